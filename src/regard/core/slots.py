"""What one layer of an attached model does differently: the bound mechanisms, in running order."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Codec

State = dict[str, Tensor]


def _as_it_is(x: Tensor, step: Step) -> Tensor:
    return x


@dataclass(frozen=True)
class Prepare:
    """Site `qkv`: queries, keys and values before their product, keys and values before they are stored.

    Each is `f(x [B, heads, T, D], step) -> x` and may look at nothing but its own token and its position.
    """

    name: str
    query: Callable[[Tensor, Step], Tensor] = _as_it_is
    key: Callable[[Tensor, Step], Tensor] = _as_it_is
    value: Callable[[Tensor, Step], Tensor] = _as_it_is


@dataclass(frozen=True)
class Mix:
    """Site `heads`: per-head outputs, `run(out [B, H, T, Dv], step, state) -> out`."""

    name: str
    run: Callable[[Tensor, Step, State], Tensor]


@dataclass(frozen=True)
class Slots:
    """The mechanisms bound to one layer.

    Sites open as mechanisms need them; each is one field here, neutral by default.

    Args:
        pattern: what each KV head may see, the model's own rule included (`masks`, `cache.keep`).
        key_codec, value_codec: one entry a KV head, None where stored as they come (`cache.encode`).
        prepare, mix: in the recipe's order.
    """

    pattern: Pattern
    key_codec: tuple[Codec | None, ...]
    value_codec: tuple[Codec | None, ...]
    prepare: tuple[Prepare, ...] = ()
    mix: tuple[Mix, ...] = ()

    def __str__(self) -> str:
        """What runs, for `explain`: the pattern, then codecs, heads together where they agree."""
        parts = [] if self.pattern.is_causal else [str(self.pattern)]
        for name, codecs in (("keys", self.key_codec), ("values", self.value_codec)):
            told = ["as they come" if codec is None else codec.name for codec in codecs]
            if any(codecs):
                parts.append(f"{name} {told[0]}" if len(set(told)) == 1 else f"{name} {', '.join(told)}")
        parts += [edit.name for edit in (*self.prepare, *self.mix)]
        return "; ".join(parts)
