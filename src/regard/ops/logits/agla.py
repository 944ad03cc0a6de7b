"""AGLA: logits of a view of the image in which only what the prompt asks for survives are added."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import BranchSpec, Contrast, Image, Sight
from regard.ops.branching import weighted

CARD = Card(
    title="AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local "
    "Attention",
    arxiv="2406.12718",
    sheet=88,
    implements="Decoding with the sum of two views, the map of relevance from a matching model's attention and its "
    "gradient, and the masked view that it gives.",
    exact=False,
    saving="none",
    departures=(
        "The matching model is the user's: its attention and match go into `relevance`, and the masked pixels into "
        "handle.lending(pixel_values).",
        "Cubic resizing is torch's, with its coefficient of -0.75.",
    ),
    oracles=(
        "alpha 0 leaves only the cut",
        "identical views: logits times 1 + alpha, a temperature",
        "relevance is a hand-made product of attention and the positive part of its gradient",
        "a better match keeps fewer pixels; a constant map keeps all",
        "two planted objects: of what survives nine tenths lie in the named one, and its margin rises",
        "two runs of the model without a cache, one on the masked pixels",
    ),
    whole_model=True,
    needs="pixels",
    neutral={"alpha": 0.0, "beta": 0.0},
    example={"alpha": 1.0, "beta": 0.0},
    options={
        "alpha": Option(kind="float", default=2.0, low=0.0, doc="weight of the masked view's logits"),
        "beta": Option(
            kind="float",
            default=0.5,
            low=0.0,
            high=1.0,
            doc="tokens below beta times the largest probability are cut; 0 cuts none",
        ),
    },
)


def contrast(where: Where, *, alpha: float, beta: float) -> Contrast | None:
    """A branch that sees the pixels that were lent."""
    if alpha == 0:
        return Contrast("agla", lambda z: weighted(z, (1.0,), beta), ()) if beta > 0 else None

    def view(sight: Sight) -> list[Image]:
        own, other = sight.given["pixel_values"], sight.lent
        if not isinstance(other, Tensor):
            raise RegardError(
                "'agla' needs the masked view of the request's images: handle.lending(pixel_values), from agla.masked"
            )
        other = other.repeat_interleave(sight.times, 0)
        if other.shape != own.shape:
            raise RegardError(f"'agla' was lent pixels {list(other.shape)} for images {list(own.shape)}")
        return sight.encode(pixel_values=other.to(own))

    return Contrast("agla", lambda z: weighted(z, (1.0, alpha), beta), (BranchSpec(view=view),))


def relevance(attention: Tensor, match: Tensor, words: Tensor | None = None) -> Tensor:
    """What of an image a text asks for: `A * relu(dL/dA)`, mean over heads and words, `[B, n]`.

    Args:
        attention: `[B, heads, words, n]` weights from text to patches in the matching model, without its class patch.
        match: the match logit `[B]`, computed from `attention` with gradients.
        words: `[B, words]` bool, real ones; None: all.

    Raises:
        RegardError: `match` has no gradient with respect to `attention` (inference mode, a fused kernel).
    """
    if not (attention.requires_grad and match.requires_grad):
        raise RegardError(
            "'agla' needs the gradient of the match with respect to attention: run the matching model with gradients, "
            "and with an attention that returns its weights"
        )
    (grad,) = torch.autograd.grad(match.sum(), attention, retain_graph=True)
    maps = (attention * grad.relu()).detach().mean(1)
    real = torch.ones(maps.shape[:2], device=maps.device) if words is None else words.to(maps)
    return (maps * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def enlarged(maps: Tensor, size: int = 384, grid: tuple[int, int] | None = None) -> Tensor:
    """Maps `[B, n]` at `[B, size, size]`, in 0 to 1: cubic, then blurred with a deviation of 0.02 `size`.

    A constant map comes out as ones.

    Raises:
        RegardError: the map is not square and no `grid` (rows, columns) says what it is.
    """
    side = math.isqrt(maps.shape[-1])
    grid = grid or (side, side)
    if grid[0] * grid[1] != maps.shape[-1]:
        raise RegardError(f"a map of {maps.shape[-1]} patches is not {grid[0]} x {grid[1]}; pass grid=(rows, columns)")
    x = _scaled(maps.unflatten(-1, grid)[:, None])
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False)
    return _scaled(_blurred(x, 0.02 * size))[:, 0]


def kept_share(similarity: Tensor) -> Tensor:
    """Share of the pixels that survive, by the cosine of image and text: a better match keeps fewer."""
    return (1 - similarity / 2).clamp(max=1 - 1e-5)


def masked(pixels: Tensor, maps: Tensor, similarity: Tensor) -> Tensor:
    """`pixels [B, C, H, W]`, 0 where `maps [B, H, W]` are below the value at the rank that `kept_share` gives.

    Raises:
        RegardError: maps of another size, or another number of views; numbers that are not finite.
    """
    if maps.shape != (pixels.shape[0], *pixels.shape[-2:]) or similarity.shape != pixels.shape[:1]:
        raise RegardError(
            f"'agla' has maps {list(maps.shape)} and similarities {list(similarity.shape)} for pixels "
            f"{list(pixels.shape)}; one of each an image, of its height and width"
        )
    if not bool(maps.isfinite().all() and similarity.isfinite().all()):
        raise RegardError("'agla' has a map or a similarity that is not finite")
    ranked = maps.flatten(1).sort(1, descending=True).values
    rank = (kept_share(similarity) * ranked.shape[1]).long()
    least = ranked.gather(1, rank[:, None])[:, :, None]
    return pixels * (maps >= least)[:, None]


def _scaled(x: Tensor) -> Tensor:
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    flat = high <= low
    return torch.where(flat, 1.0, (x - low) / torch.where(flat, 1.0, high - low))


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """`x [B, 1, H, W]` under a Gaussian of four deviations, mirrored at its edges."""
    reach = min(int(4 * sigma + 0.5), x.shape[-1] - 1)
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None, None]
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="reflect"), kernel)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="reflect"), kernel.transpose(2, 3))
