"""Words' maps, magnets and sinks: planted joint attention, and the algebra of the softmax."""

import math
import re

import pytest
import torch

import regard
from regard.ops.views import refam

GRID = (16, 16)


def offsets(text):
    return [match.span() for match in re.finditer(r"\S+", text)]


def test_no_magnet_and_no_filter_is_the_mean_map():
    weights = torch.rand(3, 2, 260, 260).softmax(-1)
    maps = refam.heat(weights, slice(4, 260), slice(0, 4))
    text = "the red car left"
    shown = refam.show(maps, text, text, offsets(text), GRID, spread=0.0, stop_words=False)
    plain = weights[:, :, 4:, :4].mean((0, 1, 3)).view(GRID)
    torch.testing.assert_close(shown.map, (plain - plain.min()) / (plain.max() - plain.min()))
    assert shown.point == divmod(int(plain.argmax()), 16)
    assert shown.words == ("the", "red", "car", "left")


def planted(seed, magnets):
    """Joint attention of 256 image tokens to "<sink> cat", magnets and themselves; and the object's tokens."""
    drawn = torch.Generator().manual_seed(seed)
    row, column = torch.randint(0, 12, (2,), generator=drawn).tolist()
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[row : row + 4, column : column + 4] = True
    inside = inside.flatten()
    text = "start " + refam.magnetised("cat", magnets) if magnets else "start cat"
    scores = torch.randn(256, len(text.split()), generator=drawn) * 0.4
    scores[:, 0] = 6 + 0.05 * scores[:, 0]
    scores[:, 1] += torch.where(inside, 4.0, torch.randn(256, generator=drawn) * 0.6)
    scores[:, 2:] += torch.where(inside, -2.0, 2.0)[:, None]
    return scores.softmax(-1).mT, text, inside


def test_planted_objects_are_found():
    better = []
    for seed in range(200):
        ratios = []
        for magnets in (0, 5):
            maps, text, inside = planted(seed, magnets)
            plain = maps.mean(0)
            if magnets:
                shown = refam.show(maps, "start cat", text, offsets(text), GRID)
                assert inside[shown.point[0] * 16 + shown.point[1]]
                assert shown.sinks == (0,)
                assert shown.words == (None, "cat", *[None] * 5)
                plain = maps[1]  # the one that was kept
            ratios.append(plain[inside].mean() / plain[~inside].mean())
        better.append(ratios[1] > ratios[0])
    assert all(better)


def test_magnets_raise_object_over_background():
    """Content scores 5 on the object, 1 on the background; magnets 2 there, a key of score 0 besides."""
    content = lambda score, n, magnet: math.exp(score) / (math.exp(score) + n * math.exp(magnet) + 1)  # noqa: E731
    maps = []
    for n in range(6):
        scores = torch.tensor([[5.0] + [-2.0] * n + [0.0], [1.0] + [2.0] * n + [0.0]])
        weights = torch.zeros(1, 2, 2 + n + 2)
        weights[..., : n + 2] = scores.softmax(-1)
        maps.append(refam.heat(weights.expand(3, -1, -1), slice(0, 2), slice(0, 1))[0])
        torch.testing.assert_close(maps[-1], torch.tensor([content(5, n, -2), content(1, n, 2)]))
    ratio = torch.stack([x[0] / x[1] for x in maps])
    assert (ratio.diff() > 0).all()
    assert maps[5][0] > 0.99 * maps[0][0]


def test_the_order_of_tokens_does_not_matter():
    text = "a dog near the tree of my yard"
    maps, at = torch.rand(8, 256), offsets(text)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    one = refam.show(maps, text, text, at, GRID)
    two = refam.show(maps[order], text, text, [at[i] for i in order], GRID)
    torch.testing.assert_close(one.map, two.map)
    assert [one.words[i] for i in order] == list(two.words)
    assert (one.map.min(), one.map.max()) == (0, 1)


def test_pieces_of_words_padding_and_colours():
    text = refam.magnetised("old lighthouse", 2, "pink")
    assert text == "old lighthouse the a pink"
    at = [(0, 3), (3, 9), (9, 14), (14, 18), (18, 20), (20, 25), (0, 0)]
    shown = refam.show(torch.rand(7, 256), "old lighthouse", text, at, GRID)
    assert shown.words == ("old", "lighthouse", "lighthouse", None, None, None, None)


def test_the_point_in_pixels():
    maps = torch.zeros(1, 256)
    maps[0, 3 * 16 + 15] = 1
    shown = refam.show(maps, "cat", "cat", [(0, 3)], GRID)
    assert shown.pixel((160, 320)) == (35, 310)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"phrase": "of the"}, "does not begin with the phrase 'of the'"),
        ({"phrase": "the", "text": "the of", "offsets": [(0, 3), (4, 6)]}, "none is left: 'the', 'of'"),
        ({"offsets": [(0, 5), (5, 7)]}, "token 0 at .* is of several words: 'the c'"),
        ({"offsets": [(0, 3), (4, 9)]}, "lies outside the text of 7 characters"),
        ({"offsets": [(0, 3)]}, "one for each of 1 tokens"),
        ({"offsets": [(0, 0), (0, 0)]}, "no token of 'the cat' is a word"),
        ({"grid": (16, 15)}, r"a grid of \(16, 15\) has 240 tokens"),
        ({"grid": (256,)}, "an image has rows and columns"),
        ({"maps": torch.full((2, 256), math.nan)}, "NaN"),
    ],
)
def test_bad_input(changed, message):
    given = {"maps": torch.rand(2, 256), "phrase": "the cat", "text": "the cat", "offsets": [(0, 3), (4, 7)]}
    with pytest.raises(regard.RegardError, match=message):
        refam.show(**{**given, "grid": GRID, **changed})


def test_magnets_need_a_phrase():
    with pytest.raises(regard.RegardError, match="magnets go behind a phrase"):
        refam.magnetised("  ")
