"""Vision-aware head reinforcement (VHR): heads whose output changes most without the image count for more."""

from functools import partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Mix, State
from regard.core.step import Step

CARD = Card(
    title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
    arxiv="2412.13949",
    sheet=15,
    implements="Head divergence at the prompt's last token, the choice of heads layer by layer with earlier layers "
    "reinforced, and their reinforcement there and in the answer. The paper treats the last layers (14 of LLaVA's 32): "
    "say so in the placement's layers.",
    exact=False,
    saving="none",
    departures=(
        "Official code was not to be had: the rule for outliers, the rows, and that the prompt without its image is "
        "reinforced too are inferred.",
        "Divergences within rounding count as none, so that a layer whose window hides the image chooses no head.",
        "The token score of the paper's analysis, a sum over each layer's largest divergences, is left out.",
    ),
    oracles=(
        "the definition run layer by layer from the start, with the image and without, on the bare model",
        "heads scaled are columns of the output projection scaled",
        "equal outputs choose no head; at most half of a layer's heads are chosen",
        "planted heads that read the image alone are found, and the image's answer grows likelier with alpha",
        "one prefill without the image, as far as the last placed layer",
    ),
    aliases=("vision_aware_head_reinforcement",),
    whole_layers=True,
    needs="image",
    neutral={"alpha": 1.0},
    example={},
    options={
        "alpha": Option(
            kind="float",
            default=2.0,
            low=0.0,
            search=(1.5, 2.0),
            doc="what chosen heads are multiplied by, above 0 (the paper: 2; 4 breaks models)",
        ),
        "outliers": Option(
            kind="str",
            default="drop",
            choices=("drop", "keep"),
            doc="heads that surge without the image: never chosen, or as others",
        ),
    },
)

# Of a layer: which heads were chosen, `[B, H]`. In the scratch of the prompt without its image: the request's outputs.
CHOSEN, WITH_IMAGE = "vhr chosen", "vhr with image"


def mix(where: Where, *, alpha: float, outliers: str) -> Mix | None:
    """Chooses heads where the prompt ends, and multiplies them by `alpha` from its last row on.

    Raises:
        RegardError: `alpha` is 0.
    """
    if alpha == 0:
        raise RegardError("'vhr' has alpha=0, which would silence the heads that see the image; take more than 0")
    if alpha == 1:
        return None
    run = partial(_run, layer=where.layer, alpha=alpha, outliers=outliers)
    return Mix("vhr", run, compares=True)


def divergence(full: Tensor, blind: Tensor, outliers: str = "drop") -> Tensor:
    """`|full - blind|` of head outputs `[..., H, D]` with the image and without, `[..., H]`, in float32 at least.

    It is 0 for outputs that agree in half of their digits: where a window hides the image, rounding alone differs. With
    outliers "drop" it is 0, too, for heads that surge without the image: whose output is longer then, and whose
    divergence is above the layer's mean by more than a standard deviation.
    """
    exact = torch.promote_types(full.dtype, torch.float32)
    rounding = torch.finfo(full.dtype).eps ** 0.5
    full, blind = full.to(exact), blind.to(exact)
    found = (full - blind).norm(dim=-1)
    found = found.masked_fill(found <= rounding * full.norm(dim=-1), 0)
    if outliers == "keep":
        return found
    bound = found.mean(-1, keepdim=True) + found.std(-1, keepdim=True, correction=0)
    return found.masked_fill((blind.norm(dim=-1) > full.norm(dim=-1)) & (found > bound), 0)


def chosen(divergence: Tensor) -> Tensor:
    """Heads above their layer's median, bool like `divergence [..., H]`."""
    return divergence > divergence.median(-1, keepdim=True).values


def reinforced(out: Tensor, heads: Tensor, alpha: float) -> Tensor:
    """`out [B, H, R, D]` with `heads [B, H]` times `alpha`."""
    return torch.where(heads[..., None, None], alpha * out, out)


def _run(out: Tensor, step: Step, state: State, *, layer: int, alpha: float, outliers: str) -> Tensor:
    if step.tokens is None:
        return _without_image(out, step, alpha, outliers)
    if step.emitting is None:
        return out
    rows, which = step.within(step.emitting)
    if rows.start >= rows.stop:
        return out
    if step.blind is not None:
        state[CHOSEN] = step.blind(layer, {WITH_IMAGE: _picked(out, _last(step).to(out.device))})[CHOSEN]
    if CHOSEN not in state:
        raise RegardError(
            "'vhr' chooses heads in the forward that brings the prompt's last token, and nobody said that it did: use "
            "handle.prompting(length)"
        )
    edited = reinforced(out[:, :, rows], state[CHOSEN], alpha)
    if which is not None:
        edited = torch.where(which[:, None, :, None], edited, out[:, :, rows])
    return torch.cat((out[:, :, : rows.start], edited, out[:, :, rows.stop :]), 2)


def _last(step: Step) -> Tensor:
    """`[1|B, R]` bool: which row is the prompt's last.

    Raises:
        RegardError: the layer does not run it.
    """
    assert step.answer is not None
    found = step.arrivals == step.answer - 1
    if not bool(found.any(1).all()):
        raise RegardError("'vhr' compares the prompt's last row, which another mechanism lets pass this layer by")
    return found


@torch.no_grad()
def _picked(out: Tensor, rows: Tensor) -> Tensor:
    """`[B, H, D]` of `out [B, H, R, D]`, one row each, where `rows [1|B, R]` says."""
    at = rows.int().argmax(1).expand(len(out))
    return out[torch.arange(len(out), device=out.device), :, at]


def _without_image(out: Tensor, step: Step, alpha: float, outliers: str) -> Tensor:
    """The layer in the prompt without its image; in branches of other mechanisms nobody asks."""
    full = step.shared.pop(WITH_IMAGE, None)
    if full is None:
        return out
    last = _last(step).to(out.device)
    heads = step.shared[CHOSEN] = chosen(divergence(full, _picked(out, last), outliers))
    return torch.where(last[:, None, :, None], reinforced(out, heads, alpha), out)
