"""A placement: one mechanism, its options, and where in the model it goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Indices = tuple[int, ...] | Literal["all"]


@dataclass(frozen=True)
class Where:
    """The layer a mechanism is being bound to, in a model of the given shape.

    `layers`, `heads`, `kv_heads`, `head_dim` and `width` (of the residual stream) are the model's; `layer` is this
    layer's index, `placed` the KV heads of it that the placement names.
    """

    layer: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    placed: tuple[int, ...] = ()
    width: int = 0

    def rows(self, heads: int) -> list[int]:
        """The placed heads as query heads, of `heads` in all."""
        group = heads // self.kv_heads
        return [kv * group + i for kv in self.placed for i in range(group)]


@dataclass(frozen=True)
class Placement:
    """Mechanism `stem` with `options` (and trained `tensors`) on `layers` and KV `heads`."""

    stem: str
    layers: Indices = "all"
    heads: Indices = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
