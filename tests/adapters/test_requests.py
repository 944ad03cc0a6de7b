"""Requests on an attached model: whose cache it is, what each forward is told, and what cannot be served."""

import copy

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

import regard
from contracts.decoding import at_once, forced, generated, prompts
from families import VOCABULARY, tiny
from regard import RegardError
from regard.adapters import requests

STREAM = [regard.place("streaming", sink=2, window=5)]
CODES = [regard.place("saw_int4", key_bits=8, value_bits=4)]
BOTH = [regard.place("streaming", layers=[0], sink=2, window=5), regard.place("saw_int4", layers=[1], key_bits=8)]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama").double()


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY - 6, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def feed(model, ids, cache):
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def filled(model, ids):
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache)
    return cache


@pytest.fixture
def steps(monkeypatch):
    """Every Step told to the layers of a forward."""
    made, real = [], requests.Step
    monkeypatch.setattr(requests, "Step", lambda *args: made.append(real(*args)) or made[-1])
    return made


def responses(steps):
    return [(step.start, step.response[0].tolist()) for step in steps]


@pytest.mark.parametrize("way", ["greedy", "beams", "chunked prefill", "prompt lookup", "sampling"])
def test_rows_that_generate_adds_are_response_rows(llama, steps, way):
    with regard.attach(llama, STREAM):
        generated(llama, way)
    assert len(steps) > 2
    for step in steps:
        assert step.response[0].tolist() == [arrival >= 21 for arrival in range(step.start, step.stop)]


