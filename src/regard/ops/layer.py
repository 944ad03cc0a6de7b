"""One layer's attention under its Slots, in running order; imports no paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.slots import Chosen, Reading, Reweigh, Slots, State
from regard.core.step import Step
from regard.core.store import View


def run(
    slots: Slots, view: View, q: Tensor, step: Step, state: State, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of `q [B, H, T, D]` over `view`: prepare, select, attend, reweigh, mix. Returns out `[B, H, T, Dv]`.

    Keys and values were prepared when they were stored. Edits chain in the recipe's order.
    """
    for edit in slots.prepare:
        q = edit.query(q, step)
    pieces = None
    for choice in slots.select:
        pieces = choice.choose(_reading(slots, view, q, step, state, scale, softcap))
    if pieces is not None:
        out = _gathered(pieces, slots, view, q, step, scale, softcap)
    else:
        out, lse = view.attend(q, pattern=slots.pattern, step=step, scale=scale, softcap=softcap)
        for edit in slots.reweigh:
            reading = _reading(slots, view, q, step, state, scale, softcap, lse)
            segments = edit.split(reading)
            if segments is not None:
                out = _reweighed(edit, segments, reading, view, q)
    for edit in slots.mix:
        out = edit.run(out, step, state)
    return out


def _reading(
    slots: Slots,
    view: View,
    q: Tensor,
    step: Step,
    state: State,
    scale: float,
    softcap: float | None,
    lse: Tensor | None = None,
) -> Reading:
    query, key, positions = view.keys(q, step)
    return Reading(query, key, positions, slots.pattern, scale, softcap, step, state, lse)


def _gathered(
    pieces: Sequence[Chosen], slots: Slots, view: View, q: Tensor, step: Step, scale: float, softcap: float | None
) -> Tensor:
    """Attention of each piece's rows over its own keys."""
    arrivals, outs = step.arrivals, []
    for piece in pieces:
        own = step.only(arrivals[:, piece.rows])
        rows, index = q[:, :, piece.rows], piece.index
        call = {"pattern": slots.pattern, "step": own, "scale": scale, "softcap": softcap}
        if index.ndim == 3:
            outs.append(view.attend_blocks(rows, index, own=piece.rows if piece.own else None, **call))
        else:
            outs.append(view.attend(rows, index=index, **call)[0])
    return torch.cat(outs, dim=2)


def _reweighed(edit: Reweigh, segments: Tensor, reading: Reading, view: View, q: Tensor) -> Tensor:
    """`sum_s gain_s mass_s out_s`, from the attention of every segment by itself."""
    assert reading.lse is not None
    outs, masses = [], []
    for segment in range(edit.segments):
        bias = q.new_zeros(segments.shape).masked_fill(segments != segment, -torch.inf)
        out, lse = view.attend(
            q,
            pattern=reading.pattern,
            step=reading.step,
            scale=reading.scale,
            softcap=reading.softcap,
            bias=bias,
        )
        outs.append(out)
        # A row without keys has no mass anywhere.
        masses.append(torch.exp(lse - reading.lse.masked_fill(reading.lse == -torch.inf, 0)))
    mass = torch.stack(masses)
    share = (edit.gains(mass) * mass)[..., None]
    exact = sum(w * out.to(w.dtype) for w, out in zip(share, outs, strict=True))
    assert isinstance(exact, Tensor)
    return exact.to(q.dtype)
