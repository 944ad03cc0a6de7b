"""Everything about one set of placements in one call: quality, bytes, seconds and recall."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure import quality as scorer
from regard.measure import recall as facts_
from regard.measure import seconds as clock
from regard.measure.text import Window
from regard.measure.text import windows as cut


@dataclass(frozen=True)
class Bytes:
    """Memory of one request's cache after a whole window (largest over windows).

    Args:
        live: bytes of the live storages as they lie in memory, each counted once.
        stored: the same with unencoded keys and values counted at 2 bytes a number, so that a model
            loaded in float32 is compared with the bfloat16 cache it would be served with.
        dense: bytes of the dense bfloat16 cache at that length.
        ratio: `stored / dense`.
        length: tokens held.
    """

    live: int
    stored: int
    dense: int
    ratio: float
    length: int


@dataclass(frozen=True)
class Measurement:
    """One row of a comparison. `seconds` and `recall` are None where not asked for."""

    length: int
    quality: scorer.Quality
    bytes: Bytes
    seconds: clock.Seconds | None = None
    recall: facts_.Recall | None = None

    def scores(self) -> dict[str, float]:
        """The figures that objectives and constraints speak of, by name (see `SCORES`)."""
        found = {
            "kl": self.quality.kl,
            "kl_last_half": self.quality.kl_last_half,
            "kl_worst": self.quality.kl_worst,
            "top1": self.quality.top1,
            "perplexity": self.quality.perplexity_ratio,
            "bytes": self.bytes.ratio,
        }
        if self.seconds is not None:
            found |= {"prefill": self.seconds.prefill.ratio.median, "decode": self.seconds.decode.ratio.median}
        if self.recall is not None:
            found["recall"] = self.recall.recalled
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self) | {"scores": self.scores()}


# name -> (what it is, whether larger is better)
SCORES: dict[str, tuple[str, bool]] = {
    "kl": ("KL to dense, nats per token", False),
    "kl_last_half": ("KL over the last half of each window", False),
    "kl_worst": ("KL of the worst window", False),
    "top1": ("agreement of the most likely token with dense", True),
    "perplexity": ("perplexity relative to dense", False),
    "bytes": ("cache bytes relative to dense bf16", False),
    "prefill": ("prefill seconds relative to dense", False),
    "decode": ("decode time a token relative to dense", False),
    "recall": ("fraction of planted facts recalled", True),
}


@dataclass
class Setting:
    """What is measured on, with the dense side of it computed once and shared by all measurements.

    Args:
        windows: held-out windows; `chunk` continuation tokens a forward.
        timed: `[n]` tokens to time on, the last `steps` of them decoded; None: nothing is timed.
        repeats: interleaved timing pairs.
        planted: context with facts; None: recall is not measured.
    """

    windows: list[Window]
    chunk: int = 32
    timed: Tensor | None = None
    steps: int = 16
    repeats: int = 3
    planted: facts_.Planted | None = None
    dense: scorer.Dense | None = None
    dense_recall: list[list[float]] | None = None

    def prepare(self, model: Any) -> "Setting":
        """Compute the dense side, unless it is already there."""
        if self.dense is None:
            self.dense = scorer.dense(model, self.windows, self.chunk)
        if self.planted is not None and self.dense_recall is None:
            self.dense_recall = facts_.ask(model, None, self.planted, self.chunk)
        return self


def run(model: Any, placements: Sequence[Placement], setting: Setting) -> Measurement:
    """Measure `placements` in `setting`.

    Raises:
        RegardError: the method yields NaN, or the placements cannot be installed.
    """
    setting.prepare(model)
    held: list[Bytes] = []
    quality = scorer.quality(
        model,
        placements,
        setting.windows,
        setting.chunk,
        setting.dense,
        observe=lambda cache, window: held.append(count(model, cache, window.length)),
    )
    seconds = None
    if setting.timed is not None:
        # No warm-up: both sides have just run.
        seconds = clock.seconds(model, placements, setting.timed, setting.steps, setting.repeats, warmup=0)
    recall = None
    if setting.planted is not None:
        recall = facts_.recall(model, placements, setting.planted, setting.chunk, setting.dense_recall)
    largest = max(held, key=lambda b: b.ratio)
    return Measurement(max(w.length for w in setting.windows), quality, largest, seconds, recall)


def count(model: Any, cache: Any, length: int) -> Bytes:
    """Bytes that `cache` keeps alive after `length` tokens of one row."""
    from regard.adapters.memory import dense_bytes, live_bytes

    stored, dense = live_bytes(cache, raw_itemsize=2), dense_bytes(model, 1, length)
    return Bytes(live_bytes(cache), stored, dense, stored / dense, length)


def measure(
    model: Any,
    placements: Sequence[Placement],
    tokens: Tensor,
    *,
    tokenizer: Any = None,
    context: int = 896,
    continuation: int = 128,
    windows: int = 2,
    chunk: int = 32,
    repeats: int = 0,
    steps: int = 16,
    facts: int = 0,
    seed: int = 0,
) -> Measurement:
    """Measure `placements` on held-out `tokens [n]`.

    Args:
        model: a transformers causal language model, not attached.
        placements: what is measured.
        tokens: held-out text, `[n]` int64.
        tokenizer: only needed to plant facts.
        context: tokens prefilled in each window.
        continuation: tokens scored in each window.
        windows: how many disjoint windows.
        chunk: continuation tokens a forward.
        repeats: interleaved timing pairs; 0 times nothing.
        steps: tokens decoded in each timing.
        facts: facts planted in the first window's context; 0 leaves recall out.
        seed: of the planted facts.

    Raises:
        RegardError: the text is too short, facts without a tokenizer, NaN, or placements that do not fit.
    """
    cuts = cut(tokens, context, continuation, windows)
    return run(model, placements, setting(cuts, chunk, repeats, steps, facts, tokenizer, seed))


def setting(
    windows: list[Window],
    chunk: int = 32,
    repeats: int = 0,
    steps: int = 16,
    facts: int = 0,
    tokenizer: Any = None,
    seed: int = 0,
) -> Setting:
    """A `Setting` on `windows`; timing and recall use the first of them.

    Raises:
        RegardError: facts are asked for without a tokenizer.
    """
    if facts and tokenizer is None:
        raise RegardError("planting facts needs a tokenizer")
    first = windows[0]
    return Setting(
        windows,
        chunk,
        timed=torch.cat([first.context, first.continuation[:steps]]) if repeats else None,
        steps=min(steps, len(first.continuation)),
        repeats=repeats,
        planted=facts_.plant(tokenizer, first.context, facts, seed) if facts else None,
    )
