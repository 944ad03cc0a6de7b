"""Contrasted maps against the objective they minimise, regions against a flood fill, and planted signals."""

import math

import pytest
import torch

import regard
from regard.ops import maps
from regard.ops.views import carve


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01


def test_the_contrast_minimises_its_objective():
    asked, general = drawn(40), drawn(40, seed=1)
    objective = lambda x: ((x * general - asked) ** 2 + 0.3 * x**2 * general).sum(-1)  # noqa: E731
    best = carve.contrast(asked, general, 0.3)
    assert (objective(best) < objective(best + 0.2 * (drawn(500, 40, seed=2) - 0.5))).all()


def test_common_noise_cancels():
    asked, general, noise = drawn(40), drawn(40, seed=1), drawn(40, seed=2) * 50
    torch.testing.assert_close(carve.contrast(asked * noise, general * noise, 0), carve.contrast(asked, general, 0))


@pytest.mark.parametrize(("size", "factor"), [(1.0, 1.0), (1.0, 3.0), (1e-8, 1.0)])
def test_equal_maps_keep_the_whole_image_and_say_so(size, factor):
    given = drawn(2, 3, 20) * size
    shown = carve.show(given * factor, given, (4, 5), (8, 10))
    assert not shown.informative
    assert shown.mask.all()
    assert shown.box == (0, 0, 8, 10)


def test_share_one_is_the_identity():
    shown = carve.show(drawn(2, 3, 20), drawn(2, 3, 20, seed=1), (4, 5), (8, 10), share=1.0)
    image = drawn(3, 8, 10)
    (part,) = carve.images(image, shown, keep_original=False)
    assert shown.informative
    assert part.equal(image)


def test_steps_are_weighted_by_their_number():
    given = drawn(3, 2, 4, 5)
    single = [maps.resized(layer.sum(0), (8, 10)) for layer in given]
    torch.testing.assert_close(carve.fused(given, (8, 10)), single[0] + 2 * single[1] + 3 * single[2])
    torch.testing.assert_close(carve.fused(given, (8, 10), "last"), 3 * single[2])
    assert carve.fused(given[:1], (8, 10)).equal(carve.fused(given, (8, 10), "first"))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_regions_are_those_of_a_flood_fill(seed, diagonal):
    mask = drawn(13, 17, seed=seed) > (0.45 if seed % 2 else 0.6)
    near = [(-1, 0), (1, 0), (0, -1), (0, 1)] + ([(-1, -1), (-1, 1), (1, -1), (1, 1)] if diagonal else [])
    expected, count = torch.zeros(13, 17, dtype=torch.long), 0
    for pixel in mask.nonzero().tolist():
        if expected[tuple(pixel)]:
            continue
        count, todo = count + 1, [tuple(pixel)]
        while todo:
            i, j = todo.pop()
            if 0 <= i < 13 and 0 <= j < 17 and mask[i, j] and not expected[i, j]:
                expected[i, j] = count
                todo += [(i + a, j + b) for a, b in near]
    assert maps.regions(mask, diagonal).equal(expected)


def test_a_spiral_is_one_region():
    """The longest way through a square takes few rounds all the same."""
    mask = torch.zeros(81, 81, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    assert maps.regions(mask).unique().tolist() == [0, 1]


def test_the_largest_sums_are_kept():
    scores = torch.zeros(9, 9)
    for i in range(5):
        scores[2 * i, : i + 1] = 1.0
    mask = scores > 0
    assert carve.largest(mask, scores, 2, 0.2).equal(mask & (torch.arange(9) > 5)[:, None])
    assert carve.largest(mask, scores, None, 0.2).equal(mask & (torch.arange(9) > 3)[:, None])


def test_the_refined_image_is_masked_cropped_and_enlarged():
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[2:4, 3:6] = True
    mask[3, 3] = False
    shown = carve.Shown(mask, (2, 3, 4, 6), mask.double(), True)
    image = drawn(3, 8, 12)
    whole, part = carve.images(image, shown)
    assert whole is image
    assert part.shape == (3, 8, 12)
    assert part[:, -1, 0].eq(0).all()
    assert part[:, 0, 0].equal(image[:, 2, 3])


def overlap(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_planted_signals_are_found_where_plain_attention_fails():
    """Noise common to both runs (bright textures) times a signal that only the question has."""
    rates = []
    for seed in range(10):
        noise = torch.exp(8 * (drawn(24, 24, seed=seed) - 0.5))
        signal = torch.ones(24, 24, dtype=torch.float64)
        top, left = (seed * 7) % 14, (seed * 5) % 14
        signal[top : top + 10, left : left + 10] = 3.0
        true = maps.resized(signal, (96, 96)) > 2
        asked, general = ((x / x.sum()).view(1, 1, -1) for x in (noise * signal, noise))
        options = {"share": float(true.double().mean()), "kept": 2}
        shown = carve.show(asked, general, (24, 24), (96, 96), **options)
        plain = carve.show(asked, torch.ones_like(general), (24, 24), (96, 96), **options)
        rates.append((overlap(shown.mask, true), overlap(plain.mask, true)))
    found, blind = torch.tensor(rates).T
    assert found.min() >= 0.8
    assert blind.max() < 0.4


def test_measures_of_attention_and_images():
    assert carve.entropy(torch.ones(2, 3, 16)) == pytest.approx([math.log(16)] * 2)
    assert carve.entropy(torch.eye(16)[:3]) == 0
    square = torch.zeros(20, 30)
    square[5:15, 8:22] = 255.0
    # An edge is one pixel wide.
    assert carve.texture(square) * 600 == pytest.approx(2 * (10 + 14) - 4)
    assert carve.texture(square / 10) == 0
    assert carve.colour(torch.rand(1, 9, 9).expand(3, -1, -1)) == 0
    angle = torch.arange(180) / 30
    wheel = torch.stack(
        [(2 - (angle - shift).remainder(6).sub(3).abs().sub(3).abs()).clamp(0, 1) for shift in (0, 2, 4)]
    )
    assert carve.colour(wheel[:, None]) > 0.95


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": (4, 4)}, r"a grid of \(4, 4\) has 16 tokens, and the maps are \[2, 3, 20\]"),
        ({"grid": (20,)}, "an image has rows and columns"),
        ({"general": drawn(2, 2, 20)}, "of the same layers and tokens"),
        ({"general": drawn(0, 3, 20)}, "no steps that both runs have"),
        ({"question": drawn(2, 3, 20) * math.nan}, "NaN"),
        ({"question": -drawn(2, 3, 20)}, "negative"),
        ({"fuse": "lst"}, "Did you mean 'last'"),
        ({"share": 1.2}, "share must lie in"),
        ({"kept": 0}, "kept be at least 1"),
    ],
)
def test_bad_input(changed, message):
    given = {"question": drawn(2, 3, 20), "general": drawn(2, 3, 20, seed=1), "grid": (4, 5), "image_size": (8, 10)}
    with pytest.raises(regard.RegardError, match=message):
        carve.show(**given | changed)


def test_an_image_of_another_size_is_named():
    shown = carve.show(drawn(1, 1, 20), drawn(1, 1, 20, seed=1), (4, 5), (8, 10))
    with pytest.raises(regard.RegardError, match=r"the mask is \[8, 10\] and the image \[3, 9, 10\]"):
        carve.images(drawn(3, 9, 10), shown)
