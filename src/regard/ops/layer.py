"""One layer's attention under its Slots, in running order; imports no paper."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from regard.core.slots import Chosen, Reading, Reweigh, Slots, State
from regard.core.step import Step
from regard.core.store import View

# Rows that are attended once more together: what is added to their scores is built for so many at once.
ROWS = 128


def run(
    slots: Slots, view: View, q: Tensor, step: Step, state: State, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of `q [B, H, T, D]` over `view`: out `[B, H, T, Dv]`.

    In order: prepare, select, attend, rescore, reweigh, mix. Keys and values were prepared when they were stored. Edits
    of a site chain in the recipe's order.
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
        if slots.rescore:
            out, lse = _rescored(slots, view, q, step, state, scale, softcap, out, lse)
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


def _rescored(
    slots: Slots,
    view: View,
    q: Tensor,
    step: Step,
    state: State,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` with the rows that edits name attended once more, under the sum of their biases."""
    asked = [(rows, edit) for edit in slots.rescore if (rows := edit.rows(step)) is not None]
    asked = [(range(*rows.indices(q.shape[2])), edit) for rows, edit in asked]
    cuts = sorted({end for rows, _ in asked for end in (rows.start, rows.stop)})
    outs, lses, done, arrivals = [], [], 0, step.arrivals
    for first, last in pairwise(cuts):
        edits = [edit for rows, edit in asked if first in rows]
        for start in range(first, last, ROWS) if edits else ():
            rows = slice(start, min(start + ROWS, last))
            own = step.only(arrivals[:, rows])
            reading = _reading(slots, view, q[:, :, rows], own, state, scale, softcap, lse[:, :, rows])
            biases = [bias for edit in edits if (bias := edit.bias(reading)) is not None]
            if not biases:
                continue
            call = {"pattern": slots.pattern, "step": own, "scale": scale, "softcap": softcap}
            new, mass = view.attend(q[:, :, rows], bias=sum(biases[1:], biases[0]), **call)
            outs += [out[:, :, done:start], new]
            lses += [lse[:, :, done:start], mass]
            done = rows.stop
    if not done:
        return out, lse
    return torch.cat([*outs, out[:, :, done:]], 2), torch.cat([*lses, lse[:, :, done:]], 2)


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
