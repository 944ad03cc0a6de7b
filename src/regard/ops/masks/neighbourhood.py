"""Neighbourhood attention on grids of one, two, three or more axes: the nearest keys on every axis."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives import lattice

CARD = Card(
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    arxiv="2403.04690",
    sheet=1,
    implements="The mask in any number of dimensions with kernel, dilation, stride and causality by axis, and the "
    "permutation of tokens into tiles.",
    exact=False,
    saving="compute",
    departures=(
        "Tokens are in raster order, or in tiles, in one dimension: [B, H, tokens, D].",
        "Keys that all queries see are a second attention, joined by `regard.merge`.",
    ),
    oracles=(
        "a loop over pairs of cells in one, two and three dimensions",
        "kernel = axis: full attention; stride = kernel: windows side by side; 1-D causal: a sliding window",
        "exactly the product of kernels of keys in every row where no axis is causal",
        "dilation: the undilated pattern on every sub-grid",
        "in tiles: the same outputs, and fewer blocks",
        "torch's flex_attention with the same mask",
    ),
    aliases=("fused_na", "natten"),
    options={
        "dilation": Option(default=1, low=1, doc="step between keys, one or one an axis"),
        "stride": Option(default=1, low=1, doc="neighbouring queries that share a window, one or one an axis"),
        "causal": Option(kind="bool", default=False, doc="see no later cell, for all axes or one an axis"),
        "box": Option(
            default=None, low=1, optional=True, doc="tile of the numbering, one or one an axis; none: raster"
        ),
    },
)


@dataclass(frozen=True)
class Near:
    """The window of the query at index u of n along one axis."""

    kernel: int
    stride: int
    causal: bool

    def __call__(self, u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key index."""
        group = u // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(group + self.stride - 1, n - 1)
            return (leader - self.kernel + 1).clamp(min=0), u
        centre = torch.minimum(group + self.stride // 2, n - 1)
        first = torch.minimum((centre - self.kernel // 2).clamp(min=0), n - self.kernel)
        return first, first + self.kernel - 1

    def __repr__(self) -> str:
        return f"{self.kernel}{f' by {self.stride}' * (self.stride > 1)}{' causal' * self.causal}"


def pattern(
    grid: Sequence[int],
    kernel: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    box: int | Sequence[int] | None = None,
) -> Pattern:
    """Every cell sees the `kernel` nearest cells on each axis; windows slide inward at the edges.

    Args:
        grid: cells an axis; token `i` is cell `i` in raster order, the last axis fastest.
        kernel: keys an axis, the query's own included: `kernel // 2` before it, the others behind. One for all axes, or
            one an axis, as all that follow.
        dilation: only cells with the query's coordinate modulo it count.
        stride: so many neighbouring queries share the window of the one in their middle (causal: their last).
        causal: the query's own cell is the last one that it sees, and windows do not slide inward.
        box: the positions are slots of `tiles(grid, box, dilation)`, not tokens.

    Returns:
        A two-sided Pattern over `prod(grid)` positions (with `box`: over all slots; those without a token are empty
        rows and unseen).

    Raises:
        RegardError: a kernel below 2, kernel * dilation beyond the axis, a stride beyond the kernel, or another number
            of axes; names the axis.
    """
    sizes = lattice.shape(grid)
    kernels, steps, strides = (
        lattice.per_axis(name, value, len(sizes))
        for name, value in (("kernel", kernel), ("dilation", dilation), ("stride", stride))
    )
    causals = lattice.per_axis("causal", causal, len(sizes))
    for axis, (n, size, step, shared) in enumerate(zip(sizes, kernels, steps, strides, strict=True)):
        if size < 2:
            raise RegardError(f"axis {axis}: a neighbourhood needs a kernel of at least 2, got {size}")
        if step < 1 or size * step > n:
            raise RegardError(
                f"axis {axis}: kernel {size} with dilation {step} spans {size * step} cells, the axis has {n}; "
                f"the largest kernel is {n // max(step, 1)}"
            )
        if not 1 <= shared <= size:
            raise RegardError(f"axis {axis}: a stride must lie in 1 to the kernel, {size}, got {shared}")
    spans = [Near(*axis) for axis in zip(kernels, strides, causals, strict=True)]
    return lattice.windows(sizes, spans, steps, box)


def tiles(grid: Sequence[int], box: int | Sequence[int], dilation: int | Sequence[int] = 1) -> tuple[Tensor, Tensor]:
    """The permutation of tokens that makes every tile a run of neighbouring slots, and its inverse.

    Blocks of as many slots as a tile has cells are then boxes of the grid, which few other boxes are near to.

    Args:
        grid: cells an axis.
        box: cells of a tile, one for all axes or one an axis.
        dilation: tiles hold cells with the same coordinate modulo it.

    Returns:
        order int64 `[slots]`, the token in every slot (-1 where a tile sticks out of the grid), and inverse int64
        `[tokens]`, the slot of every token: `order[inverse]` counts up.

    Raises:
        RegardError: a box or dilation larger than its axis, or for another number of axes.
    """
    numbering = lattice.tiling(grid, box, dilation)
    return numbering.order(), numbering.inverse()
