"""The definition of an attached model: keep every key and value, mask and encode them as recorded.

A run on real stores is recorded (its codes, in writing order) and replayed as one full forward that
drops nothing and reads the recorded codes. What a store really dropped cannot show in a replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regard.adapters import requests
from regard.adapters.install import Handle
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Codec
from regard.ops.attention import attend

Tape = dict[tuple[int, str, int], list[tuple[Tensor, ...]]]


class Everything:
    """A store that drops nothing, and encodes only to decode at once."""

    def __init__(self, key_codec, value_codec):
        self.codecs = (key_codec, value_codec)
        self.parts: list[list[Tensor]] = [[], []]
        self.length, self.state = 0, {}

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
        self.length = step.stop
        return self

    def attend(self, q: Tensor, *, pattern: Pattern, step: Step, scale: float, softcap: float | None = None):
        k, v = (torch.cat(part, 2) for part in self.parts)
        group = q.shape[1] // k.shape[1]
        outs = []
        for head in range(k.shape[1]):
            mine = q[:, head * group : (head + 1) * group]
            key_codec, value_codec = (codecs[head] for codecs in self.codecs)
            mine = mine if key_codec is None else key_codec.query(mine)
            positions = step.positions(torch.arange(step.stop))
            out, lse = attend(
                mine, k[:, head : head + 1], v[:, head : head + 1], pattern=pattern.head(head), scale=scale,
                softcap=softcap, q_positions=step.queries(), k_positions=positions, backend="reference",
            )  # fmt: skip
            outs.append((out if value_codec is None else value_codec.output(out), lse))
        return torch.cat([out for out, _ in outs], 1), torch.cat([lse for _, lse in outs], 1)

    @property
    def removable(self) -> int:
        return self.length

    def record(self) -> None: ...

    def crop(self, length: int) -> None:
        self.parts = [[torch.cat(part, 2)[:, :, :length]] for part in self.parts]
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        self.parts = [[torch.cat(part, 2)[rows]] for part in self.parts if part]

    def reset(self) -> None:
        self.parts, self.length = [[], []], 0

    def storages(self) -> Iterator[Tensor]:
        yield from (x for part in self.parts for x in part)


@contextmanager
def everything_kept() -> Iterator[None]:
    """Models attached inside run on `Everything` instead of their real stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "build", lambda pattern, keys, values, kv_heads, attend: Everything(keys, values))
        yield


def record_codes(handle: Handle, tape: Tape) -> None:
    """Write every code that `handle`'s stores write to `tape`."""

    def wrap(codec: Codec, place: tuple[int, str, int]) -> Codec:
        def encode(x: Tensor) -> tuple[Tensor, ...]:
            fields = codec.encode(x)
            tape.setdefault(place, []).append(fields)
            return fields

        return replace(codec, encode=encode)

    _rewrite(handle, wrap)


def replay_codes(handle: Handle, tape: Tape) -> None:
    """Give `handle`'s stores the codes of `tape`, one full forward at once, instead of encoding anew."""

    def wrap(codec: Codec, place: tuple[int, str, int]) -> Codec:
        recorded = tuple(torch.cat(fields, 2) for fields in zip(*tape[place], strict=True))

        def encode(x: Tensor) -> tuple[Tensor, ...]:
            error = (codec.decode(recorded, x.dtype) - codec.decode(codec.encode(x), x.dtype)).abs()
            assert (error > 1e-3).double().mean() < 0.01, "the replayed codes are not those of these keys"
            return recorded

        return replace(codec, encode=encode)

    _rewrite(handle, wrap)


def _rewrite(handle: Handle, wrap) -> None:
    """Put `wrap(codec, place)` for every codec, the same object where heads shared one."""
    slots = list(handle.slots)
    for layer, slot in enumerate(slots):
        if slot is None:
            continue
        new: dict[tuple[str, int], Codec] = {}
        sides: dict[str, tuple[Codec | None, ...]] = {}
        for side in ("key_codec", "value_codec"):
            for head, codec in enumerate(getattr(slot, side)):
                if codec is not None and (side, id(codec)) not in new:
                    new[(side, id(codec))] = wrap(codec, (layer, side, head))
            sides[side] = tuple(None if c is None else new[(side, id(c))] for c in getattr(slot, side))
        slots[layer] = replace(slot, **sides)
    handle.slots = handle._requests._slots = tuple(slots)
