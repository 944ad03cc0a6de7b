"""Halo attention [158]: the oracles of its sheet."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import regard
from lattices import agrees_with_flex, dense, is_covered
from regard.ops.masks import halo


def brute(grid, block, around):
    """A key is seen if it lies within the halo of the query's block, by a loop over pairs of cells."""
    cells = list(itertools.product(*map(range, grid)))
    return torch.tensor([
        [
            all(b * (x // b) - h <= y < b * (x // b) + b + h for x, y, b, h in zip(q, k, block, around, strict=True))
            for k in cells
        ]
        for q in cells
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "block", "around", "box"),
    [((12,), (4,), (1,), (3,)), ((8, 6), (4, 2), (1, 3), (4, 2)), ((8, 6), (2, 3), (0, 1), (3, 4)),
     ((4, 4, 6), (2, 4, 3), (1, 0, 2), (2, 4, 3))],
)  # fmt: skip
def test_pairs_and_covers(grid, block, around, box):
    wanted = brute(grid, block, around)
    pattern = halo.pattern(grid, block, around)
    assert torch.equal(dense(pattern, len(wanted)), wanted)
    tiled = halo.pattern(grid, block, around, box=box)
    slots = math.prod(-(-n // b) * b for n, b in zip(grid, box, strict=True))
    assert dense(tiled, slots).sum() == wanted.sum()
    for rows, keys in ((4, 4), (5, 3), (8, 2)):
        is_covered(pattern, len(wanted), rows, keys)
        is_covered(tiled, slots, rows, keys)


def test_no_halo_is_windows_and_a_large_one_is_full():
    number = torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4
    assert torch.equal(dense(halo.pattern((8, 8), 4, 0), 64), number.view(-1, 1) == number.view(-1))
    assert dense(halo.pattern((8, 8), 4, 4), 64).all()


def test_the_interior_moves_with_the_block():
    found = dense(halo.pattern((20, 20), 4, 2), 400).view(20, 20, 20, 20)
    assert torch.equal(found[5, 6].roll((4, 8), (0, 1)), found[9, 14])


def test_zero_padding_that_counts_is_softmax_over_the_unfolded_window():
    H, W, b, h, D = 8, 12, 4, 2, 8
    q, k, v = torch.randn(3, 1, 2, H * W, D, dtype=torch.float64).unbind(0)
    found, lse = halo.with_padding(*regard.attend(q, k, v, pattern=halo.pattern((H, W), b, h)), (H, W), b, h)

    def unfolded(x, side, pad):
        image = x.transpose(-1, -2).reshape(1, 2 * D, H, W)
        parts = F.unfold(image, side, padding=pad, stride=b)
        return parts.view(2, D, side * side, -1).permute(0, 3, 2, 1)

    keys, values, queries = unfolded(k, b + 2 * h, h), unfolded(v, b + 2 * h, h), unfolded(q, b, 0)
    scores = queries @ keys.transpose(-1, -2) * D**-0.5

    def folded(x):
        return F.fold(x.permute(0, 3, 2, 1).reshape(1, -1, x.shape[1]), (H, W), b, stride=b).view(1, 2, -1, H * W)

    torch.testing.assert_close(found, folded(scores.softmax(-1) @ values).transpose(-1, -2), atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, folded(scores.logsumexp(-1, keepdim=True))[:, :, 0], atol=1e-12, rtol=0)


def test_flex_attention_agrees():
    agrees_with_flex(halo.pattern((8, 6), (4, 3), 1), 48)


@pytest.mark.parametrize(
    ("words", "block", "around"),
    [("axis 1 of 6 cells is not divisible by a block of 4", 4, 1), ("axis 0: a halo needs 0 cells or more", 2, (-1, 0)),
     ("block (2, 2, 2) has 3 numbers", (2, 2, 2), 1)],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_axis(words, block, around):
    with pytest.raises(regard.RegardError) as error:
        halo.pattern((8, 6), block, around)
    assert words in str(error.value)
