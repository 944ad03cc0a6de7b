"""Families regard does not list: recognised by structure, and held to the same contracts."""

import pytest
import torch
import transformers as tf

import regard
from contracts.decoding import at_once, forced, generated, prompts
from contracts.replay import everything_kept, record, replay
from families import _SMALL
from regard.adapters.families import open_decoder

UNLISTED = {
    "cohere": (tf.CohereConfig, {}),
    "cohere2": (tf.Cohere2Config, {"sliding_window": 8}),
    "stablelm": (tf.StableLmConfig, {}),
    "starcoder2": (tf.Starcoder2Config, {"sliding_window": 8}),
    "glm": (tf.GlmConfig, {}),
    "exaone4": (tf.Exaone4Config, {"sliding_window": 8, "sliding_window_pattern": 2}),
    "olmo3": (tf.Olmo3Config, {"sliding_window": 8}),
    "gpt_bigcode": (tf.GPTBigCodeConfig, {"n_positions": 256, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
}
MIXED = [
    regard.place("streaming", layers=[0, 2], sink=2, window=5),
    regard.place("saw_int4", layers=[1, 2], key_bits=8, value_bits=4),
]


def build(name):
    config, more = UNLISTED[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(**_SMALL | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_family_keeps_the_contracts(name):
    model = build(name)
    assert "by structure" in open_decoder(model).family
    ids, mask = prompts(length=30)
    own, tokens = forced(model, ids, mask, [9, 14]), generated(model, "greedy")
    with regard.attach(model, regard.Recipe([])):
        assert torch.equal(forced(model, ids, mask, [9, 14]), own)
        assert torch.equal(generated(model, "greedy"), tokens)
    tape = {}
    with regard.attach(model, MIXED) as handle:
        record(handle, tape)
        cached = forced(model, ids, mask, [6, 7, 16, *range(21, 30)])
    with everything_kept(), regard.attach(model, MIXED) as handle:
        replay(handle, tape)
        full = at_once(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(cached[real], full[real], atol=1e-4, rtol=1e-4)
    assert not torch.equal(cached[real], own[real])
    assert torch.equal(forced(model, ids, mask, [9, 14]), own)
