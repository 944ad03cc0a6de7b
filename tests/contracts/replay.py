"""The definition of an attached model: keep every key and value, mask and encode them as recorded.

A run on real stores is recorded (its codes in writing order, its choices by arrival) and replayed as one full
forward that drops nothing, runs every row of every layer, hides as keys the rows that passed a layer by, and
reads the recorded codes. What a store really dropped, or a layer really skipped, cannot show in a replay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.adapters import blocks, requests
from regard.adapters.install import Handle
from regard.core.pattern import Pattern
from regard.core.slots import Chosen, Reading, Slots
from regard.core.step import Step
from regard.core.store import Codec
from regard.ops.attention import attend

Tape = dict[tuple[Any, ...], list[Any]]


class Everything:
    """A store that drops nothing, and encodes only to decode at once."""

    def __init__(self, key_codec, value_codec):
        self.codecs = (key_codec, value_codec)
        self.parts: list[list[Tensor]] = [[], []]
        self.passed: list[Tensor] = []
        self.length, self.state = 0, {}

    @property
    def size(self) -> int:
        return self.length

    def append(self, k: Tensor, v: Tensor, step: Step) -> "Everything":
        for part, codecs, x in zip(self.parts, self.codecs, (k, v), strict=True):
            groups: dict[int, list[int]] = {}
            for head, codec in enumerate(codecs):
                groups.setdefault(id(codec), []).append(head)
            read = x.clone()
            for heads in groups.values():
                if (codec := codecs[heads[0]]) is not None:
                    read[:, heads] = codec.decode(codec.encode(x[:, heads]), x.dtype)
            part.append(read)
        runs = step.shared.pop(self, torch.ones(1, k.shape[2], dtype=torch.bool))
        self.passed.append(~runs.expand(k.shape[0], -1))
        self.length = step.stop
        return self

    def attend(self, q: Tensor, *, pattern: Pattern, step: Step, scale: float, softcap=None, index=None, bias=None):
        k, v = (torch.cat(part, 2) for part in self.parts)
        positions = self.positions(step)
        if index is not None:
            at = index.clamp(min=0).expand(k.shape[0], -1)
            k, v = (x.take_along_dim(at[:, None, :, None], 2) for x in (k, v))
            positions = positions.gather(1, at).masked_fill(index < 0, -1)
        group = q.shape[1] // k.shape[1]
        outs = []
        for head in range(k.shape[1]):
            mine = q[:, head * group : (head + 1) * group]
            own = bias if bias is None or bias.shape[1] == 1 else bias[:, head * group : (head + 1) * group]
            key_codec, value_codec = (codecs[head] for codecs in self.codecs)
            mine = mine if key_codec is None else key_codec.query(mine)
            out, lse = attend(
                mine, k[:, head : head + 1], v[:, head : head + 1], pattern=pattern.head(head), scale=scale, bias=own,
                softcap=softcap, q_positions=step.queries(), k_positions=positions, backend="reference",
            )  # fmt: skip
            outs.append((out if value_codec is None else value_codec.output(out), lse))
        return torch.cat([out for out, _ in outs], 1), torch.cat([lse for _, lse in outs], 1)

    def attend_blocks(self, q: Tensor, index: Tensor, *, own: slice | None, step: Step, **call) -> Tensor:
        whole = Chosen(slice(0, q.shape[2]), index, own is not None)
        # The rows of `q` within the forward that runs, whose keys are the last.
        first = 0 if own is None else self.length - step.stop + step.start + own.start
        outs = []
        for one in whole.split(first):
            rows = step.only(step.arrivals[:, one.rows])
            outs.append(self.attend(q[:, :, one.rows], index=one.index, step=rows, **call)[0])
        return torch.cat(outs, 2)

    def keys(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        group = q.shape[1] // len(self.codecs[0])
        parts = zip(q.split(group, 1), self.codecs[0], strict=True)
        query = torch.cat([part if codec is None else codec.query(part) for part, codec in parts], 1)
        return query, torch.cat(self.parts[0], 2), self.positions(step)

    def positions(self, step: Step) -> Tensor:
        passed = torch.cat(self.passed, 1)
        return step.positions(torch.arange(self.length)).expand(passed.shape).masked_fill(passed, -1)

    @property
    def removable(self) -> int:
        return self.length

    def record(self) -> None: ...

    def crop(self, length: int) -> None:
        self.parts = [[torch.cat(part, 2)[:, :, :length]] for part in self.parts]
        self.passed = [torch.cat(self.passed, 1)[:, :length]]
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        if self.passed:
            self.parts = [[torch.cat(part, 2)[rows]] for part in self.parts]
            self.passed = [torch.cat(self.passed, 1)[rows]]
        self.state = {name: x[rows] for name, x in self.state.items()}

    def reset(self) -> None:
        self.parts, self.passed, self.length, self.state = [[], []], [], 0, {}

    def storages(self) -> Iterator[Tensor]:
        yield from (x for part in self.parts for x in part)


@contextmanager
def everything_kept() -> Iterator[None]:
    """Models attached inside run on `Everything` instead of their real stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "build", lambda pattern, keys, values, *_, **__: Everything(keys, values))
        patch.setattr(blocks, "_some_rows", _all_rows)
        yield


