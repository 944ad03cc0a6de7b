"""Many small positive definite systems at once, by conjugate gradients: the matrices are never formed."""

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 1e-12


def conjugate(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    diagonal: Tensor | None = None,
    iterations: int = 32,
    tolerance: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """`x` with `apply(x) = right`, row by row.

    A row is left alone once its squared residual is at most `tolerance * max(1e-12, |right|^2)`. On a CPU the loop ends
    when all are; elsewhere, that would wait for the device.

    Args:
        apply: `[..., D] -> [..., D]`, a symmetric positive definite map of each row.
        right: `[..., D]`.
        diagonal: `[..., D]`, of the maps: the preconditioner; None: none.
        iterations: at most so many.
        tolerance: relative, of squares.

    Returns:
        x `[..., D]`, and which rows have converged, bool `[...]`.

    Source: Hestenes and Stiefel (1952); the stopping rule is that of FlashLLA's `cg.py`.
    """
    x, residual = torch.zeros_like(right), right
    goal = tolerance * right.square().sum(-1).clamp(min=SMALLEST)
    turned = residual if diagonal is None else residual / diagonal
    direction, power = turned, (residual * turned).sum(-1)
    open_ = residual.square().sum(-1) > goal
    for _ in range(iterations):
        if right.device.type == "cpu" and not open_.any():
            break
        image = apply(direction)
        bend = (direction * image).sum(-1)
        step = torch.where(open_ & (bend > 0), power / bend, 0)[..., None]
        x, residual = x + step * direction, residual - step * image
        turned = residual if diagonal is None else residual / diagonal
        after = (residual * turned).sum(-1)
        direction = turned + torch.where(power > 0, after / power, 0)[..., None] * direction
        power = after
        open_ = open_ & (residual.square().sum(-1) > goal)
    return x, ~open_
