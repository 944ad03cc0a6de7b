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
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    turns = base ** (torch.arange(0, x.shape[-1], 2, device=x.device, dtype=exact) / -x.shape[-1])
    angle = at[:, None, :, None].to(exact) * turns
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
