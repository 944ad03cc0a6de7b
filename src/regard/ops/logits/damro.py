"""DAMRO: logits of a branch that sees only the outlier patches of the image are taken away."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import BranchSpec, Contrast, Image, Sight
from regard.ops import class_token
from regard.ops.branching import weighted

CARD = Card(
    title="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
    arxiv="2410.04514",
    sheet=85,
    implements="Outlier patches of the class token's attention, and decoding from the contrast with a branch that sees "
    "only these.",
    exact=False,
    saving="none",
    departures=(
        "Where image tokens are not the encoder's patches one by one (tiles, merged patches, a resampler), and where "
        "the encoder has no class token, scores of the image's tokens are lent: handle.lending(scores).",
        "Other logit processors run after the contrast; the code draws from it directly.",
    ),
    oracles=(
        "alpha 0 leaves only the cut, and the likeliest token",
        "all patches in the image's order: the logits before the cut",
        "without the cut, log-probabilities are those of transformers' guidance processor at scale 1 + alpha",
        "the model run without a cache on the gathered features in place of the image",
        "two planted outliers that vote for a wrong label lose at alpha 0.5",
    ),
    whole_model=True,
    needs="pixels",
    neutral={"alpha": 0.0, "beta": 0.0},
    example={"alpha": 1.0, "beta": 0.0, "outliers": 3},
    options={
        "alpha": Option(
            kind="float",
            default=2.0,
            low=0.0,
            doc="how much of the branch's logits is taken away (the paper: 0.5 to 2 by model and task)",
        ),
        "beta": Option(
            kind="float",
            default=0.1,
            low=0.0,
            high=1.0,
            doc="tokens below beta times the largest probability are cut; 0 cuts none",
        ),
        "outliers": Option(default=10, low=1, doc="patches that the branch sees (the paper: 10, or 4 by model)"),
        "attention": Option(
            kind="str",
            default="merged",
            choices=("merged", "mean"),
            doc="that of the class token: one product over all heads (LLaVA in the code), or the heads' mean",
        ),
        "order": Option(
            kind="str",
            default="attention",
            choices=("attention", "image"),
            doc="order of the outliers in the prompt: descending attention (the code), or as in the image",
        ),
    },
)


def contrast(where: Where, *, alpha: float, beta: float, outliers: int, attention: str, order: str) -> Contrast | None:
    """A branch whose prompt holds `outliers` tokens of each image."""
    if alpha == 0:
        return Contrast("damro", lambda z: weighted(z, (1.0,), beta), ()) if beta > 0 else None

    def view(sight: Sight) -> list[Image]:
        scores = _lent(sight) if sight.lent is not None else class_attention(*_caught(sight), attention).cpu()
        chosen = [outlying(_fitting(c, image), outliers, order) for image, c in zip(sight.images, scores, strict=True)]
        places = torch.stack(chosen).to(sight.images[0][0].device)
        return [tuple(x[index] for x in image) for image, index in zip(sight.images, places, strict=True)]

    branches = (BranchSpec(view=view),)
    return Contrast("damro", lambda z: weighted(z, (1 + alpha, -alpha), beta), branches, around=_watched)


def outlying(scores: Tensor, count: int, order: str = "attention") -> Tensor:
    """Indices `[count]` of the largest of `scores [n]`, in descending order or in that of the image.

    Raises:
        RegardError: there are fewer than `count`, or they are not finite.
    """
    if not 1 <= count <= len(scores):
        raise RegardError(f"'damro' has outliers={count} in an image of {len(scores)} tokens; take 1 to {len(scores)}")
    if not bool(scores.isfinite().all()):
        raise RegardError("'damro' has scores that are not finite numbers")
    top = scores.topk(count).indices
    return top if order == "attention" else top.sort().values


def class_attention(query: Tensor, key: Tensor, count: int, heads: str) -> Tensor:
    """Attention of the class token to every patch, `[images, n]`.

    Args:
        query: `[images, 1 + n, C]` of one encoder layer, the class token first, heads side by side.
        key: in the same way.
        count: how many heads.
        heads: "merged": one product over the full width; "mean": the mean of the heads' attention.
    """
    parts = 1 if heads == "merged" else count
    q, k = (x.unflatten(-1, (parts, -1)).transpose(1, 2) for x in (query, key))
    scores = q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1)[:, 0, 1:]


def _lent(sight: Sight) -> Sequence[Tensor]:
    scores = list(sight.lent) if isinstance(sight.lent, (Tensor, list, tuple)) else None
    if scores is None or not all(isinstance(c, Tensor) and c.ndim == 1 for c in scores):
        raise RegardError("'damro' takes scores of the images' tokens, [images, n] or one [n] an image")
    scores = [c for c in scores for _ in range(sight.times)]
    if len(scores) != len(sight.images):
        raise RegardError(f"'damro' was lent scores of {len(scores)} images, and the request has {len(sight.images)}")
    return [c.to(image[0].device) for c, image in zip(scores, sight.images, strict=True)]


def _fitting(scores: Tensor, image: Image) -> Tensor:
    if len(scores) != len(image[0]):
        raise RegardError(
            f"'damro' has scores of {len(scores)} patches for an image of {len(image[0])} tokens; lend scores of the "
            "tokens themselves: handle.lending(scores)"
        )
    return scores


def _caught(sight: Sight) -> tuple[Tensor, Tensor, int]:
    if isinstance(sight.caught, str):
        raise RegardError(
            f"'damro' reads the attention of a class token, and {sight.caught}; lend scores of the "
            "image's tokens: handle.lending(scores)"
        )
    seen, heads = sight.caught
    return seen["q_proj"], seen["k_proj"], heads


@contextmanager
def _watched(model: nn.Module, lent: Any) -> Iterator[Any]:
    """Yields queries and keys of the encoder layer that feeds the projector, or why there are none."""
    layer = _layer(model)
    if isinstance(layer, str) or lent is not None:
        yield layer if isinstance(layer, str) else None
        return
    with class_token.watching([layer]) as caught:
        yield caught[0], layer.num_heads


def _layer(model: nn.Module) -> Any:
    """The attention of the encoder layer whose output is projected, or a reason in words."""
    tower = class_token.tower(model)
    if isinstance(tower, str):
        return tower
    layers = class_token.attentions(tower)
    chosen = getattr(model.config, "vision_feature_layer", None)
    if not isinstance(chosen, int):
        return f"{type(model).__name__} projects several encoder layers ({chosen})"
    # Hidden states begin with the embeddings.
    number = (chosen if chosen >= 0 else len(layers) + 1 + chosen) - 1
    return layers[number] if number >= 0 else f"{type(model).__name__} projects embeddings that no layer has read"
