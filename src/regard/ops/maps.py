"""Maps of attention as images: on their grid, at another size, cut into connected regions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import RegardError
from regard.primitives import lattice


def on_grid(values: Tensor, grid: Sequence[int]) -> Tensor:
    """`values [..., N]`, numbers by visual token in raster order, as `[..., *grid]`.

    Raises:
        RegardError: the grid has another number of tokens, or a value is not finite.
    """
    sizes = lattice.shape(grid)
    cells = torch.Size(sizes).numel()
    if values.ndim == 0 or values.shape[-1] != cells:
        raise RegardError(f"a grid of {sizes} has {cells} tokens, and the maps are {list(values.shape)}")
    if not values.isfinite().all():
        raise RegardError("the maps hold NaN or infinite values")
    return values.unflatten(-1, sizes)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """`maps [..., h, w]` at `size = (H, W)`, bilinear, corners not aligned; in the maps' dtype."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    large = F.interpolate(flat, lattice.shape(size, "size"), mode="bilinear", align_corners=False)
    return large.view(*maps.shape[:-2], *large.shape[-2:])


def min_max(maps: Tensor) -> Tensor:
    """`maps [..., h, w]` shifted and scaled to 0..1, each by itself; 0 where a map is constant."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).masked_fill(high == low, 1)


def regions(mask: Tensor, diagonal: bool = False) -> Tensor:
    """Connected regions of `mask [H, W]` bool, int64 `[H, W]`: 0 outside, 1, 2, ... by their first pixel.

    Neighbours share a side, or with `diagonal` a corner. Takes logarithmically many rounds, on any device.
    """
    height, width = mask.shape
    index = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    shifts = [(0, 1), (1, 0)] + ([(1, 1), (1, -1)] if diagonal else [])
    pairs = []
    for down, right in shifts:
        left, off = max(right, 0), max(-right, 0)
        near = (slice(0, height - down), slice(off, width - left))
        far = (slice(down, height), slice(left, width - off))
        both = mask[near] & mask[far]
        pairs.append(torch.stack([index[near][both], index[far][both]]))
    a, b = torch.cat(pairs, 1)
    # Every pixel points to one that comes before it: trees are hooked to the smaller root, then flattened.
    root = index.flatten().clone()
    while True:
        before = root.clone()
        low = torch.minimum(root[a], root[b])
        root.scatter_reduce_(0, torch.cat([before[a], before[b], a, b]), low.repeat(4), "amin")
        while not (jumped := root[root]).equal(root):
            root = jumped
        if root.equal(before):
            break
    first = mask.flatten() & (root == index.flatten())
    return (first.cumsum(0)[root] * mask.flatten()).view_as(mask)
