"""Concentric positions and mask [039]: the oracles of its sheet."""

import pytest
import torch

import regard
from families import tiny
from lattices import agrees_with_flex, decoded, dense, is_covered, logits
from regard import Pattern
from regard.ops.masks import concentric

IMAGES, GRIDS = [(2, 18), (20, 32)], [(4, 4), (3, 4)]


def outward(side):
    """Rings by growing squares from the centre, as a loop: the construction that the formula is checked against."""
    ring = torch.full((side, side), -1)
    for step in range((side + 1) // 2):
        low, high = (side - 1) // 2 - step, side // 2 + step
        square = ring[low : high + 1, low : high + 1]
        square[square < 0] = (side - 1) // 2 - step
    return ring.flatten()


@pytest.mark.parametrize("side", [1, 2, 5, 8, 24])
def test_rings_equal_the_construction_from_the_centre(side):
    assert torch.equal(concentric.rings((side, side)), outward(side))
    assert concentric.rings((24, 24)).bincount().tolist() == list(range(92, 0, -8))


def test_pairs_equal_a_loop_and_nobody_sees_through_another():
    pattern = concentric.pattern(IMAGES, GRIDS)
    found = dense(pattern, 36)
    ring = {
        a + n: (a, int(r)) for (a, _), g in zip(IMAGES, GRIDS, strict=True) for n, r in enumerate(concentric.rings(g))
    }
    for i in range(36):
        for j in range(36):
            same = i in ring and j in ring and ring[i][0] == ring[j][0]
            assert bool(found[i, j]) == (ring[j][1] <= ring[i][1] if same else j <= i)
    through = (found.int() @ found.int()) > 0
    assert torch.equal(through, found)
    for sizes in ((4, 4), (5, 3), (1, 1)):
        is_covered(pattern, 36, *sizes)


def test_no_image_and_an_image_of_one_token_are_causal():
    assert concentric.pattern([]).is_causal
    assert torch.equal(dense(concentric.pattern([(3, 4)]), 9), dense(Pattern.causal(), 9))
    assert torch.equal(concentric.positions(0, 9, [(3, 4)]), torch.arange(9))
    assert torch.equal(concentric.positions(4, 9, []), torch.arange(4, 9))


def test_positions_of_text_and_of_rings():
    at = concentric.positions(0, 600, [(10, 586)])
    assert at[:10].tolist() == list(range(10))
    assert torch.equal(at[10:586], 10 + outward(24))
    assert at[586:].tolist() == list(range(22, 36))
    # A generated token: its index less the tokens of the image, plus half a side.
    assert concentric.positions(640, 641, [(10, 586)]).item() == 640 - 576 + 12
    assert int(at[586] - at[10:586].min()) == 12

    two = concentric.positions(0, 36, IMAGES, GRIDS)
    assert two[:2].tolist() == [0, 1]
    assert two[18:20].tolist() == [4, 5]
    assert torch.equal(two[20:32], 6 + concentric.rings((3, 4)))
    assert two[32:].tolist() == [8, 9, 10, 11]
    assert torch.equal(torch.cat([concentric.positions(a, b, IMAGES, GRIDS) for a, b in ((0, 20), (20, 36))]), two)


def test_a_llama_decodes_as_one_masked_forward():
    model, ids = tiny("llama").double(), torch.randint(2, 90, (1, 36))
    pattern, at = concentric.pattern(IMAGES, GRIDS), concentric.positions(0, 36, IMAGES, GRIDS)
    found = decoded(model, ids, 32, pattern, at)
    torch.testing.assert_close(found, logits(model, ids, pattern, at), atol=1e-9, rtol=0)


def test_flex_attention_agrees():
    agrees_with_flex(concentric.pattern(IMAGES, GRIDS), 36)


@pytest.mark.parametrize("edges", [(0, 7), (5, 36), (3, 4)])
def test_a_chunk_that_cuts_an_image_is_refused(edges):
    with pytest.raises(regard.RegardError, match=r"cut the image at \(2, 18\) in two; feed an image at once"):
        concentric.positions(*edges, IMAGES, GRIDS)


@pytest.mark.parametrize(
    ("words", "images", "grids"),
    [(r"the image at \(2, 14\) has 12 tokens, which is no square; pass grids", [(2, 14)], None),
     (r"the image at \(2, 18\) has 16 tokens, its grid is \(3, 4\)", [(2, 18)], [(3, 4)]),
     (r"spans \(2, 18\) and \(10, 26\) of images overlap", [(2, 18), (10, 26)], None),
     (r"got \(-3, 1\); positions count from a row's first real token", [(-3, 1)], None),
     ("1 grids for 2 images", [(2, 18), (18, 34)], [(4, 4)])],
)  # fmt: skip
def test_images_that_do_not_fit_are_named(words, images, grids):
    for call in (concentric.pattern, lambda *of: concentric.positions(0, 40, *of)):
        with pytest.raises(regard.RegardError, match=words):
            call(images, grids)
    with pytest.raises(regard.RegardError, match="an image has rows and columns, got a grid of 3 axes"):
        concentric.rings((2, 2, 2))
