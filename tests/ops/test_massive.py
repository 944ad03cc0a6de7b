"""Massive activations against their definition."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.ops.massive import TAU, magnitudes, peaks


def test_one_planted_token_is_found_and_scaling_changes_nothing():
    x = torch.randn(2, 9, 900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 4, 700] = 800
    known = x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(magnitudes(x), known)
    torch.testing.assert_close(peaks(x, (700, 3)), known[..., [700, 3]].amax(-1))
    assert (magnitudes(x) > TAU).nonzero().tolist() == [[1, 4, 700]]
    assert (peaks(x) > TAU).nonzero().tolist() == [[1, 4]]
    assert (peaks(x, (3,)) <= TAU).all()
    torch.testing.assert_close(magnitudes(50 * x), known, atol=1e-6, rtol=1e-5)
    assert (peaks(x.bfloat16()) > TAU).nonzero().tolist() == [[1, 4]]
    assert peaks(x.bfloat16()).dtype == torch.float32


def test_a_dimension_out_of_range_is_named():
    with pytest.raises(RegardError, match="dimension 8 is out of range; the hidden state has 8"):
        peaks(torch.zeros(1, 8), (3, 8))
