"""Windows of the training size that slide inward at borders, all frames visible (FreeSwim)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives import lattice

CARD = Card(
    title="FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video "
    "Generation",
    arxiv="2511.14712",
    sheet=131,
    implements="The self-attention mask over frames, rows and columns, and the scale of its scores.",
    exact=False,
    saving="compute",
    departures=("The branch of full attention, its override of cross-attention and its cache are left out.",),
    oracles=(
        "neighbourhood attention with kernels 2 * (window // 2) + 1 and a full time axis",
        "every query sees (2 * (h // 2) + 1) * (2 * (w // 2) + 1) keys a frame",
        "a grid of the training size: full attention",
        "inward False: clipped windows, in a loop",
    ),
    aliases=("freeswim",),
    options={
        "inward": Option(kind="bool", default=True, doc="windows keep their size at borders; false: they are clipped"),
        "box": Option(
            default=None, low=1, optional=True, doc="tile of the numbering, one or one an axis; none: raster"
        ),
    },
)


@dataclass(frozen=True)
class Inward:
    """A window of `half` cells on either side, which slides inward at borders where `slides`."""

    half: int
    slides: bool

    def __call__(self, u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key index; both may lie beyond the grid."""
        if not self.slides:
            return u - self.half, u + self.half
        beyond, before = (self.half + u - n + 1).clamp(min=0), (self.half - u).clamp(min=0)
        return u - self.half - beyond, u + self.half + before

    def __repr__(self) -> str:
        return f"{2 * self.half + 1}{' inward' * self.slides}"


@dataclass(frozen=True)
class Whole:
    """The whole axis."""

    def __call__(self, u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key index."""
        return u * 0, n - 1 + u * 0

    def __repr__(self) -> str:
        return "all"


def pattern(
    grid: Sequence[int],
    window: Sequence[int],
    *,
    inward: bool = True,
    box: int | Sequence[int] | None = None,
) -> Pattern:
    """A query sees, in every frame, the rows and columns within half a training window of its own.

    Args:
        grid: frames, rows and columns; tokens in raster order, columns fastest.
        window: rows and columns of the training grid.
        inward: at borders windows move inward and keep their size; False: they are clipped.
        box: the positions are slots in tiles of it (`neighbourhood.tiles`).

    Returns:
        A two-sided Pattern over `prod(grid)` positions (with `box`: over all slots).

    Raises:
        RegardError: a grid without three axes, a window without two, or one larger than its axis.
    """
    sizes, halves = lattice.shape(grid), lattice.shape(window, "window")
    if len(sizes) != 3 or len(halves) != 2:
        raise RegardError(
            f"expected a grid (frames, rows, columns) and a window (rows, columns), got {sizes}, {halves}"
        )
    for axis, n, size in zip(("rows", "columns"), sizes[1:], halves, strict=True):
        if size > n:
            raise RegardError(f"a window of {size} {axis} is larger than the grid, which has {n}")
    spans = (Whole(), *(Inward(size // 2, inward) for size in halves))
    return lattice.windows(sizes, spans, (1, 1, 1), box)


def scale(head_dim: int, window: Sequence[int]) -> float:
    """`sqrt(ln(2 n) / ln(n) / head_dim)`, n the cells of the training window: what both branches scale scores by.

    Raises:
        RegardError: fewer than 2 cells, whose logarithm is 0.
    """
    cells = math.prod(lattice.shape(window, "window"))
    if cells < 2:
        raise RegardError(f"a window of {cells} cell has no scale; it needs at least 2")
    return math.sqrt(math.log(2 * cells) / math.log(cells) / head_dim)
