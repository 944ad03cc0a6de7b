"""One step of the recurrence by its kernel, against the definition in float64: interpreted, or compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from regard.kernels.states import step as kernel
from running import DEVICE, FLOATS, close, drawn, filled_with_nan

GATES = {
    "none": lambda B, H, Hk, D: None,
    "head": lambda B, H, Hk, D: (H,),
    "token": lambda B, H, Hk, D: (B, H, 1),
    "channel": lambda B, H, Hk, D: (B, H, 1, D),
    "shared": lambda B, H, Hk, D: (B, Hk, 1, D),
}


def definition(q, k, v, state, decay, beta, delta, scale):
    """The recurrence as it is written, one state at a time, in float64; `state` is overwritten."""
    B, H, _, Dv = v.shape
    group = H // q.shape[1]
    out = torch.empty(B, H, 1, Dv, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            query, key, value = q[b, h // group, 0].double(), k[b, h // group, 0].double(), v[b, h, 0].double()
            S = state[b, h]
            if decay is not None and decay.dim() == 1:
                S *= decay[h].double().exp()
            elif decay is not None and decay.dim() == 3:
                S *= decay[b, h, 0].double().exp()
            elif decay is not None:
                S *= decay[b, h * decay.shape[1] // H, 0].double().exp()[:, None]
            written = value - S.T @ key if delta else value
            S += (1.0 if beta is None else beta[b, h, 0].double()) * torch.outer(key, written)
            out[b, h, 0] = scale * S.T @ query
    return out


def check(B, H, Hk, D, Dv, gate, *, delta=False, beta=None, dtype=torch.float32, change=lambda x: x, at=None):
    make = drawn(0)
    q, k = (change(make(B, Hk, 1, D) / D**0.5).to(dtype) for _ in range(2))
    v = change(make(B, H, 1, Dv)).to(dtype)
    shape = GATES[gate](B, H, Hk, D)
    decay = None if shape is None else -make(*shape).abs()
    if at is not None:
        decay = torch.full_like(decay, at)
    state = make(B, H, D, Dv).float()
    expected = state.double().clone()
    out = definition(q, k, v, expected, decay, beta, delta, 0.3)
    here = [x if x is None else x.to(DEVICE) for x in (decay, beta)]
    on_device = state.to(DEVICE)
    with filled_with_nan():
        found = kernel.step(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), on_device,
                            decay=here[0], beta=here[1], delta=delta, scale=0.3)  # fmt: skip
    assert found.dtype == dtype
    assert found.shape == v.shape
    close(found, out, FLOATS[dtype])
    close(on_device, expected, FLOATS[torch.float32])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True])
def test_every_gate(gate, delta):
    check(2, 4, 2, 16, 32, gate, delta=delta, beta=torch.rand(2, 4, 1) if delta else None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    check(1, 2, 1, 32, 16, "channel", delta=True, beta=torch.rand(1, 2, 1), dtype=dtype)


@pytest.mark.parametrize(("D", "Dv"), [(16, 256), (256, 16), (64, 128), (100, 36), (17, 129)])
def test_sizes(D, Dv):
    check(1, 2, 2, D, Dv, "channel", delta=True)


def test_strides_of_projections():
    """Tokens before heads, as a projection leaves them, and channels far apart."""
    check(2, 4, 2, 16, 24, "channel", change=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    check(2, 4, 2, 16, 24, "channel", change=lambda x: x.mT.contiguous().mT.expand_as(x))
    check(2, 4, 2, 16, 24, "token", change=lambda x: torch.cat([x, x], -1)[..., ::2])


@pytest.mark.parametrize("at", [0.0, -torch.inf])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_gates_open_and_closed(at, beta, gate):
    check(1, 2, 1, 16, 16, gate, delta=True, beta=torch.full((1, 2, 1), beta), at=at)


def test_state_that_is_part_of_another():
    held = torch.zeros(2, 3, 2, 16, 16, device=DEVICE)
    ones = torch.ones(2, 2, 1, 16, device=DEVICE)
    kernel.step(ones, ones, ones, held[:, 1])
    assert (held[:, 1] == 1).all()
    assert (held[:, [0, 2]] == 0).all()


def test_many_steps_are_the_recurrence():
    make = drawn(1)
    state, expected = torch.zeros(1, 2, 16, 16, device=DEVICE), torch.zeros(1, 2, 16, 16, dtype=torch.float64)
    for _ in range(20):
        q, k = (torch.nn.functional.normalize(make(1, 2, 1, 16), dim=-1).float() for _ in range(2))
        v, decay, beta = make(1, 2, 1, 16).float(), -make(1, 2, 1, 16).abs(), torch.rand(1, 2, 1)
        out = definition(q, k, v, expected, decay, beta, True, 1.0)
        q, k, v, decay, beta = (x.to(DEVICE) for x in (q, k, v, decay, beta))
        close(kernel.step(q, k, v, state, decay=decay, beta=beta, delta=True), out, 1e-5)
    close(state, expected, 1e-5)


def test_refuses_by_name(monkeypatch):
    x, state = torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 32, 32)
    assert "cpu" in kernel.refuses(x, x, x, state)
    monkeypatch.setattr(kernel.device, "refuses", lambda tensor: None)
    assert kernel.refuses(x, x, x, state) is None
    assert "q is torch.float64" in kernel.refuses(x.double(), x, x, state)
    assert "torch.bfloat16" in kernel.refuses(x, x, x, state.bfloat16())
    assert "contiguous" in kernel.refuses(x, x, x, state.mT)
    assert "D from 16 to 256, not 8" in kernel.refuses(x[..., :8], x[..., :8], x, state[:, :, :8])
    wide = torch.zeros(1, 2, 1, 300)
    assert "Dv from 16 to 256, not 300" in kernel.refuses(x, x, wide, torch.zeros(1, 2, 32, 300))
