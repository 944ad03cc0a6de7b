"""Join attention over disjoint key sets: softmax over a union from softmaxes over its parts."""

from collections.abc import Iterable

import torch
from torch import Tensor

from regard.core.errors import RegardError

Part = tuple[Tensor, Tensor]


def merge(parts: Iterable[Part]) -> Part:
    """Attention over the union of disjoint key sets.

    `out = sum_i exp(lse_i - lse) out_i`, `lse = log sum_i exp(lse_i)`: associative, commutative,
    differentiable in outs and lses. A part with lse -inf is neutral to the bit; if all are, out is 0 and
    lse -inf, and the gradients are 0.

    Args:
        parts: `(out [B, H, T, Dv], lse [B, H, T])` each, or any `out [..., Dv]` with `lse [...]`.

    Returns:
        `(out, lse)`; out in the dtype of the first out, lse float32 (float64 if a part's lse is).

    Raises:
        RegardError: no parts, or shapes that disagree.

    Source: the online softmax of FlashAttention (2205.14135, section 3.1).
    """
    parts = list(parts)
    if not parts:
        raise RegardError("merge needs at least one (out, lse)")
    for i, (out, lse) in enumerate(parts):
        if out.shape != parts[0][0].shape or lse.shape != out.shape[:-1]:
            raise RegardError(
                f"part {i} has out {list(out.shape)} and lse {list(lse.shape)}; "
                f"part 0 has out {list(parts[0][0].shape)}, and an lse has its out's shape without the last dimension"
            )
    if len(parts) == 1:
        return parts[0]
    exact = torch.float64 if any(lse.dtype == torch.float64 for _, lse in parts) else torch.float32
    lses = torch.stack([lse.to(exact) for _, lse in parts])
    top = lses.detach().amax(0)
    # Without this, -inf - -inf makes NaN where every part is empty.
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = sum((w / total)[..., None] * o.to(exact) for w, (o, _) in zip(weights, parts, strict=True))
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse
