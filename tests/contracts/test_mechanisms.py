"""What every mechanism of the catalog promises on every family."""

import pytest
import torch

import regard
from contracts.decoding import at_once, forced, generated, possible, prompts
from contracts.replay import everything_kept, record, replay
from contracts.subjects import MECHANISMS, NEUTRAL, example, neutral
from families import FAMILIES, VOCABULARY, tiny
from regard.adapters.families import open_decoder
from regard.catalog import find
from regard.measure.quality import quality
from regard.measure.text import windows

# One of each kind: plain, windows in some layers, norms behind parts, no rotary positions, fused weights, images.
CORE = ("llama", "qwen2", "gemma3", "gpt2", "gpt_neox", "qwen2_5_vl")


def subjects(few):
    """Every mechanism on every family; `few(stem)` are the families that `make test` runs it on."""
    return [
        pytest.param(stem, family, id=f"{stem}-{family}", marks=() if family in few(stem) else pytest.mark.long)
        for stem in MECHANISMS
        for family in FAMILIES
    ]


# What reads the kinds of tokens meets a family where `act` and `locore`, which do not, meet all of them.
SUBJECTS = subjects(lambda stem: FAMILIES if find(stem).card.needs == "nothing" else CORE)
GENERATED = subjects(lambda stem: CORE if find(stem).card.needs == "nothing" else CORE[:2])
# Where the prompt ends in runs that do not generate.
PROMPT = 21
CUTS = {"token by token": list(range(21, 35)), "chunks": [1, 2, 6, 16, 21, 30]}


def exact(model, recipe):
    """Put the model in float64, so that no code flips; in float32 if transformers' own layers of Gemma 2 attend.

    Their mask overflows in float64, so that padding makes everything NaN.
    """
    model.double()
    if model.config.model_type == "gemma2":
        ids, mask = prompts(rows=2, length=30, padding=7)
        with regard.attach(model, recipe) as handle, handle.prompting(PROMPT):
            overflows = at_once(model, ids, mask)[mask.bool()].isnan().any()
        if overflows:
            model.float()


def _close(model):
    return 1e-6 if model.dtype == torch.float64 else 1e-4


@pytest.mark.parametrize(("stem", "family"), SUBJECTS)
def test_cached_decoding_replays_as_one_full_forward(stem, family):
    model = tiny(family)
    recipe = example(stem, open_decoder(model))
    ids, mask = prompts(length=36)
    for cuts in CUTS.values():
        tape = {}
        with regard.attach(model, recipe) as handle, handle.prompting(PROMPT):
            record(handle, tape)
            cached = forced(model, ids, mask, cuts)
        with everything_kept(), regard.attach(model, recipe) as handle, handle.prompting(PROMPT):
            replay(handle, tape)
            full = at_once(model, ids, mask)
        real = mask.bool()
        torch.testing.assert_close(cached[real], full[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("stem", "family"), SUBJECTS)
def test_a_padded_batch_equals_single_runs(stem, family):
    model = tiny(family)
    recipe = example(stem, open_decoder(model))
    exact(model, recipe)
    ids, mask = prompts(rows=3, length=30, padding=7)
    with regard.attach(model, recipe) as handle:
        with handle.prompting(PROMPT):
            together = forced(model, ids, mask, [11, 29])
        for row, pad in enumerate([7, 0, 0]):
            with handle.prompting(PROMPT - pad):
                alone = forced(model, ids[row : row + 1, pad:], mask[row : row + 1, pad:], [11 - pad, 29 - pad])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, atol=_close(model), rtol=1e-6)


@pytest.mark.parametrize(("stem", "family"), GENERATED)
def test_every_way_of_generating_equals_its_definition(stem, family):
    model = tiny(family)
    recipe = example(stem, open_decoder(model))
    exact(model, recipe)
    for way in possible(family):
        with regard.attach(model, recipe):
            real = generated(model, way)
        with everything_kept(), regard.attach(model, recipe):
            assert torch.equal(generated(model, way), real), way
    with regard.attach(model, recipe):
        lookup = generated(model, "prompt lookup")
        assert torch.equal(generated(model, "greedy", rows=1, padding=0), lookup)


@pytest.mark.parametrize("stem", MECHANISMS)
def test_a_saved_recipe_applies_again(stem, tmp_path):
    model = tiny("llama")
    recipe = example(stem, open_decoder(model)).made_for(model)
    recipe.save(tmp_path / "recipe.yaml")
    again = regard.Recipe.load(tmp_path / "recipe.yaml")
    assert again.digest == recipe.digest
    assert again.shape == recipe.shape
    ids, mask = prompts()
    with regard.attach(model, recipe) as handle, handle.prompting(PROMPT):
        first = at_once(model, ids, mask)
    with regard.attach(model, again) as handle, handle.prompting(PROMPT):
        assert torch.equal(at_once(model, ids, mask), first)


@pytest.mark.parametrize("stem", MECHANISMS)
def test_gradients_reach_the_weights(stem):
    model = tiny("llama").train()
    ids, mask = prompts()
    with regard.attach(model, example(stem, open_decoder(model))):
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < float(parameter.grad.abs().sum()) < float("inf"), name


@pytest.mark.parametrize("stem", MECHANISMS)
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_the_scorer_sees_every_mechanism_and_nothing_else(stem, chunk):
    model = tiny("llama")
    decoder = open_decoder(model)
    drawn = torch.randint(2, VOCABULARY - 6, (120,), generator=torch.Generator().manual_seed(0))
    held = windows(drawn, 40, 16, 2)
    placements = example(stem, decoder).placements
    found = quality(model, placements, held, chunk).kl
    # An exact mechanism is the model in other numbers: what it loses is rounding.
    assert found < 1e-6 if find(stem).card.exact else found > 1e-6
    nothing = neutral(stem, decoder).placements if stem in NEUTRAL else ()
    assert quality(model, nothing, held, chunk).kl == 0
