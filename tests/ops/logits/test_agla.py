"""The sum of two views and the masked view, against their definitions; planted objects."""

import math

import pytest
import torch

from regard import RegardError
from regard.core.placement import Where
from regard.ops.logits import agla

WHERE = Where(layer=0, layers=1, heads=4, kv_heads=2, head_dim=8)
DRAWN = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=DRAWN, dtype=torch.float64)


def test_views_are_added_under_the_cut():
    z, view = drawn(3, 7), drawn(3, 7)
    found = agla.contrast(WHERE, alpha=1.5, beta=0.3).combine([z, view])
    for row in range(3):
        likely = z[row].softmax(-1)
        for token in range(7):
            value = z[row, token] + 1.5 * view[row, token]
            assert found[row, token] == (value if likely[token] >= 0.3 * likely.max() else -math.inf)


def test_identical_views_are_a_temperature_and_alpha_zero_leaves_the_cut():
    z = drawn(3, 7)
    torch.testing.assert_close(agla.contrast(WHERE, alpha=2.0, beta=0.0).combine([z, z]), 3 * z)
    only = agla.contrast(WHERE, alpha=0.0, beta=0.5)
    cut = only.combine([z])
    assert not only.branches
    assert torch.equal(cut[cut.isfinite()], z[cut.isfinite()])
    assert cut.isinf().any()
    assert torch.equal(cut.argmax(-1), z.argmax(-1))


def test_relevance_is_a_hand_made_product():
    """A matcher of one product: the gradient of its match is known by hand."""
    attention, values = drawn(2, 3, 4, 9).softmax(-1).requires_grad_(), drawn(2, 3, 4, 9)
    words = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    found = agla.relevance(attention, (attention * values).sum((1, 2, 3)), words)
    attention = attention.detach()
    for row in range(2):
        real = words[row].nonzero()[:, 0].tolist()
        for patch in range(9):
            parts = [attention[row, h, w, patch] * max(values[row, h, w, patch], 0) for h in range(3) for w in real]
            assert float(found[row, patch]) == pytest.approx(float(sum(parts)) / 3 / len(real))


def test_a_matcher_without_gradients_is_refused():
    attention = drawn(1, 1, 2, 4)
    with torch.inference_mode(), pytest.raises(RegardError, match="run the matching model with gradients"):
        agla.relevance(attention, attention.sum((1, 2, 3)))


def test_a_better_match_keeps_fewer_pixels():
    shares = agla.kept_share(torch.linspace(-1, 1, 9))
    assert bool((shares.diff() <= 0).all())
    assert float(shares[-1]) == 0.5
    assert float(shares[0]) == pytest.approx(1 - 1e-5)
    pixels, maps = torch.ones(2, 3, 8, 8), torch.rand(1, 8, 8, generator=DRAWN).expand(2, -1, -1)
    found = agla.masked(pixels, maps, torch.tensor([0.2, 0.8]))
    ranked = maps[0].flatten().sort(descending=True).values
    for row, similarity in enumerate((0.2, 0.8)):
        least = ranked[math.floor(64 * (1 - similarity / 2))]
        assert torch.equal(found[row, 0] > 0, maps[row] >= least)


def test_a_constant_map_keeps_all():
    maps = agla.enlarged(torch.full((1, 16), 0.3), size=32)
    assert torch.equal(maps, torch.ones(1, 32, 32))
    pixels = torch.rand(1, 3, 32, 32, generator=DRAWN) + 0.1
    assert torch.equal(agla.masked(pixels, maps, torch.ones(1)), pixels)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(RegardError, match=r"12 patches is not 3 x 3; pass grid"):
        agla.enlarged(torch.rand(1, 12))
    assert agla.enlarged(torch.rand(1, 12), size=16, grid=(3, 4)).shape == (1, 16, 16)
    pixels = torch.rand(2, 3, 8, 8)
    with pytest.raises(RegardError, match=r"maps \[1, 8, 8\] and similarities \[2\]"):
        agla.masked(pixels, torch.rand(1, 8, 8), torch.ones(2))
    with pytest.raises(RegardError, match="not finite"):
        agla.masked(pixels, torch.full((2, 8, 8), torch.nan), torch.ones(2))


def test_what_survives_lies_in_the_named_object_and_its_margin_rises():
    """Each object is half of the image; the matcher attends to the named one; an answer is an object's brightness."""
    size, objects = 64, {"left": (slice(0, 64), slice(0, 32)), "right": (slice(0, 64), slice(32, 64))}
    pixels = torch.zeros(1, 3, size, size)
    for rows, columns in objects.values():
        pixels[:, :, rows, columns] = 1.0
    attention = torch.full((1, 1, 1, 64), 1e-3).view(1, 1, 1, 8, 8)
    attention[..., :4] = 1.0
    attention = attention.flatten(3).requires_grad_()
    maps = agla.enlarged(agla.relevance(attention, attention.sum((1, 2, 3))), size)
    view = agla.masked(pixels, maps, torch.tensor([1.0]))

    def logits(image):
        return torch.stack([image[0, 0, rows, columns].mean() for rows, columns in objects.values()])[None]

    alive = view[0, 0] > 0
    inside = alive[objects["left"]].sum() / alive.sum()
    assert float(inside) >= 0.9
    z = agla.contrast(WHERE, alpha=2.0, beta=0.0).combine([logits(pixels), logits(view)])
    assert float(z[0, 0] - z[0, 1]) > float((logits(pixels)[0, 0] - logits(pixels)[0, 1]).abs()) + 1.0
