"""Attention times its gradient, of few rows, from the gradient of the layer's output.

Hallucination Begins Where Saliency Drops multiplies attention by a gate of ones and takes the gradient of that. It is
`A_ij (dL/do_i . v_j)`, so no gate is built, and a model runs its own attention.
"""

import torch
from torch import Tensor

from regard.core.shapes import group_size


def salient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`A * dL/dA`, signed, over the keys that `mask` allows.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`.
        v: `[B, Hk, S, Dv]`.
        slope: `[B, H, T, Dv]`, the gradient of the loss by the output of attention.
        scale: of the scores.
        mask: bool `[1|B, 1|H, T, S]`, every row with a key; None: all keys.
        softcap: of the scores, or None.

    Returns:
        `[B, H, T, S]` float32 (float64 for float64): T x S, so give few rows.
    """
    group = group_size(q, k)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.to(exact)[:, :, None].mT for x in (k, v))
    scores = (q.to(exact).unflatten(1, (-1, group)) @ keys).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) * (slope.to(exact).unflatten(1, (-1, group)) @ values).flatten(1, 2)


def layer_map(raw: Tensor) -> Tensor:
    """Saliency of one layer, `raw [B, H, T, S]`: sizes, mean over heads, every row over its length: `[B, T, S]`.

    Source: zhangbaijin/LVLMs-Saliency, do_reject_sample.py.
    """
    mean = raw.abs().mean(1)
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-9)
