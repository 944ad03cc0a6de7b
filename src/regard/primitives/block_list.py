"""Block lists: what a kernel reads of a `Pattern`, without a tensor of rows x keys.

Rows and keys are cut into blocks of `size = (M, N)`. For every block of rows, `index` lists the blocks of keys that any
of its rows sees: those that are seen whole first, then those that are cut. How a block is cut is one row of
`bounds` (each row of the block sees one interval of its keys) or of `bits` (anything else); equal cuts share a row.

`build` asks each rule which ranges of positions it settles (`Rule.cover`), and looks at the pairs of those blocks only
that it leaves open and that are not known to be cut as another one is (`Rule.traits`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.rules import Rule
from regard.primitives.cuts import EMPTY, WHOLE, classes, cuts, doubled, joined, unpack

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Rows and keys a block may have.
SIZES = ((16, 32, 64, 128), (32, 64, 128))
# Pairs of blocks whose ranges are asked for together.
LIMIT = 2**22
# Block lists that are kept.
KEPT = 8


Lists = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class BlockList:
    """Which blocks of keys each block of rows sees, and how the cut ones are cut.

    Args:
        size: `(M, N)`, rows and keys a block.
        rows: number of rows; those past it in the last block may be given anything, and are not to be stored.
        keys: number of keys; those past it are never seen, so a last block that is not filled is cut.
        full: `[1|B, 1|Hk|H, Mb]` int32, how many entries of `index` are whole. They come first.
        count: the same shape, all entries.
        index: `[.., Mb, n]` int32, blocks of keys, ascending among whole and among cut ones; 0 beyond `count`. A
            block may be listed twice, cut in two ways that share no pair.
        part: `[.., Mb, n]` int32: -1 whole; `p >= 0`: cut as row p of `bounds` says; `-2 - p`: as row p of `bits`.
        bounds: `[P, M, 2]` int16: row i of the block sees its keys `lo <= j < hi` (0, 0 where it sees none).
        bits: `[P, M, N / 32]` int32: bit `j % 32` of word `j // 32` says whether row i sees key j; P is 0 where no
            block needs bits.
        by_key: whether `full`, `count`, `index` and `part` go by block of keys (`[.., Nb, n]`, `index` naming blocks of
            rows) instead; `bounds` and `bits` go by row always.
        chosen: whether it was made at run time from whole blocks, so that it is turned without a look at the device.
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
    chosen: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """`(Mb, Nb)`: how many blocks of rows and of keys there are."""
        return -(-self.rows // self.size[0]), -(-self.keys // self.size[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.full, self.count, self.index, self.part, self.bounds, self.bits))

    @cached_property
    def density(self) -> float:
        """Share of the blocks of rows x keys that are listed, mean over lists; reads the device once."""
        row_blocks, key_blocks = self.blocks
        return self.count.sum().item() / (self.count.shape[0] * self.count.shape[1] * row_blocks * key_blocks)

    def turned(self) -> "BlockList":
        """The same by block of keys, or back; made once."""
        return self._turned

    @cached_property
    def _turned(self) -> "BlockList":
        if self.chosen and not self.by_key:
            return self._turned_table()
        shape = (len(self.count), 1, self.blocks[0 if self.by_key else 1])
        # What is kept may be used later where gradients are wanted.
        with torch.inference_mode(False):
            made = []
            # One head at a time: entries take a hundred bytes each while they are sorted.
            for h in range(self.count.shape[1]):
                lead, block, other, part = self.entries(slice(h, h + 1))
                made.append(listed(lead, other, block, part, shape))
            full, count, index, part = beside(made)
            return replace(self, full=full, count=count, index=index, part=part, by_key=not self.by_key)

    def _turned_table(self) -> "BlockList":
        """A chosen list by block of keys, with room for all rows in each."""
        (row_blocks, key_blocks), device = self.blocks, self.index.device
        used = torch.arange(self.index.shape[-1], device=device) < self.count[..., None]
        shape = (*self.count.shape, key_blocks + 1)
        table = torch.zeros(shape, dtype=torch.bool, device=device)
        table = table.scatter_(-1, torch.where(used, self.index, key_blocks).long(), True)
        # Kernels read what is made of it line by line.
        table = table[..., :key_blocks].mT.contiguous()
        rows = torch.arange(row_blocks, dtype=torch.int32, device=device)
        index = torch.where(table, rows, row_blocks).sort(-1).values
        count = table.sum(-1, dtype=torch.int32)
        full = count.clone()
        part = torch.full_like(index, WHOLE)
        if self.keys % self.size[1]:
            full[..., -1] = 0
            part[..., -1, :] = torch.where(index[..., -1, :] < row_blocks, 0, WHOLE)
        index = index.where(index < row_blocks, 0)
        return replace(self, full=full, count=count, index=index, part=part, by_key=True)

    def entries(self, heads: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every entry once: list (batch and head), the block whose list it is in, the block it names, its part."""
        count, index, part = (x[:, heads] for x in (self.count, self.index, self.part))
        used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        b, h, block, _ = used.nonzero().unbind(1)
        return b * count.shape[1] + h, block, index[used].long(), part[used].long()

    def to_dense(self) -> Tensor:
        """Who sees whom: bool `[1|B, 1|Hk|H, rows, keys]`. For tests: it is what block lists avoid."""
        (M, N), (row_blocks, key_blocks) = self.size, self.blocks
        lead, row, column, part = self.entries()
        if self.by_key:
            row, column = column, row
        masks = torch.ones(len(part), M, N, dtype=torch.bool, device=part.device)
        j = torch.arange(N, device=part.device)
        spans, others = part >= 0, part < WHOLE
        low, high = self.bounds[part[spans]].unbind(-1)
        masks[spans] = (low[..., None] <= j) & (j < high[..., None])
        masks[others] = unpack(self.bits[-2 - part[others]])
        batch, heads = self.count.shape[:2]
        dense = torch.zeros(batch * heads, row_blocks, key_blocks, M, N, dtype=torch.uint8, device=part.device)
        dense = dense.index_put_((lead, row, column), masks.byte(), accumulate=True).bool()
        dense = dense.transpose(2, 3).reshape(batch, heads, row_blocks * M, key_blocks * N)
        return dense[:, :, : self.rows, : self.keys]

    @staticmethod
    def from_table(table: Tensor, size: tuple[int, int], rows: int, keys: int, most: int | None = None) -> "BlockList":
        """Whole blocks where `table` is True, chosen at run time; no value is read.

        Args:
            table: bool `[1|B, 1|Hk|H, Mb, Nb]`.
            size: `(M, N)`.
            rows: number of rows, in `Mb` blocks.
            keys: number of keys, in `Nb` blocks.
            most: no block of rows sees more blocks than this (a promise); None: all of them.

        Raises:
            RegardError: `table` is not bool or of another shape, or such blocks do not exist.
        """
        size = check_size(size)
        blocks = (-(-rows // size[0]), -(-keys // size[1]))
        if table.dtype != torch.bool or table.dim() != 4 or tuple(table.shape[2:]) != blocks:
            raise RegardError(
                f"a table of blocks must be bool [B, H, {blocks[0]}, {blocks[1]}] for {rows} rows and {keys} keys in "
                f"blocks of {size}, got {table.dtype} {list(table.shape)}"
            )
        columns = torch.arange(blocks[1], device=table.device)
        index = torch.where(table, columns, blocks[1]).sort(-1).values[..., :most]
        return BlockList.from_index(index, size, rows, keys)

    @staticmethod
    def from_index(index: Tensor, size: tuple[int, int], rows: int, keys: int) -> "BlockList":
        """Whole blocks that `index` names, chosen at run time; no value is read, and nothing is checked.

        Args:
            index: integer `[1|B, 1|Hk|H, Mb, n]`, blocks of keys, ascending; `Nb` where there are no more.
            size: `(M, N)`.
            rows: number of rows, in `Mb` blocks.
            keys: number of keys, in `Nb` blocks.
        """
        blocks, short = -(-keys // size[1]), keys % size[1]
        used = index < blocks
        count = used.sum(-1, dtype=torch.int32)
        # Only the last block of keys can be cut, and it is the last of its row.
        cut = (index == blocks - 1) & bool(short)
        bounds = torch.zeros(1, size[0], 2, dtype=torch.int16, device=index.device)
        bounds[..., 1] = short
        bits = torch.zeros(0, size[0], size[1] // 32, dtype=torch.int32, device=index.device)
        full, part = count - cut.sum(-1, dtype=torch.int32), torch.where(cut, 0, WHOLE).int()
        return BlockList(size, rows, keys, full, count, index.where(used, 0).int(), part, bounds, bits, chosen=True)

    @staticmethod
    def from_block_mask(mask: "BlockMask") -> "BlockList":
        """FlexAttention's `BlockMask` as a block list; its partial blocks are evaluated.

        Raises:
            RegardError: its blocks are of a size that block lists do not have.
        """
        from regard.primitives.block_mask import read

        return read(mask)

    def to_block_mask(self, heads: int | None = None) -> "BlockMask":
        """FlexAttention's `BlockMask` of the same pairs.

        Args:
            heads: query heads, a multiple of the lists'; None: as many as there are lists.

        Raises:
            RegardError: the head counts disagree, or the list goes by block of keys.
        """
        from regard.primitives.block_mask import written

        return written(self, heads)


def listed(lead: Tensor, block: Tensor, other: Tensor, part: Tensor, shape: tuple[int, int, int]) -> Lists:
    """`(full, count, index, part)` of entries in any order: list `lead`, its `block` names block `other`, cut `part`.

    `shape` is (batch, heads, blocks); all four are flat and of one length.
    """
    batch, heads, blocks = shape
    lists, widest = batch * heads * blocks, int(other.max()) + 1 if len(other) else 1
    group = lead * blocks + block
    order = ((group * 2 + (part != WHOLE)) * widest + other).argsort(stable=True)
    group, other, part = group[order], other[order], part[order]
    count = torch.bincount(group, minlength=lists)
    full = torch.bincount(group[part == WHOLE], minlength=lists)
    slot = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
    n = max(int(count.max()) if lists else 0, 1)
    index = torch.zeros(lists, n, dtype=torch.int32, device=group.device)
    parts = torch.full_like(index, WHOLE)
    index[group, slot] = other.int()
    parts[group, slot] = part.int()
    return full.int().view(shape), count.int().view(shape), index.view(*shape, n), parts.view(*shape, n)


def beside(lists: Sequence[Lists]) -> Lists:
    """Lists of several heads as one, as wide as the widest."""
    full, count = (torch.cat([one[field] for one in lists], 1) for field in (0, 1))
    widest = max(one[2].shape[-1] for one in lists)
    index, part = (
        torch.cat([F.pad(one[field], (0, widest - one[field].shape[-1]), value=unused) for one in lists], 1)
        for field, unused in ((2, 0), (3, WHOLE))
    )
    return full, count, index, part


def build(
    pattern: Pattern,
    q_pos: Tensor | int,
    k_pos: Tensor | int,
    size: tuple[int, int],
    heads: int | None = None,
    device: torch.device | str | None = None,
) -> BlockList:
    """The block list of `pattern` over positions.

    Lists of two numbers of positions are kept for the last few calls, until a tensor of the pattern is written to.

    Args:
        pattern: who sees whom.
        q_pos: integer `[1|B, Tq]`; negative: padding, an empty row. Or, with a number of keys, a number of rows: they
            are the last ones of the keys' positions.
        k_pos: integer `[1|B, Tk]` or `[1|B, Hk, Tk]`; negative: padding, never seen. A number n: positions `0..n-1`.
        size: `(M, N)`, rows and keys a block.
        heads: heads wanted, a multiple of the pattern's; None: the pattern's own. One list serves all where they agree.
        device: where the list is made and lies; None: where `q_pos` lies, or the CPU.

    Raises:
        RegardError: blocks of a size that does not exist, head counts that disagree, or positions of another shape.
    """
    size = check_size(size)
    if isinstance(q_pos, int) and isinstance(k_pos, int):
        if q_pos < 1 or k_pos < 1:
            raise RegardError(f"a block list has 1 row and 1 key at least, got {q_pos} rows and {k_pos} keys")
        device = device if isinstance(device, torch.device) else torch.device(device or "cpu")
        versions = pattern.versions()
        make = _kept if None not in versions else _kept.__wrapped__
        return make(pattern, q_pos, k_pos, size, heads, device, versions)
    if isinstance(q_pos, int) or isinstance(k_pos, int):
        raise RegardError("pass positions of queries and keys as two tensors or as two numbers of them")
    device = torch.device(device or q_pos.device)
    with torch.inference_mode(False):
        return _build(pattern, q_pos.to(device), k_pos.to(device), size, heads)


@lru_cache(KEPT)
def _kept(
    pattern: Pattern,
    rows: int,
    keys: int,
    size: tuple[int, int],
    heads: int | None,
    device: torch.device,
    versions: tuple[int | None, ...],
) -> BlockList:
    # What is kept may be used later where gradients are wanted.
    with torch.inference_mode(False):
        at = torch.arange(min(keys - rows, 0), keys, device=device)[None]
        return _build(pattern, at[:, -rows:], at[:, -keys:], size, heads)


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """`size`; raises RegardError where such blocks do not exist."""
    if len(size) != 2 or size[0] not in SIZES[0] or size[1] not in SIZES[1]:
        rows, keys = (", ".join(map(str, sizes)) for sizes in SIZES)
        raise RegardError(f"blocks have {rows} rows and {keys} keys, got {tuple(size)}")
    return int(size[0]), int(size[1])


class Side(NamedTuple):
    """The positions of rows or of keys, by block: `[b, blocks]`, or `[b, blocks, size]` for the first three."""

    at: Tensor  # positions; where there is none, one that the block has
    real: Tensor  # neither padding nor past the end
    loose: Tensor  # a row past the end
    low: Tensor
    high: Tensor  # of the real ones; below `low` where there is none
    filled: Tensor  # whether nothing stands against the whole block
    kind: Tensor  # where the real ones lie, if they are consecutive; else the block's own number


def _side(pos: Tensor, size: int, is_rows: bool) -> Side:
    count = pos.shape[-1]
    blocks = -(-count // size)
    at = F.pad(pos, (0, blocks * size - count), value=-1).unflatten(-1, (blocks, size))
    past = (torch.arange(blocks * size, device=pos.device) >= count).view(blocks, size).expand_as(at)
    real, slot = at >= 0, torch.arange(size, device=pos.device)
    some, many = real.any(-1), real.sum(-1)
    high = at.amax(-1).clamp(min=-1)
    low = at.masked_fill(~real, torch.iinfo(at.dtype).max).amin(-1).where(some, 0)
    first = real.int().argmax(-1)
    even = (~real | (at - low[..., None] == slot - first[..., None])).all(-1) & (high - low + 1 == many)
    own = torch.arange(low.numel(), device=pos.device).view_as(low)
    kind = torch.where(even, first * (size + 1) + many, -1 - own)
    loose = past if is_rows else torch.zeros_like(past)
    return Side(at.where(real, low[..., None]), real, loose, low, high, (real | loose).all(-1), kind)


def _build(pattern: Pattern, q_pos: Tensor, k_pos: Tensor, size: tuple[int, int], heads: int | None) -> BlockList:
    lists = _lists(pattern, q_pos, k_pos, heads)
    rows = _side(q_pos.long(), size[0], True)
    spread = k_pos.dim() == 3 and k_pos.shape[1] > 1
    keys = [_side(k.long(), size[1], False) for k in (k_pos.unbind(1) if k_pos.dim() == 3 else [k_pos])]
    rules = pattern.relations() * (lists if pattern.heads is None else 1)
    places: dict[tuple[Rule, int], int] = {}
    of = [places.setdefault((rule, h if spread else 0), len(places)) for h, rule in enumerate(rules)]
    found = [_search(rule, rows, keys[h]) for rule, h in places]
    ats, parts, bounds, bits = doubled([at for at, _ in found], *joined([cut for _, cut in found]))
    batch, blocks = max(len(q_pos), len(k_pos)), rows.low.shape[1]
    made = [listed(b, r, c, part, (batch, 1, blocks)) for (b, r, c), part in zip(ats, parts, strict=True)]
    of = of if len(made) > 1 else of[:1]
    full, count, index, part = beside([made[i] for i in of])
    if heads is not None and 1 < len(of) < heads:
        full, count, index, part = (x.repeat_interleave(heads // len(of), 1) for x in (full, count, index, part))
    return BlockList(size, q_pos.shape[1], k_pos.shape[-1], full, count, index, part, bounds, bits)


def _lists(pattern: Pattern, q_pos: Tensor, k_pos: Tensor, heads: int | None) -> int:
    """How many heads differ, by rule or by keys, at most.

    Raises:
        RegardError: as `build` says.
    """
    if q_pos.dim() != 2 or k_pos.dim() not in (2, 3) or 0 in (*q_pos.shape, *k_pos.shape):
        raise RegardError(f"positions must be [B, Tq] and [B, Tk], got {list(q_pos.shape)}, {list(k_pos.shape)}")
    if 1 != len(q_pos) != len(k_pos) != 1:
        raise RegardError(f"positions of {len(q_pos)} rows of a batch of queries and {len(k_pos)} of keys")
    held = k_pos.shape[1] if k_pos.dim() == 3 else 1
    if held > 1 and pattern.heads not in (None, held):
        raise RegardError(f"a pattern of {pattern.heads} heads over keys of {held} heads")
    count = max(held, pattern.heads or 1)
    if heads is not None and heads % count:
        raise RegardError(f"{count} heads of the pattern or its keys do not divide {heads} heads")
    return count


def _search(rule: Rule, rows: Side, keys: Side) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The blocks that `rule` opens, as (batch, row, column), and `cuts` of them."""
    whole, open_ = _settled(rule, rows, keys)
    b, r, c = open_.unbind(1)
    of_rows, of_keys = (b.clamp(max=len(rows.low) - 1), r), (b.clamp(max=len(keys.low) - 1), c)
    ranges = (rows.low[of_rows], rows.high[of_rows], keys.low[of_keys], keys.high[of_keys])
    kinds = (rows.kind[of_rows], keys.kind[of_keys])
    alike, first = _alike((*kinds, *rule.traits(*ranges)), len(b), b.device)

    def masks(start: int, stop: int) -> tuple[Tensor, Tensor]:
        some = first[start:stop]
        row, key = tuple(x[some] for x in of_rows), tuple(x[some] for x in of_keys)
        mask = rule(rows.at[row][:, :, None], keys.at[key][:, None])
        return mask & rows.real[row][:, :, None] & keys.real[key][:, None], rows.loose[row]

    size = (rows.at.shape[-1], keys.at.shape[-1])
    part, bounds, bits = cuts(masks, len(first), size, b.device)
    part = part[alike]
    kept = part != EMPTY
    b, r, c = torch.cat((whole, open_[kept])).unbind(1)
    return (b, r, c), (torch.cat((torch.full_like(whole[:, 0], WHOLE), part[kept])), bounds, bits)


def _settled(rule: Rule, rows: Side, keys: Side) -> tuple[Tensor, Tensor]:
    """Blocks that `rule` opens whole, and those whose pairs have to be looked at: both `[E, 3]`, batch, row, column."""
    batch, count, columns = max(len(rows.low), len(keys.low)), rows.low.shape[1], keys.low.shape[1]
    step, whole, open_ = max(1, LIMIT // (batch * columns)), [], []
    for start in range(0, count, step):
        part = slice(start, start + step)
        low, high, filled = (x[:, part, None] for x in (rows.low, rows.high, rows.filled))
        some, every = rule.cover(low, high, keys.low[:, None], keys.high[:, None])
        some = some & (low <= high) & (keys.low <= keys.high)[:, None]
        every = every & filled & keys.filled[:, None]
        for found, blocks in ((whole, some & every), (open_, some & ~every)):
            at = blocks.expand(batch, -1, -1).nonzero()
            at[:, 1] += start
            found.append(at)
    return torch.cat(whole), torch.cat(open_)


def _alike(numbers: tuple[Tensor, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Classes of the entries whose `numbers` all agree: which class each of `count` is in, and an entry of each."""
    code, span = torch.zeros(count, dtype=torch.long, device=device), 1
    if not count:
        return code, code
    numbers = tuple(number.expand(count) for number in numbers)
    lows, highs = torch.stack([torch.stack(n.aminmax()) for n in numbers], 1).tolist()
    for number, low, high in zip(numbers, lows, highs, strict=True):
        width = high - low + 1
        if width > 2**31:
            number, width, low = classes(number)[0], count, 0
        if span * width > 2**62:
            code, span = classes(code)[0], count
        code, span = code * width + (number - low), span * width
    return classes(code)
