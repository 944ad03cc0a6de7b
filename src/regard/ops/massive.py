"""Massive activations: tokens whose state is ruled by a few dimensions, as the states of attention sinks are [118]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.errors import RegardError

EPS = 1e-6
TAU = 20.0


def magnitudes(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """`|x_d| / sqrt(mean(x^2) + 1e-6)`: entries in root mean squares of their token; no scaling of x changes them.

    Args:
        x: `[..., d]` hidden states.
        dims: where to look; None: everywhere.

    Returns:
        `[..., d]`, or as many as there are `dims`: float32 (float64 for float64), at most `sqrt(d)`.

    Raises:
        RegardError: a dimension that x does not have.
    """
    for dim in dims or ():
        if not 0 <= dim < x.shape[-1]:
            raise RegardError(f"dimension {dim} is out of range; the hidden state has {x.shape[-1]}")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    some = x if dims is None else x[..., list(dims)]
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square() / x.shape[-1]
    return some.abs() / (square + EPS).sqrt()


def peaks(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """The largest of the `magnitudes` of each token of `x [..., d]`: `[...]`."""
    return magnitudes(x, dims).amax(-1)
