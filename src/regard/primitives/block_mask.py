"""FlexAttention's `BlockMask` and block lists, both ways."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from regard.core.errors import RegardError
from regard.primitives.block_list import BlockList, check_size, listed
from regard.primitives.cuts import EMPTY, WHOLE, cuts, doubled, joined


def read(mask: BlockMask) -> BlockList:
    """`BlockList.from_block_mask`."""
    rows, keys = (int(length) for length in mask.seq_lengths)
    size = M, N = check_size(mask.BLOCK_SIZE)
    batch, heads, row_blocks = mask.kv_num_blocks.shape
    cut, whole = _entries(mask.kv_num_blocks, mask.kv_indices), mask.kv_num_blocks.new_zeros(0, 4)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        whole = _entries(mask.full_kv_num_blocks, mask.full_kv_indices)
    # FlexAttention hides keys past the end by itself; block lists say so.
    short = (whole[:, 3] + 1) * N > keys
    cut, whole, masked = torch.cat((cut, whole[short])), whole[~short], len(cut)
    at_row, at_key = (torch.arange(n, device=cut.device) for n in size)
    sees = torch.vmap(torch.vmap(torch.vmap(mask.mask_mod, (None, None, None, 0)), (None, None, 0, None)))

    def masks(start: int, stop: int) -> tuple[Tensor, Tensor]:
        b, h, r, c = cut[start:stop].unbind(1)
        q, k = r[:, None] * M + at_row, c[:, None] * N + at_key
        seen = sees(b, h, q.clamp(max=rows - 1), k.clamp(max=keys - 1))
        seen = seen | (torch.arange(start, stop, device=b.device) >= masked)[:, None, None]
        return seen & (k < keys)[:, None], q >= rows

    part, bounds, bits = cuts(masks, len(cut), size, cut.device)
    kept = part != EMPTY
    b, h, r, c = torch.cat((whole, cut[kept])).unbind(1)
    part = torch.cat((torch.full_like(whole[:, 0], WHOLE), part[kept]))
    ((b, h, r, c),), (part,), bounds, bits = doubled([(b, h, r, c)], *joined([(part, bounds, bits)]))
    lists = listed(b * heads + h, r, c, part, (batch, heads, row_blocks))
    return BlockList(size, rows, keys, *lists, bounds, bits)


def _entries(count: Tensor, index: Tensor) -> Tensor:
    """`[E, 4]`: batch row, head, block of rows, block of keys."""
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    at = used.nonzero()
    return torch.cat((at[:, :3], index[used][:, None].long()), 1)


def written(blocks: BlockList, heads: int | None) -> BlockMask:
    """`BlockList.to_block_mask`."""
    if blocks.by_key:
        raise RegardError("a block list by block of keys is no BlockMask; pass the one that it was turned from")
    batch, lists, row_blocks = blocks.count.shape
    if heads is not None and heads % lists:
        raise RegardError(f"block lists of {lists} heads do not divide {heads} heads")
    group = 1 if heads is None or lists == 1 else heads // lists
    (M, N), (_, key_blocks) = blocks.size, blocks.blocks
    lead, row, column, part = blocks.entries()
    # Entries of a block that is listed twice lie side by side.
    place = (lead * row_blocks + row) * key_blocks + column
    again = torch.zeros_like(place, dtype=torch.bool)
    again[1:] = place[1:] == place[:-1]
    table = torch.full((2, batch, lists, row_blocks, key_blocks), EMPTY, device=part.device)
    table[again.long(), lead // lists, lead % lists, row, column] = part
    twice = bool(again.any())

    bits = blocks.bits if len(blocks.bits) else blocks.bits.new_zeros(1, *blocks.bits.shape[1:])

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = (b if batch > 1 else 0, h // group if lists > 1 else 0, q_idx // M, kv_idx // N)
        i, j = q_idx % M, kv_idx % N

        def seen(own: Tensor) -> Tensor:
            bounds = blocks.bounds[own.clamp(min=0), i]
            word = bits[(-2 - own).clamp(0, len(bits) - 1), i, j // 32]
            bit = ((word >> (j % 32)) & 1).bool()
            inside = (bounds[..., 0] <= j) & (j < bounds[..., 1])
            return (own == WHOLE) | torch.where(own >= 0, inside, (own != EMPTY) & bit)

        return seen(table[0][at]) | seen(table[1][at]) if twice else seen(table[0][at])

    def numbered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        at = (lead[chosen], row[chosen], column[chosen])
        _, count, index, _ = listed(*at, torch.zeros_like(at[0]), (batch, lists, row_blocks))
        index = torch.nn.functional.pad(index, (0, key_blocks - index.shape[-1]))
        return count.repeat_interleave(group, 1), index.repeat_interleave(group, 1)

    some, every = numbered((part != WHOLE) & ~again), numbered(part == WHOLE)
    return BlockMask.from_kv_blocks(
        *some, *every, BLOCK_SIZE=(M, N), mask_mod=mask_mod, seq_lengths=(blocks.rows, blocks.keys)
    )
