"""The closed form against the gate of ones that the paper has, and the facts of causality and of scaled rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from regard.ops import saliency

CALL = {"scale": 0.4, "mask": torch.ones(5, 7, dtype=torch.bool).tril(2)}


def made():
    at = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=at, dtype=torch.float64)  # noqa: E731
    return normal(2, 4, 5, 6), normal(2, 2, 7, 6), normal(2, 2, 7, 3)


def gated(q, k, v, gate, cap=None):
    """Attention with its probabilities times a gate."""
    scores = q @ k.repeat_interleave(2, 1).mT * CALL["scale"]
    scores = scores if cap is None else cap * (scores / cap).tanh()
    weights = scores.masked_fill(~CALL["mask"], -math.inf).softmax(-1)
    return (weights * gate) @ v.repeat_interleave(2, 1)


def loss(out):
    return out.pow(3).sum() + out.sin().sum()


def slope(given, cap=None):
    out = gated(*given, 1.0, cap).requires_grad_()
    return torch.autograd.grad(loss(out), out)[0]


@pytest.mark.parametrize("cap", [None, 0.5])
def test_it_is_the_gradient_of_a_gate_of_ones(cap):
    given = made()
    gate = torch.ones(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(gated(*given, gate, cap)), gate)
    found = saliency.salient(*given, slope(given, cap), softcap=cap, **CALL)
    torch.testing.assert_close(found, expected)
    assert found.masked_select(~CALL["mask"]).eq(0).all()
    assert torch.autograd.gradcheck(
        lambda gate: gated(*(x[:1] for x in given), gate, cap), gate.detach()[:1].requires_grad_()
    )


def test_a_rows_sum_is_the_slope_of_scaling_it():
    given = made()
    found, nudge = saliency.salient(*given, slope(given), **CALL), torch.zeros(2, 4, 5, 1, dtype=torch.float64)
    nudge[1, 2, 3] = 1e-6
    rise = float(loss(gated(*given, 1 + nudge)) - loss(gated(*given, 1 - nudge))) / 2e-6
    assert float(found[1, 2, 3].sum()) == pytest.approx(rise, rel=1e-6)


def test_rows_have_length_one():
    raw = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    raw[0, :, 0] = 0
    found = saliency.layer_map(raw)
    torch.testing.assert_close(found[1].norm(dim=-1), torch.ones(5).double())
    assert found[0, 0].eq(0).all()
    torch.testing.assert_close(found[1, 2], F.normalize(raw[1, :, 2].abs().sum(0), dim=0))
