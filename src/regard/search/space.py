"""The space a search draws from: built from the cards, and holding only placements that are legal together.

Every mechanism brings its card's `search` values. A mechanism that was not fitted also chooses how many
of its most sensitive layers to *spare*: a `keep` or `allow` leaves them alone, an `encode` gives them
more bits (options whose names end in `bits`; larger is gentler).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from regard.catalog import Entry
from regard.core.placement import Indices, Placement

NONE = "none"


class Trial(Protocol):
    """What the space needs of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        ...


@dataclass(frozen=True)
class Space:
    """All placements a search may propose for a model of `layers` layers.

    Args:
        entries: the mechanisms.
        layers: the model's layers `L`.
        order: for a stem, layer indices from most to least sensitive (missing: 0 to L - 1).
        tensors: for a fitted stem, its trained tensors.
    """

    entries: tuple[Entry, ...]
    layers: int
    order: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def suggest(self, trial: Trial) -> list[Placement]:
        """Draw one set of placements; the same draws give equal placements in equal order."""
        placed: list[Placement] = []
        kept = None
        # At most one `keep` and one `encode` a head: one draw for each. Masks intersect: each on its own.
        for verb in ("keep", "encode"):
            rivals = [e for e in self.entries if verb in e.verbs]
            if rivals:
                stem = trial.suggest_categorical(verb, (NONE, *(e.stem for e in rivals)))
                chosen = next((e for e in rivals if e.stem == stem), None)
                if verb == "encode" and kept is not None and "encode" in kept.verbs:
                    chosen = None  # it encodes already
                if chosen is not None:
                    placed += self._place(trial, chosen)
                if verb == "keep":
                    kept = chosen
        for entry in self.entries:
            if not {"keep", "encode"} & set(entry.verbs):
                used = trial.suggest_categorical(f"use.{entry.stem}", (False, True))
                placed += self._place(trial, entry) if used else []
        return placed

    def _place(self, trial: Trial, entry: Entry) -> list[Placement]:
        """Draw the options and layers of one mechanism."""
        stem = entry.stem
        options = {
            name: trial.suggest_categorical(f"{stem}.{name}", option.search)
            for name, option in entry.card.options.items()
            if option.search
        }
        tensors = dict(self.tensors.get(stem, {}))
        neutral = entry.card.neutral
        if neutral is not None and all(options.get(k, entry.card.options[k].default) == v for k, v in neutral.items()):
            return []  # the model's own attention, whatever the other options say
        spare = 0
        if not tensors:
            spare = trial.suggest_categorical(f"{stem}.spare", self.spares(entry))
        if not spare:
            return [Placement(stem, "all", "all", options, tensors)]
        order = list(self.order.get(stem, range(self.layers)))
        spared, rest = tuple(sorted(order[:spare])), tuple(sorted(order[spare:]))
        placed = [Placement(stem, rest, "all", options, tensors)]
        gentle = dict(options)
        for name in bits(entry):
            drawn = trial.suggest_categorical(f"{stem}.{name}.spared", entry.card.options[name].search)
            gentle[name] = max(drawn, options[name], key=width)
        if bits(entry):
            if gentle == options:
                return [Placement(stem, "all", "all", options, tensors)]
            placed.append(Placement(stem, spared, "all", gentle, tensors))
        return placed

    def spares(self, entry: Entry) -> tuple[int, ...]:
        """How many layers may be spared; never all of them."""
        sixths = range(5) if bits(entry) else range(4)
        return tuple(dict.fromkeys(round(self.layers * n / 6) for n in sixths))

    def starts(self) -> list[dict[str, Any]]:
        """Draws worth trying first: nothing at all (dense), each mechanism on its own, then pairs."""
        base = {verb: NONE for verb in ("keep", "encode") if any(verb in e.verbs for e in self.entries)}
        base |= {f"use.{e.stem}": False for e in self.entries if not {"keep", "encode"} & set(e.verbs)}
        alone = [draw for entry in self.entries for draw in self._starts(entry)]
        keeps = [d for d in alone if "encode" not in d]
        encodes = [d for d in alone if "encode" in d]
        pairs = [a | b for a in keeps[:2] for b in encodes[-1:]]
        return [base, *(base | draw for draw in [*encodes, *keeps, *pairs])]

    def _starts(self, entry: Entry) -> list[dict[str, Any]]:
        """First draws of one mechanism: few bits everywhere, then more on a third, half, two thirds of the layers."""
        stem, finest = entry.stem, bits(entry)
        verb = next((v for v in ("keep", "encode") if v in entry.verbs), None)
        draw: dict[str, Any] = {verb: stem} if verb else {f"use.{stem}": True}
        for name, option in entry.card.options.items():
            if option.search:
                usual = option.default if option.default in option.search else option.search[len(option.search) // 2]
                draw[f"{stem}.{name}"] = min(option.search, key=width) if name in finest else usual
        if stem in self.tensors:
            return [draw]
        counts = (
            (0, round(self.layers / 3), round(self.layers / 2), round(self.layers * 2 / 3))
            if finest
            else (0, round(self.layers / 3))
        )
        found = []
        for count in dict.fromkeys(c for c in counts if c in self.spares(entry)):
            more = {f"{stem}.spare": count}
            if count:
                # Keys suffer more than values, and cards name them first.
                for i, name in enumerate(finest):
                    search = entry.card.options[name].search
                    more[f"{stem}.{name}.spared"] = sorted(search, key=width)[i == 0]
            found.append(draw | more)
        return found

    def describe(self) -> dict[str, Any]:
        """What a resumed study must agree on."""
        return {
            "mechanisms": {
                e.name: {name: list(o.search) for name, o in e.card.options.items() if o.search} for e in self.entries
            },
            "fitted": sorted(self.tensors),
            "order": {stem: list(map(int, order)) for stem, order in sorted(self.order.items())},
        }


def bits(entry: Entry) -> list[str]:
    """Searched options of an `encode` whose names end in `bits`, in the card's order."""
    if "encode" not in entry.verbs:
        return []
    return [name for name, o in entry.card.options.items() if name.endswith("bits") and len(o.search) > 1]


def width(bits: int | None) -> float:
    """Bits a number, to compare settings by; None leaves numbers as they come."""
    return float("inf") if bits is None else bits


def tell(placements: Sequence[Placement]) -> list[dict[str, Any]]:
    """Placements as plain JSON, trained tensors left out (they belong to the stem)."""

    def indices(written: Indices) -> Any:
        return written if written == "all" else list(written)

    return [
        {"mechanism": p.stem, "layers": indices(p.layers), "heads": indices(p.heads), "options": dict(p.options)}
        for p in placements
    ]


def read(told: Sequence[Mapping[str, Any]], tensors: Mapping[str, Mapping[str, Tensor]]) -> list[Placement]:
    """The placements that `tell` wrote, with the trained tensors of their stems."""

    def indices(written: Any) -> Indices:
        return "all" if written == "all" else tuple(written)

    return [
        Placement(
            p["mechanism"],
            indices(p["layers"]),
            indices(p["heads"]),
            dict(p["options"]),
            dict(tensors.get(p["mechanism"], {})),
        )
        for p in told
    ]


def words(placements: Sequence[Mapping[str, Any]], layers: int) -> str:
    """One line for people; `dense` for none.

    `saw_int4(key_bits 4, value_bits 4; 10 layers: key_bits 8) + streaming(sink 4, window 256)`: the widest
    placement of a mechanism first, then how others differ from it. Options that are off are left out.
    """

    def width(place: Mapping[str, Any]) -> int:
        return layers if place["layers"] == "all" else len(place["layers"])

    def told(options: Mapping[str, Any]) -> str:
        named = (k if v is True else f"no {k}" if v in (None, False) else f"{k} {v}" for k, v in options.items())
        return ", ".join(named)

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for place in placements:
        groups.setdefault(place["mechanism"], []).append(place)
    parts = []
    for stem, group in groups.items():
        first, *others = sorted(group, key=width, reverse=True)
        base = {k: v for k, v in first["options"].items() if v is not None and v is not False}
        inner = [told(base)]
        for other in others:
            changed = {k: v for k, v in other["options"].items() if first["options"].get(k) != v}
            inner.append(f"{width(other)} layers: {told(changed)}")
        covered = sum(map(width, group))
        where = "" if covered == layers else f" on {covered} of {layers} layers"
        parts.append(f"{stem}({'; '.join(inner)}){where}")
    return " + ".join(parts) or "dense"
