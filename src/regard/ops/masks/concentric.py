"""Image tokens numbered and masked by rings, from the border inward (concentric causal attention)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives import lattice, spans
from regard.primitives.spans import Span

CARD = Card(
    title="Mitigating Object Hallucination via Concentric Causal Attention",
    arxiv="2410.15926",
    sheet=39,
    implements="Rings, position ids and mask, for several images a row.",
    exact=False,
    saving="none",
    departures=(
        "Rings of odd and of oblong grids, and several images in one row, are inferred.",
        "Meant for models trained with it; a plain model reads other positions than it knows.",
    ),
    oracles=(
        "24 x 24: rings of 92, 84, ..., 12, 4 tokens",
        "no image, or an image of one token: causal, and positions count up",
        "a loop over pairs; whom one sees, sees no one else",
        "from image to text at most half a side of positions",
        "decoding a Llama from a cache equals one masked forward",
    ),
    aliases=("cca", "concentric_causal"),
)

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Rings:
    """Inside an image, keys of the query's ring and of those around it; causal elsewhere.

    Args:
        images: their spans of positions.
        ring: integer `[tokens of all images]`, in order.
    """

    images: tuple[Span, ...]
    ring: Tensor

    def __call__(self, q: Tensor, k: Tensor, head: Tensor | None = None) -> Tensor:
        """Whether queries at `q` see keys at `k`, elementwise."""
        seen, before, ring = k <= q, 0, self.ring.to(q.device)
        for start, stop in self.images:
            shift, last = before - start, before + stop - start - 1
            a, b = (ring[(x + shift).clamp(before, last)] for x in (q, k))
            both = (q >= start) & (q < stop) & (k >= start) & (k < stop)
            seen = torch.where(both, b <= a, seen)
            before = last + 1
        return seen

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> tuple[Tensor, Tensor]:
        """Whether any, and whether all pairs of positions `q_low..q_high` and `k_low..k_high` may be allowed."""
        some, every = k_low <= q_high, k_high <= q_low
        for image in self.images:
            both = spans.touches(q_low, q_high, image) & spans.touches(k_low, k_high, image)
            some, every = some | both, every & ~both
        return some, every

    def __repr__(self) -> str:
        return f"rings of {len(self.images)} images"


def rings(grid: Sequence[int]) -> Tensor:
    """The ring of every token of an image `grid = (rows, columns)`, int64 `[rows * columns]`: 0 at the border.

    Raises:
        RegardError: the grid has not two axes of at least one token.
    """
    sizes = lattice.shape(grid)
    if len(sizes) != 2:
        raise RegardError(f"an image has rows and columns, got a grid of {len(sizes)} axes")
    near = [torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) for n in sizes]
    return torch.minimum(near[0][:, None], near[1]).flatten()


def pattern(images: Sequence[Span], grids: Sequence[Grid] | None = None) -> Pattern:
    """Inside an image a token sees its ring and those around it; all else is causal.

    Args:
        images: spans `(start, stop)` of positions, in raster order each.
        grids: rows and columns of each image; None: all are squares.

    Returns:
        A two-sided Pattern. A prompt may be cut into chunks between images only (`positions` refuses others).

    Raises:
        RegardError: a span is ill-formed or overlaps another, or is not of the size of its grid.
    """
    found = _checked(images, grids)
    if not found:
        return Pattern.causal()
    rule = Rings(tuple(image for image, _ in found), torch.cat([rings(grid) for _, grid in found]))
    return Pattern.predicate(rule, causal=False, cover=rule.cover)


def positions(start: int, stop: int, images: Sequence[Span], grids: Sequence[Grid] | None = None) -> Tensor:
    """Position ids of tokens `start..stop-1`, int64 `[stop - start]`: text counts up, a ring has one id.

    An image spans as many ids as it has rings. For a prompt, and for tokens generated after it.

    Args:
        start: the first token, counted from a row's first real one.
        stop: behind the last.
        images: as `pattern` takes them.
        grids: likewise.

    Raises:
        RegardError: as `pattern`, or `start` or `stop` lies inside an image: its tokens see each other, so that they
            must come in one chunk.
    """
    found = _checked(images, grids)
    parts, at, number = [], 0, 0
    for image, grid in found:
        for edge in (start, stop):
            if image[0] < edge < image[1]:
                raise RegardError(f"tokens {start}..{stop - 1} cut the image at {image} in two; feed an image at once")
        ring = rings(grid)
        parts += [torch.arange(number, number + image[0] - at), number + image[0] - at + ring]
        number, at = number + image[0] - at + int(ring.max()) + 1, image[1]
    parts.append(torch.arange(number, number + max(stop - at, 0)))
    return torch.cat(parts)[start:stop]


def _checked(images: Sequence[Span], grids: Sequence[Grid] | None) -> list[tuple[Span, Grid]]:
    """Every image with its grid, in order of position."""
    if grids is not None and len(grids) != len(images):
        raise RegardError(f"{len(grids)} grids for {len(images)} images")
    spans.ordered("images", images)
    found = []
    for i, image in enumerate(images):
        tokens = image[1] - image[0]
        if grids is None:
            side = math.isqrt(tokens)
            if side * side != tokens or not tokens:
                raise RegardError(f"the image at {tuple(image)} has {tokens} tokens, which is no square; pass grids")
            found.append((tuple(image), (side, side)))
            continue
        grid = tuple(grids[i])
        if math.prod(grid) != tokens or len(grid) != 2:
            raise RegardError(f"the image at {tuple(image)} has {tokens} tokens, its grid is {grid}")
        found.append((tuple(image), grid))
    return sorted(found)
