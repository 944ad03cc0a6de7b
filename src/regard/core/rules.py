"""The single-head relations that a `Pattern` is made of: leaves, and their `&`, `|`, `~`.

A rule is called as `rule(q, k)`, elementwise for broadcastable index tensors of query and key positions, so the
same code serves a whole mask and FlexAttention's scalar `mask_mod`. Rules need not be causal: `Pattern`
cuts at `0 <= k <= q` once, after the whole tree. Rules that hold tensors are equal only to themselves.
"""

# Every `__call__` below is documented once, in `Rule`.
# ruff: noqa: D102

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.errors import RegardError


class Reach(NamedTuple):
    """When a key at position `p_k` is needed by a query at `p_q`: `p_k < sink`, `p_q - p_k < recent`, or in `phases`.

    `recent` None: for ever. `sink` and `phases` are then without meaning and empty. Of a phase
    `(block, stride, residues)` a key is if the number of its block is one of `residues` modulo `stride`.
    """

    sink: int
    recent: int | None
    phases: "tuple[Phase, ...]" = ()

    @property
    def bounded(self) -> bool:
        """Whether what is needed does not grow with the text."""
        return self.recent is not None and not self.phases

    def needs(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether keys at positions `k` are needed by queries at `q` or later; elementwise, bool."""
        if self.recent is None:
            return torch.ones_like(k, dtype=torch.bool)
        needed = (k < self.sink) | (k > q - self.recent)
        for block, stride, residues in self.phases:
            number = k.div(block, rounding_mode="floor") % stride
            for residue in residues:
                needed = needed | (number == residue)
        return needed

    def __or__(self, other: "Reach") -> "Reach":  # type: ignore[override]
        """The smallest reach that covers both."""
        if self.recent is None or other.recent is None:
            return FOR_EVER
        phases = tuple(sorted({*self.phases, *other.phases}))
        return Reach(max(self.sink, other.sink), max(self.recent, other.recent), phases)

    def __and__(self, other: "Reach") -> "Reach":
        """The smaller of the two: each covers the intersection."""
        return min(self, other, key=Reach._size)

    def _size(self) -> tuple[float, ...]:
        share = sum(len(residues) / stride for _, stride, residues in self.phases)
        return (float("inf"), 0) if self.recent is None else (share, self.sink + self.recent)


Phase = tuple[int, int, tuple[int, ...]]
FOR_EVER = Reach(0, None)


class Rule:
    """One head's relation; `rule(q, k)` is elementwise, `reach` sound under the causal cut."""

    reach: Reach = FOR_EVER

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether queries at `q` may see keys at `k`: bool, of the broadcast shape of both (or less)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Causal(Rule):
    """Everything inside the causal cut."""

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def __repr__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window(Rule):
    """`q - k < size`."""

    size: int

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """Only what is recent."""
        return Reach(0, self.size)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return k > q - self.size

    def __repr__(self) -> str:
        return f"window {self.size}"


@dataclass(frozen=True)
class Sink(Rule):
    """`k < size`."""

    size: int

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """Only the sink."""
        return Reach(self.size, 0)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return k < self.size

    def __repr__(self) -> str:
        return f"sink {self.size}"


@dataclass(frozen=True)
class Phased(Rule):
    """`(k // block) % stride` is one of `residues`."""

    block: int
    stride: int
    residues: tuple[int, ...]

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """Its blocks for ever, and nothing else."""
        return Reach(0, 0, ((self.block, self.stride, self.residues),))

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.reach.needs(q, k)

    def __repr__(self) -> str:
        return f"phases {', '.join(map(str, self.residues))} of {self.stride} (blocks of {self.block})"


@dataclass(frozen=True)
class Predicate(Rule):
    """A user's `fn(q, k, head)`."""

    fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    head: int
    reach: Reach = FOR_EVER

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        answer = self.fn(q, k, torch.tensor(self.head, device=q.device))
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            got = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            raise RegardError(f"{self!r} must return a bool tensor, got {got}; end it with a comparison")
        return answer

    def __repr__(self) -> str:
        return f"predicate {getattr(self.fn, '__name__', type(self.fn).__name__)}"


@dataclass(frozen=True, eq=False)
class Table(Rule):
    """`table[q // size, k // size]`, nothing outside the table; `size` 1 is a dense mask."""

    table: Tensor
    size: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        rows, columns = self.table.shape
        i, j = (q, k) if self.size == 1 else (q // self.size, k // self.size)
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        return self.table.to(q.device)[i.clamp(0, rows - 1), j.clamp(0, columns - 1)] & inside

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.table.shape))
        return f"dense {shape}" if self.size == 1 else f"blocks {shape} of {self.size}"


