"""What mechanisms with branches share: weighted logits under the plausibility cut, and prompts padded on the left."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def weighted(z: Sequence[Tensor], weights: Sequence[float], beta: float) -> Tensor:
    """`sum_b weights_b z_b` of logits `[..., V]` under the cut of `plausible` on `z[0]`, in its dtype.

    Computed in float32 at least.
    """
    exact = torch.promote_types(z[0].dtype, torch.float32)
    first = z[0].to(exact)
    out = weights[0] * first
    for weight, other in zip(weights[1:], z[1:], strict=True):
        out = out + weight * other.to(exact)
    return plausible(out, first, beta).to(z[0].dtype)


def plausible(out: Tensor, z: Tensor, beta: float) -> Tensor:
    """`out [..., V]`, -inf for tokens whose probability under the logits `z` is below `beta` times the largest."""
    return out if beta <= 0 else out.masked_fill(z < z.amax(-1, keepdim=True) + math.log(beta), -torch.inf)


def packed(tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The `kept [B, N]` ones (bool) of `tokens [B, N, ...]`, padded on the left with 0, and their mask, int64."""
    counts = kept.sum(1)
    longest = int(counts.max())
    real = torch.arange(longest, device=tokens.device) >= (longest - counts)[:, None]
    out = tokens.new_zeros(*real.shape, *tokens.shape[2:])
    out[real] = tokens[kept]
    return out, real.long()
