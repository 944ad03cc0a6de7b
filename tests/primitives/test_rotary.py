"""Rotary positions against complex multiplication."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.primitives.rotary import rotate


def test_rotation():
    """Channel i and i + D/2 turn by `position * base^(-2i/D)`; scores depend on distances only."""
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    at = torch.tensor([[3, 4, 5, 9, 20]])
    out = rotate(x, at, base=100.0)
    for t in range(5):
        for i in range(3):
            turn = torch.polar(torch.ones((), dtype=torch.float64), at[0, t] * torch.tensor(100.0).double() ** (-i / 3))
            a, b = x[0, 0, t, i], x[0, 0, t, i + 3]
            expected = torch.complex(a, b) * turn
            torch.testing.assert_close(torch.complex(out[0, 0, t, i], out[0, 0, t, i + 3]), expected)
    shifted = rotate(x, at + 11, base=100.0)
    torch.testing.assert_close(shifted @ shifted.mT, out @ out.mT)


def test_without_a_base_nothing_turns():
    x = torch.randn(1, 2, 3, 5)
    assert rotate(x, torch.arange(3)[None], base=None) is x


def test_an_odd_size_is_refused():
    with pytest.raises(RegardError, match="even head size, got 3"):
        rotate(torch.zeros(1, 1, 2, 3), torch.arange(2)[None])
