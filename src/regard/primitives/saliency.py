"""Attention times its gradient [112], without the all-ones gate that it is the gradient of.

The gradient of a loss in a probability is `dout_i . v_j`, so `A dL/dA` at (i, j) is `p_ij (dout_i . v_j)`: known from
the log-sum-exp and the gradient of the layer's output.
"""

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.shapes import group_size
from regard.primitives.sweep import LIMIT, visible


def saliency(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    row_edges: Tensor,
    key_edges: Tensor,
    pattern: Pattern | None,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`|A dL/dA|` summed over tiles of rows and keys; rows are computed in blocks, differentiable.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`.
        v: `[B, Hk, S, Dv]`.
        lse: `[B, H, T]`; -inf: an empty row, which gives nothing.
        dout: `[B, H, T, Dv]`, the gradient of the loss in the output.
        row_edges: `[R + 1]` ascending from 0 to T.
        key_edges: `[C + 1]` ascending from 0 to S.
        pattern: who sees whom; None: all real keys.
        q_positions: `[1|B, T]`; negative ones are rows that do not count.
        k_positions: `[1|B, S]`.
        scale: of the scores.
        softcap: of the scores.

    Returns:
        `[B, H, R, C]`, float32 (float64 for float64).

    Raises:
        RegardError: the shapes of lse or dout do not belong to q and v.
    """
    if lse.shape != q.shape[:3] or dout.shape != (*q.shape[:3], v.shape[3]):
        raise RegardError(
            f"lse must be {list(q.shape[:3])} and dout {[*q.shape[:3], v.shape[3]]}, got {list(lse.shape)} and "
            f"{list(dout.shape)}"
        )
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, group = k.shape[1], group_size(q, k)
    known = lse.masked_fill(lse == -torch.inf, 0).to(exact).unflatten(1, (heads, group))
    rows, grads = (x.to(exact).unflatten(1, (heads, group)) for x in (q, dout))
    keys, values = (x.to(exact)[:, :, None].mT for x in (k, v))
    tile, column = (
        torch.searchsorted(ends[1:].contiguous(), torch.arange(n), right=True).to(q.device)
        for ends, n in ((row_edges, q.shape[2]), (key_edges, k.shape[2]))
    )
    found = known.new_zeros(*known.shape[:3], len(row_edges) - 1, len(key_edges) - 1)
    block = max(1, LIMIT // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], block):
        part = slice(start, min(start + block, q.shape[2]))
        scores = rows[:, :, :, part] @ keys * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = visible(pattern, q_positions[:, part], k_positions)[:, :, None]
        weights = torch.exp((scores - known[:, :, :, part, None]).masked_fill(~mask, -torch.inf))
        salient = (weights * (grads[:, :, :, part] @ values)).abs()
        pooled = salient.new_zeros(*salient.shape[:4], len(key_edges) - 1).index_add(4, column, salient)
        found = found.index_add(3, tile[part], pooled)
    return found.flatten(1, 2)
