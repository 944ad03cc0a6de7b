"""Rules that read a tensor: tables of blocks, lists of keys, documents. They are equal only to themselves."""

# Every `__call__`, `cover` and `origin` below is documented once, in `Rule`.
# ruff: noqa: D102

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.rules import Numbers, Pair, Rule

# Positions a cell of the counts that answer `cover`: the smallest block of a kernel.
CELL = 64
# Blocks that hold at most so many entries of a table are told apart by these entries, not by where they lie.
MOST = 64
BITS = 60


class Counts(NamedTuple):
    """Running counts `[rows + 1, columns + 1]` of the cells that hold any allowed pair, and of those that hold all."""

    some: Tensor
    every: Tensor
    cell: int

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        """As `Rule.cover`."""
        top, left = (x.div(self.cell, rounding_mode="floor") for x in (q_low, k_low))
        bottom, right = (x.div(self.cell, rounding_mode="floor") + 1 for x in (q_high, k_high))
        area = (bottom - top) * (right - left)
        rows, columns = (n - 1 for n in self.some.shape)
        top, bottom = top.clamp(0, rows), bottom.clamp(0, rows)
        left, right = left.clamp(0, columns), right.clamp(0, columns)

        def inside(counts: Tensor) -> Tensor:
            return counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]

        return inside(self.some) > 0, inside(self.every) == area


def _running(cells: Tensor) -> Tensor:
    return F.pad(cells.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))


def kept(rule: Rule, name: str, device: torch.device, make: Callable[[], Any]) -> Any:
    """What `make` made for this rule and device, made again once a tensor of the rule has changed."""
    key = (device, *versions(rule))
    if None in key:
        return make()
    found = rule.__dict__.get(name)
    if found is None or found[0] != key:
        found = (key, make())
        object.__setattr__(rule, name, found)
    return found[1]


def versions(rule: Rule) -> tuple[int | None, ...]:
    """What changes when a tensor of `rule` is written to; None where torch does not say."""
    return tuple(None if t.is_inference() else t._version for t in rule.tensors())


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

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        counts = kept(self, "_counts", q_low.device, lambda: self._count(q_low.device))
        return counts.cover(q_low, q_high, k_low, k_high)

    def _count(self, device: torch.device) -> Counts:
        table, side = self.table.to(device), max(1, CELL // self.size)
        some = every = table
        if side > 1:
            rows, columns = table.shape
            cells = F.pad(table, (0, -columns % side, 0, -rows % side))
            cells = cells.view(-(-rows // side), side, -(-columns // side), side)
            some, every = cells.any(1).any(-1), cells.all(1).all(-1)
        return Counts(_running(some), _running(every), side * self.size)

    def origin(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Numbers:
        size, (rows, columns) = self.size, self.table.shape
        top, left, bottom, right = (x.div(size, rounding_mode="floor") for x in (q_low, k_low, q_high, k_high))
        spans = torch.stack(((bottom - top).max(), (right - left).max())).tolist() if top.numel() else (0, 0)
        high, wide = (int(span) + 1 for span in spans)
        if high * wide > MOST:
            return q_low, k_low
        within = torch.arange(high * wide, device=top.device)
        i, j = top[..., None] + within // wide, left[..., None] + within % wide
        real = (i < rows) & (j < columns) & (i <= bottom[..., None]) & (j <= right[..., None])
        entries = self.table.to(top.device)[i.clamp(0, rows - 1), j.clamp(0, columns - 1)] & real
        words = [(part.long() << within[: part.shape[-1]]).sum(-1) for part in entries.split(BITS, -1)]
        return q_low % size, k_low % size, *words

    def tensors(self) -> Numbers:
        return (self.table,)

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

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        counts = kept(self, "_counts", q_low.device, lambda: self._count(q_low.device))
        return counts.cover(q_low, q_high, k_low, k_high)

    def _count(self, device: torch.device) -> Counts:
        index = self.index.to(device)
        columns = int(index.max()) // CELL + 1
        some = torch.zeros(-(-len(index) // CELL), max(columns, 1), dtype=torch.bool, device=device)
        row = torch.arange(len(index), device=device)[:, None].expand_as(index) // CELL
        used = index >= 0
        some[row[used], index[used] // CELL] = True
        counts = _running(some)
        return Counts(counts, torch.zeros_like(counts), CELL)

    def tensors(self) -> Numbers:
        return (self.index,)

    def __repr__(self) -> str:
        return f"indices {self.index.shape[0]}x{self.index.shape[1]}"


@dataclass(frozen=True, eq=False)
class Same(Rule):
    """`ids[q] == ids[k]`, nothing beyond `ids`."""

    ids: Tensor

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        last, ids = len(self.ids) - 1, self.ids.to(q.device)
        same = ids[q.clamp(0, last)] == ids[k.clamp(0, last)]
        return same & (q >= 0) & (q <= last) & (k >= 0) & (k <= last)

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        device, last = q_low.device, len(self.ids) - 1
        ids, run, ordered = kept(self, "_runs", device, lambda: self._run(device))
        ends = [x.clamp(0, last) for x in (q_low, q_high, k_low, k_high)]
        (q_first, q_last, k_first, k_last), runs = (ids[end] for end in ends), [run[end] for end in ends]
        even = (runs[0] == runs[1]) & (runs[2] == runs[3])
        some = (q_first <= k_last) & (k_first <= q_last) if ordered else ~even | (q_first == k_first)
        every = even & (q_first == k_first) & (q_high <= last) & (k_high <= last)
        return some & (q_low <= last) & (k_low <= last), every

    def _run(self, device: torch.device) -> tuple[Tensor, Tensor, bool]:
        """Ids, the number of the run of equal ids that each position is in, and whether ids never fall."""
        ids = self.ids.to(device)
        step = ids.diff()
        return ids, F.pad((step != 0).long().cumsum(0), (1, 0)), bool((step >= 0).all())

    def tensors(self) -> Numbers:
        return (self.ids,)

    def __repr__(self) -> str:
        return f"documents of {len(self.ids)}"
