"""Massive activations: tokens whose state is ruled by a few dimensions, as the states of attention sinks are [118]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.errors import RegardError

EPS = 1e-6
TAU = 20.0


def peaks(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """`max_d |x_d| / sqrt(mean(x^2) + 1e-6)` of each token; what a scaling of x does not change.

    Args:
        x: `[..., d]` hidden states.
        dims: where to look; None: everywhere.

    Returns:
        `[...]` float32 (float64 for float64), at most `sqrt(d)`.

    Raises:
        RegardError: a dimension that x does not have.
    """
    for dim in dims or ():
        if not 0 <= dim < x.shape[-1]:
            raise RegardError(f"dimension {dim} is out of range; the hidden state has {x.shape[-1]}")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    some = x if dims is None else x[..., list(dims)]
    square = torch.linalg.vector_norm(x, dim=-1, dtype=exact).square() / x.shape[-1]
    return torch.linalg.vector_norm(some, torch.inf, dim=-1, dtype=exact) / (square + EPS).sqrt()


def massive(x: Tensor, dims: Sequence[int] | None = None, tau: float = TAU) -> Tensor:
    """Which tokens of `x [..., d]` have `peaks` above `tau`: bool `[...]`."""
    return peaks(x, dims) > tau
