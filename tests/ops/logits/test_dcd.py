"""The contrast of two projectors: two runs of models that have them as their own, and what must not move."""

import copy

import pytest
import torch

import regard
import vlms
from regard import RegardError
from regard.core.placement import Where
from regard.ops.logits import dcd

WHERE = Where(layer=0, layers=1, heads=4, kv_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def llava():
    return vlms.tiny("llava")


def changed(model, seed):
    """A projector near the model's own, flat."""
    own = dcd.flat(dcd.projector(model))
    return own + 0.3 * own.std() * torch.randn(
        own.shape, generator=torch.Generator().manual_seed(seed), dtype=own.dtype
    )


@torch.no_grad()
def logits(model, given, cut=None):
    """Of the whole prompt; `cut`: in two forwards through a cache."""
    ids, mask, cache, found = given["input_ids"], given["attention_mask"], None, []
    place = (mask.cumsum(1) - 1).clamp(min=0)
    for start, stop in [(0, cut), (cut, ids.shape[1])] if cut else [(0, ids.shape[1])]:
        out = model(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
            pixel_values=given["pixel_values"] if start == 0 else None, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def own(model, weights):
    """A copy of the model whose projector it is."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(weights, dcd.projector(twin).parameters())
    return twin


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("both", [False, True])
def test_two_projectors_are_two_models(family, both):
    model, given = vlms.tiny(family)
    trained = {"negative": changed(model, 1)} | ({"positive": changed(model, 2)} if both else {})
    bad, good = (own(model, trained[name]) if name in trained else model for name in ("negative", "positive"))
    said = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with regard.attach(model, [regard.place("dcd", alpha=0.7, beta=0.0, **trained)]):
        found = model.generate(**given, **said)
    tokens = found.sequences
    with torch.no_grad():
        z = [forced(part, given, tokens) for part in (good, bad)]
    torch.testing.assert_close(torch.stack(found.logits, 1), (1.7 * z[0] - 0.7 * z[1]).to(found.logits[0]))


def forced(model, given, tokens):
    """Logits of the response rows of `tokens`, by one run without a cache."""
    prompt = given["input_ids"].shape[1]
    mask = torch.cat((given["attention_mask"], torch.ones_like(tokens[:, prompt:])), 1)
    whole = given | {"input_ids": tokens, "attention_mask": mask}
    if "mm_token_type_ids" in given:
        whole["mm_token_type_ids"] = (tokens == vlms.IMAGE).long()
    else:
        whole["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return model(**whole, use_cache=False).logits[:, prompt - 1 : -1]


def test_equal_projectors_change_nothing_and_alpha_zero_is_the_positive_one(llava):
    model, given = llava
    same, prompt = dcd.flat(dcd.projector(model)), given["input_ids"].shape[1]
    plain = logits(model, given)
    with regard.attach(model, [regard.place("dcd", beta=0.0, negative=same)]) as handle, handle.prompting(prompt - 3):
        torch.testing.assert_close(logits(model, given, prompt - 2), plain)
    good = changed(model, 3)
    wanted = logits(own(model, good), given)
    recipe = [regard.place("dcd", alpha=0.0, beta=0.0, positive=good)]
    with regard.attach(model, recipe) as handle, handle.prompting(prompt):
        assert torch.equal(logits(model, given), wanted)
    assert torch.equal(logits(model, given), plain)
    assert dcd.contrast(WHERE, alpha=0.0, beta=0.0, positive=None, negative=None) is None


def test_a_saved_recipe_holds_the_projectors(llava, tmp_path):
    model, given = llava
    recipe = regard.Recipe([regard.place("dcd", beta=0.0, negative=changed(model, 1), positive=changed(model, 2))])
    recipe.save(tmp_path / "recipe.yaml")
    again, prompt = regard.Recipe.load(tmp_path / "recipe.yaml"), given["input_ids"].shape[1]
    found = []
    for each in (recipe, again):
        with regard.attach(model, each) as handle, handle.prompting(prompt):
            found.append(logits(model, given))
    assert torch.equal(*found)


def test_what_is_missing_or_does_not_fit_is_named(llava):
    model, given = llava
    with pytest.raises(RegardError, match=r"needs a negative projector; regard.calibrate.dcd.fit"):
        regard.attach(model, [regard.place("dcd")])
    with pytest.raises(RegardError, match="negative projector whose weights are not finite"):
        regard.attach(model, [regard.place("dcd", negative=torch.tensor([torch.inf]))])
    message = r"projector of \[7\] weights, and LlavaMultiModalProjector has \d+"
    short = [regard.place("dcd", negative=torch.ones(7))]
    with regard.attach(model, short), pytest.raises(RegardError, match=message):
        model.generate(**given, max_new_tokens=1)
    with pytest.raises(RegardError, match="looked for a projector in Linear"):
        dcd.projector(torch.nn.Linear(2, 2))
