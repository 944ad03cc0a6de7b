"""Attaching and detaching, in every order and around every accident: one model changes, nothing else does."""

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import regard
from contracts.decoding import at_once, generated, prompts
from contracts.snapshot import snapshot
from families import _SMALL, tiny
from regard import RegardError
from regard.adapters import requests

STREAM = [regard.place("streaming", sink=2, window=5)]
CODES = [regard.place("saw_int4", key_bits=8, value_bits=4)]


@pytest.fixture
def llama():
    return tiny("llama")


def logits(model):
    return at_once(model, *prompts())


def test_two_models_attached_at_once_do_not_meet(llama):
    other = tiny("qwen2", seed=1)
    alone = []
    for model, recipe in ((llama, STREAM), (other, CODES)):
        with regard.attach(model, recipe):
            alone.append(generated(model, "greedy"))
    with regard.attach(llama, STREAM), regard.attach(other, CODES):
        assert torch.equal(generated(llama, "greedy"), alone[0])
        assert torch.equal(generated(other, "greedy"), alone[1])


def test_models_that_share_a_config_are_attached_one_by_one(llama):
    torch.manual_seed(3)
    twin = tf.AutoModelForCausalLM.from_config(llama.config).eval()
    twin.config = twin.model.config = llama.config
    own, own_tokens = logits(twin), generated(twin, "greedy")
    with regard.attach(llama, STREAM) as first:
        assert torch.equal(logits(twin), own)
        assert torch.equal(generated(twin, "greedy"), own_tokens)
        with regard.attach(twin, STREAM):
            first.detach()
            assert not torch.equal(logits(twin), own)
    assert torch.equal(logits(twin), own)


def test_attaching_twice_names_the_model_and_keeps_the_first(llama):
    with regard.attach(llama, STREAM):
        streaming = logits(llama)
        with pytest.raises(RegardError, match="LlamaForCausalLM is attached already"):
            regard.attach(llama, CODES)
        assert torch.equal(logits(llama), streaming)


def test_detaching_twice_is_an_error_and_inside_with_is_not(llama):
    with regard.attach(llama, STREAM) as handle:
        handle.detach()
    with pytest.raises(RegardError, match="LlamaForCausalLM is not attached"):
        handle.detach()


def test_an_exception_inside_with_restores(llama):
    before = snapshot(llama)
    with pytest.raises(KeyboardInterrupt), regard.attach(llama, STREAM):
        raise KeyboardInterrupt
    assert snapshot(llama) == before


def test_an_exception_inside_a_forward_leaves_the_model_usable(llama, monkeypatch):
    ids, mask = prompts()
    with regard.attach(llama, STREAM):
        good = logits(llama)
        with monkeypatch.context() as patch:
            patch.setattr(llama.model.layers[1].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llama(input_ids=ids, attention_mask=mask)
        assert torch.equal(logits(llama), good)


@pytest.mark.parametrize("place", [(requests.Requests, "generating"), (requests.Requests, "preparing")])
def test_a_failure_while_installing_restores_everything(llama, monkeypatch, place):
    before = snapshot(llama)
    with monkeypatch.context() as patch:
        patch.setattr(*place, lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            regard.attach(llama, STREAM)
    assert snapshot(llama) == before
    regard.attach(llama, STREAM).detach()


def test_an_attached_model_is_not_copied(llama):
    with regard.attach(llama, STREAM), pytest.raises(RegardError, match="attached model cannot be copied"):
        copy.deepcopy(llama)
    assert torch.equal(logits(copy.deepcopy(llama)), logits(llama))


def test_lora_trains_and_generates_while_attached(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    ids, mask = prompts()
    with regard.attach(model, STREAM):
        generated(model, "greedy")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimiser.step()
        model.zero_grad(set_to_none=True)
        streaming, tokens = logits(model), generated(model, "greedy")
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed
    assert all("lora_B" in name for name in changed)
    assert not torch.equal(logits(model), streaming)
    snap = snapshot(model)
    with regard.attach(model.base_model.model, STREAM):
        assert torch.equal(generated(model, "greedy"), tokens)
        assert torch.equal(logits(model), streaming)
    assert snapshot(model) == snap


def test_prefix_tuning_is_refused_by_name(llama):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    own, before = logits(model), snapshot(model)
    with pytest.raises(RegardError, match="PEFT's PREFIX_TUNING puts tokens of its own"):
        regard.attach(model, STREAM)
    assert snapshot(model) == before
    with regard.attach(model, regard.Recipe([])):
        assert torch.equal(logits(model), own)


@pytest.mark.parametrize("last", ["cpu", "disk"])
def test_a_dispatched_model_generates_the_same(llama, last, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    with regard.attach(llama, STREAM):
        tokens = generated(llama, "greedy")
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1"]
    devices = dict.fromkeys(parts, "cpu") | {"model.layers.2": last}
    model = accelerate.dispatch_model(
        llama, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True, skip_keys="past_key_values"
    )
    before = snapshot(model)
    with regard.attach(model, STREAM):
        assert torch.equal(generated(model, "greedy"), tokens)
    # accelerate itself puts new placeholders where weights lie on disk.
    changed = {name for name, value in snapshot(model).items() if before[name] != value}
    assert all("layers.2" in name and name.endswith("._parameters") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["compiled while attached", "compiled before"])
def test_a_compiled_model_follows_what_is_attached(llama, before):
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend="eager")
    if before:
        logits(compiled)
    for recipe in (regard.Recipe([]), STREAM):
        with regard.attach(llama, recipe):
            want = logits(llama)
            torch.testing.assert_close(logits(compiled), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(compiled), logits(llama), atol=1e-4, rtol=1e-4)


REFUSED = {
    "not a transformer": (lambda: nn.Linear(2, 2), "Linear was not recognised.*uses transformers' ALL_ATTENTION"),
    "no registry": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(**{**_SMALL, "n_layer": 1})),
        "Bloom.*not recognised.*found none",
    ),
    "T5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "BART": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1)),
        "BartForConditionalGeneration is an encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_opened_is_refused_by_what_was_looked_for(name):
    build, message = REFUSED[name]
    model = build()
    before = snapshot(model)
    for recipe in (regard.Recipe([]), STREAM):
        with pytest.raises(RegardError, match=message):
            regard.attach(model, recipe)
    assert snapshot(model) == before


def test_layers_without_kv_heads_in_common_are_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.num_key_value_groups = 4
    with pytest.raises(RegardError, match=r"differ in their number of key heads: groups \[2, 4\]"):
        regard.attach(model, STREAM)


def test_layer_types_that_are_not_open_are_named():
    config = tf.LlamaConfig(**_SMALL, layer_types=["full_attention"] * 2 + ["chunked_attention"])
    config.attention_chunk_size = 4
    with pytest.raises(RegardError, match="layers of type chunked_attention are not opened yet"):
        regard.attach(tf.LlamaForCausalLM(config), STREAM)
