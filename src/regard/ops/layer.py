"""One layer's attention under its Slots, in running order; imports no paper."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from regard.core.slots import Chosen, Reading, Rescore, Reweigh, Slots, State
from regard.core.step import Step
from regard.core.store import View

# Rows that are attended once more together: what is added to their scores, or splits their keys, is built for so many.
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
    read = partial(_reading, slots, view, q, step, state, scale, softcap)
    pieces = None
    for choice in slots.select:
        pieces = choice.choose(read())
    if pieces is not None:
        out = _gathered(pieces, slots, view, q, step, scale, softcap)
    else:
        out, lse = view.attend(q, pattern=slots.pattern, step=step, scale=scale, softcap=softcap)
        out = _rescored(slots.rescore, view, q, step, read, out, lse)
        for edit in slots.reweigh:
            out = _reweighed(edit, view, q, step, read, out, lse)
    for edit in slots.mix:
        out = edit.run(out, step, state)
    return out


def _reading(
    slots: Slots, view: View, q: Tensor, step: Step, state: State, scale: float, softcap: float | None
) -> Reading:
    query, key, positions = view.keys(q, step)
    return Reading(query, key, positions, slots.pattern, scale, softcap, step, state)


def _block(whole: Reading, rows: slice, lse: Tensor) -> Reading:
    """Of `whole` the rows `rows` of the forward."""
    step, every = whole.step, rows == slice(0, whole.query.shape[2])
    return whole.of_rows(rows, step if every else step.only(step.arrivals[:, rows]), lse[:, :, rows])


def _rescored(
    edits: Sequence[Rescore], view: View, q: Tensor, step: Step, read: Callable[[], Reading], out: Tensor, lse: Tensor
) -> Tensor:
    """`out` with the rows that edits name attended once more, under the sum of their biases."""
    asked = [(edit, *step.within(named)) for edit in edits if (named := edit.rows(step)) is not None]
    asked = [one for one in asked if one[1].start < one[1].stop]
    if not asked:
        return out
    whole, outs, done = read(), [], 0
    for first, last in pairwise(sorted({end for _, rows, _ in asked for end in (rows.start, rows.stop)})):
        mine = [one for one in asked if one[1].start <= first < one[1].stop]
        for start in range(first, last, ROWS) if mine else ():
            rows = slice(start, min(start + ROWS, last))
            reading = _block(whole, rows, lse)
            biases = []
            for edit, named, which in mine:
                bias = edit.bias(reading)
                if bias is not None and which is not None:
                    of_rows = which[:, None, rows.start - named.start : rows.stop - named.start, None]
                    bias = torch.where(of_rows.to(bias.device), bias, 0.0)
                biases += [] if bias is None else [bias]
            if biases:
                new = _attended(view, q[:, :, rows], reading, sum(biases[1:], biases[0]))[0]
                outs += [out[:, :, done:start], new]
                done = rows.stop
    return torch.cat([*outs, out[:, :, done:]], 2) if outs else out


def _attended(view: View, q: Tensor, reading: Reading, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`view.attend` of the rows of `reading`, `q` as the layer has them, with `bias`."""
    call = {"pattern": reading.pattern, "scale": reading.scale, "softcap": reading.softcap}
    return view.attend(q, step=reading.step, bias=bias, **call)


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


def _reweighed(
    edit: Reweigh, view: View, q: Tensor, step: Step, read: Callable[[], Reading], out: Tensor, lse: Tensor
) -> Tensor:
    """`out` with the segments of the rows that `edit` names under their gains."""
    if edit.rows is None:
        rows, which, block = slice(0, q.shape[2]), None, max(q.shape[2], 1)
    else:
        named = edit.rows(step)
        (rows, which), block = (slice(0, 0), None) if named is None else step.within(named), ROWS
    if rows.start >= rows.stop:
        return out
    whole, outs, done = read(), [], 0
    for start in range(rows.start, rows.stop, block):
        part = slice(start, min(start + block, rows.stop))
        reading = _block(whole, part, lse)
        segments = edit.split(reading)
        if segments is None:
            continue
        new = _joined(edit, segments, reading, view, q[:, :, part])
        if which is not None:
            of_rows = which[:, None, start - rows.start : part.stop - rows.start, None]
            new = torch.where(of_rows.to(new.device), new, out[:, :, part])
        outs += [out[:, :, done:start], new]
        done = part.stop
    return torch.cat([*outs, out[:, :, done:]], 2) if outs else out


def _joined(edit: Reweigh, segments: Tensor, reading: Reading, view: View, q: Tensor) -> Tensor:
    """`sum_s gain_s mass_s out_s`, from the attention of every segment by itself."""
    assert reading.lse is not None
    outs, masses = [], []
    for segment in range(edit.segments):
        bias = q.new_zeros(segments.shape).masked_fill(segments != segment, -torch.inf)
        out, lse = _attended(view, q, reading, bias)
        outs.append(out)
        # A row without keys has no mass anywhere.
        masses.append(torch.exp(lse - reading.lse.masked_fill(reading.lse == -torch.inf, 0)))
    mass = torch.stack(masses)
    share = (edit.gains(mass) * mass)[..., None]
    exact = sum(w * out.to(w.dtype) for w, out in zip(share, outs, strict=True))
    assert isinstance(exact, Tensor)
    return exact.to(q.dtype)
