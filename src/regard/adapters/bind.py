"""Placements to Slots: what each layer will do differently, checked before any model is touched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from regard import catalog
from regard.adapters import projections
from regard.adapters.families import Decoder
from regard.core.card import Needs
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Indices, Placement, Where
from regard.core.projections import Projections
from regard.core.slots import Contrast, Slots
from regard.core.store import Codec


@dataclass(frozen=True)
class Bound:
    """What placements come to on one model.

    Args:
        slots: one entry a layer, None where every mechanism placed there is at its neutral setting.
        weights: parameters that change, with their new values.
        contrast: the second branch that logits are compared with, None where there is none.
        branching: whether a mechanism with a second branch is placed, at its neutral setting too.
    """

    slots: tuple[Slots | None, ...]
    weights: tuple[tuple[nn.Parameter, Tensor], ...]
    contrast: Contrast | None = None
    branching: bool = False

    def __bool__(self) -> bool:
        return bool(self.contrast) or any(self.slots)

    def whole(self, decoder: Decoder) -> "Bound":
        """The same with every layer on a store of regard's."""
        return replace(self, slots=tuple(s or plain(decoder, index) for index, s in enumerate(self.slots)))


def bind(placements: Iterable[Placement], decoder: Decoder) -> Bound:
    """Ask every placed mechanism what it does to each layer; nothing is touched.

    Raises:
        RegardError: an unknown mechanism, option, layer or head; a missing trained tensor or one of another
            shape; two placements that rewrite the same thing.
    """
    layers = [_Layer(decoder, index) for index in range(decoder.layers)]
    contrasts: dict[str, Contrast] = {}
    branching = False
    for placement in placements:
        entry = catalog.find(placement.stem)
        entry.refuse_unattachable()
        options = catalog.fill_options(entry, {**placement.options, **placement.tensors})
        _refuse_unknown_tokens(entry, options, decoder)
        branching |= "contrast" in entry.verbs
        if (entry.card.whole_layers or entry.card.whole_model) and placement.heads != "all":
            raise RegardError(f"{entry.stem!r} decides over whole layers; drop heads={placement.heads!r}")
        if entry.card.whole_model and placement.layers != "all":
            raise RegardError(f"{entry.stem!r} decides over the whole model; drop layers={placement.layers!r}")
        heads = _indices("head", placement.heads, decoder.kv_heads)
        module = catalog.load(placement.stem)
        for index in _indices("layer", placement.layers, decoder.layers):
            shape = (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_dim)
            where = Where(index, *shape, heads, decoder.width)
            for verb in entry.verbs:
                layers[index].claim(verb, entry.stem, heads)
                if verb == "edit":
                    now = layers[index].projections or projections.read(decoder, index)
                    layers[index].projections = module.edit(where, now, **options) or layers[index].projections
                elif verb != "contrast":
                    layers[index].take(verb, entry.stem, getattr(module, verb)(where, **options), heads)
                    layers[index].needs[entry.stem] = entry.card.needs
                elif index == decoder.layers - 1 and (made := module.contrast(where, **options)) is not None:
                    contrasts[entry.stem] = made
    if len(contrasts) > 1:
        raise RegardError(f"{' and '.join(map(repr, contrasts))} each run a branch of their own; place one of them")
    edited = ((layer.index, layer.projections) for layer in layers)
    weights = (pair for index, made in edited if made is not None for pair in projections.write(decoder, index, made))
    slots = tuple(layer.slots() for layer in layers)
    _refuse_partial_records(layers)
    return Bound(slots, tuple(weights), next(iter(contrasts.values()), None), branching)


def plain(decoder: Decoder, index: int) -> Slots:
    """Of a layer whose mechanisms are all neutral: its own attention, over a store of regard's."""
    nothing = (None,) * decoder.kv_heads
    return Slots(_Layer(decoder, index).own, nothing, nothing)


def _refuse_unknown_tokens(entry: catalog.Entry, options: Mapping[str, Any], decoder: Decoder) -> None:
    for name, option in entry.card.options.items():
        worst = max(options[name] or (), default=0) if option.kind == "tokens" else 0
        if worst >= decoder.vocabulary:
            raise RegardError(
                f"option {name!r} of {entry.stem!r} has token {worst}; this model knows ids 0 to "
                f"{decoder.vocabulary - 1}"
            )


def _refuse_partial_records(layers: "Sequence[_Layer]") -> None:
    """What is written to the residual stream comes from other layers, which must have run the same rows."""
    placed = {verb: next((layer.placed[verb] for layer in layers if verb in layer.placed), None) for verb in FIELDS}
    for verb in ("skip", "drop"):
        if placed["write"] and placed[verb]:
            raise RegardError(
                f"{placed['write']!r} takes what other layers made of a row, and {placed[verb]!r} lets rows pass by"
            )


