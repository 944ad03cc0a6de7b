"""How tensors and lists of blocks are handed to the kernels of this folder."""

import torch
import triton
from torch import Tensor

from regard.kernels import device
from regard.primitives.block_list import BlockList


def on_gluon(where: torch.device) -> bool:
    """Whether kernels in Gluon for Hopper run there: it promises nothing from one version of Triton to the next."""
    return device.capability(where)[0] == 9 and triton.__version__.startswith("3.6.")


def lists(blocks: BlockList) -> tuple[Tensor | None, ...]:
    """The tensors of a list as a kernel reads them; both bounds of a row are one word."""
    bits = blocks.bits if len(blocks.bits) else None
    return blocks.full, blocks.count, blocks.index, blocks.part, blocks.bounds.view(torch.int32), bits


def spread(blocks: BlockList, heads: int) -> tuple[int, int, int, int, int]:
    """Heads that share a list, lines, most entries of one; how many lists lie between batch rows, and between heads."""
    rows, held, lines = blocks.count.shape
    return heads // held, lines, blocks.index.shape[-1], held if rows > 1 else 0, 1 if held > 1 else 0


def like(x: Tensor) -> Tensor:
    """Memory for a tensor shaped as x, with heads inside tokens where x has them so."""
    B, H, T, D = x.shape
    if x.stride(2) > x.stride(1):
        return torch.empty(B, T, H, D, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(B, H, T, D, dtype=x.dtype, device=x.device)


def three(x: Tensor | None) -> tuple[int, ...]:
    """Strides of all but the last dimension."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def fits(x: Tensor) -> bool:
    """Whether the copy engine can read x: rows that begin at multiples of 16 bytes, and no broadcast dimension."""
    apart = all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and apart
