"""Attaching nothing, or a mechanism at its neutral setting, changes no bit; detaching leaves no trace."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, generated, prompts, ways
from contracts.snapshot import snapshot
from contracts.subjects import MECHANISMS, NEUTRAL, example, neutral
from families import FAMILIES, tiny
from regard.adapters.families import open_decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_settings_are_bit_identical(family):
    model = tiny(family)
    decoder = open_decoder(model)
    ids, mask = prompts()
    before = ways(model)
    logits = (at_once(model, ids, mask), forced(model, ids, mask, [9, 14]))
    asked = set()
    for recipe in [regard.Recipe([]), *(neutral(stem, decoder) for stem in NEUTRAL)]:
        with regard.attach(model, recipe) as handle:
            now = (at_once(model, ids, mask), forced(model, ids, mask, [9, 14]))
            assert all(torch.equal(a, b) for a, b in zip(logits, now, strict=True))
            # Where the same runs in every layer as under the empty recipe, it was asked already.
            if handle.explain() in asked:
                continue
            asked.add(handle.explain())
            for way, tokens in before.items():
                assert torch.equal(generated(model, way), tokens), way


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_leaves_the_model_as_it_was(family):
    model = tiny(family)
    decoder = open_decoder(model)
    generated(model, "greedy", tokens=2)
    ids, mask = prompts()
    logits, before = at_once(model, ids, mask), snapshot(model)
    for stem in MECHANISMS:
        handle = regard.attach(model, example(stem, decoder))
        # Some mechanisms touch prompt rows, others response rows only.
        with handle.prompting(ids.shape[1] - 6):
            changed = at_once(model, ids, mask)
        assert not torch.equal(changed[1], logits[1]), f"{stem} changes nothing at its card's example"
        generated(model, "greedy", tokens=2)
        handle.detach()
        assert snapshot(model) == before
    assert torch.equal(at_once(model, ids, mask), logits)
