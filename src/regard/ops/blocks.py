"""When attention goes to the kernels over lists of blocks (`kernels/attention/block.py`), and how."""

import torch
from torch import Tensor

from regard.core.pattern import Pattern
from regard.kernels import device
from regard.primitives.block_list import build

SIZE = (128, 128)
# Pairs of query and key from which lists pay, where torch would need a mask of all pairs. It is the smallest size
# measured: there they take 0.4 of the mask's time, 0.8 with gradients (results/crossover-nvidia-h200.json).
PAIRS = 2**16


def refuses(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, size: tuple[int, int] = SIZE) -> str | None:
    """Why the kernels cannot do this call over blocks of `size`, or None if they can."""
    if bias is not None:
        return "the kernels over blocks take no bias"
    reason = device.refuses(q)
    if reason is not None:
        return reason
    from regard.kernels.attention import block

    return block.refuses(q, k, v, size=size)


def yields(q: Tensor, k: Tensor, pattern: Pattern | None) -> str | None:
    """Why another path is at least as fast, or None if this one is worth its lists."""
    if pattern is None or pattern.is_causal or pattern.is_full:
        return "torch's fused kernels do causal and full attention faster"
    if q.shape[2] * k.shape[2] < PAIRS:
        return f"lists of blocks pay from {PAIRS} pairs of query and key on"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks that `pattern` opens (None: all), for calls that `refuses` does not refuse.

    The lists of patterns over default positions are kept; others are made anew, which waits for the device.
    """
    from regard.kernels.attention.block import attend

    pattern = Pattern.full() if pattern is None else pattern
    rows, keys = q.shape[2], k.shape[2]
    # Full attention does not place its queries among the keys: more queries than keys are no padding there.
    first = max(0, keys - rows) if pattern.is_full else keys - rows
    if q_positions is None and k_positions is None and first == keys - rows:
        blocks = device.keep_for_graphs(build(pattern, rows, keys, SIZE, device=q.device), q.device)
    else:
        at = torch.arange(first, first + rows, device=q.device)[None] if q_positions is None else q_positions
        keys_at = torch.arange(keys, device=q.device)[None] if k_positions is None else k_positions
        blocks = build(pattern, at, keys_at, SIZE, device=q.device)
    return attend(q, k, v, blocks, scale=scale, softcap=softcap)
