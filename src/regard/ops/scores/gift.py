"""Gaze shifts (GIFT): image tokens that gain attention while the question is read get more of it in the answer."""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Reading, Rescore
from regard.core.step import Step
from regard.core.token_map import Kind, TokenMap

CARD = Card(
    title="Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
    arxiv=None,
    sheet=9,
    implements="Both stages in one prefill: rises of visual attention between rows of the question, in some layers; in "
    "later ones gains on image tokens and on the question for the last prompt row and all after it.",
    exact=False,
    saving="none",
    departures=(
        "No prefill of its own: edited layers lie behind those that are read, so the paper's setting for Qwen2-VL "
        "(reads 14, edits 5 to 18) edits 15 to 18 here.",
        "All rows of the question are content words, unless rows are marked: no tagger is run.",
    ),
    oracles=(
        "weights gained and renormalised in a loop over heads, as an additive mask of torch's own attention",
        "a key with the same attention in all rows of the question has no rise, whatever its level",
        "rows sum to 1; a map of one value changes nothing",
    ),
    whole_model=True,
    needs="image",
    neutral={"alpha": 0.0},
    example={"alpha": 2.0, "sources": "0"},
    options={
        "alpha": Option(
            kind="float", default=5.0, low=0.0, high=50.0, search=(2.0, 5.0), doc="log of the largest gain"
        ),
        "sources": Option(
            kind="str", default=None, optional=True, doc="layers that are read, as '10,11'; none: 11 of 32, scaled"
        ),
        "first": Option(default=None, optional=True, low=0, doc="first edited layer; none: behind those that are read"),
        "last": Option(default=None, optional=True, low=0, doc="last edited layer; none: 22 of 32, scaled"),
    },
)

# By arrival, in a layer that is read: rises summed over rows, and the last row's attention; in an edited one: the map.
RISES, ROW, MAP = "gift rises", "gift row", "gift map"


def rescore(where: Where, *, alpha: float, sources: str | None, first: int | None, last: int | None) -> Rescore | None:
    """Reads rises in `sources`, and edits the layers `first` to `last`.

    Raises:
        RegardError: a layer that does not exist, or an edited one that does not lie behind those that are read.
    """
    read = _layers(sources, where.layers)
    first = max(read) + 1 if first is None else first
    last = min(max(round(22 / 32 * where.layers), first), where.layers - 1) if last is None else last
    if first <= max(read):
        raise RegardError(f"'gift' edits layers behind those it reads: first must be {max(read) + 1} or more")
    if not first <= last < where.layers:
        raise RegardError(f"'gift' edits layers {first} to {last}, this model has layers 0 to {where.layers - 1}")
    if alpha == 0:
        return None
    if where.layer in read:
        return Rescore("gift: reads the question", _question, partial(_observe, where.layer))
    if first <= where.layer <= last:
        return Rescore(f"gift: alpha {alpha:g}", _emitting, partial(_bias, alpha))
    return None


def rises(weights: Tensor, before: Tensor) -> Tensor:
    """What each row of `weights [..., R, S]` has more than the row before it; `before [..., 1, S]` the first row."""
    return (weights - torch.cat((before, weights[..., :-1, :]), -2)).clamp(min=0)


