"""The part of an image that a question is about: its attention over that of a general instruction (CARVE)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose
from regard.ops.maps import on_grid, regions, resized
from regard.primitives import lattice

CARD = Card(
    title="Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
    arxiv="2509.06461",
    sheet=154,
    implements="Contrast of two runs' maps, their fusion over steps and layers, the kept regions, the refined image, "
    "and the paper's measures of attention and of images.",
    exact=False,
    saving="none",
    departures=(
        "Maps that do not differ keep the whole image, and say so; the paper does not treat them.",
        "Edges are those of the Canny detector with 3 x 3 derivatives and thresholds 100 and 200, which are inferred.",
    ),
    oracles=(
        "the contrast minimises the paper's objective: no perturbation is lower",
        "a noise common to both maps cancels; equal maps say nothing",
        "share 1 keeps the image; one weighted step is its weight times that step",
        "planted noise x signal: the kept region overlaps the signal by 0.8, that of plain attention by less than 0.4",
    ),
    options={
        "floor": Option(kind="float", default=1e-8, low=0.0, doc="lambda, added to the general map (released code)"),
        "fuse": Option(
            kind="str",
            default="weighted",
            choices=("first", "weighted", "last"),
            doc="which steps count: the first, all in proportion to their number, or the last (the paper's best)",
        ),
        "share": Option(kind="float", default=0.2, low=0.0, high=1.0, doc="p, of the pixels above the threshold"),
        "kept": Option(default=None, low=1, optional=True, doc="regions kept; none: max(3, share of all), as released"),
    },
)
FLAT = 1e-3  # maps that differ by less, relative to their size, say nothing of the question


@dataclass(frozen=True, eq=False)
class Shown:
    """What of an image of H x W pixels is shown.

    Args:
        mask: bool `[H, W]`, the kept regions.
        box: `(top, left, bottom, right)` around them, ends excluded.
        scores: `[H, W]`, the fused contrast.
        informative: False where the maps do not differ, so that the whole image is kept.
    """

    mask: Tensor
    box: tuple[int, int, int, int]
    scores: Tensor
    informative: bool


def show(
    question: Tensor,
    general: Tensor,
    grid: Sequence[int],
    image_size: Sequence[int],
    *,
    floor: float = 1e-8,
    fuse: str = "weighted",
    share: float = 0.2,
    kept: int | None = None,
) -> Shown:
    """The regions of an image that the question attends to more than a general instruction does.

    Args:
        question: `[steps, layers, N]` float: at every generated token, the attention of the last row to the visual
            tokens under the question, mean over heads, of the layers that count (the paper: 20 to 25 of 28 to 40).
        general: the same under "describe the image"; steps beyond the shorter run are left out.
        grid: rows and columns of the N visual tokens.
        image_size: height and width in pixels.
        floor: lambda of the contrast.
        fuse: which steps count (see the card).
        share: of the pixels above the threshold, ties included.
        kept: regions of the largest sums that are kept.

    Raises:
        RegardError: maps, layers and grid disagree, a value is negative or infinite, or an option is out of range.

    Source: CARVE (2509.06461), section 4; YuyaoGe/CARVE, carve/masking.py.
    """
    if question.ndim != 3 or general.ndim != 3 or question.shape[1:] != general.shape[1:]:
        raise RegardError(
            f"maps must be [steps, layers, N] of the same layers and tokens, got {list(question.shape)} for the "
            f"question and {list(general.shape)} for the general instruction"
        )
    if len(lattice.shape(grid)) != 2:
        raise RegardError(f"an image has rows and columns, got a grid of {tuple(grid)}")
    if not 0 <= share <= 1 or (kept is not None and kept < 1):
        raise RegardError(f"share must lie in [0, 1] and kept be at least 1, got share={share} and kept={kept}")
    steps = min(len(question), len(general))
    scores = fused(on_grid(contrast(question[:steps], general[:steps], floor), grid), image_size, fuse)
    # Where attention is as small as the floor, the contrast of equal maps is below 1, so they are compared themselves.
    same = torch.allclose(question[:steps], general[:steps], rtol=FLAT, atol=0)
    if same or scores.max() - scores.min() <= FLAT * scores.mean():
        mask = torch.ones_like(scores, dtype=torch.bool)
        return Shown(mask, (0, 0, mask.shape[0], mask.shape[1]), scores, informative=False)
    rank = math.floor((1 - share) * (scores.numel() - 1)) + 1
    above = scores >= scores.flatten().kthvalue(rank).values
    mask = largest(above, scores, kept, share)
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
    return Shown(mask, box, scores, informative=True)


def contrast(question: Tensor, general: Tensor, floor: float = 1e-8) -> Tensor:
    """`a_Q / (a_G + lambda)`, the x that minimises `sum (x a_G - a_Q)^2 + lambda sum x^2 a_G`.

    Raises:
        RegardError: shapes differ, a value is negative, or lambda is negative.
    """
    if question.shape != general.shape:
        raise RegardError(f"maps to be contrasted differ: {list(question.shape)} and {list(general.shape)}")
    if floor < 0 or (question < 0).any() or (general < 0).any():
        raise RegardError(f"maps of attention and their floor {floor} cannot be negative")
    return question / (general + floor)


def fused(maps: Tensor, size: Sequence[int], fuse: str = "weighted") -> Tensor:
    """`sum_t w_t sum_l` of `maps [steps, layers, h, w]` at `size`: `[H, W]`, with `w_t` 1, 2, ... or one step alone.

    Raises:
        RegardError: there is no step, or no such way of fusing.
    """
    choose("fuse", fuse, CARD.options["fuse"].choices)
    if not len(maps):
        raise RegardError("there are no steps that both runs have")
    layers = maps.sum(1)  # resizing is linear, so it may follow the sums
    if fuse == "weighted":
        weight = torch.arange(1, len(maps) + 1, dtype=maps.dtype, device=maps.device)
        return resized(torch.einsum("t,thw->hw", weight, layers), size)
    # The last step that both runs have keeps its weight, which no threshold sees.
    return resized(layers[0] if fuse == "first" else layers[-1] * len(maps), size)


def largest(mask: Tensor, scores: Tensor, kept: int | None, share: float) -> Tensor:
    """The regions of `mask [H, W]` with the largest sums of `scores`: `kept`, or `max(3, share * regions)`."""
    labels = regions(mask)
    count = int(labels.max())
    sums = scores.new_zeros(count + 1).index_add_(0, labels.flatten(), scores.flatten())[1:]
    few = max(3, math.floor(share * count)) if kept is None else kept
    best = sums.topk(min(few, count)).indices + 1
    return torch.isin(labels, best)


def images(image: Tensor, shown: Shown, keep_original: bool = True) -> list[Tensor]:
    """What the model is asked again with: the image (unless left out, as the paper has it) and its refined part.

    Outside the kept regions the refined image is 0; it is cropped to their box and enlarged to the image's size at
    least, its shape kept.

    Args:
        image: `[channels, H, W]` float.
        shown: of `show`.
        keep_original: as the released code does.

    Raises:
        RegardError: the image is not of the size that `shown` speaks of.
    """
    if image.ndim != 3 or image.shape[1:] != shown.mask.shape:
        raise RegardError(f"the mask is {list(shown.mask.shape)} and the image {list(image.shape)}")
    top, left, bottom, right = shown.box
    part = (image * shown.mask)[:, top:bottom, left:right]
    scale = max(image.shape[1] / part.shape[1], image.shape[2] / part.shape[2])
    part = resized(part, (round(part.shape[1] * scale), round(part.shape[2] * scale)))
    return [image, part] if keep_original else [part]


def entropy(maps: Tensor) -> Tensor:
    """Entropy of attention over visual tokens, `maps [..., layers, N]` renormalised, mean over layers: `[...]`."""
    part = maps / maps.sum(-1, keepdim=True)
    return torch.special.entr(part).sum(-1).mean(-1)


def colour(image: Tensor) -> float:
    """Entropy of 180 bins of hue over its greatest, in 0..1, of `image [3, H, W]` in 0..1; grey has hue 0."""
    high, arg = image.max(0)
    chroma = (high - image.amin(0)).clamp(min=1e-12)
    r, g, b = image
    sextant = torch.stack([(g - b) / chroma % 6, (b - r) / chroma + 2, (r - g) / chroma + 4])
    hue = sextant.gather(0, arg[None])[0] * 30 * (high > image.amin(0))
    counts = torch.bincount(hue.floor().long().clamp(0, 179).flatten(), minlength=180)
    return float(torch.special.entr(counts / counts.sum()).sum() / math.log(180))


def texture(image: Tensor, low: float = 100.0, high: float = 200.0) -> float:
    """Share of pixels on an edge of `image [H, W]`, grey in 0..255: Canny, without blurring first.

    Pixels whose gradient (sums of absolute 3 x 3 derivatives) is the largest across the edge, above `low`, and
    connected to one above `high`.
    """
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=image.dtype, device=image.device)
    wide = F.pad(image[None, None], (1, 1, 1, 1), mode="replicate")
    x, y = F.conv2d(wide, torch.stack([kernel, kernel.T])[:, None])[0]
    size = x.abs() + y.abs()
    around = F.pad(size[None, None], (1, 1, 1, 1))[0, 0]
    h, w = size.shape
    steep, slight = y.abs() > x.abs() * math.tan(3 * math.pi / 8), y.abs() < x.abs() * math.tan(math.pi / 8)
    thin = torch.zeros_like(size, dtype=torch.bool)
    sloping = ~steep & ~slight
    for where, down, right in ((slight, 0, 1), (steep, 1, 0), (sloping & (x * y > 0), 1, 1),
                               (sloping & (x * y <= 0), 1, -1)):  # fmt: skip
        before = around[1 - down : 1 - down + h, 1 - right : 1 - right + w]
        after = around[1 + down : 1 + down + h, 1 + right : 1 + right + w]
        thin |= where & (size > before) & (size >= after)
    labels = regions(thin & (size > low), diagonal=True)
    strong = labels[thin & (size > high)].unique()
    return float(torch.isin(labels, strong).float().mean())
