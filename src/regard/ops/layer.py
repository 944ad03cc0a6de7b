"""One layer's attention under its Slots, in running order; imports no paper."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

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


def _blocks(
    named: Sequence[tuple[Any, slice, Tensor | None]], read: Callable[[], Reading], lse: Tensor, size: int = ROWS
) -> Iterator[tuple[slice, Reading, list[tuple[Any, Tensor | None]]]]:
    """Rows that edits name, at most `size` at a time, in order: (rows, their reading, who names them).

    `named`: (edit, rows, which of them `[B, rows]` or None: all), of which a block has (edit, which
    `[B, 1, rows, 1]`). Nothing is read where nobody names a row.
    """
    asked = [one for one in named if one[1].start < one[1].stop]
    if not asked:
        return
    whole = read()
    for first, last in pairwise(sorted({end for _, rows, _ in asked for end in (rows.start, rows.stop)})):
        mine = [one for one in asked if one[1].start <= first < one[1].stop]
        for start in range(first, last, size) if mine else ():
            rows = slice(start, min(start + size, last))
            step, every = whole.step, rows == slice(0, whole.query.shape[2])
            reading = whole.of_rows(rows, step if every else step.only(step.arrivals[:, rows]), lse[:, :, rows])
            told = [
                (edit, None if which is None else which[:, None, start - own.start : rows.stop - own.start, None])
                for edit, own, which in mine
            ]
            yield rows, reading, told


def _replaced(out: Tensor, new: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """`out [B, H, T, Dv]` with some of its rows new, in order."""
    pieces, done = [], 0
    for rows, piece in new:
        pieces += [out[:, :, done : rows.start], piece]
        done = rows.stop
    return torch.cat([*pieces, out[:, :, done:]], 2) if pieces else out


def _rescored(
    edits: Sequence[Rescore], view: View, q: Tensor, step: Step, read: Callable[[], Reading], out: Tensor, lse: Tensor
) -> Tensor:
    """`out` with the rows that edits name attended once more, under the sum of their biases."""
    named = [(edit, *step.within(rows)) for edit in edits if (rows := edit.rows(step)) is not None]
    new = []
    for rows, reading, mine in _blocks(named, read, lse):
        biases = []
        for edit, which in mine:
            bias = edit.bias(reading)
            if bias is not None:
                biases.append(bias if which is None else torch.where(which.to(bias.device), bias, 0.0))
        if biases:
            new.append((rows, _attended(view, q[:, :, rows], reading, sum(biases[1:], biases[0]))[0]))
    return _replaced(out, new)


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
        rows, which, size = slice(0, q.shape[2]), None, max(q.shape[2], 1)
    else:
        asked = edit.rows(step)
        (rows, which), size = (slice(0, 0), None) if asked is None else step.within(asked), ROWS
    new = []
    for part, reading, ((_, chosen),) in _blocks([(edit, rows, which)], read, lse, size):
        segments = edit.split(reading)
        if segments is not None:
            joined = _joined(edit, segments, reading, view, q[:, :, part])
            new.append((part, joined if chosen is None else torch.where(chosen.to(q.device), joined, out[:, :, part])))
    return _replaced(out, new)


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
