"""Tokens on a grid of chunks: every sequence continues in the chunk it left open, whatever padding stands between."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.errors import RegardError


class Grid(NamedTuple):
    """Where T tokens stand once chunks begin at multiples of their length.

    `lead` slots before the first token belong to the open chunk, which is chunk `first` of the sequence: one number
    for all rows, or `[B]` each. `at [B, T]` is the slot of each token, `slots` for padding; None: from `lead` on.
    `ends [B]` is where the last token stands (-1: nowhere), None where `at` is.
    """

    slots: int
    chunk: int
    lead: int | Tensor
    first: int | Tensor
    at: Tensor | None
    ends: Tensor | None

    def place(self, x: Tensor, fill: float) -> Tensor:
        """`x [B, H, T, D]` on the grid, `[B, H, slots, D]`, with `fill` where no token stands."""
        if self.at is not None:
            empty = x.new_full((*x.shape[:2], self.slots + 1, x.shape[3]), fill)
            return empty.scatter(2, self.at[:, None, :, None].expand_as(x), x)[:, :, :-1]
        assert isinstance(self.lead, int)
        free = (self.lead, self.slots - self.lead - x.shape[2])
        return F.pad(x, (0, 0, *free), value=fill) if any(free) else x

    def take(self, x: Tensor, tokens: int) -> Tensor:
        """`place` undone: `[B, H, T, D]`, zero at padding."""
        if self.at is not None:
            return F.pad(x, (0, 0, 0, 1)).take_along_dim(self.at[:, None, :, None], 2)
        assert isinstance(self.lead, int)
        return x if x.shape[2] == tokens else x[:, :, self.lead : self.lead + tokens]

    def enter(self, x: Tensor, before: Tensor | None) -> Tensor:
        """`x [B, H, slots, D]` plus `before [B, H, D]` in the slot before the first token, where the chunk was open."""
        if before is None or (isinstance(self.lead, int) and self.lead == 0):
            return x
        lead = torch.full((x.shape[0],), self.lead, device=x.device) if isinstance(self.lead, int) else self.lead
        index = (lead - 1).clamp(min=0)[:, None, None, None].expand(-1, x.shape[1], 1, x.shape[3])
        return x.scatter_add(2, index, (before * (lead > 0)[:, None, None])[:, :, None].to(x.dtype))

    def last(self, x: Tensor, tokens: int) -> Tensor:
        """What stands in `x [B, H, slots, D]` at the last token, `[B, H, D]`."""
        if self.ends is not None:
            return x.take_along_dim(self.ends.clamp(min=0)[:, None, None, None], 2)[:, :, 0]
        assert isinstance(self.lead, int)
        return x[:, :, self.lead + tokens - 1]

    @property
    def count(self) -> Tensor | None:
        """Real tokens `[B]` up to the last one, None where `at` is."""
        return None if self.ends is None else self.ends + 1 + self.first * self.chunk

    def entries(self, new: Tensor, old: Tensor | None, total: int) -> Tensor:
        """One entry a chunk, `[B, H, total, D]`, in memory of its own.

        `new [B, H, slots / chunk, D]` are those of this grid, `old` those of the sequence so far; a chunk that
        was open is replaced.
        """
        if self.ends is None:
            return new.clone() if old is None else torch.cat([old[:, :, : self.first], new], 2)
        numbers = torch.arange(new.shape[2], device=new.device)
        assert isinstance(self.first, Tensor)
        at = self.first[:, None] + numbers
        at = at.masked_fill(numbers * self.chunk > self.ends[:, None], total)
        empty = new.new_zeros(*new.shape[:2], total + 1, new.shape[3])
        if old is not None:
            empty[:, :, : old.shape[2]] = old
        return empty.scatter(2, at[:, None, :, None].expand_as(new), new)[:, :, :-1].clone()


def grid(tokens: int, chunk: int, seen: int | Tensor, mask: Tensor | None) -> Grid:
    """The grid of `tokens` more tokens of sequences that have `seen` (one number, or `[B]`), `mask [B, T]` as usual."""
    if isinstance(seen, int) and mask is None:
        lead = seen % chunk
        return Grid(-(-(lead + tokens) // chunk) * chunk, chunk, lead, seen // chunk, None, None)
    if mask is None:
        assert isinstance(seen, Tensor)
        mask = torch.ones(len(seen), tokens, dtype=torch.bool, device=seen.device)
    if isinstance(seen, int):
        seen = torch.full((len(mask),), seen, device=mask.device)
    slots = -(-(tokens + chunk - 1) // chunk) * chunk
    lead = seen % chunk
    at = lead[:, None] + mask.cumsum(1) - 1
    return Grid(slots, chunk, lead, seen // chunk, at.masked_fill(~mask, slots), lead + mask.sum(1) - 1)


class Packed(NamedTuple):
    """Packed sequences as rows: token t of the pack is token `offset[t]` of row `row[t]`; `mask [N, longest]`."""

    index: Tensor
    row: Tensor
    offset: Tensor
    mask: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """`x [1, H, T, D]` as `[N, H, longest, D]`; padding holds other tokens."""
        return x[0][:, self.index].transpose(0, 1)

    def pack(self, x: Tensor) -> Tensor:
        """`rows` undone."""
        return x[self.row, :, self.offset].transpose(0, 1)[None]


def packed(cu_seqlens: Tensor, tokens: int) -> Packed:
    """The rows that `cu_seqlens [N + 1]` cuts `tokens` tokens into. Reads `cu_seqlens` from its device.

    Raises:
        RegardError: it is not a list of whole numbers from 0 up to `tokens`, each larger than the one before.
    """
    cuts = cu_seqlens.tolist() if cu_seqlens.dim() == 1 and not cu_seqlens.is_floating_point() else []
    rising = all(a < b for a, b in pairwise(cuts))
    if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != tokens or not rising:
        shown = cuts or f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise RegardError(f"cu_seqlens must be whole numbers that rise from 0 to T = {tokens}, got {shown}")
    starts = torch.tensor(cuts[:-1], device=cu_seqlens.device)
    lengths = torch.tensor(cuts[1:], device=cu_seqlens.device) - starts
    places = torch.arange(max(b - a for a, b in pairwise(cuts)), device=starts.device)
    row = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), lengths, output_size=tokens)
    offset = torch.arange(tokens, device=starts.device) - starts[row]
    index = (starts[:, None] + places).clamp(max=tokens - 1)
    return Packed(index, row, offset, places < lengths[:, None])
