"""A rehearsal compiles what a call launches, and launches nothing."""

import pytest
import torch

pytest.importorskip("triton")

import regard
from regard.kernels import ahead
from running import DEVICE, drawn

CUDA = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


class Kernel:
    """What was asked of a kernel."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, grid):
        return lambda *arguments: self.asked.append(("launched", grid, arguments))

    def warmup(self, *arguments, grid):
        self.asked.append(("compiled", grid, arguments))


def test_nothing_is_launched_while_rehearsing():
    kernel = Kernel()
    ahead.launch(kernel, (2,))(1)
    token = ahead._rehearsing.set(True)
    ahead.launch(kernel, (2,))(1)
    ahead._rehearsing.reset(token)
    assert kernel.asked == [("launched", (2,), (1,)), ("compiled", (2,), (1,))]


def test_no_rehearsal_without_a_gpu():
    ahead.rehearse(lambda x: pytest.fail("it was called"), [torch.ones(2)], "some key")


def test_a_failed_compilation_is_left_to_the_launch():
    from triton.runtime._async_compile import active_mode

    def fails():
        raise RuntimeError("out of resources")

    with ahead._compiling():
        mode = active_mode.get()
        assert mode is not None
        mode.submit("some key", fails, lambda kernel: pytest.fail("it was not compiled"))
    assert active_mode.get() is None
    assert not ahead._rehearsing.get()


@CUDA
@pytest.mark.parametrize("T", [100, 4000])
@pytest.mark.parametrize(("gates", "delta"), [(1, False), (3, True), (4, True)])
def test_what_is_rehearsed_is_all_that_a_call_compiles(monkeypatch, tmp_path, T, gates, delta):
    """Decays of a head, a token, a channel; 4,000 tokens are cut into segments."""
    from triton.runtime.jit import JITFunction

    ran, compiled = JITFunction._do_compile, []

    def watched(kernel, *arguments, **options):
        compiled.append((kernel.fn.__name__, ahead._rehearsing.get()))
        return ran(kernel, *arguments, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", watched)
    monkeypatch.setattr(ahead, "_known", set())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function in kernels():
        function.device_caches.clear()
    make = drawn(3)
    q, k, v = (make(1, T, 2, 128).to(DEVICE, torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    decay = {1: make(2), 3: make(1, 2, T), 4: make(1, 2, T, 128)}[gates].abs().neg().to(DEVICE, torch.float32)
    decay.requires_grad_(gates > 1)
    beta = make(1, 2, T).sigmoid().to(DEVICE, torch.float32).requires_grad_() if delta else None
    out, _ = regard.scan(q, k, v, decay=decay, beta=beta, delta=delta, scale=0.1, backend="triton")
    out.backward(torch.ones_like(out))
    assert compiled
    assert [name for name, rehearsing in compiled if not rehearsing] == []


def kernels():
    """All kernels of the scan."""
    from triton.runtime.jit import JITFunction

    from regard.kernels.states import delta, factor, gates, gradients, hopper, hopper_delta, segments, sweep

    modules = (delta, factor, gates, gradients, hopper, hopper_delta, segments, sweep)
    return {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
