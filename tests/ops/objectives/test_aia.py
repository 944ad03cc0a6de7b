"""Intensities and their Huber loss, and a tiny model of two tasks trained towards the targets."""

import math

import pytest
import torch
from torch import nn

import regard
from ops.objectives import toys
from regard.ops.objectives import aia


def test_the_loss_is_torchs_huber_loss_per_layer():
    drawn = torch.rand(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for task in aia.TARGETS:
        steps = aia.table(task, 32).double()
        each = [nn.HuberLoss(delta=float(d))(drawn[:, i], t.expand(3)) for i, (d, t) in enumerate(steps)]
        expected = torch.stack(each)
        torch.testing.assert_close(aia.penalty(drawn, 40, task=task), 40 * expected.mean())
        torch.testing.assert_close(aia.penalty(drawn[0], 1, steps), aia.penalty(drawn[:1], 1, task=task))


def test_published_steps():
    told = aia.table("generation", 28)
    assert (
        told[[0, 9, 10, 24, 25]].tolist()
        == torch.tensor([[0.2, 0.4], [0.2, 0.4], [0.1, 0.4], [0.1, 0.4], [0.05, 0.2]]).tolist()
    )
    assert (
        aia.table("understanding", 33)[[9, 10, 19, 20, 30, 31], 1].tolist()
        == torch.tensor([0.1, 0.15, 0.15, 0.3, 0.3, 0.2]).tolist()
    )


def test_gradients_are_bounded_by_delta_and_vanish_at_the_target():
    steps = aia.table("generation", 30).double()
    found = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(aia.penalty(found, 30.0), found)
    assert (slope.abs() <= steps[:, 0] + 1e-12).all()
    assert (slope.sign() == (found - steps[:, 1]).sign()).all()
    met = steps[:, 1].clone().requires_grad_()
    assert torch.autograd.grad(aia.penalty(met, 30.0), met)[0].eq(0).all()
    assert torch.autograd.gradcheck(lambda x: aia.penalty(x, 2.0), found)


def test_flags_switch_samples_off():
    found = torch.rand(2, 5, dtype=torch.float64).requires_grad_()
    value = aia.penalty(found, 1.0, active=torch.tensor([True, False]))
    torch.testing.assert_close(value, aia.penalty(found[:1], 1.0) / 2)
    assert torch.autograd.grad(value, found)[0][1].eq(0).all()


def test_uniform_causal_attention_in_closed_form():
    """Text at 0..3, image at 4..9: row i sees text with 4 / (i + 1); everything with 1."""
    weights = torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]
    rows = torch.arange(10)[None] >= 4
    mass = weights[:, :4].sum(1).expand(1, 2, -1)
    assert float(aia.intensity(mass, rows)) == pytest.approx(sum(4 / n for n in range(5, 11)) / 6)
    assert float(aia.intensity(weights.sum(1).expand(1, 2, -1), rows)) == pytest.approx(1)


def test_masses_from_log_sum_exps_are_those_of_probabilities():
    drawn = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 8, 8, generator=drawn, dtype=torch.float64).requires_grad_()
    hidden = torch.ones(8, 8).triu(1).bool()
    rows, keys = torch.arange(8).expand(2, -1) >= 3, torch.arange(8) < 3
    causal = scores.masked_fill(hidden, -math.inf)
    part = causal.masked_fill(~keys, -math.inf).logsumexp(-1) - causal.logsumexp(-1)
    both = []
    for mass in (part.exp(), causal.softmax(-1)[..., keys].sum(-1)):
        value = aia.penalty(aia.intensity(mass, rows)[:, None], 40.0)
        both.append((value, torch.autograd.grad(value, scores, retain_graph=True)[0]))
    torch.testing.assert_close(*both)


def tasks(drawn, n=8):
    """Four of text, four of image, n rows each: the image spells the text (generation), or the text says the image."""
    word = torch.randint(0, 6, (2 * n, 4), generator=drawn)
    return torch.cat([torch.cat([word[:n], word[:n] + 6], 1), torch.cat([word[n:] + 6, word[n:]], 1)])


def intensities(maps, rows=8):
    """Of the late half to the early half, `[rows, L]`."""
    late = (torch.arange(8) >= 4).expand(rows, -1)
    return torch.stack([aia.intensity(x[..., :4].sum(-1), late) for x in maps], 1)


def both(maps):
    """The two tasks' intensities, by task."""
    return {task: intensities([x[8 * i : 8 * i + 8] for x in maps]) for i, task in enumerate(aia.TARGETS)}


def test_a_tiny_model_of_two_tasks_comes_within_delta():
    losses, near = [], []
    for weight in (0.0, 5.0):
        model = toys.Toy(12, 8)
        extra = lambda maps, _, w=weight: sum(aia.penalty(x, w, task=task) for task, x in both(maps).items())  # noqa: E731
        losses.append(toys.train(model, tasks, extra, 300))
        found = both(model(tasks(torch.Generator().manual_seed(2)))[1])
        steps = {task: aia.table(task, 2) for task in found}
        away = torch.stack([(found[task].mean(0) - steps[task][:, 1]).abs() < steps[task][:, 0] for task in found])
        near.append(float(away.float().mean()))
    assert near[1] > 0.5
    assert near[0] == 0
    assert losses[1] < 1.02 * losses[0]


def test_weight_zero_leaves_the_gradients_of_the_loss():
    model, ids = toys.Toy(12, 8), tasks(torch.Generator().manual_seed(1))[:8]
    logits, maps, _ = model(ids)
    plain, found = toys.next_token(logits, ids), intensities(maps)
    weights = list(model.parameters())
    one = torch.autograd.grad(plain, weights, retain_graph=True)
    two = torch.autograd.grad(plain + aia.penalty(found, 0.0), weights)
    assert all(a.equal(b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": torch.ones(2, 2)}, r"for each of 3 layers, got \[2, 2\]"),
        ({"targets": torch.zeros(3, 2)}, "deltas must be above 0"),
        ({"weight": -1.0}, "weight cannot be negative"),
        ({"task": "generate"}, "Did you mean 'generation'"),
        ({"intensities": torch.tensor([0.1, math.nan, 0.2])}, "masses of attention"),
        ({"intensities": torch.rand(2, 2, 2)}, r"\[L\] or \[B, L\]"),
        ({"active": torch.ones(2)}, r"flags must be \[1\]"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(regard.RegardError, match=message):
        aia.penalty(**{"intensities": torch.rand(3), "weight": 40.0, **given})


def test_samples_without_rows_are_named():
    rows = torch.tensor([[True, False], [False, False]])
    with pytest.raises(regard.RegardError, match="samples 1 have no rows of the asking modality"):
        aia.intensity(torch.rand(2, 3, 2), rows)
    with pytest.raises(regard.RegardError, match=r"masses must be \[B, H, T\]"):
        aia.intensity(torch.rand(2, 3, 4), rows)
