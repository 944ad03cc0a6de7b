"""Inward windows [131]: the oracles of its sheet."""

import itertools
import math

import pytest
import torch

import regard
from lattices import agrees_with_flex, dense, is_covered
from regard.ops.masks import inward, neighbourhood

GRIDS = [((2, 7, 9), (3, 4)), ((1, 5, 6), (5, 6)), ((3, 6, 5), (2, 5)), ((2, 8, 4), (1, 3))]


@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_it_is_neighbourhood_attention_with_a_full_time_axis(grid, window):
    found = dense(inward.pattern(grid, window), math.prod(grid))
    kernel = [min(2 * (size // 2) + 1, n) for n, size in zip(grid[1:], window, strict=True)]
    frames, others = grid[0], [max(size, 2) for size in kernel]
    near = dense(neighbourhood.pattern(grid[1:], others), grid[1] * grid[2])
    if kernel != others:  # a window of one row is no neighbourhood: it needs a kernel of two
        near = near & torch.kron(torch.eye(grid[1]), torch.ones(grid[2], grid[2])).bool()
    assert torch.equal(found, near.repeat(frames, frames))
    assert (found.sum(1) == frames * math.prod(kernel)).all()


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("slides", [True, False])
def test_pairs_equal_the_papers_formula_in_a_loop(grid, window, slides):
    found = dense(inward.pattern(grid, window, inward=slides), math.prod(grid))
    cells = list(itertools.product(*map(range, grid)))
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            wanted = True
            for x, y, n, size in zip(query[1:], key[1:], grid[1:], window, strict=True):
                half = size // 2
                before = x - half - (max(half + x - n + 1, 0) if slides else 0)
                after = x + half + (max(half - x, 0) if slides else 0)
                wanted &= before <= y <= after
            assert bool(found[i, j]) == wanted


def test_without_sliding_border_queries_see_fewer_keys():
    counts = [dense(inward.pattern((1, 9, 9), (5, 5), inward=slides), 81).sum(1) for slides in (True, False)]
    assert (counts[0] == 25).all()
    assert counts[1].min() == 9
    assert counts[1].max() == 25


def test_a_grid_of_the_training_size_is_full_attention():
    assert dense(inward.pattern((2, 4, 6), (4, 6)), 48).all()
    assert dense(inward.pattern((2, 5, 7), (5, 7)), 70).sum() == 70 * 70


@pytest.mark.parametrize("box", [None, (1, 4, 4), (2, 3, 5)])
def test_covers_are_sound(box):
    pattern = inward.pattern((2, 8, 9), (3, 5), box=box)
    slots = len(neighbourhood.tiles((2, 8, 9), box or (1, 1, 1))[0])
    for rows, keys in ((8, 8), (16, 4), (7, 10)):
        is_covered(pattern, slots, rows, keys)


def test_the_scale_is_the_heads_own_times_a_root_of_logarithms():
    wanted = 64**-0.5 * math.sqrt(math.log(2 * 30 * 52) / math.log(30 * 52))
    assert inward.scale(64, (30, 52)) == pytest.approx(wanted, rel=1e-12)


def test_flex_attention_agrees():
    agrees_with_flex(inward.pattern((2, 4, 6), (3, 3)), 48)


@pytest.mark.parametrize(
    ("words", "grid", "window"),
    [("a window of 9 rows is larger than the grid, which has 8", (2, 8, 8), (9, 3)),
     ("a window of 9 columns", (2, 8, 8), (3, 9)), ("expected a grid (frames, rows, columns)", (8, 8), (3, 3)),
     ("a window needs at least one axis", (2, 8, 8), (0, 3))],
)  # fmt: skip
def test_what_does_not_fit_is_named(words, grid, window):
    with pytest.raises(regard.RegardError) as error:
        inward.pattern(grid, window)
    assert words in str(error.value)
    with pytest.raises(regard.RegardError, match="a window of 1 cell"):
        inward.scale(64, (1, 1))
