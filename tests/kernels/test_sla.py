"""SLA's linear part by its kernels, against plain torch in float64: interpreted, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from regard.kernels import device
from regard.ops.sparsity import sla
from running import DEVICE, FLOATS, close, drawn, filled_with_nan


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(device, "refuses", lambda tensor: None)


def made(B=1, H=2, Hk=1, N=150, S=140, D=16, Dv=32):
    make = drawn(0)
    return make(B, H, N, D), make(B, Hk, S, D), make(B, Hk, S, Dv), make(Dv, Dv) / Dv, make(B, H, N, Dv), make(Dv)


@pytest.mark.parametrize("features", sla.FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients(features, dtype):
    """Odd lengths, two query heads on a key head, heads inside tokens."""
    q, k, v, weight, exact, bias = (x.to(dtype).double() for x in made())
    dout = drawn(1)(*exact.shape).to(dtype).double()

    def run(to, call):
        leaves = [x.to(to(x)).detach().requires_grad_() for x in (q, k, v, weight, exact, bias)]
        out = call(*leaves)
        out.backward(dout.to(out))
        return out, *(x.grad for x in leaves)

    def definition(q, k, v, weight, exact, bias):
        call = {"size": (1, 1), "semantics": "all", "features": features}
        return exact + sla.linear(q, k, v, None, weight, **call) + bias

    expected = run(lambda x: torch.float64, definition)
    with filled_with_nan():
        found = run(lambda x: dtype, lambda *x: sla._Linear.apply(*(y.to(DEVICE) for y in x), features))
    for name, x, y in zip(("out", "q", "k", "v", "weight", "exact", "bias"), found, expected, strict=True):
        assert x.dtype == dtype, name
        close(x, y, FLOATS[dtype] * 4)


def test_several_pieces(monkeypatch):
    """Tokens in more pieces than one, the last of them short, and rows of a batch."""
    kernel = pytest.importorskip("regard.kernels.sparsity.sla")
    monkeypatch.setattr(kernel, "ROWS", 16)
    q, k, v, weight, exact, _ = (x.float() for x in made(B=2))
    expected = exact + sla.linear(q, k, v, None, weight, size=(1, 1), semantics="all", features="softmax")
    with filled_with_nan():
        call = {"features": "softmax", "floor": sla.FLOOR}
        found = kernel.linear(*(x.to(DEVICE) for x in (q, k, v, weight, exact)), None, **call)
    close(found, expected.double(), 1e-5)


def test_refused():
    kernel = pytest.importorskip("regard.kernels.sparsity.sla")
    q, k, v, *_ = (x.to(DEVICE) for x in made())
    assert "at most 32 bits" in kernel.refuses(q, k, v)
    assert "take D and Dv of 16" in kernel.refuses(q.float()[..., :5], k.float(), v.float())
