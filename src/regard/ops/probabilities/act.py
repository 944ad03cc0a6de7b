"""Attention calibration (ACT): sinks other than the first token give up most of their attention to all other keys."""

from functools import partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Reading, Reweigh
from regard.primitives.columns import column_mass, column_rows

CARD = Card(
    title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
    "through Attention Calibration",
    arxiv="2406.15765",
    sheet=65,
    implements="Column levels, their sinks, the calibration of each row by two segment gains, and the offline "
    "search for the heads that are calibrated (regard.calibrate.act). The paper leaves out the first two "
    "layers and the last: say so in the placement's layers.",
    exact=False,
    saving="none",
    departures=(
        "Sinks are found over the prompt and stay as they are for response rows: the official code runs one forward "
        "and one new token. A prompt in chunks: each chunk uses what the prompt has shown so far.",
        "The first real token is left out by its position; the code leaves out the first sink that it finds.",
        "A level is the mean over the rows that can see the key, under sliding windows too.",
    ),
    oracles=(
        "the slow loop of the paper: damp, free, spread",
        "rows sum to 1, the ratio of two other keys stays",
        "no sink but the first token, or theta of 1: nothing changes",
        "a planted sink is found, and its column mean falls by 60 %",
        "a planted harmful head is found among helpful ones",
    ),
    aliases=("attention_calibration",),
    neutral={"beta": 1.0},
    example={"theta": 0.05},
    options={
        "beta": Option(kind="float", default=0.4, low=0.0, high=1.0, doc="what a sink keeps of its attention"),
        "theta": Option(
            kind="float", default=0.1, low=0.0, high=1.0, doc="keys whose mean attention is above it are sinks"
        ),
        "relative": Option(
            kind="float",
            default=None,
            optional=True,
            low=0.0,
            doc="sinks lie above relative / n instead, n tokens of the prompt (the paper: 5); none: theta says",
        ),
        "heads_mask": Option(
            kind="tensor",
            default=None,
            optional=True,
            shape=("layers", "heads"),
            low=0.0,
            high=1.0,
            doc="[L, H] query heads above 0.5 are calibrated, if placed; none: all that are placed",
        ),
    },
)

# What a layer keeps by arrival, over the prompt's rows: attention that a key got, and rows that could see it.
MASS, ROWS = "act mass", "act rows"


def reweigh(
    where: Where, *, beta: float, theta: float, relative: float | None, heads_mask: Tensor | None
) -> Reweigh | None:
    """Gains `beta` on sinks and `1 + (1 - beta) m_sink / m_rest` on the rest.

    Raises:
        RegardError: `heads_mask` is not `[layers, heads]`, or not finite.
    """
    chosen = torch.zeros(where.heads, dtype=torch.bool)
    chosen[where.rows(where.heads)] = True
    if heads_mask is not None:
        if tuple(heads_mask.shape) != (where.layers, where.heads):
            wanted, found = [where.layers, where.heads], list(heads_mask.shape)
            raise RegardError(f"'act' needs heads_mask of shape [layers, heads] = {wanted}, got {found}")
        if not bool(heads_mask.isfinite().all()):
            raise RegardError("'act' has a heads_mask with numbers that are not finite")
        picked = heads_mask.detach().cpu() > 0.5
        chosen &= picked[where.layer]
        if not bool(picked.any()):
            return Reweigh("act: no head is chosen, nothing changes", 2, lambda reading: None, torch.ones_like)
    if beta == 1 or not bool(chosen.any()):
        return None
    split = partial(segments, chosen=chosen, theta=theta, relative=relative)
    heads = "" if bool(chosen.all()) else f", heads {', '.join(map(str, chosen.nonzero()[:, 0].tolist()))}"
    return Reweigh(f"act: beta {beta:g}{heads}", 2, split, partial(gains, beta=beta))


@torch.no_grad()
def segments(reading: Reading, *, chosen: Tensor, theta: float, relative: float | None) -> Tensor | None:
    """1 for sinks of the `chosen [H]` heads and 0 for all other keys, `[B, H, 1, S]`; None: there is no sink.

    Raises:
        RegardError: a crop took rows of the prompt, whose attention is among the levels.
    """
    step = reading.step
    _count(reading)
    if MASS not in reading.state:
        return None
    mass, rows = reading.state[MASS], reading.state[ROWS]
    width = mass.shape[2]
    positions = step.positions(torch.arange(width, device=mass.device))
    bound = theta
    if relative is not None:
        bound = (relative / (positions[:, -1:] + 1)).to(mass)[:, None]
    found = (mass / rows.clamp(min=1) > bound) & (positions != 0)[:, None] & chosen.to(mass.device)[:, None]
    held = reading.held(found, False)
    return held[:, :, None].long() if bool(held.any()) else None


def gains(masses: Tensor, *, beta: float) -> Tensor:
    """Gains `[2, B, H, R]` of the rest and of the sinks, for their masses `[2, B, H, R]`.

    A row whose attention is all on sinks keeps it: there is nothing to spread to.
    """
    rest, sinks = masses
    stuck = rest < torch.finfo(rest.dtype).tiny
    up = 1 + (1 - beta) * sinks / rest.masked_fill(stuck, 1)
    return torch.stack((up.masked_fill(stuck, 1), torch.full_like(sinks, beta).masked_fill(stuck, 1)))


def _count(reading: Reading) -> None:
    """Add the prompt rows of this forward to the columns in `state`: `[B, H, n]`, and `[B, 1|H, n]` rows."""
    step, state = reading.step, reading.state
    held = state[MASS].shape[2] if MASS in state else 0
    if step.start < held:
        raise RegardError(
            f"a crop left {step.start} of the {held} prompt rows over which 'act' found its sinks; begin a new cache"
        )
    stop = step.stop if step.prompt is None else min(step.stop, step.prompt)
    if stop <= step.start:
        return
    assert reading.lse is not None
    device = reading.key.device
    queries = reading.queries.masked_fill(step.arrivals.to(device) >= stop, -1)
    mass = column_mass(
        reading.query, reading.key, reading.lse,
        pattern=reading.pattern, q_positions=queries, k_positions=reading.positions,
        scale=reading.scale, softcap=reading.softcap, two_sided=step.two_sided,
    )  # fmt: skip
    seen = column_rows(reading.pattern, queries, reading.positions, step.two_sided)
    if seen.shape[1] > 1:
        seen = seen.repeat_interleave(mass.shape[1] // seen.shape[1], 1)
    # Keys of later rows got nothing from these, and padding nothing at all: where they land is without meaning.
    at = reading.arrivals.clamp(0, stop - 1)
    for name, new in ((MASS, mass), (ROWS, seen)):
        new = new.expand(mass.shape[0], -1, -1)
        total = new.new_zeros(*new.shape[:2], stop)
        if name in state:
            total[..., :held] = state[name]
        state[name] = total.scatter_add_(2, at.expand(*new.shape[:2], -1), new)
