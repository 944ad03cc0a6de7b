"""What a mechanism file says of itself: one frozen literal, read without importing the file."""

from dataclasses import dataclass, field
from typing import Any, Literal

Saving = Literal["none", "compute", "memory"]
Needs = Literal["nothing", "map", "image", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a mechanism: its default, its legal values and what it means.

    `low`/`high` bound numbers (inclusive); `choices` lists the only legal values; `search` lists the
    values a search tries (none: the search leaves the default). `optional` also allows None.
    `kind` "tensor" marks a trained tensor, which travels in `recipe.safetensors`; `shape` names its axes
    as `Where` does, `("layers", "kv_heads")`, or gives their size, and its values lie in `[low, high]`.
    `kind` "tokens" takes token ids (a list or a tensor of one dimension), and keeps them as a tuple.
    """

    default: Any
    doc: str
    kind: Literal["int", "float", "bool", "str", "tensor", "tokens"] = "int"
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    search: tuple[Any, ...] = ()
    optional: bool = False
    shape: tuple[str | int, ...] = ()

    def sizes(self, model: Any) -> tuple[int, ...]:
        """`shape` on `model`, anything that has the axes it names (`Where`, an opened decoder)."""
        return tuple(getattr(model, axis) if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A mechanism's card.

    `neutral` holds the options under which the mechanism is bit-identical to the model's own attention
    (None: it has no such setting), `example` options small enough to show it at work on a short text (the
    contract tests run them). `oracles` says what the file was checked against. `whole_layers`
    forbids a choice of heads. `whole_model`: the mechanism decides over all layers at once, so that it is placed on all
    of them and a search spares none. `needs` says what it has to be told besides tokens: a "map" of their kinds, one in
    which every row has an "image", or the images themselves ("pixels"; a request of text alone is refused).
    """

    title: str
    arxiv: str | None
    sheet: int | None
    implements: str
    exact: bool
    saving: Saving
    departures: tuple[str, ...] = ()
    oracles: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    whole_layers: bool = False
    whole_model: bool = False
    needs: Needs = "nothing"
    neutral: dict[str, Any] | None = None
    example: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Option] = field(default_factory=dict)
