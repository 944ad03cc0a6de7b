"""Generative anchors: the stream is pulled towards an image and away from what a caption of it makes one draw."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Write
from regard.core.step import Step

CARD = Card(
    title="Exposing Hallucinations To Suppress Them: VLMs Representation Editing With Generative Anchors",
    arxiv="2509.21997",
    sheet=170,
    implements="The edit of the residual stream by two anchors, and the anchor of an image from its projected "
    "features; captioning and drawing are the user's.",
    exact=False,
    saving="none",
    departures=(
        "No code is public: anchors are means of projected tokens at the norm of the row they edit, rows are the "
        "prompt's last and the answer's, weights 0.1, and norms are restored (all inferred).",
        "The layers are those of the placement; the paper edits one in the middle or behind it.",
    ),
    oracles=(
        "equal anchors and weights change no bit",
        "linear in both weights before norms are restored: a forward hook that adds a vector",
        "a logit whose direction is orthogonal to the edit stays",
        "a toy whose concepts stand in one image each: one logit rises with alpha, the other falls with beta",
    ),
    neutral={"alpha": 0.0, "beta": 0.0},
    example={},
    options={
        "alpha": Option(kind="float", default=0.1, low=0.0, doc="pull towards the image"),
        "beta": Option(kind="float", default=0.1, low=0.0, doc="push away from the drawn image"),
        "restore": Option(kind="bool", default=True, doc="rows keep their norm"),
        "positive": Option(
            kind="tensor", default=None, shape=("width",), doc="[d] anchor of the image, or [rows, d], one a row"
        ),
        "negative": Option(
            kind="tensor",
            default=None,
            shape=("width",),
            doc="[d] anchor of what was drawn from the image's caption, or [rows, d]",
        ),
    },
)


def write(
    where: Where, *, alpha: float, beta: float, restore: bool, positive: Tensor | None, negative: Tensor | None
) -> Write | None:
    """The edit of the rows that emit the answer, as they leave the layer.

    Raises:
        RegardError: an anchor that is weighted is missing, not of the model's width, or not finite; in a forward, there
            are anchors for another number of rows.
    """
    if alpha == 0 and beta == 0:
        return None
    pull, push = _checked(where, "positive", alpha, positive), _checked(where, "negative", beta, negative)

    def run(part: str, x: Tensor, step: Step) -> Tensor:
        if part != "layer" or step.prompt is None or step.stop < step.prompt:
            return x
        first = max(step.prompt - 1 - step.start, 0)
        own = edited(x[:, first:], _of_rows(pull, len(x)), _of_rows(push, len(x)), alpha, beta, restore)
        return torch.cat((x[:, :first], own), dim=1)

    return Write("anchors", run)


def edited(x: Tensor, positive: Tensor, negative: Tensor, alpha: float, beta: float, restore: bool) -> Tensor:
    """`x + |x| (alpha v+ - beta v-)` of rows `x [..., d]`, in their dtype; at the norm they had, if `restore`.

    Args:
        x: residual stream.
        positive: broadcasts to `x`; its direction is `v+`.
        negative: the same; its direction is `v-`.
        alpha: pull towards the one.
        beta: push away from the other.
        restore: whether norms stay.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    h, ends = x.to(exact), [torch.nn.functional.normalize(v.to(x.device, exact), dim=-1) for v in (positive, negative)]
    norm = h.norm(dim=-1, keepdim=True)
    out = h + norm * (alpha * ends[0] - beta * ends[1])
    if restore:
        now = out.norm(dim=-1, keepdim=True)
        out = torch.where(now == 0, h, out * (norm / now.masked_fill(now == 0, 1)))
    return out.to(x.dtype)


def anchor(features: Tensor) -> Tensor:
    """The anchor of an image: the direction of the mean of its projected tokens `[n, d]`, `[d]` float32."""
    return torch.nn.functional.normalize(features.detach().float().mean(0), dim=0)


def _checked(where: Where, name: str, weight: float, given: Tensor | None) -> Tensor:
    if given is None and weight == 0:
        return torch.zeros(where.width)
    if given is None:
        how = (
            "anchor(features) of the image" if name == "positive" else "caption the image, draw one from the caption, "
        )
        how += "" if name == "positive" else "and take anchor(features) of that (or of any second image)"
        raise RegardError(f"'anchor_edit' has no {name} anchor: {how}")
    if given.ndim not in (1, 2) or given.shape[-1] != where.width:
        raise RegardError(
            f"'anchor_edit' has a {name} anchor of shape {list(given.shape)}; this model's stream is [{where.width}]"
        )
    if not bool(given.isfinite().all()):
        raise RegardError(f"'anchor_edit' has a {name} anchor that is not finite")
    return given.detach()


def _of_rows(anchor: Tensor, batch: int) -> Tensor:
    """An anchor `[d]`, or those of the request's rows, `[batch, 1, d]`: `generate` repeats rows for its beams."""
    if anchor.ndim == 1:
        return anchor
    rows = len(anchor)
    if not rows or batch % rows:
        raise RegardError(f"'anchor_edit' has anchors for {rows} rows, and the request has {batch}")
    return anchor.repeat_interleave(batch // rows, 0)[:, None]
