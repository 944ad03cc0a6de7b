"""Attention through cuDNN: which calls take it, and that it is right in every layout, its lse and gradients too."""

import pytest
import torch

import regard
from regard.primitives import sdpa

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() in ((9, 0), (10, 0))
pytestmark = pytest.mark.skipif(not CAPABLE, reason="needs a CUDA device for which torch prefers cuDNN")


@pytest.fixture
def taken(monkeypatch):
    """The kernels that were called, in order."""
    seen, kernel = [], sdpa._forward

    def spy(*call):
        out, lse, extra = kernel(*call)
        seen.append(extra[0])
        return out, lse, extra

    monkeypatch.setattr(sdpa, "_forward", spy)
    return seen


def drawn(*shape, layout="plain", dtype=torch.bfloat16):
    """`[B, H, T, D]`: rows of a head together, rows of a token together, or cut out of more tokens."""
    B, H, T, D = shape
    if layout == "plain":
        return torch.randn(*shape, device="cuda").to(dtype)
    more = 3 * (layout == "cut")
    return torch.randn(B, T + more, H, D, device="cuda").to(dtype).transpose(1, 2)[:, :, more:]


@pytest.mark.parametrize(("T", "S", "causal"), [(257, 257, True), (130, 300, False), (255, 129, False)])
@pytest.mark.parametrize("layout", ["plain", "tokens", "cut"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_all_gradients(T, S, causal, layout, dtype, taken, monkeypatch):
    """Twice, with gradients that come in two layouts: a plan must not be found for the wrong one."""
    monkeypatch.setattr(sdpa, "LEAST_TRAINED", 0)
    torch.manual_seed(0)
    made = {"layout": layout, "dtype": dtype}
    q, k, v = drawn(2, 4, T, 64, **made), drawn(2, 2, S, 64, **made), drawn(2, 2, S, 64, **made)
    dlse = torch.randn(2, 4, T, device="cuda")

    def run(tensors, dout, backend):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out, lse = regard.attend(*tensors, causal=causal, backend=backend)
        torch.autograd.backward([out, lse], [dout.to(out), dlse.to(lse)])
        return [out.detach(), lse.detach(), *(x.grad for x in tensors)]

    for other in ("plain", "tokens"):
        dout = drawn(2, 4, T, 64, layout=other, dtype=dtype)
        wanted = run([x.double() for x in (q, k, v)], dout, "reference")
        found = run((q, k, v), dout, "sdpa")
        for a, b in zip(found, wanted, strict=True):
            assert (a.double() - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()
    assert taken == ["cudnn"] * 2


@pytest.mark.parametrize(
    ("T", "S", "trained", "kernel"),
    [(1024, 1024, True, "cudnn"), (128, 128, True, "flash"), (1024, 1024, False, "flash"), (1, 4096, False, "flash")],
)
def test_only_calls_that_gain_by_it(T, S, trained, kernel, taken):
    q, k = (drawn(1, 32, n, 128).requires_grad_(trained) for n in (T, S))
    regard.attend(q, k, k, causal=T == S)
    assert taken == [kernel]


def test_it_can_be_switched_off(taken):
    q = drawn(1, 32, 1024, 128).requires_grad_()
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        regard.attend(q, q, q)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
    assert taken == ["flash"]
