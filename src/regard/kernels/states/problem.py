"""What all launches of one scan share: sizes, decays and segments, how a kernel is cut, and how tensors are read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from regard.kernels import device
from regard.kernels.states.segments import Segments, cut
from regard.kernels.states.sweep import CHANNEL, HEAD, NONE, TOKEN

CHUNK = 64


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: columns of the state a program, warps, stages of loads in flight."""

    block: int
    warps: int
    stages: int


def launch(dim: int, columns: int, dtype: torch.dtype) -> Launch:
    """A fixed table, so that nothing is tried at run time (docs/log.md has the measurements)."""
    if dtype == torch.float32:
        return Launch(min(columns, 64), 4 if dim <= 64 else 8, 1)
    if dim > 128:
        return Launch(min(columns, 64), 8, 1)
    return Launch(min(columns, 64), 4, 2)


class Problem:
    """Sizes, decays and segments.

    `place` is the device of the tensors, unless they are a rehearsal's (see ahead.py).
    """

    def __init__(
        self, q: Tensor, v: Tensor, decay: Tensor | None, spans: tuple[tuple[int, int, int], ...], place: torch.device
    ) -> None:
        self.batch, self.heads, self.tokens, self.columns = v.shape
        self.dim, self.dtype, self.device = q.shape[3], v.dtype, v.device
        self.place = place
        self.group = self.heads // q.shape[1]
        self.decay = decay
        self.kind = NONE if decay is None else {1: HEAD, 3: TOKEN, 4: CHANNEL}[decay.dim()]
        self.group_g = 1 if decay is None or decay.dim() == 1 else self.heads // decay.shape[1]
        self.strides_g = (0, 0, 0) if decay is None or decay.dim() == 1 else decay.stride()[:3]
        self.chunk = chunk = CHUNK
        self.settings = {"CHUNK": chunk, "GROUP_G": self.group_g, "EXACT": self.dtype == torch.float32}
        self.blocks = max(1, self.dim // 64)
        # float16 overflows long before bfloat16 does.
        self.span = 16 if self.dtype == torch.float16 else 200
        # Matrices of a chunk, in bfloat16 for float16, whose range is too small for a triangle.
        self.fine = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        self.segments = cut(spans, chunk, self.heads * 2, place)
        self.spans, self.packed = spans, self.batch < len(spans)
        self.grid = (self.segments.longest, self.heads, self.segments.count)

    @cached_property
    def whole(self) -> Segments:
        """Every sequence in one piece."""
        return cut(self.spans, self.chunk, None, self.place)

    @cached_property
    def along_chunks(self) -> Tensor:
        """`[B, H, T]`, of decays by token: logarithms (base 2) of the decay from the begin of a token's chunk to it."""
        assert self.decay is not None
        # No smaller than what float32 can tell from 0.
        g = (self.decay.float() * math.log2(math.e)).clamp_(min=-173.0)
        g = functional.pad(g, (0, -self.tokens % self.chunk))
        return g.unflatten(2, (-1, self.chunk)).cumsum(3).flatten(2)

    def launch(self, dim: int, columns: int) -> tuple[dict[str, int], tuple[int, int]]:
        """Keywords of a launch, and its number of column blocks and their size."""
        how = launch(dim, columns, self.dtype)
        return {"num_warps": how.warps, "num_stages": how.stages}, (columns // how.block, how.block)

    def programs(self) -> int:
        """Of kernels whose programs walk over segments: one a segment and head, but no more than multiprocessors."""
        items, on_card = self.segments.count * self.heads, self.place.type == "cuda"
        return min(items, torch.cuda.get_device_properties(self.place).multi_processor_count if on_card else items)

    def states(self, rows: int, columns: int, count: int | None = None) -> Tensor:
        """Memory for a state of every segment."""
        shape = (count or self.segments.count, self.heads, rows, columns)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def matrices(self) -> Tensor:
        """Memory for a matrix of every chunk and head, `[chunks, H, C, C]`."""
        shape = (self.segments.chunks, self.heads, self.chunk, self.chunk)
        return torch.empty(shape, dtype=self.fine, device=self.device)

    def like(self, columns: int, model: Tensor) -> Tensor:
        """Memory for `[B, H, T, columns]`, with heads inside tokens where `model` has them so."""
        sizes = {"dtype": self.dtype, "device": self.device}
        if model.stride(2) > model.stride(1):
            return torch.empty(self.batch, self.tokens, self.heads, columns, **sizes).transpose(1, 2)
        return torch.empty(self.batch, self.heads, self.tokens, columns, **sizes)


@dataclass
class Factors:
    """What `factor` makes of q, k and decays by channel; without such decays, q and k themselves."""

    left: Tensor
    right: Tensor
    entry: Tensor | None = None
    scores: Tensor | None = None
    scaling: Tensor | None = None
    wide: Tensor | None = None


def three(x: Tensor | None) -> tuple[int, ...]:
    """Strides of batch, head and token; 0 of what is not there."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def four(x: Tensor | None) -> tuple[int, ...]:
    """All strides; 0 of what is not there."""
    return (0, 0, 0, 0) if x is None else x.stride()


def fits(p: Problem, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the copy engine can read and write them all.

    It wants rows that begin at multiples of 16 bytes, and reads past the end of a packed sequence.
    """
    step = 16 // p.dtype.itemsize
    aligned = lambda x: x.data_ptr() % 16 == 0 and all(s > 0 and s % step == 0 for s in x.stride()[:3])  # noqa: E731
    return not p.packed and all(aligned(x) for x in tensors if x is not None)


def on_hopper(p: Problem, kinds: Sequence[int], tensors: Sequence[Tensor | None]) -> bool:
    """Whether there is a kernel for Hopper, which knows these kinds of decay, for a sweep over all `tensors`."""
    return (
        p.kind in kinds
        and p.dtype != torch.float32
        and p.dim == p.columns == 128
        and device.capability(p.place)[0] == 9
        and fits(p, tensors)
    )


def bulked(
    p: Problem, wide: Sequence[Tensor | None], dim: int, narrow: Sequence[Tensor | None], block: int
) -> tuple[bool, list[Any], list[Any]]:
    """Tensor descriptors in place of tensors read `dim` or `block` columns at a time, if all can have one."""
    if not fits(p, (*wide, *narrow)):
        return False, list(wide), list(narrow)

    def described(x: Tensor | None, width: int) -> TensorDescriptor | None:
        return None if x is None else TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, p.chunk, width])

    return True, [described(x, dim) for x in wide], [described(x, block) for x in narrow]
