"""Training of DCD's projectors: what each learns from, what stays, and that decoding avoids what was rejected."""

import pytest
import torch

import regard
import vlms
from regard import RegardError
from regard.calibrate import dcd as fitting
from regard.calibrate.dcd import Pair
from regard.ops.logits import dcd

RIGHT, ABSENT = 11, 57


@pytest.fixture(scope="module")
def llava():
    model, _ = vlms.tiny("llava")
    return model.float()


def pairs(count=4, rejected=ABSENT):
    """Questions about random images: the right attribute is chosen, an absent one rejected."""
    prompt = torch.tensor([vlms.BOS, *[vlms.IMAGE] * 16, 5, 6, 7])
    drawn = torch.Generator().manual_seed(0)
    pixels = [torch.randn(1, 3, 16, 16, generator=drawn) for _ in range(count)]
    return [Pair(prompt, torch.tensor([RIGHT]), torch.tensor([rejected]), {"pixel_values": x}) for x in pixels]


def test_each_side_learns_its_own_answers_and_nothing_else_learns(llava):
    part, pair = dcd.projector(llava), pairs(1)[0]
    weights = dcd.flat(part).requires_grad_()
    fitting.loss(llava.requires_grad_(False), part, weights, pair, "positive").backward()
    assert 0 < float(weights.grad.abs().sum()) < float("inf")
    assert all(p.grad is None for p in llava.parameters())
    llava.requires_grad_(True)
    before = {name: p.clone() for name, p in llava.named_parameters()}
    one = fitting.fit(llava, pairs=pairs(2), epochs=1)
    two = fitting.fit(llava, pairs=pairs(2, rejected=30), epochs=1)
    assert torch.equal(one["positive"], two["positive"])
    assert not torch.equal(one["negative"], two["negative"])
    assert not torch.equal(one["positive"], one["negative"])
    assert all(torch.equal(p, before[name]) for name, p in llava.named_parameters())
    assert all(p.requires_grad for p in llava.parameters())


def test_before_training_both_are_the_model_s_own(llava):
    found = fitting.fit(llava, pairs=pairs(1), epochs=0)
    assert set(found) == {"positive", "negative"}
    assert all(torch.equal(x, dcd.flat(dcd.projector(llava))) for x in found.values())


def test_decoding_avoids_what_was_rejected(llava):
    told = []
    found = fitting.fit(
        llava, pairs=pairs(), epochs=6, rate=3e-3, sides=["negative"], progress=lambda *x: told.append(x)
    )
    assert told[-1] == (24, 24)
    held = pairs(8)[4:]
    given = {
        "input_ids": torch.stack([pair.prompt for pair in held]),
        "pixel_values": torch.cat([pair.images["pixel_values"] for pair in held]),
    }
    with torch.no_grad():
        before = llava(**given).logits[:, -1].log_softmax(-1)[:, ABSENT]
        with regard.attach(llava, [regard.place("dcd", beta=0.0, **found)]) as handle, handle.prompting(20):
            after = llava(**given).logits[:, -1].log_softmax(-1)[:, ABSENT]
    assert bool((after < before - 1).all())


def test_bad_pairs_are_named(llava):
    whole = pairs(1)[0]
    bad = {
        "got none": [],
        "pair 1 has no rejected answer": [whole, Pair(whole.prompt, whole.chosen, whole.rejected[:0], whole.images)],
        "pair 0 has no images": [Pair(whole.prompt, whole.chosen, whole.rejected)],
    }
    for message, given in bad.items():
        with pytest.raises(RegardError, match=message):
            fitting.fit(llava, pairs=given)
    with pytest.raises(RegardError, match="sides positive and negative, got 'neg'"):
        fitting.fit(llava, pairs=[whole], sides=["neg"])
