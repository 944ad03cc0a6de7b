"""Norms of mixers: RMS with and without weights, with an output gate, and the L2 norm of queries and keys."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import choose

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "linear": lambda x: x}


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gates, norms and states beside activations of `dtype`: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in that dtype."""
    return x.to(exact(x.dtype))


def l2(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x [..., D]` over `sqrt(sum x^2 + eps)`, in the dtype of x ([089], [133])."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """`x [..., size]` over its root mean square, times weights if it has any (without: SRMSNorm of [003]).

    With `gate`, `forward(x, g)` also multiplies by silu, sigmoid or nothing of `g`, after the norm.
    """

    def __init__(self, size: int, *, eps: float = 1e-5, weights: bool = True, gate: str = "silu"):
        super().__init__()
        self.eps, self.gate = eps, choose("output gate", gate, GATES)
        self.weight = nn.Parameter(torch.ones(size)) if weights else None

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters: ones."""
        return {} if self.weight is None else {"weight": torch.ones(self.weight.shape)}

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        """`x [..., size]` normed, in the dtype of x."""
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight
        if g is not None:
            y = y * GATES[self.gate](wide(g))
        return y.to(x.dtype)


def norm(kind: str, size: int, eps: float) -> nn.Module:
    """A norm by name: `rms`, `srms` (no weights) or `layer`.

    Raises:
        RegardError: no such norm.
    """
    choose("norm", kind, ("rms", "srms", "layer"))
    return nn.LayerNorm(size, eps=eps) if kind == "layer" else RMSNorm(size, eps=eps, weights=kind == "rms")
