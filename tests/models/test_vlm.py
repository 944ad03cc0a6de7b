"""The tiny vision-language model: its layout, its processor, and the trained weights."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
import torch

pytest.importorskip("PIL", reason="transformers reads images with pillow")

from regard.core.errors import RegardError
from regard.measure import hallucination, scenes
from regard.measure import scene_questions as ask
from regard.models import pretrained, vlm

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tiny-vlm-nvidia-h200.json"
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


@pytest.fixture(scope="module")
def shapes():
    return vlm.load()


def test_the_trained_model_is_small_and_loads_as_asked(shapes):
    model, processor = shapes
    assert (vlm.FOLDER / "model.safetensors").stat().st_size < 8e6
    assert (model.dtype, model.training) == (torch.float32, False)
    assert vlm.load(dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert set(ask.words()) | set(vlm.MARKS) == set(processor.tokenizer.get_vocab())
    assert processor.tokenizer.padding_side == "left"


def test_it_has_a_name(shapes):
    model, tokenizer = pretrained.load("shapes")
    assert torch.equal(model.lm_head.weight, shapes[0].lm_head.weight)
    assert tokenizer(ASKED)["input_ids"] == shapes[1].tokenizer(ASKED)["input_ids"]


def test_padded_rows_are_single_rows(shapes):
    """Chats of different lengths, one with two images and one with none, padded on the left."""
    model, processor = shapes
    pictures = list(scenes.render(scenes.draw(3, 0)))
    texts = [
        chat(processor, 1, "describe the image ."),
        chat(processor, 2, "is there a red circle in the second image ?"),
        chat(processor, 0, "what comes after three ?"),
    ]
    shown = [pictures[:1], pictures[1:], None]
    options = {"max_new_tokens": 28, "do_sample": False}
    together = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    assert together["attention_mask"].sum(1).unique().numel() == 3
    said = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
    for row, (text, images) in enumerate(zip(texts, shown, strict=True)):
        alone = processor(images=images, text=[text], return_tensors="pt")
        out = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert said[row, : len(out)].tolist() == out.tolist()
        assert (said[row, len(out) :] == processor.tokenizer.pad_token_id).all()
        with torch.no_grad():
            assert torch.allclose(model(**alone).logits[0, -1], logits[row], atol=1e-3)
    answers = processor.batch_decode(said, skip_special_tokens=True)
    assert ask.named(answers[0])
    assert answers[1] in ("yes", "no")
    assert answers[2] == "four"


def test_attention_maps_show_the_class_token(shapes):
    model, processor = vlm.load()
    model.set_attn_implementation("eager")
    inputs = processor(images=[picture(0)], text=[chat(processor, 1)], return_tensors="pt")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        views = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    assert [m.shape for m in maps] == [(1, 6, length, length)] * 6
    assert [m.shape for m in views] == [(1, 4, 65, 65)] * 4


def test_figures_hold(shapes):
    """A smaller sample than the committed one, of other scenes: within four standard errors."""
    report = hallucination.evaluate(hallucination.answerer(*shapes), existence=80, captions=24, skills=16, seed=99)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]

    def near(value, told, number):
        spread = max(told * (1 - told), 0.02)
        assert abs(value - told) < 4 * (spread / number) ** 0.5, (value, told)

    for sort, one in report.existence.items():
        near(one.accuracy, mean(row["existence"][sort]["accuracy"] for row in rows), one.questions)
    for skill, value in report.skills.items():
        near(value, mean(row["skills"][skill] for row in rows), 16)
    near(report.captions.sentence, mean(row["captions"]["sentence"] for row in rows), 24)
    near(report.captions.recall, mean(row["captions"]["recall"] for row in rows), 24)


def test_the_committed_baseline_leaves_room_both_ways():
    """What the test bed is for: it says yes to what usually comes along and names it; else it sees and answers well."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 5
    for row in rows:
        drawn, usual = (row["existence"][sort] for sort in ("random", "adversarial"))
        assert drawn["accuracy"] > 0.95
        assert usual["accuracy"] < drawn["accuracy"] - 0.05
        assert usual["yes"] > 0.55
        assert 0.25 < row["captions"]["sentence"] < 0.75
        assert row["skills"]["colour"] > 0.9
    assert mean(row["skills"]["neutral"] for row in rows) > 0.95


def test_the_card_says_what_the_results_say():
    card = (vlm.FOLDER / "README.md").read_text(encoding="utf-8")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    told = {name: float(value) for name, value in re.findall(r"^\| ([\w ,]+) \| ([\d.]+) \|", card, re.M)}
    for name, of in {
        "POPE accuracy": lambda row: row["accuracy"],
        "CHAIR_S": lambda row: row["captions"]["sentence"],
        "neutral": lambda row: row["skills"]["neutral"],
    }.items():
        assert told[name] == round(mean(of(row) for row in rows), 3)
