"""Scenes: the same each time, painted as they say, and with the co-occurrences they promise."""

import pytest
import torch

from regard.core.errors import RegardError
from regard.measure import scenes
from regard.measure.scenes import KINDS, MOST, PAINT, SHAPES, Scenes, draw, render, theme


def one(kind, x=20.0, y=30.0, radius=8.0, opacity=1.0, window=(0.0, 0.0, 64.0, 64.0)):
    """A scene with one object."""
    row = torch.zeros(1, MOST)
    kinds = torch.tensor([[KINDS.index(kind), -1, -1, -1, -1]])
    return Scenes(
        kinds, row.long(), row + x, row + y, row + radius, row + opacity, torch.tensor([60.0]), torch.tensor([window])
    )


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def have(drawn):
    """`[N, 42]`: which kinds each scene has."""
    return torch.stack([(drawn.kind == k).any(1) for k in range(len(KINDS))], 1)


def test_the_same_seed_gives_the_same_scenes_and_pictures():
    first, again, other = draw(20, 3, hidden=0.5), draw(20, 3, hidden=0.5), draw(20, 4, hidden=0.5)
    assert equal(first, again)
    assert not equal(first, other)
    assert torch.equal(render(first, seed=1), render(again, seed=1))
    assert not torch.equal(render(first, seed=1), render(first, seed=2))


def test_a_red_circle_is_red_where_it_says():
    picture = render(one("red circle"), noise=0)[0]
    assert picture.shape == (64, 64, 3)
    for i in range(64):
        for j in range(64):
            away = ((j + 0.5 - 20) ** 2 + (i + 0.5 - 30) ** 2) ** 0.5
            if away < 7.4:
                assert tuple(picture[i, j].tolist()) == PAINT["red"]
            elif away > 8.6:
                assert picture[i, j].tolist() == [60, 60, 60]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_another_and_stays_within_its_radius(shape):
    masks = {s: scenes.coverage(torch.tensor([i]), *(torch.tensor([v]) for v in (32.0, 32.0, 8.0)))[0]
             for i, s in enumerate(SHAPES)}  # fmt: skip
    mine = masks.pop(shape)
    assert mine.sum() > 60
    inside = torch.zeros(64, 64)
    inside[22:42, 22:42] = 1
    assert not (mine * (1 - inside)).any()
    for other in masks.values():
        assert (mine - other).abs().sum() > 20


def test_what_is_faint_is_mixed_with_the_ground_and_what_is_hidden_is_not_painted():
    faint = render(one("white square", opacity=0.25), noise=0)[0, 30, 20]
    assert faint.tolist() == [round(60 + 0.25 * (245 - 60))] * 3
    assert render(one("white square", opacity=0.0), noise=0).unique().tolist() == [60]
    assert one("white square", opacity=0.0).things()[0][0].hidden


def test_noise_has_its_spread():
    plain, noisy = (render(one("red circle", radius=0.1), noise=noise).float() for noise in (0, 6))
    assert (noisy - plain).std() == pytest.approx(6, rel=0.05)


def test_a_window_blackens_the_rest_and_takes_its_objects_away():
    drawn = draw(200, 0, masked=1.0)
    pictures = render(drawn)
    for k in range(len(drawn)):
        left, top, right, bottom = drawn.window[k].tolist()
        for slot in range(MOST):
            if drawn.kind[k, slot] >= 0:
                assert left <= drawn.x[k, slot] < right
                assert top <= drawn.y[k, slot] < bottom
        black = (pictures[k] == 0).all(-1)
        assert black.sum() == black.numel() - (round(right) - round(left)) * (round(bottom) - round(top))
    assert (drawn.kind < 0).all(1).any()
    kept = scenes.seen(draw(200, 0), drawn.window)
    assert kept.things() == drawn.things()


def test_objects_are_distinct_in_reading_order_and_first():
    drawn = draw(500, 1)
    for kinds, cells in zip(drawn.kind.tolist(), drawn.cell.tolist(), strict=True):
        number = sum(k >= 0 for k in kinds)
        assert 1 <= number <= MOST
        assert all(k >= 0 for k in kinds[:number])
        assert len(set(kinds[:number])) == number
        assert sorted(set(cells[:number])) == cells[:number]
    pitch = 64 / 3
    there = drawn.kind >= 0
    assert torch.equal((drawn.x / pitch).floor().long()[there], (drawn.cell % 3)[there])
    assert torch.equal((drawn.y / pitch).floor().long()[there], (drawn.cell // 3)[there])


def test_partners_are_each_others_in_a_theme_of_six_shapes():
    for kind in range(len(KINDS)):
        other = scenes.partner(kind)
        assert scenes.partner(other) == kind != other
        assert theme(other) == theme(kind)
    for number in range(7):
        members = [KINDS[k] for k in range(len(KINDS)) if theme(k) == number]
        assert sorted(kind.split()[1] for kind in members) == sorted(SHAPES)
    assert torch.allclose(scenes.affinity().sum(1), torch.ones(len(KINDS)))


def test_partners_come_together_as_far_as_the_prior_says():
    def together(drawn, kind):
        there = have(drawn)
        return there[there[:, kind]][:, scenes.partner(kind)].float().mean()

    usual, rare = draw(8000, 0), draw(8000, 0, prior=0.3)
    strong, weak = KINDS.index("red circle"), KINDS.index("red ring")
    assert together(usual, strong) > 0.7
    assert together(usual, strong) - together(rare, strong) > 0.2
    assert together(usual, strong) - together(usual, weak) > 0.1


def test_only_the_second_of_a_pair_is_hidden():
    drawn = draw(3000, 0, hidden=0.5)
    hidden = (drawn.opacity == 0) & (drawn.kind >= 0)
    there = have(drawn)
    row, slot = hidden.nonzero(as_tuple=True)
    partners = torch.tensor([scenes.partner(k) for k in drawn.kind[row, slot].tolist()])
    assert there[row, partners].all()
    pairs = sum((there[:, k] & there[:, scenes.partner(k)]).sum() for k in range(len(KINDS))) / 2
    assert len(row) / pairs == pytest.approx(0.5, abs=0.04)
    assert not (draw(3000, 0).opacity == 0).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [({"count": 0}, "at least 1 scene"), ({"prior": 1.5}, "prior is a share.*1.5"), ({"masked": -1}, "masked")],
)
def test_bad_settings(words, message):
    with pytest.raises(RegardError, match=message):
        draw(**({"count": 2, "seed": 0} | words))


def test_bad_noise():
    with pytest.raises(RegardError, match="noise"):
        render(draw(1, 0), noise=-1)
