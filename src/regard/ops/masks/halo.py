"""Halo attention: blocks of queries share one window, their block and a halo around it (HaloNet)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives import lattice

CARD = Card(
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    arxiv="2103.12731",
    sheet=158,
    implements="The pattern of section 2.2 on grids of any number of axes, and the count of padded keys.",
    exact=False,
    saving="compute",
    departures=(
        "Keys beyond the image are masked; `with_padding` counts them, as implementations that pad with zeros do.",
        "Relative position logits and strided queries are left out.",
    ),
    oracles=(
        "a loop: a key is seen if it is within the halo of the query's block",
        "halo 0: windows side by side; a halo as large as the grid: full attention",
        "padded with zeros and unfolded: softmax over the whole window, with `with_padding`",
    ),
    aliases=("halonet",),
    options={
        "box": Option(
            default=None, low=1, optional=True, doc="tile of the numbering, one or one an axis; none: raster"
        ),
    },
)


@dataclass(frozen=True)
class Around:
    """The block of the query and a halo on both sides, along one axis."""

    block: int
    halo: int

    def __call__(self, u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key index; both may lie beyond the grid."""
        start = u // self.block * self.block
        return start - self.halo, start + self.block - 1 + self.halo

    def __repr__(self) -> str:
        return f"{self.block} and {self.halo} around"


def pattern(
    grid: Sequence[int],
    block: int | Sequence[int],
    halo: int | Sequence[int],
    *,
    box: int | Sequence[int] | None = None,
) -> Pattern:
    """A key is seen where it lies within `halo` cells of the query's block, on every axis.

    Args:
        grid: cells an axis; token `i` is cell `i` in raster order, the last axis fastest.
        block: cells of a block of queries, one for all axes or one an axis.
        halo: cells around it, likewise.
        box: the positions are slots in tiles of it (`neighbourhood.tiles`); `block` is the best one.

    Returns:
        A two-sided Pattern over `prod(grid)` positions (with `box`: over all slots).

    Raises:
        RegardError: an axis that the block does not divide, or a negative halo; names the axis.
    """
    sizes, blocks, halos = _checked(grid, block, halo)
    return lattice.windows(sizes, [Around(*axis) for axis in zip(blocks, halos, strict=True)], (1,) * len(sizes), box)


def with_padding(
    out: Tensor,
    lse: Tensor,
    grid: Sequence[int],
    block: int | Sequence[int],
    halo: int | Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Attention over `pattern` as it is where the window's cells beyond the grid count as keys and values of zeros.

    Args:
        out: `[B, H, tokens, Dv]`, in raster order.
        lse: `[B, H, tokens]`.
        grid: as `pattern` takes it.
        block: as `pattern` takes it.
        halo: as `pattern` takes it.

    Returns:
        out and lse of the same shapes and dtypes.

    Raises:
        RegardError: as `pattern`.
    """
    sizes, blocks, halos = _checked(grid, block, halo)
    seen = torch.ones((), dtype=torch.int64)
    for n, b, h in zip(sizes, blocks, halos, strict=True):
        first, last = Around(b, h)(torch.arange(n), torch.tensor(n))
        seen = seen[..., None] * (last.clamp(max=n - 1) - first.clamp(min=0) + 1)
    missing = math.prod(b + 2 * h for b, h in zip(blocks, halos, strict=True)) - seen.flatten()
    # A key of zeros scores 0, so all of them have the mass of their number.
    total = torch.logaddexp(lse, missing.to(lse).log())
    return out * (lse - total).exp()[..., None].to(out.dtype), total


def _checked(
    grid: Sequence[int], block: int | Sequence[int], halo: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    sizes = lattice.shape(grid)
    blocks, halos = (lattice.per_axis(n, v, len(sizes)) for n, v in (("block", block), ("halo", halo)))
    for axis, (n, b, h) in enumerate(zip(sizes, blocks, halos, strict=True)):
        if b < 1 or n % b:
            raise RegardError(f"axis {axis} of {n} cells is not divisible by a block of {b}")
        if h < 0:
            raise RegardError(f"axis {axis}: a halo needs 0 cells or more, got {h}")
    return sizes, blocks, halos
