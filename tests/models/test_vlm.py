"""The tiny vision-language model: its layout, its processor, and the trained weights."""

import pytest
import torch

pytest.importorskip("PIL", reason="transformers reads images with pillow")

from regard.core.errors import RegardError
from regard.models import vlm

WORDS = ("is", "there", "a", "red", "circle", "?", "yes", "no")
ASKED = "is there a red circle ?"


def picture(seed):
    return torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def chat(processor, images, text=ASKED):
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.fixture(scope="module")
def built():
    return vlm.build(WORDS, seed=1)


def test_layout(built):
    model, _ = built
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (6, 3, 32)
    assert vision.hidden_size // vision.num_attention_heads == 32
    assert model.config.vision_feature_layer == -2
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 4e6


def test_a_seed_gives_the_same_weights_and_leaves_torch_alone():
    before = torch.random.get_rng_state()
    first, again, other = (vlm.build(WORDS, seed=seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_texts_become_marks_and_words(built):
    _, processor = built
    system = {"role": "system", "content": "a red"}
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]
    turns += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "no ?"}]
    text = processor.apply_chat_template([system, *turns], add_generation_prompt=True)
    assert text == (f"<s> <system> a red <user> <image> {ASKED} <assistant> yes </s> <user> no ? <assistant>")
    inputs = processor(images=[picture(0)], text=[text], return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens == text.replace("<image>", " ".join(["<image>"] * 64)).split()
    assert torch.allclose(inputs["pixel_values"][0], picture(0).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
    unknown = processor.tokenizer("a blue circle")["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(unknown) == ["a", "<unk>", "circle"]
    assert processor.tokenizer.decode(unknown, skip_special_tokens=True) == "a circle"


@pytest.mark.parametrize("words", [("a", "b c"), ("a", "a"), ("<image>",), ("",)])
def test_bad_words(words):
    with pytest.raises(RegardError, match="cannot be a word"):
        vlm.build(words)


def test_folder_without_weights(tmp_path):
    with pytest.raises(RegardError, match=r"no weights of 'shapes': the folder 'tiny' holds no config\.json"):
        vlm.load(folder=tmp_path / "tiny")


def test_without_pillow(monkeypatch):
    monkeypatch.setattr("regard.core.extras.find_spec", lambda name: None)
    with pytest.raises(RegardError, match=r"regard\[vision\]"):
        vlm.load()
