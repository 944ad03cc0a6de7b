"""Dual triangles [030]: the oracles of its sheet."""

import pytest
import torch
import torch.nn.functional as F

import regard
from lattices import agrees_with_flex, dense, is_covered
from regard.ops.masks import dual_triangle


def inputs(B=2, H=4, Hk=2, T=13, D=8, Dv=6):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, H, T, D), (B, Hk, T, D), (B, Hk, T, Dv))]


def test_each_half_equals_torch_with_a_triangle():
    q, k, v = inputs()
    out, lse = dual_triangle.attend(q, k, v)
    lower = torch.ones(13, 13).tril().bool()
    for half, mask in enumerate((lower, lower.T)):
        a, b = slice(4 * half, 4 * half + 4), slice(3 * half, 3 * half + 3)
        wanted = F.scaled_dot_product_attention(q[..., a], k[..., a], v[..., b], attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[..., b], wanted, atol=1e-12, rtol=0)
        scores = q[..., a] @ k[..., a].repeat_interleave(2, 1).transpose(-1, -2) / 2
        torch.testing.assert_close(
            lse[:, :, half], scores.masked_fill(~mask, -torch.inf).logsumexp(-1), atol=1e-12, rtol=0
        )


def test_by_head_the_first_half_of_the_heads_looks_back():
    for H, Hk in ((4, 2), (6, 3), (3, 3)):
        q, k, v = inputs(H=H, Hk=Hk)
        out, lse = dual_triangle.attend(q, k, v, by="head")
        keys, values = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
        for h in range(H):
            for half in range(2):
                a, b = slice(4 * half, 4 * half + 4), slice(3 * half, 3 * half + 3)
                # The public code interleaves halves of heads and masks the first H of these 2 H as lower.
                mask = torch.ones(13, 13).tril().bool()
                mask = mask if 2 * h + half < H else mask.T
                parts = q[:, h, :, a], keys[:, h, :, a], values[:, h, :, b]
                torch.testing.assert_close(
                    out[:, h, :, b], F.scaled_dot_product_attention(*parts, attn_mask=mask), atol=1e-12, rtol=0
                )
                scores = (parts[0] @ parts[1].transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf)
                torch.testing.assert_close(lse[:, h, half], scores.logsumexp(-1), atol=1e-12, rtol=0)


def test_the_reversed_sequence_with_swapped_halves_gives_the_reversed_output():
    q, k, v = inputs()
    out = dual_triangle.attend(q, k, v)[0]
    swapped = [x.flip(2).roll(x.shape[-1] // 2, -1) for x in (q, k, v)]
    torch.testing.assert_close(dual_triangle.attend(*swapped)[0].roll(3, -1).flip(2), out, atol=1e-12, rtol=0)


def test_it_knows_the_order_of_tokens_and_full_attention_does_not():
    q, k, v = inputs()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    moved = [x[:, :, order] for x in (q, k, v)]
    full = [regard.attend(*x, causal=False)[0] for x in (moved, (q, k, v))]
    torch.testing.assert_close(full[0], full[1][:, :, order], atol=1e-12, rtol=0)
    assert (dual_triangle.attend(*moved)[0] - dual_triangle.attend(q, k, v)[0][:, :, order]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_ones(side):
    q, k, v = inputs()
    mask = torch.ones(2, 13, dtype=torch.bool)
    real = slice(4, None) if side == "left" else slice(0, 9)
    mask[1] = False
    mask[1, real] = True
    out, lse = dual_triangle.attend(q, k, v, mask)
    alone = dual_triangle.attend(*(x[1:, :, real] for x in (q, k, v)))
    torch.testing.assert_close((out[1:, :, real], lse[1:, :, :, real]), alone, atol=1e-12, rtol=0)
    assert (lse[1][..., ~mask[1]] == -torch.inf).all()


def test_rotations_of_neighbouring_channels_survive_the_split_and_halves_do_not():
    q, k, v = inputs()

    def turned(x, shift, pairs):
        a, b = (x[..., 0::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
        angle = (torch.arange(13, dtype=torch.float64)[:, None] + shift) * torch.tensor([1.0, 0.3, 0.1, 0.03])
        c, s = angle.cos(), angle.sin()
        parts = a * c - b * s, b * c + a * s
        return torch.stack(parts, -1).flatten(-2) if pairs else torch.cat(parts, -1)

    gaps = {}
    for pairs in (True, False):
        near, far = (dual_triangle.attend(turned(q, n, pairs), turned(k, n, pairs), v)[0] for n in (0, 5))
        gaps[pairs] = float((near - far).abs().max())
    assert gaps[True] < 1e-12
    assert gaps[False] > 0.01


def test_flex_attention_agrees_and_covers_are_exact():
    agrees_with_flex(dual_triangle.ahead(), 48)
    assert torch.equal(dense(dual_triangle.ahead(), 20), torch.ones(20, 20).triu().bool())
    for sizes in ((4, 4), (3, 5)):
        is_covered(dual_triangle.ahead(), 20, *sizes, exact=True)


def test_gradients():
    leaves = [x.requires_grad_() for x in inputs(B=1, H=2, Hk=1, T=5, D=4, Dv=4)]
    assert torch.autograd.gradcheck(lambda *x: dual_triangle.attend(*x), leaves)


def test_what_does_not_fit_is_named():
    q, k, v = inputs()
    with pytest.raises(regard.RegardError, match=r"q must be \[B, heads, T, an even number of channels\], got .* 7\]"):
        dual_triangle.attend(q[..., :7], k[..., :7], v)
    with pytest.raises(regard.RegardError, match="as many queries as keys, got 3 and 13"):
        dual_triangle.attend(q[:, :, :3], k, v)
    with pytest.raises(regard.RegardError, match=r"unknown choice of 'by' 'heads'.*Did you mean 'head'"):
        dual_triangle.attend(q, k, v, by="heads")
    with pytest.raises(regard.RegardError, match=r"mask must be bool \[2, 13\]"):
        dual_triangle.attend(q, k, v, torch.ones(2, 13))
