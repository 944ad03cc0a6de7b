"""Temporal attention of a video diffusion model, drawn to an early block's and made to vary more (BroadWay)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError

CARD = Card(
    title="BroadWay: Boost Your Text-to-Video Generation Model in a Training-free Way",
    arxiv="2410.06241",
    sheet=122,
    implements="Temporal self-guidance, and the gain of the high frequencies over keys.",
    exact=False,
    saving="none",
    departures=(
        "The caller says in which modules and steps: the paper edits blocks 1 to 3 in the first fifth of denoising.",
        "The reference is interpolated bilinearly over space.",
    ),
    oracles=(
        "alpha 0 and beta 1 change nothing; guided rows come closer to the reference by 1 - alpha",
        "the energy of both bands is that of the map, and the edited map has no less than before",
        "16 frames and tau 7: 1 / F plus the gain times the rest",
        "a discrete Fourier transform written as sums",
    ),
    aliases=("bytheway",),
    neutral={"alpha": 0.0, "beta": 1.0},
    options={
        "alpha": Option(kind="float", default=0.6, low=0.0, high=1.0, doc="pull of the reference (VideoCrafter2: 0.1)"),
        "beta": Option(kind="float", default=1.5, low=0.0, doc="least gain of high frequencies (VideoCrafter2: 10)"),
        "tau": Option(default=7, low=0, doc="half the width of the high band"),
        "guided": Option(
            kind="bool", default=False, doc="the batch's first half is unconditional, so it counts in no energy"
        ),
    },
)


def rewrite(
    weights: Tensor,
    reference: Tensor,
    *,
    alpha: float = 0.6,
    beta: float = 1.5,
    tau: int = 7,
    guided: bool = False,
) -> Tensor:
    """Probabilities of one temporal module, edited; entries may become negative, as the method has it.

    Args:
        weights: `[B, h, w, H, F, F]` float, pixels apart: every frame's attention to the frames of its pixel.
        reference: the same of the corresponding module in the first decoder block, `[B, h', w', H, F, F]`.
        alpha: pull of the reference.
        beta: gain of high frequencies; more where guidance took more energy than that gives back.
        tau: frequencies F / 2 - tau to F / 2 + tau are high.
        guided: leave the first half of the batch out of the energies.

    Returns:
        weights' shape and dtype; the very tensor if nothing is to be done. Rows sum to 1.

    Raises:
        RegardError: there is no reference or it differs in more than its pixels, F is odd or below `2 tau + 2`, alpha
            or beta is out of range, `guided` with an odd batch, or a weight is not finite.

    Source: BroadWay (2410.06241); Bujiazi/ByTheWay, README.md.
    """
    if not isinstance(reference, Tensor):
        raise RegardError("broadway needs the map of the first decoder block as reference, and got none")
    same = weights.ndim == reference.ndim == 6 and (
        weights.shape[:1] + weights.shape[3:] == reference.shape[:1] + reference.shape[3:]
    )
    frames = weights.shape[-1]
    if not same or weights.shape[-2] != frames:
        raise RegardError(
            f"weights must be [B, h, w, H, F, F], and the reference of the same B, H and F; got {list(weights.shape)} "
            f"and {list(reference.shape)}"
        )
    if frames % 2 or frames < 2 * tau + 2 or tau < 0:
        raise RegardError(f"frames must be even and at least 2 tau + 2 = {2 * tau + 2}, got {frames}")
    if not 0 <= alpha <= 1 or beta < 0:
        raise RegardError(f"alpha must lie in [0, 1] and beta be at least 0, got {alpha} and {beta}")
    if guided and len(weights) % 2:
        raise RegardError(f"a guided batch has two equal halves, got {len(weights)} rows")
    if not weights.isfinite().all() or not reference.isfinite().all():
        raise RegardError("the maps hold NaN or infinite values")
    if alpha == 0 and beta == 1:
        return weights
    exact = torch.float64 if weights.dtype == torch.float64 else torch.float32
    before = weights.to(exact)
    after = before + alpha * (spread(reference.to(exact), (weights.shape[1], weights.shape[2])) - before)
    counted = slice(len(weights) // 2, None) if guided else slice(None)
    high, low = (energy(after[counted], tau, band) for band in ("high", "low"))
    gain = balance(energy(before[counted]), low, high, beta)
    return amplified(after, gain, tau).to(weights.dtype)


def spread(reference: Tensor, size: tuple[int, int]) -> Tensor:
    """`reference [B, h', w', H, F, F]` at `size` pixels; rows still sum to 1."""
    if reference.shape[1:3] == size:
        return reference
    by_pixel = reference.flatten(3).permute(0, 3, 1, 2)
    large = F.interpolate(by_pixel, size, mode="bilinear", align_corners=False)
    return large.permute(0, 2, 3, 1).unflatten(3, reference.shape[3:])


def high_band(frames: int, tau: int, device: torch.device | None = None) -> Tensor:
    """Which of `frames` frequencies are high, bool `[F]`: those within tau of F / 2."""
    return (torch.arange(frames, device=device) - frames // 2).abs() <= tau


def energy(weights: Tensor, tau: int | None = None, band: str = "") -> Tensor:
    """`sum_k A^2`, mean over the rows of `weights [..., F, F]`; with tau that of the "high" or "low" band of keys."""
    if tau is None:
        return weights.square().sum(-1).mean()
    frames = weights.shape[-1]
    bins = torch.fft.fft(weights).abs().square() / frames
    chosen = high_band(frames, tau, weights.device)
    return bins[..., chosen if band == "high" else ~chosen].sum(-1).mean()


def balance(before: Tensor, low: Tensor, high: Tensor, beta: float) -> Tensor:
    """The gain of high frequencies: beta, or what gives the map its energy `before` back if that is more."""
    # Nothing to amplify, or more in the low band than there was: no gain restores the energy, and beta it is.
    restoring = ((before - low).clamp(min=0) / high.clamp(min=torch.finfo(high.dtype).tiny)).sqrt()
    return torch.where(high > 0, restoring, beta).clamp(min=beta)


def amplified(weights: Tensor, gain: Tensor | float, tau: int) -> Tensor:
    """`weights [..., F, F]` with their high frequencies over keys times `gain`, rows divided by their sums."""
    gains = torch.ones(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    gains = torch.where(high_band(weights.shape[-1], tau, weights.device), gain, gains)
    made = torch.fft.ifft(torch.fft.fft(weights) * gains).real
    return made / made.sum(-1, keepdim=True)
