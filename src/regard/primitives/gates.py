"""Log-decays between a bound and 1, which several gated recurrences share."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lower_bounds(logits: Tensor) -> Tensor:
    """Bounds `[L, D]` in 0..1 for the gates of every layer from learned `logits [L, D]`: none in layer 0, rising.

    Source: HGRN (2311.04823), section 3.2: a softmax over the layers, summed up to a layer, less its first row.
    """
    shares = logits.softmax(0)
    return shares.cumsum(0) - shares[:1]


def bounded_decay(x: Tensor, lower: Tensor | None = None) -> Tensor:
    """`log(lower + (1 - lower) sigmoid(x))`, elementwise and at most 0; `lower` None is 0.

    The sum is taken in logarithms, so that gates near 0 keep their gradient.

    Args:
        x: any shape, a float.
        lower: broadcastable to it, in `[0, 1)`.
    """
    if lower is None:
        return F.logsigmoid(x)
    # A logarithm of 0 would make NaN gradients; the smallest number changes no gate.
    floor = lower.clamp(min=torch.finfo(lower.dtype).tiny).log()
    return torch.logaddexp(floor, torch.log1p(-lower) + F.logsigmoid(x)).clamp(max=0)
