"""Prefill seconds and decode milliseconds a token, each repeat paired with the dense model's.

Machines drift (heat, neighbours), so the two sides take turns and only ratios within a pair are
compared; the order inside a pair alternates, so neither side always runs on the warmer cache.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure.replay import forward, installed, prefill, quiet


@dataclass(frozen=True)
class Spread:
    """Median, range and median absolute deviation of repeated measurements."""

    median: float
    low: float
    high: float
    mad: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """One quantity for both sides and the ratio method / dense within each interleaved pair."""

    method: Spread
    dense: Spread
    ratio: Spread


@dataclass(frozen=True)
class Seconds:
    """Timings of one request.

    Args:
        prefill: seconds for the whole context.
        decode: milliseconds a token, single-token forwards on the cache of that prefill.
        context: prefilled tokens. steps: decoded tokens a repeat. repeats: interleaved pairs.
        threads: torch's intra-op threads. device: where it ran.
    """

    prefill: Pair
    decode: Pair
    context: int
    steps: int
    repeats: int
    threads: int
    device: str


def spread(values: Sequence[float]) -> Spread:
    """Summarise `values` (at least one)."""
    median = statistics.median(values)
    mad = statistics.median(abs(v - median) for v in values)
    return Spread(median, min(values), max(values), mad, tuple(values))


def seconds(
    model: Any, placements: Sequence[Placement], tokens: Tensor, steps: int = 16, repeats: int = 3, warmup: int = 1
) -> Seconds:
    """Time `placements` against dense on `tokens [n]`: the last `steps` are decoded one by one.

    Args:
        model: a transformers causal language model, not attached.
        placements: what is timed.
        tokens: `[n]` int64.
        steps: tokens decoded.
        repeats: interleaved pairs counted.
        warmup: pairs run before them and dropped.

    Raises:
        RegardError: `tokens` is not longer than `steps`, or `repeats` or `steps` is below 1.
    """
    return _time(model, tokens, list(placements), steps, repeats, warmup)


def control(model: Any, tokens: Tensor, steps: int = 16, repeats: int = 3, warmup: int = 1) -> Seconds:
    """Time dense against itself: how far ratios stray from 1 on this machine when nothing differs."""
    return _time(model, tokens, None, steps, repeats, warmup)


def _time(
    model: Any, tokens: Tensor, placements: list[Placement] | None, steps: int, repeats: int, warmup: int
) -> Seconds:
    if steps < 1 or repeats < 1 or warmup < 0:
        raise RegardError(f"timing needs steps >= 1, repeats >= 1, warmup >= 0, not {steps}, {repeats}, {warmup}")
    if len(tokens) <= steps:
        raise RegardError(f"timing {steps} decoded tokens needs more than {steps} tokens, not {len(tokens)}")
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with quiet(model):
        for repeat in range(warmup + repeats):
            sides: list[tuple[list[tuple[float, float]], list[Placement] | None]]
            sides = [(theirs, None), (ours, placements)]
            for times, side in sides if repeat % 2 == 0 else reversed(sides):
                times.append(_once(model, tokens, side, steps))
    del ours[:warmup], theirs[:warmup]
    return Seconds(
        prefill=_pair([p for p, _ in ours], [p for p, _ in theirs]),
        decode=_pair([d for _, d in ours], [d for _, d in theirs]),
        context=len(tokens) - steps,
        steps=steps,
        repeats=repeats,
        threads=torch.get_num_threads(),
        device=str(model.device),
    )


def _once(model: Any, tokens: Tensor, placements: list[Placement] | None, steps: int) -> tuple[float, float]:
    """Prefill seconds and decode milliseconds a token of one side; attaching is not timed."""
    ids = tokens.to(model.device)
    with installed(model, placements) as handle:
        caches: list[Any] = []
        taken = _clock(model, lambda: caches.append(prefill(model, handle, ids[:-steps])))

        def decode() -> None:
            for token in ids[-steps:].split(1):
                forward(model, token[None], caches[0], keep=1)

        if handle is None:
            return taken, _clock(model, decode) / steps * 1e3
        with handle.responding():
            return taken, _clock(model, decode) / steps * 1e3


def _clock(model: Any, work: Callable[[], None]) -> float:
    """Wall seconds of `work`, waiting for the device on both ends."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _pair(method: Sequence[float], dense: Sequence[float]) -> Pair:
    ratio = [a / b for a, b in zip(method, dense, strict=True)]
    return Pair(spread(method), spread(dense), spread(ratio))
