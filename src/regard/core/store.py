"""What a cache layer holds: the protocol every store keeps, and the codec of its numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regard.core.pattern import Pattern
from regard.core.step import Step

Fields = tuple[Tensor, ...]


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Form:
    """What a kernel needs to know of two fields: codes uint8 `[B, Hk, T, *]`, `(s, lo)` float32 `[B, Hk, T, 2]`.

    Args:
        bits: of a code, 4 or 8. Four bits are packed, number i below number i + D/2.
        order: of the block-diagonal Hadamard rotation that vectors went through; 1: none.
    """

    bits: int
    order: int


class Part(NamedTuple):
    """Some KV heads of a layer: queries are given of all heads, and answers of these go where all have their place.

    Args:
        heads: `[n]` integers, on the device.
        group: query heads of a KV head.
        out, lse: `[B, H, T, Dv]` and `[B, H, T]` float32 of the layer, contiguous.
    """

    heads: Tensor
    group: int
    out: Tensor
    lse: Tensor

    @property
    def queries(self) -> Tensor:
        """The query heads, `[n * group]`."""
        return (self.heads[:, None] * self.group + torch.arange(self.group, device=self.heads.device)).flatten()


class Decoding(Protocol):
    """What fixed steps write and read with: `ops/decode.py`, handed in, since stores lie below it."""

    @property
    def decode(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Attention over the first keys, of which a length on the device counts."""
        ...

    @property
    def place(self) -> Callable[..., None]:
        """Writes one token of each request into its slot."""
        ...


