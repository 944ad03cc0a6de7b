"""The vector recurrence by its kernel, against a loop in float64: interpreted, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from regard.kernels.states import elementwise as kernel
from running import DEVICE, FLOATS, close, drawn, filled_with_nan


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch):
    """Tiles of eight tokens: few enough for an interpreter that goes through a scan element by element."""
    monkeypatch.setattr(kernel, "TOKENS", 8)


def definition(forget, inputs, initial, reset):
    state = torch.zeros_like(inputs[..., 0, :]) if initial is None else initial
    states = []
    for t in range(inputs.shape[-2]):
        if reset and t % reset == 0:
            state = torch.zeros_like(state)
        state = forget[..., t, :] * state + inputs[..., t, :]
        states.append(state)
    return torch.stack(states, -2), state


def check(shape, *, begun=False, reset=None, dtype=torch.float32, gates=None, change=lambda x: x, which=(True, True)):
    """Outputs and all gradients, for a loss that reads the states, the last one, or both."""
    make = drawn(0)
    given = [make(*shape).sigmoid() if gates is None else torch.full(shape, gates, dtype=torch.float64), make(*shape)]
    given = [change(x).to(dtype) for x in given]
    if begun:
        given.append(make(*shape[:-2], shape[-1]).float())
    # In the dtype of the states, so that no gradient is rounded before it comes to the kernel.
    weights = [make(*shape).to(dtype), make(*shape[:-2], shape[-1])]

    def run(recur, tensors):
        for x in tensors:
            x.requires_grad_()
        h, last = recur(tensors[0], tensors[1], tensors[2] if begun else None)
        parts = [(y.double() * w.to(y.device)).sum() for y, w in zip((h, last), weights, strict=True)]
        sum(part for part, on in zip(parts, which, strict=True) if on).backward()
        return h, last, *[x.grad for x in tensors]

    expected = run(lambda f, x, h: definition(f, x, h, reset), [x.double() for x in given])
    with filled_with_nan():
        found = run(lambda f, x, h: kernel.recur(f, x, initial=h, reset=reset), [x.detach().to(DEVICE) for x in given])
    assert [x.dtype for x in found] == [dtype, torch.float32, *[x.dtype for x in given]]
    # Twice: the gradient of the gates is taken of states that were rounded, and is rounded again.
    for x, wanted in zip(found, expected, strict=True):
        close(x, wanted, 2 * FLOATS[dtype])


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 20])
@pytest.mark.parametrize("begun", [False, True])
def test_lengths(T, begun):
    check((2, 1, T, 3), begun=begun)


@pytest.mark.parametrize("reset", [1, 3, 8, 10, 200])
@pytest.mark.parametrize("T", [1, 8, 30])
def test_resets(T, reset):
    check((1, 2, T, 3), reset=reset)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("T", [129, 150])
def test_rows_cut_into_segments(T, begun, monkeypatch):
    """Few rows and many tokens: several segments, the last of them short, and more of them than a tile holds."""
    assert 1 < -(-T // kernel._segment(T, 1, None)) <= 8
    check((1, 1, T, 1), begun=begun)
    monkeypatch.setattr(kernel, "TOKENS", 2)
    assert -(-T // kernel._segment(T, 1, None)) > 2 * 2
    check((1, 1, T, 2), begun=begun)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reset", [None, 16])
def test_dtypes(dtype, reset):
    check((1, 2, 20, 4), dtype=dtype, reset=reset, begun=reset is None)


@pytest.mark.parametrize("shape", [(10, 66), (3, 10, 2), (2, 1, 2, 9, 2), (1, 1, 3, 130)])
def test_shapes(shape):
    check(shape, begun=True)


def test_strides_of_projections():
    check((2, 3, 10, 4), change=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), begun=True)
    check((2, 3, 10, 4), change=lambda x: x.mT.contiguous().mT, reset=7)
    check((2, 3, 10, 4), change=lambda x: x[:, :1].expand(2, 3, 10, 4))


@pytest.mark.parametrize("gates", [0.0, 1.0])
@pytest.mark.parametrize("T", [20, 70])
def test_gates_open_and_closed(gates, T):
    check((1, 1, T, 4), gates=gates, begun=True)


@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_a_loss_of_one_result(which):
    check((1, 1, 20, 4), which=which, begun=True)
    check((1, 1, 20, 4), which=which, reset=8)


def test_no_tokens():
    initial = torch.ones(1, 1, 4, device=DEVICE)
    empty = torch.zeros(1, 1, 0, 4, device=DEVICE)
    h, last = kernel.recur(empty, empty, initial=initial)
    assert h.shape == empty.shape
    assert torch.equal(last, initial)


def test_refuses_by_name(monkeypatch):
    x = torch.zeros(1, 1, 4, 4)
    assert "cpu" in kernel.refuses(x, x)
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    assert kernel.refuses(x, x) is None
    assert "forget is torch.float64" in kernel.refuses(x.double(), x)
