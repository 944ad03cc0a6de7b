"""Massive activations against their definition."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.ops.massive import massive, peaks


def test_one_planted_token_is_found_and_scaling_changes_nothing():
    x = torch.randn(2, 9, 900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 4, 700] = 800
    known = x.abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
    torch.testing.assert_close(peaks(x), known)
    assert massive(x).nonzero().tolist() == [[1, 4]]
    assert massive(x, (700, 3)).nonzero().tolist() == [[1, 4]]
    assert not massive(x, (3,)).any()
    assert torch.equal(massive(50 * x), massive(x))
    assert massive(x.bfloat16()).nonzero().tolist() == [[1, 4]]


def test_a_dimension_out_of_range_is_named():
    with pytest.raises(RegardError, match="dimension 8 is out of range; the hidden state has 8"):
        peaks(torch.zeros(1, 8), (3, 8))
