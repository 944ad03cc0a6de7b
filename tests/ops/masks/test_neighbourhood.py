"""Neighbourhood attention [001]: the oracles of its sheet."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from lattices import agrees_with_flex, dense, is_covered
from regard import Pattern
from regard.ops.masks import neighbourhood
from regard.primitives.block_list import build


def sees(x, y, size, kernel, dilation, stride, causal):
    """One axis of the sheet's definition: does the query at `x` see the key at `y`."""
    if x % dilation != y % dilation:
        return False
    u, v, n = x // dilation, y // dilation, math.ceil((size - x % dilation) / dilation)
    if causal:
        return v <= u and min(u // stride * stride + stride - 1, n - 1) - v < kernel
    centre = min(u // stride * stride + stride // 2, n - 1)
    centre = max(centre, kernel // 2)
    centre = min(centre, n - 1 - (math.ceil(kernel / 2) - 1))
    return centre - kernel // 2 <= v <= centre + math.ceil(kernel / 2) - 1


def brute(grid, *axes):
    """Bool `[tokens, tokens]` by a loop over pairs of cells; `axes` as `sees` takes them, each one an axis."""
    cells = list(itertools.product(*map(range, grid)))
    return torch.tensor([
        [all(sees(*one) for one in zip(q, k, grid, *axes, strict=True)) for k in cells] for q in cells
    ])  # fmt: skip


@st.composite
def settings_of_a_grid(draw, tops=(14, 7, 4)):
    """A grid of one to three axes and legal options for it."""
    axes = draw(st.integers(1, 3))
    top = tops[axes - 1]
    grid = tuple(draw(st.integers(2, top)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, n // 2)) for n in grid)
    kernel = tuple(draw(st.integers(2, n // d)) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    causal = tuple(draw(st.booleans()) for _ in grid)
    box = tuple(draw(st.integers(1, math.ceil(n / d))) for n, d in zip(grid, dilation, strict=True))
    return grid, kernel, dilation, stride, causal, box


@settings(max_examples=40, deadline=None)
@given(settings_of_a_grid())
def test_pairs_equal_a_loop_over_cells_in_raster_order_and_in_tiles(chosen):
    grid, kernel, dilation, stride, causal, box = chosen
    wanted = brute(grid, kernel, dilation, stride, causal)
    options = {"dilation": dilation, "stride": stride, "causal": causal}
    assert torch.equal(dense(neighbourhood.pattern(grid, kernel, **options), len(wanted)), wanted)

    order, inverse = neighbourhood.tiles(grid, box, dilation)
    tiled = dense(neighbourhood.pattern(grid, kernel, box=box, **options), len(order))
    assert torch.equal(tiled[inverse][:, inverse], wanted)
    assert tiled.sum() == wanted.sum(), "a slot without a token sees or is seen"


@settings(max_examples=40, deadline=None)
@given(settings_of_a_grid(), st.integers(1, 9), st.integers(1, 9))
def test_covers_are_sound(chosen, rows, keys):
    grid, kernel, dilation, stride, causal, box = chosen
    options = {"dilation": dilation, "stride": stride, "causal": causal}
    is_covered(neighbourhood.pattern(grid, kernel, **options), math.prod(grid), rows, keys)
    slots = len(neighbourhood.tiles(grid, box, dilation)[0])
    is_covered(neighbourhood.pattern(grid, kernel, box=box, **options), slots, rows, keys)


@settings(max_examples=40, deadline=None)
@given(settings_of_a_grid((300, 18, 8)), st.sampled_from([(16, 32), (32, 64), (128, 128)]), st.booleans())
def test_block_lists_say_what_masks_say(chosen, size, tiled):
    """Blocks that are cut alike share what they are cut by; a wrong guess at which are would show here."""
    grid, kernel, dilation, stride, causal, box = chosen
    options = {"dilation": dilation, "stride": stride, "causal": causal, "box": box if tiled else None}
    pattern = neighbourhood.pattern(grid, kernel, **options)
    slots = len(neighbourhood.tiles(grid, box, dilation)[0]) if tiled else math.prod(grid)
    assert torch.equal(build(pattern, slots, slots, size).to_dense()[0, 0], dense(pattern, slots))


@pytest.mark.parametrize(("grid", "box"), [((24,), 4), ((12, 8), (4, 2)), ((4, 6, 8), (2, 2, 4))])
def test_covers_of_whole_tiles_are_exact(grid, box):
    pattern = neighbourhood.pattern(grid, 3, box=box)
    size = math.prod((box,) if isinstance(box, int) else box)
    is_covered(pattern, math.prod(grid), size, size, exact=True)


@pytest.mark.parametrize("grid", [(7,), (5, 6), (3, 4, 5)])
def test_a_kernel_of_the_whole_axis_is_full_attention(grid):
    N = math.prod(grid)
    assert dense(neighbourhood.pattern(grid, grid), N).all()
    q, k, v = torch.randn(3, 1, 2, N, 8, dtype=torch.float64).unbind(0)
    out, lse = regard.attend(q, k, v, pattern=neighbourhood.pattern(grid, grid))
    torch.testing.assert_close((out, lse), regard.attend(q, k, v, causal=False), atol=1e-12, rtol=0)


def test_a_stride_of_the_kernel_is_windows_side_by_side():
    found = dense(neighbourhood.pattern((8, 6), (4, 3), stride=(4, 3)), 48)
    number = torch.arange(8)[:, None] // 4 * 2 + torch.arange(6) // 3
    assert torch.equal(found, number.view(-1, 1) == number.view(-1))


@pytest.mark.parametrize("kernel", [2, 5, 8])
def test_one_causal_axis_is_a_sliding_window(kernel):
    found = dense(neighbourhood.pattern((20,), kernel, causal=True), 20)
    assert torch.equal(found, dense(Pattern.window(kernel), 20))


@pytest.mark.parametrize("kernel", [(2,), (5,), (4, 3), (3, 4), (2, 3, 2)])
def test_every_row_sees_as_many_keys_as_the_kernel_has_cells(kernel):
    grid = (11, 9, 5)[: len(kernel)]
    for dilation in (1, 2):
        found = dense(neighbourhood.pattern(grid, kernel, dilation=dilation), math.prod(grid))
        assert (found.sum(1) == math.prod(kernel)).all()


def test_even_kernels_reach_one_further_back():
    row = dense(neighbourhood.pattern((12,), 4), 12)[6]
    assert row.nonzero()[:, 0].tolist() == [4, 5, 6, 7]


def test_dilation_is_the_undilated_pattern_on_every_sub_grid():
    found = dense(neighbourhood.pattern((9, 8), 3, dilation=(2, 2)), 72).view(9, 8, 9, 8)
    for a, b in itertools.product(range(2), range(2)):
        part = found[a::2, b::2, a::2, b::2]
        rows, columns = part.shape[:2]
        wanted = dense(neighbourhood.pattern((rows, columns), 3), rows * columns)
        assert torch.equal(part.reshape(wanted.shape), wanted)
        assert found[a::2, b::2].sum() == wanted.sum()


def test_the_interior_moves_with_the_query():
    found = dense(neighbourhood.pattern((9, 9), 3), 81).view(9, 9, 9, 9)
    assert torch.equal(found[4, 4].roll((1, 2), (0, 1)), found[5, 6])


def test_attention_over_tiles_is_attention_over_tokens():
    grid, box = (5, 6), (2, 4)
    q, k, v = torch.randn(3, 2, 4, 30, 8, dtype=torch.float64).unbind(0)
    k, v = k[:, ::2], v[:, ::2]
    order, inverse = neighbourhood.tiles(grid, box)
    tiled = [x[:, :, order.clamp(min=0)] for x in (q, k, v)]
    out, lse = regard.attend(*tiled, pattern=neighbourhood.pattern(grid, 3, box=box))
    wanted = regard.attend(q, k, v, pattern=neighbourhood.pattern(grid, 3))
    torch.testing.assert_close((out[:, :, inverse], lse[:, :, inverse]), wanted, atol=1e-12, rtol=0)
    assert (order < 0).sum() == 48 - 30
    assert torch.equal(order[inverse], torch.arange(30))


def test_keys_that_all_queries_see_join_by_merging():
    q, k, v = torch.randn(3, 1, 2, 24, 8, dtype=torch.float64).unbind(0)
    pattern = neighbourhood.pattern((4, 5), 3)
    near = regard.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20], pattern=pattern)
    extra = regard.attend(q[:, :, :20], k[:, :, 20:], v[:, :, 20:], causal=False)
    mask = torch.cat((dense(pattern, 20), torch.ones(20, 4, dtype=torch.bool)), 1)
    wanted = torch.nn.functional.scaled_dot_product_attention(q[:, :, :20], k, v, attn_mask=mask)
    torch.testing.assert_close(regard.merge([near, extra])[0], wanted, atol=1e-12, rtol=0)


def test_flex_attention_agrees():
    agrees_with_flex(neighbourhood.pattern((6, 8), 3, dilation=(1, 2), causal=(True, False), box=(2, 4)), 48)


def test_blocks_are_fewer_in_tiles():
    """The share of blocks that attention reads: an image of 128 x 128 cells, and a video."""

    def share(grid, kernel, box, stride, size):
        pattern = neighbourhood.pattern(grid, kernel, box=box, stride=stride)
        return is_covered(pattern, math.prod(grid), *size, loop=False)

    shares = [share((128, 128), 13, box, 1, (128, 64)) for box in (None, (8, 8))]
    assert (13 / 128) ** 2 < shares[1] < 0.5 * shares[0]

    # Strides that are multiples of the tile: every block is seen whole or not at all.
    video = (30, 48, 80), (18, 24, 24)
    shares = [share(*video, box, (16, 8, 8), (128, 128)) for box in (None, (2, 8, 8))]
    assert shares[1] == pytest.approx(math.prod(video[1]) / math.prod(video[0]))
    assert shares[0] > 3 * shares[1]


@pytest.mark.parametrize(
    ("words", "grid", "kernel", "options"),
    [
        ("axis 1: a neighbourhood needs a kernel of at least 2, got 1", (4, 4), (3, 1), {}),
        ("axis 0: kernel 3 with dilation 2 spans 6 cells, the axis has 5; the largest kernel is 2", (5,), 3,
         {"dilation": 2}),
        ("axis 0: kernel 9 with dilation 1 spans 9", (8, 9), 9, {}),
        ("axis 1: a stride must lie in 1 to the kernel, 3, got 4", (8, 8), 3, {"stride": (1, 4)}),
        ("kernel (3, 3, 3) has 3 numbers for a grid of 2 axes", (8, 8), (3, 3, 3), {}),
        ("causal (True,) has 1 numbers for a grid of 2 axes", (8, 8), 3, {"causal": (True,)}),
        ("a grid needs at least one axis", (), 3, {}),
        ("whole numbers from 1 up, got (4, 0)", (4, 0), 3, {}),
        ("axis 0 of 4 cells takes no box of 5", (4, 4), 3, {"box": 5}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_axis(words, grid, kernel, options):
    with pytest.raises(regard.RegardError) as error:
        neighbourhood.pattern(grid, kernel, **options)
    assert words in str(error.value)


def test_equal_patterns_share_their_block_list():
    lists = [build(neighbourhood.pattern((16, 16), [5, 3], box=(4, 8)), 256, 256, (32, 32)) for _ in range(2)]
    assert lists[0] is lists[1]
    assert torch.equal(lists[0].to_dense()[0, 0], dense(neighbourhood.pattern((16, 16), (5, 3), box=(4, 8)), 256))
