"""Branches that see other images: whichever way people decode, they equal runs of the model without a cache."""

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

import regard
import vlms
from contracts.decoding import GENERATE
from families import tiny
from regard import RegardError
from regard.ops.logits import lqcd

ALPHA = 0.8
ADDED = [regard.place("agla", alpha=ALPHA, beta=0.0)]
CUE = (5, 17, 40)
CUED = [regard.place("lqcd", alpha=ALPHA, beta=0.0, cue=CUE)]


@pytest.fixture(scope="module")
def llava():
    return vlms.tiny("llava")


def other(given):
    """Pixels of another view."""
    return given["pixel_values"].flip(-1) * 0.5


def one_each(given):
    """Two prompts of an image each, the first one padded."""
    row = given["input_ids"][0][given["attention_mask"][0].bool()]
    ids = torch.stack((torch.cat((row.new_zeros(2), row)), torch.cat((row, row.new_tensor([9, 30])))))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": given["pixel_values"][:2]}


def positions(model, mask):
    """Of padded rows; a model that counts height and width makes them itself."""
    return None if "qwen" in model.config.model_type else (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def uncached(model, given, **more):
    """Logits `[B, T, V]` of one forward without a cache."""
    place = positions(model, given["attention_mask"])
    return model(**given | more, use_cache=False, **({} if place is None else {"position_ids": place})).logits


def longer(given, more):
    """`given` with the tokens `more [B, n]` behind its prompt."""
    ids, mask = torch.cat((given["input_ids"], more), 1), given["attention_mask"]
    grown = given | {"input_ids": ids, "attention_mask": torch.cat((mask, torch.ones_like(more)), 1)}
    if "mm_token_type_ids" in given:
        grown["mm_token_type_ids"] = (ids == vlms.IMAGE).long()
    return grown


class Uncached(LogitsProcessor):
    """The definition: at every step the branch is run again on its own inputs, and weighted."""

    def __init__(self, model, given, weights, prompt=None):
        self.model, self.given, self.weights = model, given, weights
        self.prompt = given["input_ids"].shape[1] if prompt is None else prompt

    def __call__(self, input_ids, scores):
        times = input_ids.shape[0] // self.given["input_ids"].shape[0]
        given = {name: x.repeat_interleave(times, 0) for name, x in self.given.items()}
        z = uncached(self.model, longer(given, input_ids[:, self.prompt :]))[:, -1]
        return (self.weights[0] * scores + self.weights[1] * z).log_softmax(-1)


def run(model, given, way="greedy", processor=None, tokens=6):
    more = {} if processor is None else {"logits_processor": [processor]}
    torch.manual_seed(0)
    return model.generate(**given, max_new_tokens=tokens, **GENERATE[way], **more)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"])
def test_another_view_equals_uncached_runs_on_every_family(family):
    model, given = vlms.tiny(family)
    wanted = run(model, given, processor=Uncached(model, given | {"pixel_values": other(given)}, (1, ALPHA)))
    own = run(model, given)
    with regard.attach(model, ADDED) as handle, handle.lending(other(given)):
        assert torch.equal(run(model, given), wanted)
    assert not torch.equal(own, wanted)
    assert torch.equal(run(model, given), own)


@pytest.mark.parametrize("way", GENERATE)
@pytest.mark.parametrize("recipe", ["view", "prompt"])
def test_every_way_of_generating_equals_uncached_runs(llava, way, recipe):
    model, given = llava[0], one_each(llava[1])
    if way == "prompt lookup":
        given = {name: x[1:] for name, x in given.items()}
    if way == "chunked prefill" and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release of transformers prefills in chunks without the images")
    own = run(model, given, way)
    if recipe == "view":
        placed, weights, branch = ADDED, (1, ALPHA), given | {"pixel_values": other(given)}
    else:
        placed, weights = CUED, (1 + ALPHA, -ALPHA)
        ids, mask = lqcd.insert(given["input_ids"], given["attention_mask"], CUE, 0)
        branch = given | {"input_ids": ids, "attention_mask": mask}
    prompt = given["input_ids"].shape[1]
    wanted = run(model, given, way, Uncached(model, branch, weights, prompt))
    with regard.attach(model, placed) as handle, handle.lending(other(given)):
        found = run(model, given, way)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, own)


def test_generating_without_a_cache(llava):
    model, given = llava
    with regard.attach(model, ADDED) as handle, handle.lending(other(given)):
        found = run(model, given)
        none = model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(none, found)


def after(model, given, more, view, prompt):
    """Logits of `given` and then `more`, rows from `prompt - 1` on with those of `view` added."""
    whole = longer(given, more)
    own, z = uncached(model, whole), uncached(model, whole, pixel_values=view)
    own[:, prompt - 1 :] += ALPHA * z[:, prompt - 1 :]
    return own


