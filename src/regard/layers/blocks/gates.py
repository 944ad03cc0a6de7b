"""Starting values of forget gates."""

import math

import torch
from torch import Tensor


def decay_bias(count: int, low: float = 0.001, high: float = 0.1) -> Tensor:
    """`[count]` numbers whose softplus is log-uniform in `[low, high]`: the steps of Mamba, [089] and [133]."""
    step = torch.empty(count).uniform_(math.log(low), math.log(high)).exp()
    return step + torch.log(-torch.expm1(-step))