def _all_rows(whole: Callable[..., Any], index: int, told: requests.Requests):
    """A layer that runs every row, forgets what it made of those that pass it by, and hides them as keys."""

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert told.step is not None
        layer = told.layer(index)
        runs = blocks.together(layer.slots.rows, told.step)
        if runs is None:
            return whole(hidden, *args, **kwargs)
        runs = blocks.as_mask(runs, told.step)
        told.step.shared[layer.store] = runs
        # To the layer, rows that pass it by are rows that are not there.
        layer.step = told.step.only(told.step.arrivals.masked_fill(~runs, -1))
        return torch.where(runs[..., None], whole(hidden, *args, **kwargs), hidden)

    return run


def record(handle: Handle, tape: Tape) -> None:
    """Write every code that `handle`'s stores write, and every choice its mechanisms make, to `tape`."""

    def codec(codec: Codec, place: tuple[Any, ...]) -> Codec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            fields, step = codec.encode(x), handle._requests.layer(place[0]).step
            assert step is not None
            tape.setdefault(_here(handle, place), []).append((step.arrivals.expand(len(x), -1), fields))
            return fields

        return replace(codec, encode=encode)

    def select(reading: Reading, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        pieces = choose(reading)
        every = [Chosen(slice(0, reading.query.shape[2]), torch.arange(reading.key.shape[2])[None])]
        first = reading.key.shape[2] - reading.query.shape[2]
        for piece in (one for whole in pieces or every for one in whole.split(first)):
            rows = reading.step.arrivals[:, piece.rows]
            tape.setdefault(place, []).append((rows, _arrivals(reading, piece.index)))
        return pieces

    def split(reading: Reading, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        segments = choose(reading)
        told = torch.zeros(1, 1, 1, reading.key.shape[2], dtype=torch.long) if segments is None else segments
        tape.setdefault(place, []).append((reading.step.arrivals, reading.arrivals, told))
        return segments

    def bias(reading: Reading, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        added = choose(reading)
        if added is not None:
            tape.setdefault(place, []).append((reading.step.arrivals, reading.arrivals, added))
        return added

    def feed(step: Step, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        runs = choose(step)
        every = step.arrivals.shape[1]
        tape.setdefault(place, []).append((step.arrivals, blocks.as_mask(every if runs is None else runs, step)))
        return runs

    _rewrite(handle, codec, select, split, bias, feed)


def replay(handle: Handle, tape: Tape) -> None:
    """Give `handle`, which runs one full forward, the codes and choices of `tape` instead of new ones."""

    def codec(codec: Codec, place: tuple[Any, ...]) -> Codec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            own = codec.encode(x)
            recorded = tuple(field.clone() for field in own)
            for arrivals, fields in tape[_here(handle, place)]:
                for row, at in enumerate(arrivals):
                    for field, new in zip(recorded, fields, strict=True):
                        field[row][:, at[at >= 0]] = new[row][:, at >= 0]
            error = (codec.decode(recorded, x.dtype) - codec.decode(own, x.dtype)).abs()
            assert (error > 1e-3).double().mean() < 0.01, "the replayed codes are not those of these keys"
            return recorded

        return replace(codec, encode=encode)

    def select(reading: Reading, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        batch, _, rows, _ = reading.query.shape
        # A row that passed the layer by chose nothing; what it reads here is forgotten.
        lists = {(b, t): torch.arange(reading.key.shape[2]) for b in range(batch) for t in range(rows)}
        for arrivals, index in tape[place]:
            for b, at in _each(arrivals, batch):
                lists[b, int(arrivals[min(b, len(arrivals) - 1), at])] = index[min(b, len(index) - 1)]
        pieces = []
        for t in range(rows):
            told = [lists[b, t] for b in range(batch)]
            index = torch.nn.utils.rnn.pad_sequence(told, batch_first=True, padding_value=-1)
            pieces.append(Chosen(slice(t, t + 1), index))
        return pieces

    def split(reading: Reading, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        return _told(reading, tape.get(place, []), torch.long)

    def bias(reading: Reading, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        return _told(reading, tape.get(place, []), reading.query.dtype)

    def feed(step: Step, place: tuple[Any, ...], choose: Callable[..., Any]) -> Any:
        # One more column, for rows that a batch row does not have.
        runs = torch.ones(step.batch, step.width + 1, dtype=torch.bool)
        for arrivals, told in tape[place]:
            runs = runs.scatter(
                1, arrivals.remainder(step.width + 1).expand(step.batch, -1), told.expand(step.batch, -1)
            )
        return runs[:, :-1]

    _rewrite(handle, codec, select, split, bias, feed)


def _told(reading: Reading, told: list[Any], dtype: torch.dtype) -> Tensor:
    """What was said of rows and keys by arrival, for the rows and keys of one full forward, `[B, H, R, S]`."""
    batch, heads, _, keys = (*reading.query.shape[:3], reading.key.shape[2])
    # One more key, for those that are none.
    found = torch.zeros(batch, heads, reading.step.stop, keys + 1, dtype=dtype)
    for arrivals, index, said in told:
        index = index.remainder(keys + 1).expand(batch, heads, -1)
        said = said.to(dtype).expand(batch, heads, arrivals.shape[1], index.shape[2])
        for b, at in _each(arrivals, batch):
            row = int(arrivals[min(b, len(arrivals) - 1), at])
            found[b, :, row].scatter_(1, index[b], said[b, :, at])
    return found[:, :, reading.step.arrivals[0], :-1]


def _here(handle: Handle, place: tuple[Any, ...]) -> tuple[Any, ...]:
    """`place` in the request, or in its second branch."""
    return (*place, handle._requests._aside)


def _each(arrivals: Tensor, batch: int) -> Iterator[tuple[int, int]]:
    """Batch row and offset of all that `arrivals [1|B, R]` names."""
    return ((b, at) for b in range(batch) for at, a in enumerate(arrivals[min(b, len(arrivals) - 1)]) if a >= 0)


def _arrivals(reading: Reading, index: Tensor) -> Tensor:
    """Slots `index [1|B, n]` of a reading's keys as arrivals, -1 for none."""
    padding = torch.zeros(1, dtype=torch.long) if reading.step.padding is None else reading.step.padding
    positions, index = torch.broadcast_tensors(
        reading.positions.gather(1, index.clamp(min=0).expand(len(reading.positions), -1))
        if len(reading.positions) > 1 or len(index) == 1
        else reading.positions[0][index.clamp(min=0)],
        index,
    )
    return torch.where((index >= 0) & (positions >= 0), positions + padding[:, None], -1)


def _rewrite(handle: Handle, codec, select, split, bias, feed) -> None:
    """Put wrappers round every codec (one object where heads share codec and store) and every choice."""
    slots: list[Slots | None] = list(handle.slots)
    for layer, slot in enumerate(slots):
        if slot is None:
            continue
        new: dict[tuple[Any, ...], Codec] = {}
        reach = slot.pattern.reach() * (len(slot.key_codec) if slot.pattern.heads is None else 1)
        held = (reach, slot.key_codec, slot.value_codec)
        changed: dict[str, Any] = {}
        for side in ("key_codec", "value_codec"):
            names = [(side, *map(id, codecs), reach) for reach, *codecs in zip(*held, strict=True)]
            for head, (name, own) in enumerate(zip(names, getattr(slot, side), strict=True)):
                if own is not None and name not in new:
                    new[name] = codec(own, (layer, side, head))
            changed[side] = tuple(new.get(name) for name in names)
        choices = (("select", "choose", select), ("feed", "choose", feed))
        for site, name, wrap in (*choices, ("rescore", "bias", bias), ("reweigh", "split", split)):
            changed[site] = tuple(
                replace(edit, **{name: _wrapped(handle, wrap, (layer, site, n), getattr(edit, name))})
                for n, edit in enumerate(getattr(slot, site))
            )
        slots[layer] = replace(slot, **changed)
    handle.slots = handle._requests.slots = tuple(slots)


def _wrapped(handle: Handle, wrap: Callable[..., Any], place: tuple[Any, ...], choose: Callable[..., Any]):
    return lambda told: wrap(told, _here(handle, place), choose)
