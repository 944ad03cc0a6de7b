"""The gate's gradient against A times dL/dA, and the facts of causality and of scaled rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from regard.core.errors import RegardError
from regard.ops import saliency


def made(rows=5, keys=7):
    at = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=at, dtype=torch.float64)  # noqa: E731
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    return normal(2, 4, rows, 6), normal(2, 2, keys, 6), normal(2, 2, keys, 3), mask


def test_a_gate_of_ones_is_attention():
    q, k, v, mask = made()
    found = saliency.gated(q, k, v, torch.ones(2, 4, 5, 7).double(), scale=0.4, mask=mask)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(found, expected)


def test_the_gates_gradient_is_attention_times_its_gradient():
    q, k, v, mask = made()
    gate = torch.ones(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    loss = lambda out: out.square().sum() + out.sin().sum()  # noqa: E731
    (found,) = saliency.by_gates(loss(saliency.gated(q, k, v, gate, scale=0.4, mask=mask)), [gate])
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.4).masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).requires_grad_()
    (slope,) = torch.autograd.grad(loss(weights @ v.repeat_interleave(2, 1)), weights)
    torch.testing.assert_close(found, weights * slope)
    assert found.masked_select(~mask).eq(0).all()
    call = lambda gate: saliency.gated(q[:1], k[:1], v[:1], gate, scale=0.4, mask=mask, softcap=3.0)  # noqa: E731
    assert torch.autograd.gradcheck(call, gate.detach()[:1].requires_grad_())


def test_a_rows_sum_is_the_slope_of_scaling_it():
    q, k, v, mask = made()
    loss = lambda gate: saliency.gated(q, k, v, gate, scale=0.4, mask=mask).pow(3).sum()  # noqa: E731
    gate = torch.ones(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    (found,) = saliency.by_gates(loss(gate), [gate])
    nudge = torch.zeros_like(gate)
    nudge[1, 2, 3] = 1e-6
    slope = float((loss(gate + nudge) - loss(gate - nudge)).detach()) / 2e-6
    assert float(found[1, 2, 3].sum()) == pytest.approx(slope, rel=1e-6)


def test_rows_have_length_one():
    raw = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    raw[0, :, 0] = 0
    found = saliency.layer_map(raw)
    torch.testing.assert_close(found[1].norm(dim=-1), torch.ones(5).double())
    assert found[0, 0].eq(0).all()
    torch.testing.assert_close(found[1, 2], F.normalize(raw[1, :, 2].abs().sum(0), dim=0))


def test_gradients_must_be_on():
    with pytest.raises(RegardError, match="saliency needs gradients"):
        saliency.by_gates(torch.ones(()), [torch.ones(1)])
