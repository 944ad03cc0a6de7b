"""Models whose prompts or images see later tokens, against their own attention and against masks made by hand."""

import pytest
import torch
import transformers as tf

import regard
import vlms
from contracts.subjects import example
from regard import RegardError
from regard.adapters import tokens
from regard.adapters.families import open_decoder
from regard.adapters.intercept import intercept

NAMES = ("paligemma", "gemma3")
EXACT = [regard.place("streaming", sink=4, window=400)]
SINK, WINDOW = 2, 7


def ahead(name, batch):
    """Which arrivals see which later ones, `[B, n, n]`, from what each family says of itself."""
    kinds, real = batch["token_type_ids"], batch["attention_mask"].bool()
    rows = torch.zeros(*kinds.shape, kinds.shape[1], dtype=torch.bool)
    for b, kind in enumerate(kinds.tolist()):
        for q in range(len(kind)):
            for k in range(q + 1, len(kind)):
                together = kind[q] == kind[k] == 0 if name == "paligemma" else all(kind[q : k + 1])
                rows[b, q, k] = together and bool(real[b, q])
    return rows


def by_hand(name, model, batch, pattern):
    """Masks `[B, 1, n, n]` by type of layer: `pattern(q, k)` of positions behind the query, and what lies ahead."""
    real = batch["attention_mask"].bool()
    place = real.cumsum(1) - 1
    q, k = place[:, :, None], place[:, None]
    seen, masks = ahead(name, batch), {}
    for kind, window in zip(("sliding_attention", "full_attention"), (16, 10**6), strict=True):
        behind = (k <= q) & (q - k < window) & pattern(q, k)
        mask = (behind | seen) & real[:, None] & real[:, :, None]
        # A row of padding sees itself, or it would be NaN.
        masks[kind] = (mask | torch.eye(mask.shape[1], dtype=torch.bool))[:, None]
    return masks if name == "gemma3" else masks["full_attention"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_decides_what_lies_behind_and_the_model_what_lies_ahead(name):
    model, batch = vlms.tiny(name)
    real = batch["attention_mask"].bool()
    if name == "paligemma":
        # The end of the text is a suffix, which sees nothing ahead.
        batch["token_type_ids"][:, -4:] = 1
    pattern = [regard.place("streaming", sink=SINK, window=WINDOW)]
    masks = by_hand(name, model, batch, lambda q, k: (k < SINK) | (q - k < WINDOW))
    plain = {key: batch[key] for key in ("input_ids", "pixel_values")}
    positions = (real.cumsum(1) - 1).clamp(min=0) + (name == "paligemma")
    with torch.no_grad():
        expected = model(**plain, attention_mask=masks, position_ids=positions).logits
        causal = model(**batch | {"token_type_ids": batch["token_type_ids"] * 0 + (name == "paligemma")}).logits
        with regard.attach(model, pattern):
            found = model(**batch, position_ids=positions).logits
    assert torch.allclose(found[real], expected[real], atol=1e-6)
    assert not torch.allclose(causal[real], expected[real], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_right_is_seen_by_nobody(name):
    model, batch = vlms.tiny(name)
    row = {key: x[1:] if key == "pixel_values" else torch.nn.functional.pad(x[1:], (0, 5)) for key, x in batch.items()}
    # Of kind 0, which PaliGemma takes for its prefix, or 1, which Gemma 3 takes for an image.
    row["token_type_ids"][:, -5:] = int(name == "gemma3")
    with torch.no_grad():
        own = model(**{key: x[1:] for key, x in batch.items()}).logits
        with regard.attach(model, EXACT):
            assert torch.allclose(model(**row).logits[:, :-5], own, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_the_models_own(name, implementation):
    model, batch = vlms.tiny(name)
    if implementation == "eager":
        # The row without padding, and its images: rows of padding are NaN in eager float64 attention.
        batch = {key: x[1:] for key, x in batch.items()}
    model.set_attn_implementation(implementation)
    call = {**batch, "max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    own = model.generate(**call)
    with torch.no_grad():
        prompt = model(**batch).logits
    real = batch["attention_mask"].bool()
    recipes = {"none": [], "all": EXACT, "one layer": [regard.place("streaming", sink=4, window=400, layers=[1])]}
    for what, recipe in recipes.items():
        with regard.attach(model, recipe), torch.no_grad():
            found, made = model(**batch).logits, model.generate(**call)
        assert torch.equal(made.sequences, own.sequences), what
        # Their eager attention takes its softmax in float32.
        bound = 0 if what == "none" else 2e-6
        assert (found - prompt)[real].abs().max() <= bound, what
        assert (torch.stack(made.logits) - torch.stack(own.logits)).abs().max() <= bound, what
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, prompt)


def test_a_prefix_within_the_window_is_served_and_a_longer_one_refused():
    batch = vlms.tiny("paligemma")[1]
    longest = int(batch["attention_mask"].sum(1).max())
    for window in (longest, longest - 1):
        model = vlms.paligemma2(window)
        with torch.no_grad():
            own = model(**batch).logits[:, -1]
            with regard.attach(model, EXACT):
                if window == longest:
                    assert torch.allclose(model(**batch).logits[:, -1], own, atol=1e-6)
                    continue
                with pytest.raises(RegardError, match=f"longer than the window of {window} tokens.*gemma2 lets it see"):
                    model(**batch)
            assert torch.equal(model(**batch).logits[:, -1], own)


def chunk(batch):
    """Its first 20 tokens, which end inside an image."""
    return {key: x[:, :20] for key, x in batch.items() if key in ("input_ids", "attention_mask")} | {
        "token_type_ids": batch["token_type_ids"]
    }


def apart(batch):
    kinds = batch["token_type_ids"].clone()
    kinds[1, 3] = 1
    return batch | {"token_type_ids": kinds}


BAD = {
    "an image cut in two": ("gemma3", "streaming", chunk, "see each other, and this forward brings 0 to 19 only"),
    "blocks that overlap": ("paligemma", "streaming", apart, "tokens of row 1 that see each other lie apart: block 0"),
    "nobody said": (
        "paligemma", "streaming", lambda b: {k: x for k, x in b.items() if k != "token_type_ids"},
        "gemma lets prompts see later tokens.*pass token_type_ids",
    ),
    "lists that end at the query": ("gemma3", "dhsa", dict, "'dhsa of 8 keys' reads lists of keys that end"),
    "branches": ("paligemma", "lqcd", dict, "that see later ones, and prompts of branches of 'lqcd.* have none"),
    "a prompt without its image": ("paligemma", "vhr", dict, "nobody says which tokens of that see later ones"),
    "a mask by hand": (
        "gemma3", "streaming", lambda b: b | {"attention_mask": b["attention_mask"][:, None, None]},
        "take a 2-D padding mask, got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_shown_is_refused_by_name(what):
    name, stem, spoil, said = BAD[what]
    model, batch = vlms.tiny(name)
    with torch.no_grad():
        before = model(**batch).logits
        with (
            regard.attach(model, example(stem, open_decoder(model))) as handle,
            handle.prompting(batch["input_ids"].shape[1]),
            handle.reading(tokens.read(model, batch)),
            pytest.raises(RegardError, match=said),
        ):
            model(**spoil(batch))
        assert torch.equal(model(**batch).logits, before)


def test_readings_of_attention_take_causal_models():
    model = vlms.tiny("paligemma")[0]
    with (
        pytest.raises(RegardError, match="what reads attention, or is fitted on it, takes causal models"),
        intercept(model, lambda call: call.own()[0].transpose(1, 2)),
    ):
        pass
    text = tf.GemmaForCausalLM(model.config.text_config)
    with pytest.raises(RegardError, match="GemmaForCausalLM lets all tokens of its prompt see later ones"):
        regard.attach(text, EXACT)
