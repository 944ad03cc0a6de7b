"""Unified Layer Skipping [055]: the oracles of its sheet."""

import math
from itertools import pairwise

import pytest
import torch
import transformers as tf

import regard
from families import VOCABULARY
from regard.ops.depth.unified_skip import kept_layers

PROMPT = 9
TABLE = {
    (30, 2): [*range(0, 27, 2), 29],
    (30, 3): [*range(0, 25, 3), 29],
    (30, 5): [0, 6, 12, 18, 24, 29],
    (30, 10): [0, 15, 29],
    (12, 3): [0, 4, 8, 11],
    (32, 4): [0, 4, 8, 12, 16, 20, 24, 31],
}


def deep(layers=6):
    """A random Llama of some layers in float64."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **shape))
    return model.eval().double()


def defined(model, kept, prompt):
    """`model` itself made to skip: response rows of other layers keep their residual stream. Causal: none is seen."""
    for index, layer in enumerate(model.model.layers):
        if index not in kept:
            whole = layer.forward

            def some(hidden, *args, whole=whole, **kwargs):
                rows = torch.arange(hidden.shape[1])[:, None] < prompt
                return torch.where(rows, whole(hidden, *args, **kwargs), hidden)

            layer.forward = some
    return model


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY - 6, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", TABLE, ids=str)
def test_kept_layers_are_those_of_the_paper(shape):
    assert list(kept_layers(*shape)) == TABLE[shape]


def test_as_many_layers_are_kept_as_the_speed_up_asks_for():
    for layers in range(3, 50):
        assert kept_layers(layers, 1.0) == tuple(range(layers))
        for speed_up in (1.1, 1.2, 1.5, 2, 3, 4, 5):
            count = sum(1 for n in range(1, layers + 1) if round(n * speed_up, 6) <= layers)
            if count < 2:
                continue
            for plan in ("even", "middle"):
                kept = kept_layers(layers, speed_up, plan)
                assert len(kept) == count
                assert kept == tuple(sorted(set(kept)))
                assert (kept[0], kept[-1]) == (0, layers - 1)
            even, middle = (
                [b - a for a, b in pairwise(kept_layers(layers, speed_up, plan))] for plan in ("even", "middle")
            )
            assert len(set(even[:-1])) <= 1
            assert sum(gap > 1 for gap in middle) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed_up": 4}, r"speed_up 4 keeps 1 of 6 layers, .* largest speed_up of this model is 3"),
        ({"speed_up": 0.5}, "speed_up"),
        ({"speed_up": math.nan}, "speed_up"),
        ({"speed_up": math.inf}, "speed_up"),
        ({"plan": "evn"}, "even"),
    ],
)
def test_bad_input_is_named(change, message):
    model = deep()
    with pytest.raises(regard.RegardError, match=message):
        regard.attach(model, [regard.place("unified_skip", **change)])
    with pytest.raises(regard.RegardError, match=message):
        kept_layers(6, **{"speed_up": 2.0, **change})


def test_it_decides_over_the_whole_model():
    with pytest.raises(regard.RegardError, match=r"whole model; drop layers"):
        regard.attach(deep(), [regard.place("unified_skip", layers=[1])])


@pytest.mark.parametrize("plan", ["even", "middle"])
def test_responses_and_gradients_are_those_of_the_definition(ids, plan):
    ours, plain = deep(), defined(deep(), kept_layers(6, 2, plan), PROMPT)
    with regard.attach(ours, [regard.place("unified_skip", plan=plan)]) as handle, handle.prompting(PROMPT):
        out = ours(ids, labels=ids)
        out.loss.backward()
    want = plain(ids, labels=ids)
    want.loss.backward()
    torch.testing.assert_close(out.logits, want.logits)
    torch.testing.assert_close(out.logits[:, :PROMPT], deep()(ids).logits[:, :PROMPT])
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
        # Skipped layers learn through the prompt that kept ones read.
        assert float(one.grad.abs().sum()) > 0


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[PROMPT], [4, PROMPT, *range(PROMPT + 1, 20)], [4, 13]], ids=str)
def test_cached_decoding_is_the_definition_and_runs_kept_layers_only(ids, cuts):
    ours, plain = deep(), defined(deep(), kept_layers(6, 2), PROMPT)
    called = []
    for index, layer in enumerate(ours.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, out, i=index: called.append((i, out.shape[1])))
    outs, cache, start = [], None, 0
    with regard.attach(ours, [regard.place("unified_skip")]) as handle, handle.prompting(PROMPT):
        for stop in [*cuts, 20]:
            out = ours(ids[:, start:stop], past_key_values=cache, use_cache=True)
            outs, cache, start = [*outs, out.logits], out.past_key_values, stop
    torch.testing.assert_close(torch.cat(outs, 1), plain(ids).logits)
    for index in range(6):
        rows = 20 if index in kept_layers(6, 2) else PROMPT
        assert sum(n for layer, n in called if layer == index) == rows
        assert cache.get_seq_length(index) == 20
    assert [cache.layers[i].store.buffer.size for i in (1, 2, 4)] == [PROMPT] * 3


@torch.no_grad()
def test_without_a_known_prompt_end_all_rows_are_prompt(ids):
    model = deep()
    want = model(ids).logits
    with regard.attach(model, [regard.place("unified_skip")]):
        assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_a_crop_into_the_prompt_can_be_followed_by_another_prompt(ids):
    model = deep()
    with regard.attach(model, [regard.place("unified_skip")]) as handle:
        with handle.prompting(4):
            cache = model(ids[:, :9], use_cache=True).past_key_values
        cache.crop(-5)
        with handle.prompting(12):
            again = model(ids[:, 4:], past_key_values=cache).logits
            torch.testing.assert_close(again, model(ids).logits[:, 4:])
