"""Block lists: what a kernel reads of a `Pattern`, without a tensor of rows x keys.

Rows and keys are cut into blocks of `size = (M, N)`. For every block of rows, `index` lists the blocks of keys that any
of its rows sees: those that are seen whole first, then those that are cut. How a block is cut is one row of
`bounds` (each row of the block sees one interval of its keys) or of `bits` (anything else); equal cuts share a row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern

WHOLE = -1
SIZES = ((16, 32, 64, 128), (32, 64, 128))


@dataclass(frozen=True, eq=False)
class BlockList:
    """Which blocks of keys each block of rows sees, and how the cut ones are cut.

    Args:
        size: `(M, N)`, rows and keys a block.
        rows: number of rows; those past it in the last block may be given anything, and are not to be stored.
        keys: number of keys; those past it are never seen, so a last block that is not filled is cut.
        full: `[1|B, 1|Hk|H, Mb]` int32, how many entries of `index` are whole. They come first.
        count: the same shape, all entries.
        index: `[.., Mb, n]` int32, blocks of keys, ascending among whole and among cut ones; 0 beyond `count`.
        part: `[.., Mb, n]` int32: -1 whole; `p >= 0`: cut as row p of `bounds` says; `-2 - p`: as row p of `bits`.
        bounds: `[P, M, 2]` int16: row i of the block sees its keys `lo <= j < hi` (0, 0 where it sees none).
        bits: `[P, M, N / 32]` int32: bit `j % 32` of word `j // 32` says whether row i sees key j.
        by_key: whether `full`, `count`, `index` and `part` go by block of keys (`[.., Nb, n]`, `index` naming blocks of
            rows) instead; `bounds` and `bits` go by row always.
    """

    size: tuple[int, int]
    rows: int
    keys: int
    full: Tensor
    count: Tensor
    index: Tensor
    part: Tensor
    bounds: Tensor
    bits: Tensor
    by_key: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """`(Mb, Nb)`: how many blocks of rows and of keys there are."""
        return -(-self.rows // self.size[0]), -(-self.keys // self.size[1])

    def turned(self) -> "BlockList":
        """The same by block of keys (or back); made once."""
        return self._turned

    @cached_property
    def _turned(self) -> "BlockList":
        lead, row, column, part = self._entries()
        batch, heads = self.count.shape[:2]
        others = self.blocks[0 if self.by_key else 1]
        full, count, index, parts = listed(lead, column, row, part, (batch, heads, others))
        shared = (self.size, self.rows, self.keys, full, count, index, parts, self.bounds, self.bits)
        return BlockList(*shared, by_key=not self.by_key)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every entry once: list (batch and head), the block whose list it is in, the block it names, its part."""
        used = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        b, h, block, slot = used.nonzero().unbind(1)
        at = (b, h, block, slot)
        return b * self.count.shape[1] + h, block, self.index[at].long(), self.part[at]

    def to_dense(self) -> Tensor:
        """Who sees whom: bool `[1|B, 1|Hk|H, rows, keys]`. For tests: it is what block lists avoid."""
        (M, N), (row_blocks, key_blocks) = self.size, self.blocks
        lead, row, column, part = self._entries()
        if self.by_key:
            row, column = column, row
        masks = torch.ones(len(part), M, N, dtype=torch.bool, device=part.device)
        j = torch.arange(N, device=part.device)
        cut, odd = part >= 0, part < WHOLE
        bounds = self.bounds[part[cut].long()].int()
        masks[cut] = (bounds[..., :1] <= j) & (j < bounds[..., 1:])
        words = self.bits[(-2 - part[odd]).long()]
        masks[odd] = ((words[..., j // 32] >> (j % 32)) & 1).bool()
        batch, heads = self.count.shape[:2]
        dense = masks.new_zeros(batch * heads, row_blocks, key_blocks, M, N)
        dense[lead, row, column] = masks
        dense = dense.transpose(2, 3).reshape(batch, heads, row_blocks * M, key_blocks * N)
        return dense[:, :, : self.rows, : self.keys]


def listed(
    lead: Tensor, block: Tensor, other: Tensor, part: Tensor, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(full, count, index, part)` of entries in any order: list `lead`, its `block` names block `other`, cut `part`.

    `shape` is (batch, heads, blocks); all four are flat and of one length.
    """
    batch, heads, blocks = shape
    widest = int(other.max()) + 1 if len(other) else 1
    group = lead * blocks + block
    order = ((group * 2 + (part != WHOLE)) * widest + other).argsort()
    group, other, part = group[order], other[order], part[order]
    count = torch.bincount(group, minlength=batch * heads * blocks)
    full = torch.bincount(group[part == WHOLE], minlength=batch * heads * blocks)
    slot = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
    n = max(int(count.max()) if len(count) else 0, 1)
    index = torch.zeros(batch * heads * blocks, n, dtype=torch.int32, device=group.device)
    parts = torch.full_like(index, WHOLE)
    index[group, slot] = other.int()
    parts[group, slot] = part.int()
    lists = (batch, heads, blocks)
    return full.int().view(lists), count.int().view(lists), index.view(*lists, n), parts.view(*lists, n)


def build(
    pattern: Pattern,
    q_pos: Tensor,
    k_pos: Tensor,
    size: tuple[int, int],
    heads: int | None = None,
    device: torch.device | str | None = None,
) -> BlockList:
    """The block list of `pattern` over positions.

    Args:
        pattern: who sees whom.
        q_pos: integer `[1|B, Tq]`; negative: padding, an empty row.
        k_pos: integer `[1|B, Tk]` or `[1|B, Hk, Tk]`; negative: padding, never seen.
        size: `(M, N)`.
        heads: heads wanted, a multiple of the pattern's; None: the pattern's own, or 1.
        device: where the list lies; None: where `q_pos` does.

    Raises:
        RegardError: a block size that does not exist, or head counts that disagree.
    """
    if size[0] not in SIZES[0] or size[1] not in SIZES[1]:
        raise RegardError(f"blocks of {SIZES[0]} rows by {SIZES[1]} keys exist, got {size}")
    device = torch.device(device or q_pos.device)
    mask = pattern.allow(q_pos.to(device), k_pos.to(device), heads)
    (M, N), (batch, lists, rows, keys) = size, mask.shape
    row_blocks, key_blocks = -(-rows // M), -(-keys // N)
    mask = F.pad(mask, (0, key_blocks * N - keys, 0, row_blocks * M - rows))
    tiles = mask.view(batch * lists, row_blocks, M, key_blocks, N).transpose(2, 3)
    past = torch.arange(row_blocks * M, device=device).view(row_blocks, 1, M, 1) >= rows
    whole = (tiles | past).all(-1).all(-1)
    some = tiles.any(-1).any(-1)
    lead, row, column = some.nonzero().unbind(1)
    part = torch.full_like(lead, WHOLE)
    cut = ~whole[lead, row, column]
    part[cut], bounds, bits = cuts(tiles[lead[cut], row[cut], column[cut]])
    full, count, index, parts = listed(lead, row, column, part, (batch, lists, row_blocks))
    return BlockList(size, rows, keys, full, count, index, parts, bounds, bits)


def cuts(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How blocks `masks [E, M, N]` are cut: `(part [E], bounds [P, M, 2], bits [P, M, N / 32])`, equal ones once."""
    entries, M, N = masks.shape
    j = torch.arange(N, device=masks.device)
    high = torch.where(masks, j + 1, 0).amax(-1)
    low = torch.where(masks, j, N).amin(-1).where(high > 0, 0)
    run = (high - low == masks.sum(-1)).all(-1)
    part = torch.full((entries,), WHOLE, device=masks.device)
    bounds, part[run] = torch.stack([low, high], -1)[run].to(torch.int16).unique(dim=0, return_inverse=True)
    words = (masks[~run].view(-1, M, N // 32, 32).long() << (j % 32)[:32]).sum(-1).int()
    bits, odd = words.unique(dim=0, return_inverse=True)
    part[~run] = -2 - odd
    return part, bounds, bits
