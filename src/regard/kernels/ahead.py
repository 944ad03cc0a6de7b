"""All kernels of a call compiled side by side, before the first of them is launched.

A call that launches a dozen kernels, gradients included, compiles them one after the other when it is first made: half
a minute for the delta rule with decay by channel. A rehearsal walks through the call with tensors that have no memory,
so that every compilation is known at once, and threads share them out.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from regard.kernels import device

# Compilations at a time; more gain nothing, as Python reads the kernels one by one.
MOST = 16

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)
_known: set[Any] = set()


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`; in a rehearsal the call of it compiles and launches nothing."""
    return partial(kernel.warmup, grid=grid) if _rehearsing.get() else kernel[grid]


def rehearse(call: Callable[..., Tensor], tensors: Sequence[Tensor | None], key: Any) -> None:
    """Compile what `call(*tensors)` and, where it is differentiated, its backward launch, unless `key` was seen before.

    Args:
        call: launches by `launch` only; its output is what is differentiated. It gets tensors on the device `meta`.
        tensors: of the call that follows.
        key: calls of one key launch the same kernels; what differs all the same is compiled when it is launched.
    """
    first = next(x for x in tensors if x is not None)
    if triton.knobs.runtime.interpret or not first.is_cuda or key in _known or device.capturing(first.device):
        return
    learns = torch.is_grad_enabled()
    bare = [None if x is None else _without_memory(x, learns and x.requires_grad) for x in tensors]
    with torch.cuda.device(first.device), _compiling():
        out = call(*bare)
        if learns and out.requires_grad:
            torch.autograd.grad(out, [x for x in bare if x is not None and x.requires_grad], torch.empty_like(out))
    _known.add(key)


def _without_memory(x: Tensor, learned: bool) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=learned)


@contextmanager
def _compiling() -> Iterator[None]:
    """Inside, kernels are compiled by threads; at the end all are, but for those whose compilation failed.

    These are compiled once more when they are launched, which is where to say what failed.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST)) as threads, AsyncCompileMode(threads, ignore_errors=True):
        token = _rehearsing.set(True)
        try:
            yield
        finally:
            _rehearsing.reset(token)
