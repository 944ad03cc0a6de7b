"""HGRN-2 against GLA with tied keys, and its gates against their bounds."""

import pytest
import torch
from torch.autograd import gradcheck

import regard
from recurrences import close, decays, states, tokens
from regard.ops.states import hgrn2


def test_keys_are_what_the_gates_forget():
    q, _, v = tokens()
    decay, start = decays("key channel", q, v), states(q, v)
    wanted = regard.scan(q, 1 - decay.exp(), v, decay=decay, scale=5**-0.5, initial_state=start)
    close(hgrn2.scan(q, v, decay, initial_state=start), wanted)


def test_fla():
    naive = pytest.importorskip("fla.ops.gla.naive")
    q, _, v = tokens(Hk=4, T=70, dtype=torch.float32)
    decay = decays("channel", q, v)
    inputs = (x.transpose(1, 2) for x in (q, 1 - decay.exp(), v, decay))
    wanted, _ = naive.naive_recurrent_gla(*inputs)
    torch.testing.assert_close(hgrn2.scan(q, v, decay)[0], wanted.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_bounds_rise_from_nothing():
    bounds = hgrn2.lower_bounds(torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(bounds, torch.tensor([0.0, 0.25, 0.5, 0.75]).double()[:, None].expand(4, 3))
    drawn = hgrn2.lower_bounds(torch.randn(6, 8, dtype=torch.float64) * 3)
    assert bool((drawn[0] == 0).all())
    assert bool((drawn.diff(dim=0) >= 0).all())
    assert bool((drawn < 1).all())


def test_gates_never_fall_below_their_bound():
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=torch.float64)
    for lower in (0.0, 0.3, 0.9):
        bound = torch.tensor(lower, dtype=torch.float64)
        gate = hgrn2.gate(x, bound)
        torch.testing.assert_close(gate.exp(), lower + (1 - lower) * x.sigmoid())
        assert bool((gate <= 0).all())
    torch.testing.assert_close(hgrn2.gate(x[1:]), hgrn2.gate(x[1:], torch.zeros(4, dtype=torch.float64)))


def test_gradients_of_gates():
    drawn = torch.Generator().manual_seed(0)
    x, logits = (torch.randn(s, generator=drawn, dtype=torch.float64).requires_grad_() for s in ((2, 3), (3, 3)))
    assert gradcheck(lambda x, logits: hgrn2.gate(x, hgrn2.lower_bounds(logits)[1]), (x, logits))
    far = torch.tensor([-200.0, 200.0]).requires_grad_()
    bounds = torch.zeros(2).requires_grad_()
    hgrn2.gate(far, bounds).sum().backward()
    assert bool(far.grad.isfinite().all() and bounds.grad.isfinite().all())
