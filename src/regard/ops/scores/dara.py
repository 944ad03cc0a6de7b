"""Balanced attention to demonstrations (DARA): a trained factor for each head and image."""

from functools import partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Reading, Rescore
from regard.core.step import Step

CARD = Card(
    title="True Multimodal In-Context Learning Needs Attention to the Visual Context",
    arxiv=None,
    sheet=97,
    implements="Trained factors on the scores of visual keys, one a head and image, their sign-safe sum, and their "
    "training (regard.calibrate.dara). Which layers is the placement's to say: the first alone, as far as is known.",
    exact=False,
    saving="none",
    departures=(
        "Form, placement and learning rate of the factors are inferred: the paper's model file was not to be had.",
        "mode='scale' multiplies scores, so that a larger factor lowers attention where a score is negative.",
    ),
    oracles=(
        "a factor is the keys of its image scaled, a sum is an additive mask",
        "factors of 1, and sums of 0, change no bit; their gradients pass gradcheck",
        "as many numbers a layer as heads times images",
        "a model that answers from words looks at the image after training, and answers text alone as before",
    ),
    needs="map",
    options={
        "factors": Option(
            kind="tensor",
            default=None,
            shape=("layers", "heads", 2),
            doc="[L, H, images] factors, or sums in mode 'add'; any number of images",
        ),
        "mode": Option(kind="str", default="scale", choices=("scale", "add"), doc="what is done with a score"),
        "share": Option(kind="bool", default=False, doc="images beyond the factors take the last one"),
    },
)


def rescore(where: Where, *, factors: Tensor | None, mode: str, share: bool) -> Rescore | None:
    """Scores of visual keys times their factor, or plus it.

    Raises:
        RegardError: `factors` is missing, not `[layers, heads, images]`, or not finite.
    """
    if factors is None:
        raise RegardError("'dara' needs factors [layers, heads, images]; fit some with regard.calibrate.dara")
    if factors.ndim != 3 or tuple(factors.shape[:2]) != (where.layers, where.heads) or not factors.shape[2]:
        wanted = f"[layers, heads, images] = [{where.layers}, {where.heads}, 1 or more]"
        raise RegardError(f"'dara' needs factors of shape {wanted}, got {list(factors.shape)}")
    if not bool(factors.isfinite().all()):
        raise RegardError("'dara' has factors that are not finite")
    same = float(mode == "scale")
    placed = torch.zeros(where.heads, 1, dtype=torch.bool)
    placed[where.rows(where.heads)] = True
    own = factors[where.layer]
    own = torch.where(placed.to(own.device), own, same)
    if not own.requires_grad and bool((own == same).all()):
        return None
    images = own.shape[1]
    return Rescore(f"dara: {mode}, {images} images", partial(_rows, images, share), partial(_bias, own, mode))


def balance(scores: Tensor, images: Tensor, factors: Tensor, mode: str) -> Tensor:
    """What is added to `scores [B, H, R, S]` so that those of image m are `factors [H, M]` times themselves, or plus.

    `images [B, 1|H, S]` are numbers of images, -1: none; from `M - 1` on all take the last factor. Returns
    `[B, H, R, S]`, or `[B, H, 1, S]` in mode "add".
    """
    batch, heads, _, keys = scores.shape
    same = float(mode == "scale")
    more = (factors - same).to(scores)
    table = torch.cat((more, more.new_zeros(heads, 1)), 1).expand(batch, -1, -1)
    count = factors.shape[1]
    at = torch.where(images < 0, count, images.clamp(max=count - 1)).expand(batch, heads, keys)
    found = table.gather(2, at)[:, :, None]
    return found if mode == "add" else found * scores.masked_fill(scores == -torch.inf, 0)


def _rows(count: int, share: bool, step: Step) -> slice | None:
    """Rows from the first image on."""
    if step.tokens is None or not step.tokens.spans:
        return None
    most = int(step.tokens.images.max()) + 1
    if most > count and not share:
        raise RegardError(
            f"'dara' has factors for {count} images, and a row of the token map has {most}; "
            "share=True lets the others take the last"
        )
    return slice(min(span.start for span in step.tokens.spans), None)


def _bias(factors: Tensor, mode: str, reading: Reading) -> Tensor:
    images = reading.held(reading.step.said("dara").images, -1)
    return balance(reading.scores(), images, factors.to(reading.key.device), mode)
