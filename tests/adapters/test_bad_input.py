"""Recipes a model cannot be attached under: an error that reads well, and nothing changed or registered."""

import pytest
import torch

import regard
from contracts.decoding import at_once, prompts
from contracts.snapshot import snapshot
from families import tiny
from regard import Pattern, Recipe, RegardError, attend, place
from regard.core.placement import Placement
from regard.ops.masks import streaming as mechanism
from regard.primitives import stores

GATES = torch.rand(3, 2)


def streaming(**where):
    return place("streaming", sink=2, window=5, **where)


REFUSED = {
    "layer too high": ([streaming(layers=[0, 3])], r"layer 3 is out of range; this model has 3 \(layers 0 to 2\)"),
    "layer below zero": ([streaming(layers=-1)], r"layer -1 is out of range; this model has 3 \(layers 0 to 2\)"),
    "head too high": ([streaming(heads=2)], r"head 2 is out of range; this model has 2 \(heads 0 to 1\)"),
    "the same mechanism twice": (
        [streaming(layers=[0, 1]), streaming(layers=[1])],
        "two placements rewrite the same thing: 'streaming' both allow layer 1 head 0; place them on different",
    ),
    "two that encode": (
        [place("saw_int4", layers=[2], heads=[1]), place("saw_int4", key_bits=8)],
        "two placements rewrite the same thing: 'saw_int4' both encode layer 2 head 1",
    ),
    "two that keep": (
        [place("duo", gates=GATES), place("duo", gates=GATES, sparsity=0.25)],
        "two placements rewrite the same thing: 'duo' both keep layer 0 head 0",
    ),
    "heads of whole layers": ([place("duo", heads=[0], gates=GATES)], r"'duo' decides over whole layers; drop heads"),
    "no gates": ([place("duo")], "'duo' needs its gates, fitted by regard.calibrate.duo"),
    "gates of another model": (
        [place("duo", gates=torch.rand(5, 2))],
        r"'duo' has gates \[5, 2\], this model needs \[layers, KV heads\] = \[3, 2\]",
    ),
    "gates not finite": ([place("duo", gates=torch.full((3, 2), torch.nan))], "gates that are not finite"),
    "block too large": ([place("saw_int4", block=16)], "must be a power of two that divides the head dimension 8"),
    "another shape": (
        Recipe([streaming()], shape={"layers": 30, "heads": 4, "kv_heads": 2, "head_dim": 8}),
        "made for a model with layers=30, this one has 3",
    ),
    "what replaces the product": (
        [Placement("kda")],
        "'kda' replaces the product of queries, keys and values, so it cannot be attached .*`regard train`",
    ),
    "no recipe": ("streaming", "a recipe holds placements made by regard.place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_attached_is_refused_and_nothing_has_changed(name):
    recipe, message = REFUSED[name]
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(RegardError, match=message):
        regard.attach(model, recipe)
    if name != "no recipe":
        with pytest.raises(RegardError, match=message):
            (recipe if isinstance(recipe, Recipe) else Recipe(recipe)).check(model)
    assert snapshot(model) == before


def test_a_two_sided_pattern_is_refused(monkeypatch):
    """By attach, by the recipe and by the stores, which all need to know what later queries still need."""
    both = Pattern.prefix(3)
    monkeypatch.setattr(mechanism, "allow", lambda where, **options: both)
    model = tiny("llama")
    before = snapshot(model)
    message = r"'streaming' makes pattern causal \| sink 3 \(two-sided\), which .* cut at p_k <= p_q"
    with pytest.raises(RegardError, match=message):
        regard.attach(model, [streaming()])
    with pytest.raises(RegardError, match=message):
        Recipe([streaming()]).check(model)
    assert snapshot(model) == before
    with pytest.raises(RegardError, match=r"causal \| sink 3 .* later positions"):
        stores.build(both, [None] * 2, [None] * 2, 2, attend)


def test_bad_input_beside_an_attached_model_leaves_that_one_attached():
    model, other = tiny("llama"), tiny("llama", seed=1)
    with regard.attach(model, [streaming()]):
        good = at_once(model, *prompts())
        for recipe, _ in REFUSED.values():
            with pytest.raises(RegardError):
                regard.attach(other, recipe)
        assert torch.equal(at_once(model, *prompts()), good)


WRITTEN = {
    "unknown mechanism": (lambda: place("streming"), r"unknown mechanism 'streming'; .* Did you mean 'streaming'\?"),
    "unknown site": (lambda: place("mask/streaming"), "unknown mechanism 'mask/streaming'; known: .*streaming"),
    "unknown option": (lambda: place("saw_int4", keybits=4), r"unknown option of 'saw_int4' 'keybits'.*'key_bits'\?"),
    "not a choice": (lambda: place("saw_int4", key_bits=5), "'key_bits' of 'saw_int4' must be one of 4, 8, 16, got 5"),
    "a bool": (lambda: place("saw_int4", key_bits=True), "'key_bits' of 'saw_int4' must be of kind int, got True"),
    "a number for a bool": (lambda: place("saw_int4", rotate_v=1), "'rotate_v' .* must be of kind bool, got 1"),
    "not finite": (lambda: place("duo", gates=GATES, sparsity=float("nan")), r"must lie in \[0.0, 1.0\], got nan"),
    "no tensor": (lambda: place("duo", gates=[[1.0]]), "'gates' of 'duo' must be a tensor"),
    "layers as text": (lambda: place("streaming", layers="0-2"), "layers='0-2' must be 'all', an index or a list"),
    "a head twice": (lambda: place("streaming", heads=[0, 0]), r"heads \[0, 0\] name one twice"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_wrongly_is_refused_where_it_is_written(name):
    write, message = WRITTEN[name]
    with pytest.raises(RegardError, match=message):
        write()
