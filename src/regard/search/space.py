"""The space a search draws from: built from the cards, and holding only placements that are legal together.

Every mechanism brings its card's `search` values. One that layers can be spared (`sparing`) also chooses how many
of the most sensitive to *spare*: they do not carry it, or carry it with more bits where it has options whose names
end in `bits` (larger is gentler). What may stand together is not known here but asked of `recipes.legal`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from regard.catalog import Entry
from regard.core.errors import RegardError
from regard.core.placement import Indices, Placement
from regard.recipes.legal import Legality, neutral

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
        legal: which mechanisms can stand together on the model.
    """

    entries: tuple[Entry, ...]
    layers: int
    order: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    legal: Legality = field(default_factory=Legality)

    @cached_property
    def groups(self) -> list[list[Entry]]:
        """The mechanisms, those together no two of which can stand together: one draw decides among them."""
        found: list[list[Entry]] = []
        for entry in self.entries:
            rivals = (g for g in found if all(self.legal.clash(entry.stem, other.stem) for other in g))
            if group := next(rivals, None):
                group.append(entry)
            else:
                found.append([entry])
        return found

    def suggest(self, trial: Trial) -> list[Placement]:
        """Draw one set of placements; the same draws give equal placements in equal order.

        A mechanism is only offered beside those with which it can stand. What no pair shows (three together, or
        some values of their options) may still be refused: see `refusal`.
        """
        placed: list[Placement] = []
        drawn: list[str] = []
        for group in self.groups:
            offered = [entry for entry in group if self.legal.allows(entry.stem, drawn)]
            chosen = _choose(trial, offered)
            made = self._place(trial, chosen) if chosen is not None else []
            if made:
                placed += made
                drawn.append(made[0].stem)
        return placed

    def refusal(self, placements: Sequence[Placement]) -> str | None:
        """Why the model cannot be given these placements; None if it can."""
        return self.legal.refusal(placements)

    def _place(self, trial: Trial, entry: Entry) -> list[Placement]:
        """Draw the options and layers of one mechanism."""
        stem = entry.stem
        options = {
            name: trial.suggest_categorical(f"{stem}.{name}", option.search)
            for name, option in entry.card.options.items()
            if option.search
        }
        tensors = dict(self.tensors.get(stem, {}))
        if neutral(entry, options):
            return []  # the model's own attention, whatever the other options say
        spare = 0
        if sparing(entry):
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

    def starts(self, most: int | None = None) -> list[dict[str, Any]]:
        """Draws worth trying first, `most` at most: nothing at all (dense), each mechanism, then more of each, pairs.

        Those that have bits to choose come first. What the model refuses is left out.
        """
        ranked = sorted(self.entries, key=lambda e: not bits(e))
        alone = {e.stem: self._starts(e) for e in ranked}
        firsts = [({stem}, wanted[0]) for stem, wanted in alone.items()]
        finer = [({e.stem}, more) for e in ranked if bits(e) for more in alone[e.stem][1:]]
        others = [({e.stem}, more) for e in ranked if not bits(e) for more in alone[e.stem][1:]]
        pairs = [
            ({one.stem, other.stem}, alone[one.stem][-1] | alone[other.stem][0])
            for one in ranked
            if bits(one)
            for other in ranked
            if not bits(other) and not self.legal.clash(one.stem, other.stem)
        ]
        found: list[dict[str, Any]] = []
        for stems, wanted in [(set(), {}), *firsts, *finer, *pairs, *others]:
            script = _Script(stems, wanted)
            if self.refusal(self.suggest(script)) is None and script.params not in found:
                found.append(script.params)
        return found[:most]

    def draw(self, placements: Sequence[Placement]) -> dict[str, Any]:
        """The draw that gives `placements`, trained tensors aside.

        Raises:
            RegardError: nothing drawn here gives them: another mechanism, value or choice of layers.
        """
        groups: dict[str, list[Placement]] = {}
        for place in placements:
            groups.setdefault(place.stem, []).append(place)
        wanted: dict[str, Any] = {}
        for stem, group in groups.items():
            # The placement on the spared layers, if there is one, was written second.
            first, other = group[0], group[-1]
            wanted |= {f"{stem}.{name}": value for name, value in first.options.items()}
            wanted |= {f"{stem}.{name}.spared": value for name, value in other.options.items()}
            wanted[f"{stem}.spare"] = 0 if first.layers == "all" else self.layers - len(first.layers)
        script = _Script(groups, wanted)
        if tell(self.suggest(script)) != tell(placements):
            near = words(tell(self.suggest(script)), self.layers)
            raise RegardError(
                f"a search cannot begin with {words(tell(placements), self.layers)}, which it never draws; the nearest "
                f"it draws is {near}"
            )
        return script.params

    def _starts(self, entry: Entry) -> list[dict[str, Any]]:
        """First values of one mechanism: few bits everywhere, then more on a third, half, two thirds of the layers."""
        stem, finest = entry.stem, bits(entry)
        draw: dict[str, Any] = {}
        for name, option in entry.card.options.items():
            if option.search:
                usual = option.default if option.default in option.search else option.search[len(option.search) // 2]
                draw[f"{stem}.{name}"] = min(option.search, key=width) if name in finest else usual
        if not sparing(entry):
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


class _Script:
    """A trial that takes `stems` and the values `wanted`, the first choice of all else, and remembers what it took."""

    def __init__(self, stems: Collection[str], wanted: Mapping[str, Any]):
        self.stems, self.wanted, self.params = stems, wanted, dict[str, Any]()

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        if name.startswith(_USE):
            value: Any = name.removeprefix(_USE) in self.stems
        elif name.startswith(_ONE_OF):
            value = next((stem for stem in choices if stem in self.stems), NONE)
        else:
            value = self.wanted.get(name, choices[0])
            value = value if value in choices else choices[0]
        self.params[name] = value
        return value


# Names of draws: whether to use the only mechanism offered, or which of several.
_USE, _ONE_OF = "use.", "one of "


def _choose(trial: Trial, offered: Sequence[Entry]) -> Entry | None:
    """Draw one of the mechanisms offered, or none.

    A sampler keeps the choices of a name for good, so the name says what is offered.
    """
    if len(offered) <= 1:
        return next((e for e in offered if trial.suggest_categorical(_USE + e.stem, (False, True))), None)
    stems = [entry.stem for entry in offered]
    drawn = trial.suggest_categorical(_ONE_OF + ", ".join(stems), (NONE, *stems))
    return next((entry for entry in offered if entry.stem == drawn), None)


def sparing(entry: Entry) -> bool:
    """Whether some layers may be spared `entry`: it saves something, changes something, and is not one decision.

    What is fitted, or decides over the whole model, has chosen its layers already.
    """
    card = entry.card
    fitted = any(option.kind == "tensor" for option in card.options.values())
    return card.saving != "none" and not card.exact and not card.whole_model and not fitted


def bits(entry: Entry) -> list[str]:
    """Searched options whose names end in `bits`, in the card's order."""
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