@dataclass(frozen=True, eq=False)
class Listed(Rule):
    """`k` is listed in `index[q]`, sorted ascending along its last dimension; nothing beyond its rows."""

    index: Tensor

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        # Binary search by gathers: no [Tq, n, Tk] comparison, and it still runs as a scalar mask_mod.
        rows, count = self.index.shape
        index, i = self.index.to(q.device), q.clamp(0, rows - 1)
        at = torch.zeros_like(i + k)
        for step in (1 << s for s in reversed(range((count - 1).bit_length()))):
            ahead = at + step
            at = torch.where((ahead < count) & (index[i, ahead.clamp(max=count - 1)] <= k), ahead, at)
        return (index[i, at] == k) & (q >= 0) & (q < rows)

    def __repr__(self) -> str:
        return f"indices {self.index.shape[0]}x{self.index.shape[1]}"


@dataclass(frozen=True)
class Both(Rule):
    """Intersection."""

    left: Rule
    right: Rule

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """The smaller of the two."""
        return self.left.reach & self.right.reach

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.left(q, k) & self.right(q, k)

    def __repr__(self) -> str:
        return " & ".join(f"({r!r})" if isinstance(r, Either) else repr(r) for r in (self.left, self.right))


@dataclass(frozen=True)
class Either(Rule):
    """Union."""

    left: Rule
    right: Rule

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """The larger of each."""
        return self.left.reach | self.right.reach

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.left(q, k) | self.right(q, k)

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"


@dataclass(frozen=True)
class Outside(Rule):
    """Complement of a leaf."""

    inner: Rule

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """For ever, unless nothing is left."""
        return Reach(0, 0) if self.inner == Causal() else FOR_EVER

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner(q, k)

    def __repr__(self) -> str:
        return f"~{self.inner!r}" if isinstance(self.inner, Causal) else f"~({self.inner!r})"


NOTHING = Outside(Causal())


def both(a: Rule, b: Rule) -> Rule:
    """`a & b` in its shortest form."""
    if a in (b, NOTHING) or b == Causal():
        return a
    if a == Causal() or b == NOTHING:
        return b
    if isinstance(a, (Window, Sink)) and type(a) is type(b):
        return a if a.size <= b.size else b  # type: ignore[attr-defined]
    return Both(a, b)


def either(a: Rule, b: Rule) -> Rule:
    """`a | b` in its shortest form."""
    if a in (b, Causal()) or b == NOTHING:
        return a
    if a == NOTHING or b == Causal():
        return b
    if isinstance(a, (Window, Sink)) and type(a) is type(b):
        return a if a.size >= b.size else b  # type: ignore[attr-defined]
    return Either(a, b)


def outside(a: Rule) -> Rule:
    """`~a`, pushed down to the leaves so that what is left keeps the reach of its parts."""
    if isinstance(a, Outside):
        return a.inner
    if isinstance(a, Both):
        return either(outside(a.left), outside(a.right))
    if isinstance(a, Either):
        return both(outside(a.left), outside(a.right))
    return Outside(a)


def covers(rule: Rule, length: int) -> bool:
    """Whether `rule` allows the whole causal cut of positions below `length`, as far as its structure shows."""
    if isinstance(rule, (Window, Sink)):
        return rule.size >= length
    if isinstance(rule, Both):
        return covers(rule.left, length) and covers(rule.right, length)
    if isinstance(rule, Either):
        left, right = rule.left, rule.right
        if {type(left), type(right)} == {Window, Sink}:
            return left.size + right.size >= length  # type: ignore[attr-defined]
        return covers(left, length) or covers(right, length)
    return rule == Causal()
