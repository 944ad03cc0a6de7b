"""merge against softmax over the whole, at its edges, and by finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.primitives.merge import merge


def part(scores, values):
    """Attention over one set of scores, by definition."""
    lse = scores.logsumexp(-1)
    return torch.softmax(scores, -1).nan_to_num(0) @ values, lse


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.floats(0.0, 0.7))
def test_any_partition_gives_softmax_over_the_whole(seed, sizes, masked):
    torch.manual_seed(seed)
    scores = torch.randn(2, 3, sum(sizes), dtype=torch.float64) * 20
    scores = scores.masked_fill(torch.rand(scores.shape) < masked, -torch.inf)
    values = torch.randn(2, sum(sizes), 4, dtype=torch.float64)
    pieces = [part(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes, 1), strict=True)]
    out, lse = merge(pieces)
    expected, expected_lse = part(scores, values)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    nested = pieces[0]
    for piece in pieces[1:]:
        nested = merge([nested, piece])
    torch.testing.assert_close(nested, (expected, expected_lse), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_part_is_neutral_to_the_bit(dtype):
    out, lse = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3) * 30
    nothing = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    for parts in ([(out, lse)], [(out, lse), nothing], [nothing, (out, lse), nothing]):
        joined, joined_lse = merge(parts)
        assert joined.dtype == dtype
        assert joined_lse.dtype == torch.float32
        assert torch.equal(joined, out)
        assert torch.equal(joined_lse, lse)


def test_nothing_and_nothing_is_nothing_with_finite_gradients():
    outs = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    lses = [torch.full((2,), -torch.inf, requires_grad=True) for _ in range(2)]
    out, lse = merge(zip(outs, lses, strict=True))
    assert torch.equal(out, torch.zeros(2, 3))
    assert torch.equal(lse, torch.full((2,), -torch.inf))
    (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    for leaf in outs + lses:
        assert torch.isfinite(leaf.grad).all()


def test_gradients_by_finite_differences_also_beside_an_empty_part():
    outs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    closed = torch.full((3,), -torch.inf, dtype=torch.float64)

    def joined(*leaves):
        return merge(zip(leaves[:3], [*leaves[3:], closed], strict=True))

    assert torch.autograd.gradcheck(joined, (*outs, *lses))


def test_extreme_lses_do_not_overflow():
    out, lse = merge([(torch.ones(1, 2), torch.tensor([1e4])), (torch.zeros(1, 2), torch.tensor([-1e4]))])
    assert torch.equal(out, torch.ones(1, 2))
    assert torch.equal(lse, torch.tensor([1e4]))


def test_what_does_not_fit_is_named():
    with pytest.raises(RegardError, match="at least one"):
        merge([])
    with pytest.raises(RegardError, match=r"part 1 .* \[2, 4\]"):
        merge([(torch.ones(2, 3), torch.ones(2)), (torch.ones(2, 4), torch.ones(2))])
    with pytest.raises(RegardError, match="part 0"):
        merge([(torch.ones(2, 3), torch.ones(3))])