def fed(model, given, cache, start, stop, pixels=None):
    """Logits of the tokens from `start` to `stop`."""
    mask = given["attention_mask"][:, :stop]
    return model(
        input_ids=given["input_ids"][:, start:stop], attention_mask=mask, pixel_values=pixels, past_key_values=cache,
        position_ids=(mask.cumsum(1) - 1)[:, start:],
    ).logits  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@torch.no_grad()
def test_forwards_crops_and_a_new_image_in_a_second_turn(llava, streaming):
    """Each turn's image comes with a forward of its own; what a crop takes away comes again."""
    model, given = llava
    given = {name: x[1:] for name, x in given.items()}
    pixels, view = given["pixel_values"], other(given)
    more = torch.tensor([[11, 12, 13, 14]])
    whole, (first, end) = longer(given, more), (21, given["input_ids"].shape[1])
    assert (given["input_ids"][0, :first] == vlms.IMAGE).sum() == 16
    recipe = [*ADDED, *([regard.place("streaming", sink=2, window=90)] if streaming else [])]
    wanted = after(model, given, more, view, end)
    alone = {name: x[:, :first] if name != "pixel_values" else x[:1] for name, x in given.items()}
    before = after(model, alone, more[:, :0], view[:1], first)
    cache: Any = DynamicCache(config=model.config)
    with regard.attach(model, recipe) as handle:
        with handle.prompting(first), handle.lending(view[:1]):
            one = fed(model, whole, cache, 0, first, pixels[:1])
        with handle.prompting(end):
            with handle.lending(view[1:]):
                two = fed(model, whole, cache, first, end, pixels[1:])
            three = fed(model, whole, cache, end, end + 4)
            torch.testing.assert_close(torch.cat((two, three), 1), wanted[:, first:])
            cache.crop(-3)
            torch.testing.assert_close(fed(model, whole, cache, end + 1, end + 4), wanted[:, end + 1 :])
            cache.crop(first - end - 4)
            assert [len(row) for row in cache.fork.images] == [1]
            with handle.lending(view[1:]):
                torch.testing.assert_close(fed(model, whole, cache, first, end, pixels[1:]), wanted[:, first:end])
            torch.testing.assert_close(fed(model, whole, cache, end, end + 4), wanted[:, end:])
    torch.testing.assert_close(one, before)


@torch.no_grad()
def test_a_request_after_one_that_failed(llava):
    model, given = llava
    with regard.attach(model, ADDED) as handle:
        with pytest.raises(RegardError, match="needs the masked view of the request's images"):
            run(model, given)
        with handle.lending(other(given)):
            found = run(model, given)
            hook = model.model.language_model.layers[1].register_forward_pre_hook(broken)
            with pytest.raises(RuntimeError, match="broke"):
                run(model, given)
            hook.remove()
            assert torch.equal(run(model, given), found)


def broken(*_):
    raise RuntimeError("broke")


def test_what_the_branches_cannot_be_given_is_refused(llava):
    model, given = llava
    prompt = given["input_ids"].shape[1]
    text = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with regard.attach(model, ADDED) as handle, handle.lending(other(given)):
        with pytest.raises(RegardError, match="'agla' works on images, and this request has none"):
            run(model, text)
        with handle.prompting(prompt), pytest.raises(RegardError, match="branches of 'agla' read tokens and images"):
            model(inputs_embeds=torch.zeros(1, prompt, 32).double())
        with pytest.raises(RegardError, match="read the request's own prompt"), handle.branching(text["input_ids"]):
            pass
        with handle.prompting(prompt), pytest.raises(RegardError, match="this forward brings pixel_values_videos"):
            model(**given, pixel_values_videos=given["pixel_values"])
        one = {name: x[:1] for name, x in given.items()}
        two = {name: torch.cat((x, x.clamp(max=80))) for name, x in one.items() if name != "pixel_values"}
        with handle.lending(other(one)), pytest.raises(RegardError, match="has none in rows 1"):
            run(model, two | {"pixel_values": one["pixel_values"]})
    with pytest.raises(RegardError, match="'agla' works on images, and LlamaForCausalLM takes none"):
        regard.attach(tiny("llama"), ADDED)


def test_tokens_that_stand_for_images_must_have_been_encoded_while_attached(llava):
    model, given = llava
    with torch.no_grad():
        made = {"image": model.model.get_image_features(pixel_values=given["pixel_values"], return_dict=True)}
    inputs = {name: x for name, x in given.items() if name != "pixel_values"}
    with regard.attach(model, CUED) as handle, handle.prompting(given["input_ids"].shape[1]):
        with pytest.raises(RegardError, match="images of 0 were encoded while it was attached"):
            model(**inputs, mm_encoder_outputs=made)
        with handle.branching(torch.full((2, 5), 7)), pytest.raises(RegardError, match="has 0 image tokens"):
            model(**given)


def test_a_moved_prompt_of_a_model_that_counts_height_and_width_is_refused():
    model, given = vlms.tiny("qwen2_5_vl")
    with regard.attach(model, CUED), pytest.raises(RegardError, match="places those of images by height and width"):
        run(model, given)