def test_a_later_turn_is_prompt_until_generate_adds_to_it(llama, ids, steps):
    cache = DynamicCache(config=llama.config)
    with regard.attach(llama, STREAM):
        first = llama.generate(ids[:1, :9], past_key_values=cache, max_new_tokens=4, do_sample=False)
        steps.clear()
        llama.generate(torch.cat([first, ids[:1, :6]], 1), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert responses(steps) == [(12, [False] * 7), (19, [True]), (20, [True])]


def test_responding_marks_rows_and_rows_outside_it_are_prompt_rows(llama, ids, steps):
    cache = DynamicCache(config=llama.config)
    with regard.attach(llama, STREAM) as handle:
        feed(llama, ids[:, :4], cache)
        with handle.responding():
            feed(llama, ids[:, 4:6], cache)
            feed(llama, ids[:, 6:7], cache)
        feed(llama, ids[:, 7:9], cache)
    assert [step.prompt for step in steps] == [None, 4, 4, None]
    assert responses(steps) == [(0, [False] * 4), (4, [True] * 2), (6, [True]), (7, [False] * 2)]


def test_a_copied_cache_remembers_where_its_prompt_ended(llama, ids, steps):
    with regard.attach(llama, STREAM) as handle:
        cache = filled(llama, ids[:, :4])
        with handle.responding():
            feed(llama, ids[:, 4:6], cache)
            feed(llama, ids[:, 6:7], copy.deepcopy(cache))
    assert steps[-1].prompt == 4


def test_forwards_without_a_cache_run_the_mechanism_too(llama, ids):
    mask = torch.ones_like(ids)
    own = at_once(llama, ids, mask)
    with regard.attach(llama, BOTH):
        cached, uncached = forced(llama, ids, mask, [9, 17]), at_once(llama, ids, mask)
        with torch.no_grad():
            plain = llama(ids).logits
    torch.testing.assert_close(uncached, cached, atol=1e-6, rtol=1e-6)
    assert torch.equal(plain, uncached)
    assert not torch.allclose(own, uncached, atol=1e-3)


def test_generating_without_a_cache_gives_the_same_tokens(llama):
    ids, mask = prompts()
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with regard.attach(llama, BOTH), torch.no_grad():
        assert torch.equal(llama.generate(ids, use_cache=False, **given), llama.generate(ids, **given))
        assert llama(ids, attention_mask=mask, use_cache=False).past_key_values is None
        assert llama(ids, attention_mask=mask).past_key_values is not None


def test_a_chunk_that_is_all_padding_for_a_row_changes_nothing(llama):
    ids, mask = prompts(rows=2, length=24, padding=11)
    with regard.attach(llama, BOTH):
        together = forced(llama, ids, mask, [4, 9, 16])
        alone = forced(llama, ids[:1, 11:], mask[:1, 11:], [5])
    torch.testing.assert_close(together[:1, 11:], alone, atol=1e-6, rtol=1e-6)


def test_right_padding_in_one_forward_equals_single_runs(llama, ids):
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    with regard.attach(llama, BOTH):
        together = at_once(llama, ids, mask)
        alone = at_once(llama, ids[:1, :15], mask[:1, :15])
    torch.testing.assert_close(together[:1, :15], alone, atol=1e-6, rtol=1e-6)


MASKS = {
    "too short": (torch.ones(2, 20), r"attention_mask is a mask of shape \[2, 20\]; .* 2 rows to 24 tokens in all"),
    "other rows": (torch.ones(3, 24), r"shape \[3, 24\]; this forward brings 2 rows"),
    "prepared": (torch.ones(2, 1, 24, 24), r"take a 2-D padding mask, got a mask of shape \[2, 1, 24, 24\]"),
    "per layer kind": ({"full_attention": None}, "take a 2-D padding mask, got dict"),
    "a hole": (torch.ones(2, 24).index_fill(1, torch.tensor([9]), 0), "hides tokens between visible ones; pad prompts"),
    "padding then a hole": (
        torch.ones(2, 24).index_fill(1, torch.tensor([0, 1, 9]), 0),
        "hides tokens between visible ones; pad prompts on the left",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_cannot_be_served_are_refused(llama, ids, name):
    mask, message = MASKS[name]
    with regard.attach(llama, STREAM):
        good = llama(ids).logits
        with pytest.raises(RegardError, match=message):
            llama(input_ids=ids, attention_mask=mask)
        assert torch.equal(llama(ids).logits, good)


def test_tokens_after_right_padding_are_refused(llama, ids):
    cache, mask = DynamicCache(config=llama.config), torch.ones_like(ids)
    mask[0, 9:12] = 0
    with regard.attach(llama, STREAM):
        llama(input_ids=ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        with pytest.raises(RegardError, match="hides tokens between visible ones"):
            llama(input_ids=ids[:, 12:], attention_mask=mask, past_key_values=cache)


def test_packed_sequences_are_refused(llama, ids):
    packed = torch.tensor([[*range(12), *range(12)]] * 2)
    with regard.attach(llama, STREAM):
        with pytest.raises(RegardError, match="position_ids jump inside a row"):
            llama(input_ids=ids, position_ids=packed)
        assert torch.equal(llama(input_ids=ids, position_ids=torch.arange(24)[None]).logits, llama(ids).logits)


def test_masks_of_another_kind_than_causal_are_refused(llama, ids, monkeypatch):
    block = lambda batch, head, q, k: (q < 4) & (k < 4)  # noqa: E731
    real = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **kw: real(**kw, or_mask_function=block))
    with regard.attach(llama, STREAM), pytest.raises(RegardError, match=r"layer 0 was given a mask made of .*causal"):
        llama(ids)


def test_what_attached_layers_do_not_do_is_refused_by_name(ids):
    model = tiny("llama")
    with regard.attach(model, STREAM):
        with pytest.raises(RegardError, match="output_attentions asks for weights"):
            model(ids, output_attentions=True)
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(RegardError, match="gradient checkpointing runs layers twice"):
            model(ids)
        model.gradient_checkpointing_disable()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(RegardError, match=r"attention dropout 0\.1 is not run by regard"):
            model(ids)


def quantised():
    cache = tf.QuantizedCache.__new__(tf.QuantizedCache)
    cache.layers = []
    return cache


def offloaded():
    cache = DynamicCache()
    cache.offloading = True
    return cache


CACHES = {
    "StaticCache": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "QuantizedCache": lambda model: quantised(),
    "DynamicCache with offloading": lambda model: offloaded(),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_cannot_hold_stores_are_refused_by_name(llama, ids, name):
    with regard.attach(llama, STREAM), pytest.raises(RegardError, match=f"{name} cannot hold regard's stores"):
        feed(llama, ids, CACHES[name](llama))


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_generate_refuses_the_same_caches_before_it_makes_them(ids, kind):
    model = tiny("llama")
    held = set(vars(model))
    with regard.attach(model, STREAM), pytest.raises(RegardError, match=f"cache_implementation='{kind}' cannot hold"):
        model.generate(ids, cache_implementation=kind, max_new_tokens=2)
    assert set(vars(model)) == held


def test_an_empty_recipe_leaves_static_caches_as_they_are(ids):
    model = tiny("llama")
    how = {"cache_implementation": "static", "max_new_tokens": 5, "do_sample": False}
    own, tokens = feed(model, ids, StaticCache(config=model.config, max_cache_len=40)), model.generate(ids, **how)
    with regard.attach(model, regard.Recipe([])):
        assert torch.equal(feed(model, ids, StaticCache(config=model.config, max_cache_len=40)), own)
        assert torch.equal(model.generate(ids, **how), tokens)


def test_a_cache_of_another_recipe_is_refused_naming_both(llama, ids):
    with regard.attach(llama, STREAM) as first:
        cache = filled(llama, ids)
    with regard.attach(llama, CODES) as second:
        with pytest.raises(RegardError, match=f"made under recipe {first.digest}, .* under recipe {second.digest}"):
            feed(llama, ids, cache)
        with pytest.raises(RegardError, match=f"made under recipe {first.digest}, .* under recipe {second.digest}"):
            llama.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_a_cache_without_a_recipe_is_refused_unless_it_is_empty(llama, ids):
    cache = filled(llama, ids)
    with regard.attach(llama, STREAM):
        with pytest.raises(RegardError, match="made under no recipe, the model is attached under recipe"):
            feed(llama, ids, cache)
        assert torch.equal(feed(llama, ids, DynamicCache()), feed(llama, ids, DynamicCache(config=llama.config)))


def test_a_cache_outlives_detaching_but_is_read_under_its_recipe_only(llama, ids):
    with regard.attach(llama, BOTH) as handle:
        whole = feed(llama, ids, DynamicCache(config=llama.config))
        cache = filled(llama, ids[:, :15])
    with pytest.raises(RegardError, match=f"made under recipe {handle.digest}; attach that recipe"):
        feed(llama, ids[:, 15:], cache)
    with regard.attach(llama, BOTH) as again:
        assert again.digest == handle.digest
        torch.testing.assert_close(feed(llama, ids[:, 15:], cache), whole[:, 15:])


def test_a_copied_cache_goes_on_by_itself(llama, ids):
    with regard.attach(llama, BOTH):
        cache = filled(llama, ids[:, :15])
        twin = copy.deepcopy(cache)
        other = feed(llama, ids[:, :4], twin)
        rest = feed(llama, ids[:, 15:], cache)
        assert twin.get_seq_length() == 19
        assert torch.equal(feed(llama, ids[:, :4], filled(llama, ids[:, :15])), other)
        torch.testing.assert_close(rest, feed(llama, ids, DynamicCache())[:, 15:])


@pytest.mark.parametrize("recipe", [STREAM, CODES, BOTH], ids=["ring", "codes", "mixed"])
def test_what_a_recorded_crop_removes_never_happened(llama, ids, recipe):
    with regard.attach(llama, recipe):
        want = feed(llama, ids[:, 15:], filled(llama, ids[:, :15]))
        cache = filled(llama, ids[:, :15])
        cache.activate_past_recording()
        feed(llama, ids[:, :6], cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 17
        cache.crop(15)  # transformers 5.17: the length to keep
        assert cache.get_seq_length() == 15
        cache.crop(40)
        torch.testing.assert_close(feed(llama, ids[:, 15:], cache), want)


def test_a_crop_that_a_layer_cannot_do_says_how_many_and_changes_no_layer(llama, ids):
    late = [regard.place("streaming", layers=[2], sink=2, window=5), regard.place("saw_int4", layers=[0], key_bits=8)]
    with regard.attach(llama, late):
        cache = filled(llama, ids[:, :15])
        removable = cache.layers[2].store.removable
        with pytest.raises(RegardError, match=f"cannot remove the last 6 of 15 tokens: {removable} can be removed"):
            cache.crop(-6)
        assert [layer.get_seq_length() for layer in cache.layers] == [15, 15, 15]
        want = feed(llama, ids[:, 15:], filled(llama, ids[:, :15]))
        torch.testing.assert_close(feed(llama, ids[:, 15:], cache), want)


def test_a_reset_cache_is_a_new_one(llama, ids):
    with regard.attach(llama, BOTH):
        cache = filled(llama, ids.flip(1))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(feed(llama, ids, cache), feed(llama, ids, DynamicCache()))


@pytest.mark.parametrize("rows", [torch.tensor([1]), torch.tensor([False, True]), torch.tensor([1, 0, 1])])
def test_selected_rows_go_on_as_they_were(llama, ids, rows):
    with regard.attach(llama, BOTH):
        whole = feed(llama, ids, DynamicCache())[:, 15:]
        cache = filled(llama, ids[:, :15])
        cache.batch_select_indices(rows)
        torch.testing.assert_close(feed(llama, ids[rows][:, 15:], cache), whole[rows])


def test_repeated_rows_go_on_as_they_were(llama, ids):
    with regard.attach(llama, BOTH):
        whole = feed(llama, ids, DynamicCache())[:, 15:]
        cache = filled(llama, ids[:, :15])
        cache.batch_repeat_interleave(2)
        more = ids.repeat_interleave(2, 0)[:, 15:]
        torch.testing.assert_close(feed(llama, more, cache), whole.repeat_interleave(2, 0))


def test_turns_on_one_cache_equal_one_conversation(llama, ids):
    how = {"max_new_tokens": 4, "do_sample": False}
    with regard.attach(llama, BOTH):
        cache = DynamicCache(config=llama.config)
        first = llama.generate(ids[:, :9], past_key_values=cache, **how)
        both = torch.cat([first, ids[:, 9:14]], 1)
        assert torch.equal(llama.generate(both, past_key_values=cache, **how), llama.generate(both, **how))
