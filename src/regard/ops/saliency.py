"""Attention times its gradient: how much a loss depends on each probability, through a gate of ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.shapes import group_size


def gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`(A * gate) v`, with `A` the probabilities over the keys that `mask` allows; plain attention where the gate is 1.

    The gradient of a loss by the gate, at 1, is `A * dL/dA`, so no gradient is taken of `A` itself.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`.
        v: `[B, Hk, S, Dv]`.
        gate: `[B, H, T, S]`, of ones. It costs T x S: give few rows.
        scale: of the scores.
        mask: bool `[1|B, 1|H, T, S]`, or None for all keys.
        softcap: of the scores, or None.

    Returns:
        `[B, H, T, Dv]` in q's dtype.
    """
    group = group_size(q, k)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.unflatten(1, (-1, group)) @ k[:, :, None].mT).flatten(1, 2).to(exact) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores.softmax(-1) * gate).unflatten(1, (-1, group))
    return (weights @ v[:, :, None].to(exact)).flatten(1, 2).to(q.dtype)


def by_gates(loss: Tensor, gates: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
    """`A * dL/dA` of every gate that was given to `gated`, signed, in its shape.

    Args:
        loss: a number that depends on them.
        gates: which.
        keep: the graph, for another loss.

    Raises:
        RegardError: gradients are off, so that there is no graph.
    """
    if not loss.requires_grad:
        raise RegardError("saliency needs gradients, and the loss has none; leave torch.inference_mode() and no_grad()")
    return list(torch.autograd.grad(loss, list(gates), retain_graph=keep))


def layer_map(raw: Tensor) -> Tensor:
    """Saliency of one layer, `raw [B, H, T, S]`: sizes, mean over heads, every row over its length: `[B, T, S]`.

    Source: Hallucination Begins Where Saliency Drops; zhangbaijin/LVLMs-Saliency, do_reject_sample.py.
    """
    mean = raw.abs().mean(1)
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-9)
