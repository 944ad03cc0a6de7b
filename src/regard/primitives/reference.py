"""Exact masked attention in plain torch: the definition every faster path is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.shapes import group_size


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(softcap * tanh(scale * q k^T / softcap) + bias) v` over the keys that `mask` allows.

    `q [B, H, T, D]` of any float dtype, `k [B, Hk, S, D]`, `v [B, Hk, S, Dv]`; `S` may be 0. `mask` is bool
    `[1|B, 1|Hk, T, S]` (None: all keys), `bias` broadcastable to `[B, H, T, S]` and added after the cap.

    Returns:
        out `[B, H, T, Dv]` in q's dtype, lse `[B, H, T]` float32 (float64 for float64). An empty row has
        out 0 and lse -inf, and gives no gradient.
    """
    group = group_size(q, k)
    if k.shape[2] == 0:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask, bias = torch.zeros(1, 1, q.shape[2], 1, dtype=torch.bool, device=q.device), None
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = q.shape
    # Query heads of one key head become rows of one product, so keys are never repeated.
    grouped = q.to(exact).reshape(batch, k.shape[1], group * rows, q.shape[3])
    scores = (grouped @ k.to(exact).transpose(-1, -2)) * scale
    scores = scores.view(batch, k.shape[1], group, rows, k.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape).to(exact)
        scores = scores + (bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (-1, group)))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = (weights.flatten(2, 3) @ v.to(exact)).view(*scores.shape[:-1], v.shape[3]) / total[..., None]
    lse = (top[..., 0] + total.log()).masked_fill(empty, -torch.inf)
    return out.to(q.dtype).reshape(batch, heads, rows, v.shape[3]), lse.reshape(batch, heads, rows)
