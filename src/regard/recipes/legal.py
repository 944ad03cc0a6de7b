"""What can stand on a model: each mechanism alone, any two together, the placements of a recipe, and why not.

Nothing here knows a site or a verb. Every question is put to `adapters.bind.bind`, which refuses what cannot be
served and touches no model, so a new rule there is a new rule here.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.adapters.bind import bind
from regard.adapters.families import Decoder
from regard.catalog import Entry
from regard.core.errors import RegardError
from regard.core.placement import Placement

# Settings of a mechanism that are tried before it, or a pair, is called impossible.
SETTINGS = 8

Tensors = Mapping[str, Mapping[str, Tensor]]


def refusal(placements: Sequence[Placement], decoder: Decoder) -> str | None:
    """Why `placements` cannot be served together on this model; None if they can."""
    try:
        bind(placements, decoder)
    except RegardError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Legality:
    """Which mechanisms can stand on one model, and which two of them together.

    Args:
        alone: stem -> why it cannot stand there.
        pairs: two stems, in the order they were given -> why they cannot stand together.
        decoder: the model; None knows nothing and refuses nothing.
    """

    alone: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], str] = field(default_factory=dict)
    decoder: Decoder | None = None

    def clash(self, one: str, other: str) -> str | None:
        """Why two mechanisms cannot stand together; None if they can."""
        return self.pairs.get((one, other)) or self.pairs.get((other, one))

    def allows(self, stem: str, others: Collection[str] = ()) -> bool:
        """Whether `stem` can stand on the model, beside each of `others`."""
        return stem not in self.alone and not any(self.clash(stem, other) for other in others)

    def refusal(self, placements: Sequence[Placement]) -> str | None:
        """Why these very placements cannot be served; None if they can."""
        return None if self.decoder is None else refusal(placements, self.decoder)

    def to_json(self) -> dict[str, Any]:
        """The refusals, as plain JSON."""
        pairs = [{"mechanisms": list(pair), "reason": reason} for pair, reason in self.pairs.items()]
        return {"left_out": dict(self.alone), "refused_pairs": pairs}


def judge(entries: Sequence[Entry], decoder: Decoder, tensors: Tensors | None = None) -> Legality:
    """Place every mechanism, and every two, on all layers of `decoder`, and keep what is refused.

    A mechanism or a pair is refused if none of its first settings can be served: the card's defaults, then its
    searched values one by one. A fitted mechanism that is not in `tensors` is judged with stand-ins.

    Args:
        entries: the mechanisms.
        decoder: the model, not touched.
        tensors: stem -> option -> tensor, as fitted.
    """
    known = tensors or {}
    alone, able, pairs = {}, {}, {}
    for entry in entries:
        fitted = known.get(entry.stem) or stand_ins(entry, decoder)
        tried = [Placement(entry.stem, "all", "all", options, fitted) for options in settings(entry)]
        said = [(place, refusal([place], decoder)) for place in tried]
        able[entry.stem] = [place for place, reason in said if reason is None]
        if not able[entry.stem]:
            alone[entry.stem] = said[0][1]
    for one, other in itertools.combinations([stem for stem, places in able.items() if places], 2):
        if reason := _clash(able[one], able[other], decoder):
            pairs[one, other] = reason
    return Legality(alone, pairs, decoder)


def _clash(these: Sequence[Placement], those: Sequence[Placement], decoder: Decoder) -> str | None:
    """The first reason why none of these stands with any of those; None if two do."""
    first = None
    for both in itertools.islice(itertools.product(these, those), SETTINGS):
        reason = refusal(both, decoder)
        if reason is None:
            return None
        first = first or reason
    return first


def settings(entry: Entry) -> list[dict[str, Any]]:
    """Options to judge a mechanism by: its defaults, then searched values one by one; none of them neutral.

    At most `SETTINGS`, and at least one, which is neutral only if all are.
    """

    def changed() -> Iterator[dict[str, Any]]:
        yield {}
        for name, option in entry.card.options.items():
            yield from ({name: value} for value in option.search if value != option.default)

    found = [options for options in changed() if not neutral(entry, options)]
    return found[:SETTINGS] or [{}]


def neutral(entry: Entry, options: Mapping[str, Any]) -> bool:
    """Whether `options`, defaults filled in, are the card's neutral ones, whatever its other options say."""
    told = entry.card.neutral
    return told is not None and all(options.get(k, entry.card.options[k].default) == v for k, v in told.items())


def stand_ins(entry: Entry, decoder: Decoder) -> dict[str, Tensor]:
    """Tensors of the right shape and range in place of fitted ones: enough to ask what can be served, no more."""
    drawn = torch.Generator().manual_seed(0)
    found = {}
    for name, option in entry.card.options.items():
        if option.kind == "tensor" and option.shape:
            low, high = (0.0 if option.low is None else option.low), (1.0 if option.high is None else option.high)
            share = torch.rand(*option.sizes(decoder), generator=drawn)
            found[name] = low + (high - low) * share
    return found


def together(entries: Sequence[Entry], decoder: Decoder) -> dict[tuple[str, ...], str | None]:
    """Why mechanisms cannot stand on `decoder` at their defaults, on all layers; None where they can.

    Each is asked for alone, then each two of those that can stand alone, then all, if nothing smaller was refused
    and there are more than two. Fitted tensors are stand-ins.
    """
    places = {e.stem: Placement(e.stem, tensors=stand_ins(e, decoder)) for e in entries}
    found: dict[tuple[str, ...], str | None] = {}
    for size in sorted({1, 2, len(places)}):
        able = [stem for stem in places if found.get((stem,)) is None]
        if size > 2 and any(found.values()):
            break
        for group in itertools.combinations(able, size):
            found[group] = refusal([places[stem] for stem in group], decoder)
    return found


@dataclass(frozen=True)
class Fault:
    """Placements of a recipe that cannot be served, by their numbers from 0, and why."""

    placements: tuple[int, ...]
    reason: str


def faults(placements: Sequence[Placement], decoder: Decoder) -> list[Fault]:
    """Why a recipe cannot be served: placements that cannot stand alone, then two of the others that clash.

    Where neither is found, all of it together; empty if it can be served.
    """
    found: list[Fault] = []
    for size in sorted({1, min(2, len(placements))}):
        bad = {number for fault in found for number in fault.placements}
        for group in itertools.combinations([n for n in range(len(placements)) if n not in bad], size):
            if reason := refusal([placements[n] for n in group], decoder):
                found.append(Fault(group, reason))
    whole = refusal(placements, decoder)
    return found or ([Fault(tuple(range(len(placements))), whole)] if whole else [])


def told(place: Placement) -> str:
    """One placement in a few words: `streaming on layers 0, 2-4`."""
    parts = [
        f"{kind} {_runs(indices)}"
        for kind, indices in (("layers", place.layers), ("KV heads", place.heads))
        if isinstance(indices, tuple)
    ]
    return f"{place.stem} on {', '.join(parts)}" if parts else place.stem


def _runs(indices: Iterable[int]) -> str:
    """Whole numbers as runs: `0, 2-4`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
