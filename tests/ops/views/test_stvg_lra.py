"""Tracks and windows of planted clips, and the visual prompt on models with gradients."""

import math

import pytest
import torch

import regard
from families import tiny
from regard.ops.views import stvg_lra

GRID = (12, 6, 6)


def test_equal_questions_have_ratio_one():
    maps = torch.rand(12 * 36) + 0.1
    shown = stvg_lra.show(maps, maps, torch.ones(1, 12, 24, 24), GRID)
    torch.testing.assert_close(shown.ratio, torch.ones(GRID), atol=1.1e-3, rtol=0)


def test_a_clip_reversed_twice_is_the_clip():
    maps = torch.rand(GRID)
    assert stvg_lra.assembled(maps, maps.flip(0)).equal(maps)


@pytest.mark.parametrize(
    ("values", "frames", "expected"),
    [([0, 1, 5, 2, 4], 3, (2, 5)), ([0, 3, 5, 2, 1], 3, (1, 4)), ([5, 1, 1, 9, 9], 2, (3, 5)),
     ([1, 2, 3], 11, (0, 3)), ([1, 2, 9], 2, (1, 3)), ([9, 2, 3], 1, (0, 1))],
)  # fmt: skip
def test_windows(values, frames, expected):
    assert stvg_lra.window(torch.tensor(values), frames) == expected


def answering():
    """A tiny model in double, and margins of two questions and of a neutral one over visual tokens before them."""
    model = tiny("gpt2").double()
    embed = model.get_input_embeddings()
    questions, plain = torch.tensor([[5, 9, 11], [7, 3, 2]]), torch.tensor([[4, 4, 4]])

    def answered(visual, ids):
        given = torch.cat([visual.expand(len(ids), -1, -1), embed(ids)], 1)
        return stvg_lra.margin(model(inputs_embeds=given, logits_to_keep=1).logits[:, -1], 20, 21)

    return model, lambda visual: (answered(visual, questions), answered(visual, plain))


def test_the_prompt_follows_the_models_gradient_and_leaves_its_weights():
    model, score = answering()
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    visual = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rate = 1e-5
    prompt, losses = stvg_lra.tune(score, visual, iterations=1, rate=rate)
    value = lambda at: float(stvg_lra.loss(*score(visual + at)).detach())  # noqa: E731
    assert losses == (value(0),)
    for at in ((0, 0), (2, 17), (5, 31)):
        nudge = torch.zeros_like(visual)
        nudge[at] = 1e-5
        # The prompt counts by half in the first step.
        slope = (value(nudge) - value(-nudge)) / 2e-5 / 2
        assert float(prompt[at]) == pytest.approx(-rate * slope, rel=1e-4, abs=1e-12)
    # To first order, the loss falls by twice (the half again) the square of the step over the rate.
    assert value(prompt) - value(0) == pytest.approx(-2 * float(prompt.square().sum()) / rate, rel=0.02)
    assert all(weight.equal(kept[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_iteration_is_the_model_itself():
    prompt, losses = stvg_lra.tune(lambda visual: (visual.sum(), visual.sum()), torch.rand(3, 4), iterations=0)
    assert prompt.eq(0).all()
    assert losses == ()


class Toy:
    """A clip of 12 frames in 6 x 6: attention goes by kind (channel 0), and only one of two tracks acts (channel 1)."""

    def __init__(self, seed):
        drawn = torch.Generator().manual_seed(seed)
        row, column, self.start = (int(torch.randint(0, n, (1,), generator=drawn)) for n in (5, 5, 6))
        place = torch.zeros(6, 6)
        place[row : row + 2, column : column + 2] = 1.0
        places = torch.stack([place, place.roll((2, 2), (0, 1)), place.roll(3, 0)])
        visual = torch.randn(*GRID, 8, generator=drawn) * 0.5
        visual[..., 0] += 2 * (places[0] + places[1])
        visual[self.start : self.start + 6, ..., 1] += places[0]
        self.visual = visual.flatten(0, 2)
        self.order = torch.randperm(3, generator=drawn)
        self.masks = places[self.order][:, None].expand(-1, 12, -1, -1)

    def attention(self, visual):
        return visual[:, 0].softmax(0)

    def score(self, visual):
        # "Yes" where what is attended to acts; the neutral question reads all alike.
        return (self.attention(visual) @ visual[:, 1])[None], visual[:, 1].mean()[None]

    def found(self, visual):
        """Whether the track is right, and the overlap in time and space with the true tube."""
        neutral = torch.full((len(visual),), 1 / len(visual))
        shown = stvg_lra.show(self.attention(visual), neutral, self.masks, GRID, frames=6)
        right = int(self.order[shown.track]) == 0
        times = range(max(shown.start, self.start), min(shown.stop, self.start + 6))
        return right, right * len(times) / (12 - len(times))


def test_two_updates_find_planted_objects_more_often():
    plain, tuned, rose = [], [], 0
    for seed in range(100):
        toy = Toy(seed)
        prompt, losses = stvg_lra.tune(toy.score, toy.visual)
        rose += losses[1] < losses[0]
        plain.append(toy.found(toy.visual))
        tuned.append(toy.found(toy.visual + prompt))
    before, after = torch.tensor(plain, dtype=torch.float).mean(0), torch.tensor(tuned, dtype=torch.float).mean(0)
    assert rose == 100
    assert after[0] >= before[0]
    assert after[1] > before[1]


def test_a_gradient_that_is_not_finite_keeps_the_prompt():
    def score(visual):
        return visual.sum()[None] * 1.0, (visual.sum() - 3).sqrt()[None]

    prompt, losses = stvg_lra.tune(score, torch.ones(3), iterations=2, rate=1.0)
    assert prompt.eq(0).all()
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"masks": torch.zeros(0, 12, 8, 8)}, "proposals must be .at least 1, 12 frames"),
        ({"masks": torch.zeros(2, 11, 8, 8)}, "12 frames"),
        ({"grid": (12, 6, 5)}, "has 360 tokens"),
        ({"grid": (12, 36)}, "frames, rows and columns"),
        ({"neutral": torch.rand(12)}, "the two questions differ"),
        ({"asked": torch.full((432,), math.nan)}, "NaN"),
        ({"frames": 0}, "frames must be at least 1"),
    ],
)
def test_bad_input(changed, message):
    given = {"asked": torch.rand(432), "neutral": torch.rand(432), "masks": torch.ones(2, 12, 8, 8), "grid": GRID}
    with pytest.raises(regard.RegardError, match=message):
        stvg_lra.show(**given | changed)


def test_what_tuning_needs():
    with pytest.raises(regard.RegardError, match="token 96 for 'no' is not in the vocabulary of 96"):
        stvg_lra.margin(torch.rand(2, 96), 3, 96)
    with torch.inference_mode(), pytest.raises(regard.RegardError, match=r"leave torch\.inference_mode"):
        stvg_lra.tune(lambda x: (x, x), torch.rand(3))
    with pytest.raises(regard.RegardError, match="do not depend on the visual tokens"):
        stvg_lra.tune(lambda x: (torch.ones(1), torch.ones(1)), torch.rand(3))
