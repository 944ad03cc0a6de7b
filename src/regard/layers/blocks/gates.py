"""Starting values of forget gates."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def decay_bias(count: int, low: float = 0.001, high: float = 0.1) -> Tensor:
    """`[count]` numbers whose softplus is log-uniform in `[low, high]`: the steps of Mamba, [089] and [133]."""
    step = torch.empty(count).uniform_(math.log(low), math.log(high)).exp()
    return step + torch.log(-torch.expm1(-step))


def bounded(raw: Tensor, bound: Tensor | None) -> Tensor:
    """Log-decays, `log(bound + (1 - bound) sigmoid(raw))`: a channel remembers at least `bound` (HGRN, [133])."""
    if bound is None:
        return F.logsigmoid(raw)
    # sigmoid(-60) is nothing beside any bound; below it, the exponential would overflow where the bound is 0.
    raw = raw.clamp(min=-60.0)
    return F.logsigmoid(raw) + torch.log1p(bound * torch.exp(-raw))