class Kernels(Protocol):
    """Kernels that read and write codes where they lie. `keys`, `values` are fields; a Form of None: as they come."""

    def refuses(self, q: Tensor, keys: Fields, values: Fields, key: Form | None, value: Form | None, /) -> str | None:
        """Why `read` cannot do this call, or None."""
        ...

    def read(
        self,
        q: Tensor,
        keys: Fields,
        values: Fields,
        *,
        key: Form | None,
        value: Form | None,
        scale: float,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        q_positions: Tensor | None = None,
        sink: int = 0,
        recent: int | None = None,
        part_of: Part | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of `q [B, H, T, D]`, not rotated: `(out [B, H, T, Dv], lse [B, H, T])`.

        `lengths [B]`, keys of each request; None: all slots. `positions [1|B, S]` of the keys, negative: none; None:
        consecutive, ending with the last query. With `recent`, queries see what lies less than that far back, and
        positions below `sink`.
        """
        ...

    def refuses_write(
        self, k: Tensor, v: Tensor, keys: Fields, values: Fields, key: Form | None, value: Form | None, /
    ) -> str | None:
        """Why `write` cannot do this call, or None."""
        ...

    def write(
        self,
        k: Tensor,
        v: Tensor,
        keys: Fields,
        values: Fields,
        *,
        key: Form | None,
        value: Form | None,
        start: int | Tensor = 0,
        heads: Tensor | None = None,
    ) -> None:
        """Encode `k [B, Hk, T, D]` and `v` into the slots from `start` on; a Tensor `[B]`: one a request.

        `heads [n]` are those of `k` and `v` that the fields hold; None: all.
        """
        ...


@dataclass(frozen=True)
class Codec:
    """How vectors are written to a store and read back, one token and head at a time.

    `encode(x [B, Hk, T, D]) -> fields`, each `[B, Hk, T, *]`; `decode(fields, dtype) -> [B, Hk, T, D]`,
    possibly in a rotated basis: then `query` brings queries into the basis of decoded keys, and
    `output` brings attention outputs back from the basis of decoded values. Encoding a token never
    looks at another token, so chunked writes equal one batched write. `straight(x)` is what decoding
    would give were nothing rounded: gradients flow through it (straight-through); None: they stop.
    `kernels(x)` finds the kernels that know fields of `form` and run where `x` lies, or says why there are none.
    """

    name: str
    encode: Callable[[Tensor], Fields]
    decode: Callable[[Fields, torch.dtype], Tensor]
    query: Callable[[Tensor], Tensor] = _same
    output: Callable[[Tensor], Tensor] = _same
    straight: Callable[[Tensor], Tensor] | None = None
    form: Form | None = None
    kernels: Callable[[Tensor], Kernels | str] | None = None


class View(Protocol):
    """What a store holds for the queries of one forward; dropped when the layer is done."""

    @property
    def size(self) -> int:
        """Keys that it shows, `S`."""
        ...

    def attend(
        self,
        q: Tensor,
        *,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
        index: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of `q [B, H, T, D]` over what the store holds: `(out [B, H, T, Dv], lse [B, H, T])`.

        `index [1|B, n]` reads those keys only (-1: none); `bias [1|B, 1|H, 1|T, S]` is added to the scores of the keys
        that `keys` shows.
        """
        ...

    def attend_blocks(
        self,
        q: Tensor,
        index: Tensor,
        *,
        own: slice | None,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of `q [B, H, blocks * t, D]` in blocks of `t` rows, each over its list of `index [1|B, blocks, n]`.

        `own` names the rows of the forward that `q` is: every row sees its block's whole list, and its block's own
        keys up to itself (see `Chosen`). Returns out `[B, H, blocks * t, Dv]`.
        """
        ...

    def keys(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """`q` and the keys `[B, Hk, S, D]` in one basis, and the keys' positions `[1|B, S]`.

        Where heads hold different keys, positions are `[1|B, Hk, S]`, negative in slots that a head does not have.
        """
        ...


class Store(Protocol):
    """One layer's keys and values. Batch rows come first in every tensor it holds.

    `length` is the request's logical length in arrivals, however little is held. `state` holds a
    mechanism's own batch-first tensors (decisions, counters, rings); it follows `reorder`, `repeat`,
    `select` and `reset` with the rest.
    """

    state: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Arrivals of the request so far."""
        ...

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        ...

    def append(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Write `k [B, Hk, T, D]`, `v [B, Hk, T, Dv]` and return what this forward's queries read."""
        ...

    def unfixed(self, step: Step) -> str | None:
        """Why `step` cannot be a fixed step (`Step.at`), or None."""
        ...

    def fix(self, spare: int) -> int | None:
        """Lay out what is held for fixed steps, with about `spare` slots to spare. Anything but `put` undoes it.

        Returns:
            Arrivals until which there is room; None: any number.
        """
        ...

    def put(self, k: Tensor, v: Tensor, step: Step, by: Decoding, heads: Tensor | None = None) -> View:
        """`append` of a fixed step `step`: `k [B, Hk, 1, D]`, `v` go where `step.at` says, and no count changes.

        `heads [n]` are those of `k` and `v` that are stored here; None: all.
        """
        ...

    def passed(self) -> None:
        """A fixed step went by, run or replayed: count it."""
        ...

    def versions(self) -> Iterator[int]:
        """Numbers that stay what they are only while fixed steps find everything where the last one left it."""
        ...

    def advance(self, step: Step) -> None:
        """The forward `step` went by and this layer ran none of its rows.

        Raises:
            RegardError: the store is of a kind that every row must reach.
        """
        ...

    def record(self) -> None:
        """Keep from now on, until the next `crop`, all that a `crop` may bring back."""
        ...

    def crop(self, length: int) -> None:
        """Forget arrivals from `length` on.

        Raises:
            RegardError: what is needed before `length` was already evicted.
        """
        ...

    def reorder(self, rows: Tensor) -> None:
        """Row `i` becomes the old row `rows[i]` (beams, selection); the number of rows may change."""
        ...

    def reset(self) -> None:
        """Forget everything and release the memory."""
        ...

    def storages(self) -> Iterator[Tensor]:
        """Every tensor that keeps memory alive."""
        ...

    def raw(self) -> Iterator[Tensor]:
        """Those of `storages` that hold keys or values as they come, in the model's own dtype."""
        ...

    @property
    def capacity(self) -> dict[str, int]:
        """Allocated token slots summed over heads, per kind of store: `{"full": ..., "ring": ...}`."""
        ...
