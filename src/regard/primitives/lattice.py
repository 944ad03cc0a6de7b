"""Tokens on a lattice of one or more axes: numberings of its cells, and patterns that are one window an axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.rules import Numbers, Pair, Rule

Value = TypeVar("Value", int, bool)
# `span(u, n)`: first and last key index that the query at index u of n sees. Neither falls where u or n grows.
Span = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Range = tuple[Tensor, Tensor]


def shape(grid: Sequence[int], what: str = "grid") -> tuple[int, ...]:
    """`grid` as a tuple of whole numbers of at least 1.

    Raises:
        RegardError: no axis, or one of fewer cells.
    """
    sizes = tuple(grid)
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise RegardError(f"a {what} needs at least one axis, and whole numbers from 1 up, got {sizes}")
    return sizes


def per_axis(name: str, value: Value | Sequence[Value], axes: int) -> tuple[Value, ...]:
    """`value` for every one of `axes`: one for all, or a sequence of as many.

    Raises:
        RegardError: a sequence of another length.
    """
    if isinstance(value, (int, bool)):
        return (value,) * axes
    values = tuple(value)
    if len(values) != axes:
        raise RegardError(f"{name} {values} has {len(values)} numbers for a grid of {axes} axes")
    return values


@dataclass(frozen=True)
class Tiling:
    """A numbering of the cells of `grid` in which every box of neighbouring cells is a run of slots.

    Args:
        grid: cells an axis; tokens are numbered with the last axis fastest (raster order).
        box: cells of a tile an axis. Where tiles stick out of the grid, slots hold no token.
        dilation: cells with the same coordinate modulo it are numbered together, and tiles are of such cells.

    A slot is a number of mixed radix whose digits are, slowest first: residues of all axes, tiles, cells in a tile.
    """

    grid: tuple[int, ...]
    box: tuple[int, ...]
    dilation: tuple[int, ...]

    @cached_property
    def radix(self) -> tuple[int, ...]:
        """Values of each digit."""
        classes = [-(-n // d) for n, d in zip(self.grid, self.dilation, strict=True)]
        tiles = [-(-n // b) for n, b in zip(classes, self.box, strict=True)]
        return (*self.dilation, *tiles, *self.box)

    @property
    def slots(self) -> int:
        """How many there are: at least as many as cells."""
        return math.prod(self.radix)

    def digits(self, slot: Tensor) -> list[Tensor]:
        """The digits of each slot, slowest first."""
        found, place = [], self.slots
        for size in self.radix:
            place //= size
            found.append(slot // place % size)
        return found

    def cells(self, slot: Tensor) -> list[Tensor]:
        """Coordinates of each slot, one tensor an axis; beyond the grid where the slot holds no token."""
        digits, axes = self.digits(slot), len(self.grid)
        parts = zip(digits[:axes], digits[axes : 2 * axes], digits[2 * axes :], self.box, self.dilation, strict=True)
        return [residue + d * (tile * b + inner) for residue, tile, inner, b, d in parts]

    def hull(self, low: Tensor, high: Tensor) -> list[tuple[Range, Range]]:
        """The smallest box around slots `low..high`: an axis, the least and largest residue, and index in its class."""
        ends: list[Range] = []
        same = torch.ones_like(low, dtype=torch.bool)
        for first, last, size in zip(self.digits(low), self.digits(high), self.radix, strict=True):
            # Once a slower digit has moved on, the faster ones have been through all their values.
            ends.append((torch.where(same, first, 0), torch.where(same, last, size - 1)))
            same = same & (first == last)
        axes = len(self.grid)
        parts = zip(ends[:axes], ends[axes : 2 * axes], ends[2 * axes :], self.box, strict=True)
        return [(r, (t[0] * b + i[0], t[1] * b + i[1])) for r, t, i, b in parts]

    def order(self) -> Tensor:
        """The token in every slot, int64 `[slots]`, -1 where there is none."""
        slot = torch.arange(self.slots)
        token, inside = torch.zeros_like(slot), torch.ones_like(slot, dtype=torch.bool)
        for x, n in zip(self.cells(slot), self.grid, strict=True):
            token, inside = token * n + x, inside & (x < n)
        return token.masked_fill(~inside, -1)

    def inverse(self) -> Tensor:
        """The slot of every token, int64 `[tokens]`."""
        order = self.order()
        held = (order >= 0).nonzero()[:, 0]
        return torch.empty(math.prod(self.grid), dtype=torch.int64).scatter(0, order[held], held)


def raster(grid: tuple[int, ...]) -> Tiling:
    """The numbering of tokens themselves: one tile."""
    return Tiling(grid, grid, (1,) * len(grid))


def tiling(grid: Sequence[int], box: int | Sequence[int], dilation: int | Sequence[int] = 1) -> Tiling:
    """A `Tiling`, checked.

    Raises:
        RegardError: a box or dilation below 1, or larger than its axis.
    """
    sizes = shape(grid)
    boxes, steps = per_axis("box", box, len(sizes)), per_axis("dilation", dilation, len(sizes))
    for axis, (n, b, d) in enumerate(zip(sizes, boxes, steps, strict=True)):
        if not (1 <= d <= n and 1 <= b <= -(-n // d)):
            raise RegardError(f"axis {axis} of {n} cells takes no box of {b} with dilation {d}")
    return Tiling(sizes, boxes, steps)


@dataclass(frozen=True)
class Windows(Rule):
    """Keys inside a window of the query on every axis, over the slots of `tiling`.

    Args:
        tiling: which cell a position is.
        dilation: on each axis a query sees only keys of its own residue; windows count among those.
        spans: one an axis.
    """

    tiling: Tiling
    dilation: tuple[int, ...]
    spans: tuple[Span, ...]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether queries in slots `q` see keys in slots `k`, elementwise."""
        seen = (q >= 0) & (k >= 0) & (q < self.tiling.slots) & (k < self.tiling.slots)
        axes = zip(self.tiling.cells(q), self.tiling.cells(k), self.tiling.grid, self.dilation, self.spans, strict=True)
        for x, y, size, d, span in axes:
            residue, index = x % d, y // d
            first, last = span(x // d, (size - residue + d - 1) // d)
            seen = seen & (y % d == residue) & (first <= index) & (index <= last) & (x < size) & (y < size)
        return seen

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        """Whether any, and whether all queries of slots `q_low..q_high` may see keys of slots `k_low..k_high`."""
        top = self.tiling.slots
        some = (q_high >= 0) & (k_high >= 0) & (q_low < top) & (k_low < top)
        every = (q_low >= 0) & (k_low >= 0) & (q_high < top) & (k_high < top)
        queries, keys = self._boxes(q_low, q_high), self._boxes(k_low, k_high)
        for query, key, size, d, span in zip(queries, keys, self.tiling.grid, self.dilation, self.spans, strict=True):
            (g_low, g_high), (u_low, u_high) = query
            (h_low, h_high), (v_low, v_high) = key
            # A class of a larger residue is shorter by one cell or as long.
            longest, shortest = (size - g_low + d - 1) // d, (size - g_high + d - 1) // d
            first, last = span(u_low, shortest)[0], span(u_high, longest)[1]
            some = some & (g_low <= h_high) & (h_low <= g_high) & (first <= v_high) & (v_low <= last)
            some = some & (g_low + d * u_low < size) & (h_low + d * v_low < size)
            one = (g_low == g_high) & (h_low == h_high) & (g_low == h_low)
            inside = (g_low + d * u_high < size) & (h_low + d * v_high < size)
            reached = (span(u_high, longest)[0] <= v_low) & (v_high <= span(u_low, longest)[1])
            every = every & one & inside & reached
        return some, some & every

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        """How cells lie in both blocks, and the edges of windows that cut them, by axis."""
        if not q_low.numel():
            return ()
        rows, real, of_row = self._runs(q_low, q_high)
        keys, shown, of_key = self._runs(k_low, k_high)
        looks, shows, numbers = [real], [shown], []
        axes = (self.tiling.cells(rows), self.tiling.cells(keys), self.tiling.grid, self.dilation, self.spans)
        for x, y, size, d, span in zip(*axes, strict=True):
            real, shown = real & (x < size), shown & (y < size)
            residue, u, v = x % d, x // d, y // d
            start, other = u[:, :1], v[:, :1]
            looks.append(residue.where(real, -1))
            shows += [(y % d).where(shown, -1), (v - other).where(shown, -1)]
            apart = start[of_row, 0] - other[of_key, 0]
            first, last = span(u, (size - residue + d - 1) // d)
            # An edge that no key of the block is beyond cuts nothing, wherever it lies.
            late = first.where(real, -1).amax(1)[of_row] > v.where(shown, size).amin(1)[of_key]
            early = last.where(real, size).amin(1)[of_row] < v.where(shown, -1).amax(1)[of_key]
            for edge, cuts in ((first, late), (last, early)):
                shape = _classes((edge - start).where(real, 0))[of_row]
                numbers += [shape.where(cuts, -1), apart.where(cuts, 0)]
        ways = (_classes(torch.cat(looks, 1))[of_row], _classes(torch.cat(shows, 1))[of_key])
        return tuple(number.view_as(q_low) for number in (*ways, *numbers))

    def _runs(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of each different run `low..high`, `[n, longest]`, which of them there are, and the run of each."""
        runs, back = (low.long() * 2**32 + high).flatten().unique(return_inverse=True)
        first, last = (runs // 2**32)[:, None], (runs % 2**32)[:, None]
        slots = first + torch.arange(int((last - first).max()) + 1, device=low.device)
        return slots, (slots <= last) & (slots < self.tiling.slots), back

    def _boxes(self, low: Tensor, high: Tensor) -> list[tuple[Range, Range]]:
        """`Tiling.hull` in residues and indices of this pattern's dilation."""
        found = []
        top = self.tiling.slots - 1
        hull = self.tiling.hull(low.clamp(0, top), high.clamp(0, top))
        for (residue, index), own, d in zip(hull, self.tiling.dilation, self.dilation, strict=True):
            if own == d:
                found.append((residue, index))
                continue
            x, y = residue[0] + own * index[0], residue[1] + own * index[1]
            u, v = x // d, y // d
            # Cells that share their index differ in residue alone; others may have every residue between them.
            near = u == v
            found.append(((torch.where(near, x % d, 0), torch.where(near, y % d, d - 1)), (u, v)))
        return found

    def __repr__(self) -> str:
        return f"windows on {'x'.join(map(str, self.tiling.grid))}: {', '.join(map(repr, self.spans))}"


def _classes(rows: Tensor) -> Tensor:
    """Which rows of a matrix are equal, as numbers `[rows]`."""
    return rows.unique(dim=0, return_inverse=True)[1]


def windows(
    grid: tuple[int, ...], spans: Sequence[Span], dilation: Sequence[int], box: int | Sequence[int] | None
) -> Pattern:
    """A Pattern over the tokens of `grid`: one window an axis, two-sided; over slots in tiles of `box` where given."""
    numbering = raster(grid) if box is None else tiling(grid, box, dilation)
    return Pattern((Windows(numbering, tuple(dilation), tuple(spans)),), cut=False)
