"""Rotary positions."""

import torch
from torch import Tensor

from regard.core.errors import RegardError


def rotate(x: Tensor, at: Tensor, base: float | None = 10000.0) -> Tensor:
    """The halves of `x [B, H, T, D]` turned by `at [1|B, T]` times `base ** (-2 i / D)`; base None: x itself.

    Raises:
        RegardError: D is odd.

    Source: RoFormer (2104.09864), in the half-rotation layout of GPT-NeoX; angles in float32 (float64 for float64).
    """
    if base is None:
        return x
    if x.shape[-1] % 2:
        raise RegardError(f"rotary positions need an even head size, got {x.shape[-1]}")
    cos, sin = turns(at[:, None], x.shape[-1], base, torch.float64 if x.dtype == torch.float64 else torch.float32)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def turns(at: Tensor, size: int, base: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines, `[..., size / 2]`, of the angles `at [...]` times `base ** (-2 i / size)`."""
    angle = at[..., None].to(dtype) * base ** (torch.arange(0, size, 2, device=at.device, dtype=dtype) / -size)
    return angle.cos(), angle.sin()
