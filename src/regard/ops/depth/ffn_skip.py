"""FFN-SkipLLM: where a feed-forward block barely turns the residual stream, a token skips the next few of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Feed
from regard.core.step import Step

CARD = Card(
    title="FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping",
    arxiv="2404.03865",
    sheet=57,
    implements="Greedy skipping of feed-forward blocks by saturation, between cold regions and after a warm-up. "
    "calibrate/ffn_skip.py finds the regions and the threshold for a wanted share.",
    exact=False,
    saving="compute",
    departures=(
        "The paper gives no defaults of threshold and jump, and finds the regions by a rule of its own: both are "
        "options here, and `suggest` finds them.",
        "Prompts run everything; the paper speaks of generated tokens only.",
    ),
    oracles=(
        "a threshold above 1 changes nothing; -1 with the longest jump runs only the first middle block",
        "each token's blocks are those of the greedy walk, in a loop over tokens and layers",
        "rows decide on their own: a batch equals single runs; all layers hold all keys",
    ),
    aliases=("ffn_skipllm",),
    whole_layers=True,
    whole_model=True,
    neutral={"threshold": 2.0},
    example={"first": 0, "last": 0, "warmup": 2, "threshold": 0.8, "jump": 1},
    options={
        "first": Option(default=4, low=0, doc="first layers, where every block runs"),
        "last": Option(default=4, low=0, doc="last layers, where every block runs"),
        "warmup": Option(default=25, low=0, doc="first response tokens, for which every block runs"),
        "threshold": Option(
            kind="float",
            default=0.95,
            low=-1.0,
            search=(0.9, 0.95, 0.98),
            doc="cosine of the stream before and after a block from which on it is saturated; above 1: never",
        ),
        "jump": Option(default=2, low=1, search=(1, 2, 4), doc="blocks skipped after a saturated one"),
    },
)


@dataclass
class Skips:
    """Scratch of one forward: for each row the last layer whose block it skips, -1 for none.

    Args:
        until: `[B, T]` int64.
        least, most: its smallest and largest entry, known without asking the device.
    """

    until: Tensor
    least: int
    most: int


def feed(where: Where, *, first: int, last: int, warmup: int, threshold: float, jump: int) -> Feed | None:
    """Response tokens after the warm-up skip up to `jump` blocks after one that is saturated.

    Raises:
        RegardError: the cold regions overlap, or an option is out of bounds.
    """
    stop = where.layers - last
    if math.isnan(threshold) or min(first, last, warmup) < 0 or jump < 1:
        raise RegardError(
            "'ffn_skip' needs first, last, warmup >= 0, jump >= 1 and a threshold, got "
            f"first={first}, last={last}, warmup={warmup}, jump={jump}, threshold={threshold}"
        )
    if first > stop:
        raise RegardError(
            f"'ffn_skip' runs all of the first {first} and the last {last} layers, and this model has {where.layers}; "
            f"choose first + last <= {where.layers}"
        )
    layer = where.layer
    if threshold > 1 or not first <= layer < stop:
        return None

    def choose(step: Step) -> Tensor | int | None:
        held: Skips | None = step.shared.get(Skips)
        if held is None or layer > held.most:
            return None
        if layer <= held.least:
            return 0
        return _of_rows(held.until, step) < layer

    def seen(before: Tensor, after: Tensor, step: Step) -> None:
        held: Skips | None = step.shared.get(Skips)
        nobody = step.prompt is None or step.stop <= step.prompt + warmup or layer == stop - 1
        if nobody or (held is not None and layer <= held.least):
            return
        assert step.prompt is not None
        arrivals = step.arrivals.to(before.device)
        hit = (arrivals >= step.prompt + warmup) & (saturation(before, after) >= threshold)
        if held is None:
            held = Skips(torch.full((step.batch, step.width), -1, device=before.device), -1, -1)
        elif layer <= held.most:
            hit = hit & (_of_rows(held.until, step) < layer)
        until = torch.where(hit, min(layer + jump, stop - 1), _of_rows(held.until, step))
        until = until if step.rows is None else _to_rows(held.until, until, arrivals, step)
        # One question to the device for both.
        least, most = torch.stack(torch.aminmax(until)).tolist()
        step.shared[Skips] = Skips(until, least, most)

    return Feed(f"skips up to {jump} blocks after saturation {threshold:g}", choose, seen)


def saturation(before: Tensor, after: Tensor) -> Tensor:
    """Cosine between the residual stream before and after a block: `[B, R, d]` twice to `[B, R]`, at least float32."""
    exact = torch.promote_types(before.dtype, torch.float32)
    return torch.cosine_similarity(before.to(exact), after.to(exact), dim=-1)


def _of_rows(until: Tensor, step: Step) -> Tensor:
    """`until [B, T]` of the rows that the layer runs, `[B, R]`."""
    if step.rows is None:
        return until[:, : step.width]
    at = (step.rows.to(until.device) - step.start).clamp(min=0)
    return until.gather(1, at.expand(until.shape[0], -1))


def _to_rows(until: Tensor, made: Tensor, arrivals: Tensor, step: Step) -> Tensor:
    """`until [B, T]` with `made [B, R]` in place of the rows `arrivals [1|B, R]`; -1 there is no row."""
    real = (arrivals >= 0).expand(made.shape)
    # Absent rows write to a column of their own.
    at = torch.where(real, arrivals - step.start, until.shape[1])
    wide = torch.cat((until, until[:, :1]), dim=1)
    return wide.scatter(1, at, made)[:, :-1]
