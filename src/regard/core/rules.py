"""The single-head relations that a `Pattern` is made of: leaves, and their `&`, `|`, `~`.

A rule is called as `rule(q, k)`, elementwise for broadcastable index tensors of query and key positions, so the
same code serves a whole mask and FlexAttention's scalar `mask_mod`. Rules need not be causal: `Pattern`
cuts at `0 <= k <= q` once, after the whole tree, unless it is two-sided. Rules that hold tensors (`tables.py`) are
equal only to themselves.
"""

# Every `__call__`, `cover` and `origin` below is documented once, in `Rule`.
# ruff: noqa: D102

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.reach import FOR_EVER, Phase, Reach, chosen_blocks

Pair = tuple[Tensor, Tensor]
Numbers = tuple[Tensor, ...]


class Rule:
    """One head's relation; `rule(q, k)` is elementwise, `reach` sound under the causal cut."""

    reach: Reach = FOR_EVER

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether queries at `q` may see keys at `k`: bool, of the broadcast shape of both (or less)."""
        raise NotImplementedError

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        """For ranges of positions (>= 0, ends included): may any pair be allowed, and are all of them?

        `some` may err upwards and `all` downwards; both are bool and broadcastable like `q_low` and `k_low`.
        """
        raise NotImplementedError

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        """What decides how a block of consecutive positions is cut, as whole numbers, where `cover` leaves it open."""
        return q_low, k_low

    def traits(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        """Blocks of consecutive positions whose numbers agree, and their sizes, are cut alike."""
        at = (q_low, q_high, k_low, k_high)
        some, every = self.cover(*at)
        open_ = some & ~every
        return every.long(), *(torch.where(open_, number, -1) for number in self.origin(*at))

    def tensors(self) -> Numbers:
        """What it reads besides positions: where these change, so does the rule."""
        return ()


@dataclass(frozen=True)
class Everything(Rule):
    """All pairs."""

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones_like(q + k, dtype=torch.bool)

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        every = self(q_low, k_low)
        return every, every

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        return ()

    def __repr__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Causal(Rule):
    """`k <= q`: everything inside the causal cut."""

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        return k_low <= q_high, k_high <= q_low

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        return (q_low - k_low,)

    def __repr__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window(Rule):
    """`q // block - k // block < size`."""

    size: int
    block: int = 1

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """Only what is recent."""
        return Reach(0, self.size * self.block)

    def _block(self, at: Tensor) -> Tensor:
        return at if self.block == 1 else at.div(self.block, rounding_mode="floor")

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self._block(k) > self._block(q) - self.size

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        return self(q_low, k_high), self(q_high, k_low)

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        between = self._block(q_low) - self._block(k_low)
        return (between,) if self.block == 1 else (between, q_low % self.block, k_low % self.block)

    def __repr__(self) -> str:
        return f"window {self.size}" if self.block == 1 else f"window {self.size} blocks of {self.block}"


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

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        return k_low < self.size, k_high < self.size

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        return (k_low,)

    def __repr__(self) -> str:
        return f"sink {self.size}"


@dataclass(frozen=True)
class Phased(Rule):
    """`(k // block) % stride` is one of `residues`."""

    block: int
    stride: int
    residues: tuple[int, ...]

    @property
    def phase(self) -> Phase:
        """As `Reach` has it."""
        return self.block, self.stride, self.residues

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """Its blocks for ever, and nothing else."""
        return Reach(0, 0, (self.phase,))

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.reach.needs(k, k)

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        chosen, count = chosen_blocks(self.phase, k_low, k_high)
        return chosen > 0, chosen == count

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        return (k_low % (self.block * self.stride),)

    def __repr__(self) -> str:
        return f"phases {', '.join(map(str, self.residues))} of {self.stride} (blocks of {self.block})"


@dataclass(frozen=True)
class Every(Rule):
    """`(q - k) % stride == 0`."""

    stride: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % self.stride == 0

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        near, far = q_low - k_high, q_high - k_low
        multiple = far.div(self.stride, rounding_mode="floor") * self.stride
        return multiple >= near, (multiple == near) & (near == far)

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        return ((q_low - k_low) % self.stride,)

    def __repr__(self) -> str:
        return f"every {self.stride}"


@dataclass(frozen=True)
class Predicate(Rule):
    """A user's `fn(q, k, head)`."""

    fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    head: int
    reach: Reach = FOR_EVER
    promise: Callable[[Tensor, Tensor, Tensor, Tensor], Pair] | None = None

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        answer = self.fn(q, k, torch.tensor(self.head, device=q.device))
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
            got = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
            raise RegardError(f"{self!r} must return a bool tensor, got {got}; end it with a comparison")
        return answer

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        # What is not within reach lies in the past, so this holds outside the causal cut too.
        some = self.reach.may(q_low, k_low, k_high)
        if self.promise is None:
            return some, torch.zeros_like(some)
        may, every = self.promise(q_low, q_high, k_low, k_high)
        if may.dtype != torch.bool or every.dtype != torch.bool:
            raise RegardError(f"the cover of {self!r} must be two bool tensors, got {may.dtype} and {every.dtype}")
        return some & may, every

    def tensors(self) -> Numbers:
        cells = getattr(self.fn, "__closure__", None) or ()
        return tuple(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, Tensor))

    def __repr__(self) -> str:
        return f"predicate {getattr(self.fn, '__name__', type(self.fn).__name__)}"


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

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        at = (q_low, q_high, k_low, k_high)
        (some, every), (other, others) = self.left.cover(*at), self.right.cover(*at)
        return some & other, every & others

    def traits(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        at = (q_low, q_high, k_low, k_high)
        return *self.left.traits(*at), *self.right.traits(*at)

    def tensors(self) -> Numbers:
        return *self.left.tensors(), *self.right.tensors()

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

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        at = (q_low, q_high, k_low, k_high)
        (some, every), (other, others) = self.left.cover(*at), self.right.cover(*at)
        return some | other, every | others

    def traits(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        at = (q_low, q_high, k_low, k_high)
        return *self.left.traits(*at), *self.right.traits(*at)

    def tensors(self) -> Numbers:
        return *self.left.tensors(), *self.right.tensors()

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

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        some, every = self.inner.cover(q_low, q_high, k_low, k_high)
        return ~every, ~some

    def traits(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        return self.inner.traits(q_low, q_high, k_low, k_high)

    def tensors(self) -> Numbers:
        return self.inner.tensors()

    def __repr__(self) -> str:
        return f"~{self.inner!r}" if isinstance(self.inner, (Causal, Everything)) else f"~({self.inner!r})"


# What `top` below may be: the rule that allows all there is, inside the causal cut and without one.
CUT, UNCUT = Causal(), Everything()


def both(a: Rule, b: Rule, top: Rule = CUT) -> Rule:
    """`a & b` in its shortest form."""
    if a in (b, Outside(top)) or b == top:
        return a
    if a == top or b == Outside(top):
        return b
    if _alike(a, b):
        return a if a.size <= b.size else b  # type: ignore[attr-defined]
    return Both(a, b)


def either(a: Rule, b: Rule, top: Rule = CUT) -> Rule:
    """`a | b` in its shortest form."""
    if a in (b, top) or b == Outside(top):
        return a
    if a == Outside(top) or b == top:
        return b
    if _alike(a, b):
        return a if a.size >= b.size else b  # type: ignore[attr-defined]
    return Either(a, b)


def _alike(a: Rule, b: Rule) -> bool:
    """Whether one of two leaves holds the other, by their sizes."""
    if isinstance(a, Window) and isinstance(b, Window):
        return a.block == b.block
    return isinstance(a, Sink) and isinstance(b, Sink)


def outside(a: Rule, top: Rule = CUT) -> Rule:
    """`~a`, pushed down to the leaves so that what is left keeps the reach of its parts."""
    if isinstance(a, Outside):
        return a.inner
    if isinstance(a, Both):
        return either(outside(a.left, top), outside(a.right, top), top)
    if isinstance(a, Either):
        return both(outside(a.left, top), outside(a.right, top), top)
    return Outside(a)


def uncut(a: Rule) -> Rule:
    """What rule `a` of a pattern with a causal cut is without that cut."""
    return Outside(UNCUT) if a == Outside(CUT) else both(a, CUT, UNCUT)


def within(a: Rule) -> bool:
    """Whether `a` allows only pairs inside the causal cut, as far as its structure shows."""
    if isinstance(a, Both):
        return within(a.left) or within(a.right)
    return a in (CUT, Outside(UNCUT)) or (isinstance(a, Either) and within(a.left) and within(a.right))


def recut(a: Rule) -> Rule:
    """`a` inside the causal cut, in its shortest form."""
    if isinstance(a, Both):
        return both(recut(a.left), recut(a.right))
    if isinstance(a, Either):
        return either(recut(a.left), recut(a.right))
    return {UNCUT: CUT, Outside(UNCUT): Outside(CUT)}.get(a, a)


def covers(rule: Rule, length: int) -> bool:
    """Whether `rule` allows the whole causal cut of positions below `length`, as far as its structure shows."""
    if isinstance(rule, (Window, Sink)):
        return _fills(rule, length)
    if isinstance(rule, Both):
        return covers(rule.left, length) and covers(rule.right, length)
    if isinstance(rule, Either):
        for window, sink in ((rule.left, rule.right), (rule.right, rule.left)):
            if isinstance(window, Window) and isinstance(sink, Sink) and _fills(window, length, sink.size):
                return True
        return covers(rule.left, length) or covers(rule.right, length)
    return rule == CUT


def _fills(rule: Window | Sink, length: int, first: int = 0) -> bool:
    """Whether `rule` allows all that lies inside the cut from key `first` on."""
    if isinstance(rule, Sink):
        return rule.size >= length
    return (length - 1) // rule.block - first // rule.block < rule.size
