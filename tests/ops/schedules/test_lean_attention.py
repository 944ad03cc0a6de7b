"""LeanAttention's division of work against torch's attention and against the slowest loops that state it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.ops.decode import decode
from regard.ops.schedules.lean_attention import attend


def made(seed, B=2, H=4, Hk=2, T=2, S=13, D=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, Hk, S, D), (B, Hk, S, D))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 30))
def test_torchs_attention_and_its_gradients_for_any_workers_and_tiles(seed, tile, workers):
    q, k, v = made(seed)
    mask = torch.ones(2, 13, dtype=torch.bool).tril(11)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    out, lse = attend(q, k, v, tile=tile, workers=workers)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    scores = (q @ k.repeat_interleave(2, 1).mT / 2).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 13), min_size=3, max_size=3), st.integers(1, 9))
def test_ragged_lengths(seed, lengths, workers):
    q, k, v = made(seed, B=3)
    lengths = torch.tensor(lengths)
    found = attend(q, k, v, lengths, tile=4, workers=workers)
    torch.testing.assert_close(found, decode(q, k, v, lengths=lengths), rtol=0, atol=1e-12)


def test_one_worker_is_the_online_softmax_and_one_a_tile_is_flash_decoding():
    q, k, v = (x.detach() for x in made(0, B=1, H=1, Hk=1, T=1))
    top, total, acc = torch.tensor(-torch.inf, dtype=q.dtype), 0.0, 0.0
    for j in range(13):
        score = q[0, 0, 0] @ k[0, 0, j] / 2
        new = torch.maximum(top, score)
        total = total * (top - new).exp() + (score - new).exp()
        acc = acc * (top - new).exp() + (score - new).exp() * v[0, 0, j]
        top = new
    for workers in (1, 13):
        out, lse = attend(q, k, v, tile=1, workers=workers)
        torch.testing.assert_close(out[0, 0, 0], acc / total, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse[0, 0, 0], top + total.log(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision(dtype, most):
    q, k, v = (x.detach().to(dtype) for x in made(1, S=100, D=32))
    out, _ = attend(q, k, v, tile=16, workers=7)
    exact, _ = decode(q.double(), k.double(), v.double())
    assert (out.double() - exact).abs().max() <= most * exact.abs().max().clamp(min=1)


def test_refuses_by_name():
    q, k, v = made(0)
    with pytest.raises(RegardError, match="tile of 1 or more, got 0"):
        attend(q, k, v, tile=0)
    with pytest.raises(RegardError, match=r"lengths must be 2 numbers up to 13, got \[13, 14\]"):
        attend(q, k, v, torch.tensor([13, 14]))
    with pytest.raises(RegardError, match="do not divide 3 query heads"):
        attend(q[:, :3], k, v)
