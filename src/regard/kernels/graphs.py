"""Work of fixed shapes as a CUDA graph: launched a few times kernel by kernel, captured once, then replayed whole.

A step of a small model is hundreds of kernels of a few microseconds, which Python launches more slowly than a GPU runs
them. A replay is one launch.
"""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from regard.core.errors import RegardError

# Calls before the capture: kernels are compiled, tables and moments get their memory, and the last is looked at.
WARM = 3


def refuses(device: torch.device) -> str | None:
    """Why nothing can be captured on `device`, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"graphs are captured on CUDA devices, not on {device}"
    return None


@contextmanager
def own_stream(device: torch.device, kept: bool = False) -> Iterator[AbstractContextManager]:
    """A context, to be entered as often as wanted, within which work goes to a stream of its own.

    The default stream cannot be captured; it waits for this one at the end. Where there are none, nothing is done.
    `kept` is for work that takes turns: the same stream every time, since cuBLAS keeps 32 MiB for each it has met.
    """
    if refuses(device) is not None:
        yield nullcontext()
        return
    before, stream = torch.cuda.current_stream(device), _kept(device) if kept else torch.cuda.Stream(device)
    stream.wait_stream(before)
    try:
        yield torch.cuda.stream(stream)
    finally:
        before.wait_stream(stream)


@cache
def _kept(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _nothing_freed() -> Iterator[None]:
    """No garbage is collected within: to free another graph while one is captured breaks the capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Replay:
    """`work(*inputs) -> Tensor`, launched `WARM` times, then captured and replayed. The same numbers either way.

    Where it cannot be captured it is launched every time, and `why` says why not. Random numbers are those that
    launching draws, as long as graphs that draw any are replayed one at a time. Call it within `own_stream`.

    Args:
        work: takes tensors and gives one. All else it reads and writes must stay where it is, and a call that fails
            must leave nothing behind that the next one minds.
        device: of the tensors.
        wanted: True: a refusal is an error; False: launch every time.
    """

    def __init__(self, work: Callable[..., Tensor], device: torch.device, wanted: bool | None):
        self.work, self.device, self.wanted, self.calls = work, device, wanted, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why = "" if wanted is not False else "graphs are off"
        if not self.why and (reason := refuses(device)):
            self._refuse(reason)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `work` gives, in memory of its own.

        Raises:
            RegardError: it cannot be captured, though that was wanted, or for a reason that shows only half-way.
        """
        self.calls += 1
        if self.why or self.calls < WARM:
            return self.work(*inputs)
        if self.calls == WARM:
            return self._watched(*inputs)
        if self.graph is None:
            self.graph = self._captured(*inputs)
        shapes, held = [list(x.shape) for x in inputs], [list(x.shape) for x in self.inputs]
        if shapes != held:
            self._refuse(f"rows of {shapes} came after rows of {held}")
            return self.work(*inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.out.clone()

    def _watched(self, *inputs: Tensor) -> Tensor:
        """A call in which waiting for the device is found out; then it is begun again, with the same random numbers."""
        mode, drawn = torch.cuda.get_sync_debug_mode(), torch.cuda.get_rng_state(self.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self.work(*inputs)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            at = traceback.extract_tb(error.__traceback__)[-1]
            self._refuse(f"line {at.lineno} of {at.filename} waits for the device: {at.line}")
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.set_rng_state(drawn, self.device)
        return self.work(*inputs)

    def _captured(self, *inputs: Tensor) -> torch.cuda.CUDAGraph:
        """The graph, which reads `self.inputs` and fills `self.out`. Nothing has been computed yet."""
        self.inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with _nothing_freed(), torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
                self.out = self.work(*self.inputs)
        except RuntimeError as error:
            # What a broken capture leaves of torch's allocator and random states is nothing to go on with.
            first = error.__context__ or error
            why = (str(first).strip() or type(first).__name__).splitlines()[0]
            raise RegardError(f"this cannot be captured as a CUDA graph: {why}. Use graphs=False") from error
        return graph

    def _refuse(self, why: str) -> None:
        if self.wanted:
            raise RegardError(f"graphs=True refuses: {why}. Use graphs=False, or leave it out")
        self.why = why