def shift(rises: Tensor, visual: Tensor) -> Tensor:
    """Mean rise `[B, n]` over the half of the heads that rises most; `rises [B, H, n]`, `visual [1|B, n]` bool."""
    rises = rises * visual[:, None]
    kept = rises.sum(-1).topk(rises.shape[1] // 2, 1).indices
    return rises.gather(1, kept[..., None].expand(-1, -1, rises.shape[2])).sum(1) / max(kept.shape[1], 1)


def normalised(found: Tensor, visual: Tensor) -> Tensor:
    """`found [B, n]` on `visual [1|B, n]`, cut at 3 deviations from the mean, from 0 to 1; 0 where all are the same."""
    visual = visual.expand(found.shape)
    count = visual.sum(1, keepdim=True).clamp(min=1)
    mean = (found * visual).sum(1, keepdim=True) / count
    deviation = (((found - mean) * visual).square().sum(1, keepdim=True) / count).sqrt()
    cut = torch.minimum(torch.maximum(found, mean - 3 * deviation), mean + 3 * deviation)
    low = cut.masked_fill(~visual, torch.inf).amin(1, keepdim=True)
    width = cut.masked_fill(~visual, -torch.inf).amax(1, keepdim=True) - low
    flat = ~(width > 0)
    return ((cut - low) / width.masked_fill(flat, 1)).masked_fill(flat | ~visual, 0)


def guide(weights: Tensor, gain: Tensor, visual: Tensor, question: Tensor) -> Tensor:
    """The bias `[B, H, R, S]`: log gains of image tokens and of the question, in the heads that look at them most.

    Args:
        weights: `[B, H, R, S]` probabilities.
        gain: logarithms, `[B, 1|H, 1, S]`; read on `visual`.
        visual: `[B, 1|H, 1, S]` bool, keys of images.
        question: the same, keys of the question.
    """
    seen, asked = weights * visual, weights * question
    gain = gain.to(weights) * visual
    looks, hears = (_half(part.sum(-1)) for part in (seen, asked))
    seen = seen * looks[..., None]
    before, after = seen.sum((1, 3), keepdim=True), (seen * gain.exp()).sum((1, 3), keepdim=True)
    up = torch.where(before > 0, after / before.masked_fill(before == 0, 1), 1.0).log()
    return gain * looks[..., None] + up * (hears[..., None] & question)


def _half(mass: Tensor) -> Tensor:
    """Which half of the heads of `mass [B, H, R]` has most, bool."""
    best = mass.topk(mass.shape[1] // 2, 1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, best, True)


def _layers(sources: str | None, layers: int) -> Collection[int]:
    if sources is None:
        return (min(round(11 / 32 * layers), max(layers - 2, 0)),)
    parts = [part.strip() for part in sources.split(",")]
    if not all(part.isdecimal() and int(part) < layers for part in parts):
        raise RegardError(f"'gift' needs sources such as '10,11', layers of 0 to {layers - 1}; got {sources!r}")
    return sorted(map(int, parts))


def _question(step: Step) -> slice | None:
    """From the row before the question to the prompt's end."""
    if step.tokens is None or step.answer is None or step.start >= step.answer:
        return None
    found = step.tokens.of(Kind.QUERY).any(0).nonzero()[:, 0]
    return slice(max(int(found[0]) - 1, 0), step.answer) if len(found) else None


def _emitting(step: Step) -> slice | None:
    return None if step.tokens is None else step.emitting


@torch.no_grad()
def _observe(layer: int, reading: Reading) -> None:
    """Add the rises of these rows to `state`, and show the sums to the layers behind."""
    step, state = reading.step, reading.state
    sums = step.shared.setdefault(RISES, {})
    if layer not in sums:
        _begin(step, state)
    stop = min(step.stop, step.answer or step.stop)
    weights = reading.weights()
    if RISES not in state:
        state[RISES] = state[ROW] = weights.new_zeros(*weights.shape[:2], 0)
    grown = {name: weights.new_zeros(*weights.shape[:2], stop) for name in (RISES, ROW)}
    held = state[RISES].shape[2]
    grown[RISES][..., :held] = state[RISES]
    rows = step.arrivals.to(weights.device)
    content = step.said("gift").at(rows) == Kind.QUERY
    if step.marks is not None:
        content = content & step.marked.to(content.device)
    found = (rises(weights, reading.held(state[ROW], 0.0)[:, :, None]) * content[:, None, :, None]).sum(2)
    # Keys behind these rows have no weight, nor has padding: where they land is without meaning.
    at = reading.arrivals.clamp(0, stop - 1).expand(found.shape)
    latest = rows.expand(len(weights), -1).argmax(1)[:, None, None, None].expand(*weights.shape[:2], 1, at.shape[2])
    state[RISES] = sums[layer] = grown[RISES].scatter_add_(2, at, found)
    state[ROW] = grown[ROW].scatter_add_(2, at, weights.gather(2, latest)[:, :, 0])


def _begin(step: Step, state: dict[str, Tensor]) -> None:
    """Nothing of `state` lies behind `step`; a request that begins anew has none."""
    held = state[RISES].shape[2] if RISES in state else 0
    if step.start == 0:
        state.pop(RISES, None)
        state.pop(ROW, None)
    elif step.start < held:
        raise RegardError(
            f"a crop left {step.start} of the {held} prompt rows in which 'gift' saw gaze shift; begin a new cache"
        )


@torch.no_grad()
def _bias(alpha: float, reading: Reading) -> Tensor | None:
    step, state = reading.step, reading.state
    tokens = step.said("gift")
    if step.start < (step.answer or 0):
        state.pop(MAP, None)
        if MAP not in step.shared and step.shared.get(RISES):
            step.shared[MAP] = _map(list(step.shared[RISES].values()), tokens)
        if MAP in step.shared:
            state[MAP] = step.shared[MAP]
    if MAP not in state:
        return None
    kinds = reading.kinds("gift")[:, :, None]
    gain = alpha * reading.held(state[MAP], 0.0)[:, :, None]
    return guide(reading.weights(), gain, kinds == Kind.VISUAL, kinds == Kind.QUERY)


def _map(sums: Collection[Tensor], tokens: TokenMap) -> Tensor:
    """The map of an image `[B, n]` from the sums of several layers, `[B, H, n]` each."""
    visual = tokens.of(Kind.VISUAL)
    n = min(visual.shape[1], *(found.shape[2] for found in sums))
    visual = visual[:, :n]
    shifts = [shift(found[..., :n], visual) for found in sums]
    return normalised(torch.stack(shifts).mean(0), visual)