# The verbs that bring edits, and the field of Slots each goes to.
FIELDS = {
    "prepare": "prepare",
    "select": "select",
    "rescore": "rescore",
    "watch": "watch",
    "reweigh": "reweigh",
    "mix": "mix",
    "write": "write",
    "skip": "rows",
    "drop": "rows",
    "feed": "feed",
}
# Of these a layer takes one: each answers alone what is read, or with what weight. Biases of scores add up.
ALONE = ("select", "reweigh", "rescore")


class _Layer:
    """The Slots of one layer in the making."""

    def __init__(self, decoder: Decoder, index: int):
        self.decoder, self.index, self.kv_heads = decoder, index, decoder.kv_heads
        window = decoder.windows[index]
        self.own = Pattern.causal() if window is None else Pattern.window(window)
        self.patterns: list[list[Pattern]] = [[] for _ in range(self.kv_heads)]
        self.key_codec: list[Codec | None] = [None] * self.kv_heads
        self.value_codec: list[Codec | None] = [None] * self.kv_heads
        self.edits: dict[str, list[Any]] = {field: [] for field in FIELDS.values()}
        self.placed: dict[str, str] = {}
        self.needs: dict[str, Needs] = {}
        self.projections: Projections | None = None
        self.claims: dict[tuple[str, int], str] = {}

    def claim(self, verb: str, stem: str, heads: tuple[int, ...]) -> None:
        """Masks intersect and edits chain; one `keep` and one `encode` a head, and no mechanism twice."""
        for head in heads:
            name = verb if verb in ("keep", "encode") else f"{verb} of {stem}"
            other = self.claims.get((name, head))
            if other is not None:
                both = repr(stem) if other == stem else f"{other!r} and {stem!r}"
                raise RegardError(
                    f"two placements rewrite the same thing: {both} both {verb} layer {self.index} head {head}; "
                    "place them on different layers or heads"
                )
            self.claims[(name, head)] = stem

    def take(self, verb: str, stem: str, made: Any, heads: tuple[int, ...]) -> None:
        """Put what a verb made in its place; an edit that is None is neutral.

        Raises:
            RegardError: the edit cannot stand beside another, or the family does not tell where it goes.
        """
        if verb in FIELDS:
            if made is None:
                return
            for other in ALONE if verb in ALONE else ():
                if other in self.placed and not verb == other == "rescore":
                    raise RegardError(
                        f"{self.placed[other]!r} and {stem!r} both decide how the keys of layer {self.index} are read; "
                        "place them on different layers"
                    )
            if verb in ("write", "feed"):
                self.decoder.part(self.index, "feed_forward")
            self.edits[FIELDS[verb]].append(made)
            self.placed[verb] = stem
            return
        for head in heads:
            if verb == "encode":
                self.key_codec[head], self.value_codec[head] = made
            elif not made.cut:
                raise RegardError(
                    f"{stem!r} makes pattern {made!r}, which lets queries see later positions; a model that generates "
                    "takes patterns cut at p_k <= p_q"
                )
            else:
                self.patterns[head].append(made.head(head))

    def slots(self) -> Slots | None:
        heads = []
        for patterns in self.patterns:
            pattern = self.own
            for other in patterns:
                if not other.is_causal:
                    pattern = other if pattern.is_causal else pattern & other
            heads.append(pattern)
        restricted = any(not p.is_causal for patterns in self.patterns for p in patterns)
        encoded = any(codec is not None for codec in (*self.key_codec, *self.value_codec))
        if not restricted and not encoded and not any(self.edits.values()):
            return None
        same = all(pattern == heads[0] for pattern in heads)
        self._refuse_split(heads)
        pattern = heads[0] if same else Pattern.stack_heads(heads)
        edits = {field: tuple(made) for field, made in self.edits.items()}
        edited = set(self.placed.values())
        needs: list[tuple[str, Needs]] = [
            (s, need) for s, need in self.needs.items() if s in edited and need != "nothing"
        ]
        return Slots(pattern, tuple(self.key_codec), tuple(self.value_codec), needs=tuple(needs), **edits)

    def _refuse_split(self, heads: Sequence[Pattern]) -> None:
        """A choice of keys needs one list of them."""
        held = {(p.reach()[0], k, v) for p, k, v in zip(heads, self.key_codec, self.value_codec, strict=True)}
        if "select" in self.placed and len(held) > 1:
            others = {
                stem for (kind, _head), stem in self.claims.items() if kind.split()[0] in ("keep", "encode", "allow")
            }
            split = " and ".join(map(repr, sorted(others)))
            raise RegardError(
                f"{self.placed['select']!r} reads one list of keys for all heads, and {split} lets heads of layer "
                f"{self.index} hold different ones; place them on different layers"
            )


def _indices(kind: str, written: Indices, count: int) -> tuple[int, ...]:
    if written == "all":
        return tuple(range(count))
    for index in written:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise RegardError(f"{kind} {index!r} is out of range; this model has {count} ({kind}s 0 to {count - 1})")
    if len(set(written)) != len(written):
        raise RegardError(f"{kind}s {list(written)} name one twice")
    return tuple(written)
