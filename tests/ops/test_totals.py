"""Masses of segments with gradients, against probabilities that are written out."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.totals import mass

T = 9
PADDING = 2


def made():
    drawn = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=drawn, dtype=torch.float64)  # noqa: E731
    q, k, v = make(2, 4, T, 8), make(2, 2, T, 8), make(2, 2, T, 8)
    segments = torch.rand(3, 2, T, generator=drawn) < 0.4
    segments[2] = False
    positions = torch.arange(T)[None].repeat(2, 1)
    positions[0, :PADDING] = -1
    return q, k, v, segments, positions


def explicit(q, k, segments, positions, window):
    scores = q @ k.repeat_interleave(2, 1).mT * 0.4
    at, key = positions[:, None, :, None], positions[:, None, None]
    seen = (key >= 0) & (at >= 0) & (key <= at) & (at - key < window)
    weights = torch.where(seen, scores, -1e300).softmax(-1) * seen
    return torch.stack([(weights * segment[:, None, None]).sum(-1) for segment in segments], -1)


@pytest.mark.parametrize("window", [4, 100])
def test_value_and_gradients_are_those_of_written_out_probabilities(window):
    q, k, v, segments, positions = made()
    grad = torch.randn(2, 4, T, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(call):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        out = call(*leaves)
        return out, *torch.autograd.grad((out * grad).sum(), leaves)

    places = {"q_positions": positions, "k_positions": positions, "pattern": Pattern.window(window)}
    found = run(lambda q, k: mass(q, k, v, list(segments), scale=0.4, **places))
    known = run(lambda q, k: explicit(q, k, segments, positions, window))
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[0][..., 2].any()


def test_gradcheck():
    q, k, v, segments, _ = made()
    q, k = q[:1, :2, :5].requires_grad_(), k[:1, :1, :5].requires_grad_()
    part = list(segments[:2, :1, :5])
    assert torch.autograd.gradcheck(lambda q, k: mass(q, k, v[:1, :1, :5], part), (q, k))


def test_a_segment_of_another_length_is_named():
    q, k, v, segments, _ = made()
    with pytest.raises(RegardError, match=r"segment 1 must be bool \[1 or 2, 9\]"):
        mass(q, k, v, [segments[0], segments[1, :, :4]])
