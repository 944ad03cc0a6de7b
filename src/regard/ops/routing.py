"""Blocks of keys chosen for blocks of queries by content: tables, lists for kernels, and a form for any device."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.shapes import group_size
from regard.ops.attention import attend
from regard.primitives.block_list import BlockList


class Routing(NamedTuple):
    """Key blocks of every block of queries: `chosen [B, H, Mb, n]` ascending, `dropped [B, H, Mb, m]`, of `blocks`."""

    chosen: Tensor
    dropped: Tensor
    blocks: int

    def table(self, *, between: bool = False) -> Tensor:
        """Bool `[B, H, Mb, blocks]`: which are chosen, or which are neither chosen nor dropped."""
        shape = (*self.chosen.shape[:3], self.blocks)
        chosen = torch.zeros(shape, dtype=torch.bool, device=self.chosen.device).scatter_(-1, self.chosen, True)
        return ~chosen.scatter_(-1, self.dropped, True) if between else chosen

    def listed(self, size: tuple[int, int], shape: tuple[int, int]) -> BlockList:
        """The chosen blocks of `shape` (queries, keys) as a block list."""
        return BlockList.from_index(self.chosen, size, *shape)

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, *, size: tuple[int, int], scale: float) -> Tensor:
        """Softmax attention over the chosen blocks, gathered for each block of queries: a batch of short attentions."""
        B, H, Mb, _ = self.chosen.shape
        group, tokens = group_size(q, k), k.shape[2]
        slots = (self.chosen[..., None] * size[1] + torch.arange(size[1], device=q.device)).flatten(3)
        rows = torch.arange(B, device=q.device)[:, None, None, None]
        heads = (torch.arange(H, device=q.device) // group)[None, :, None, None]
        keys, values = (x[rows, heads, slots.clamp(max=tokens - 1)].flatten(0, 2)[:, None] for x in (k, v))
        queries = F.pad(q, (0, 0, 0, -q.shape[2] % size[0])).unflatten(2, (Mb, size[0])).flatten(0, 2)[:, None]
        call: dict[str, Any] = {"scale": scale, "causal": False}
        if tokens % size[1]:
            call["k_positions"] = torch.where(slots < tokens, slots, -1).flatten(0, 2)
        out, _ = attend(queries, keys, values, **call)
        return out[:, 0].unflatten(0, (B, H, Mb)).flatten(2, 3)[:, :, : q.shape[2]]


def pooled(x: Tensor, size: int) -> Tensor:
    """Mean of every block of `size` tokens, the last one over those it has: `[B, H, blocks, D]`, float32."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = x.shape[2] // size * size
    means = x[:, :, :whole].unflatten(2, (-1, size)).mean(3, dtype=exact)
    if whole == x.shape[2]:
        return means
    return torch.cat((means, x[:, :, whole:].mean(2, keepdim=True, dtype=exact)), 2)


def spread(table: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A table of blocks as one of tokens: `[B, H, N, S]`."""
    return table.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, : shape[0], : shape[1]]
