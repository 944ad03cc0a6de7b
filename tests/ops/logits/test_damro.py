"""The contrast with outlier patches: their choice by the slowest loop, uncached runs, guidance, planted outliers."""

import math

import pytest
import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import regard
import vlms
from regard import RegardError
from regard.adapters.memory import live_bytes
from regard.core.placement import Where
from regard.ops.logits import damro

WHERE = Where(layer=0, layers=1, heads=4, kv_heads=2, head_dim=8)
DRAWN = torch.Generator().manual_seed(0)
# Patches of one image of the tiny model.
PATCHES = 16


@pytest.fixture(scope="module")
def llava():
    """Its last but one hidden state is what the first of two encoder layers made."""
    vision = {**vlms._VISION, "num_hidden_layers": 2}
    torch.manual_seed(0)
    made, given = vlms.llava()
    config = type(made.config)(
        vision_config=type(made.config.vision_config)(**vision),
        text_config=made.config.text_config,
        image_token_index=95,
    )
    torch.manual_seed(0)
    model = type(made)(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model, given | {"pixel_values": given["pixel_values"].double()}


def scores(model, given, heads):
    """The class token's attention in the encoder layer that is projected, by transformers' own weights."""
    tower = model.model.vision_tower
    layers = [part for part in tower.modules() if hasattr(part, "q_proj")]
    seen = {}
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        tower(given["pixel_values"])
        hook.remove()
        q, k = layers[0].q_proj(seen["x"]), layers[0].k_proj(seen["x"])
    parts = 1 if heads == "merged" else layers[0].num_heads
    width = q.shape[-1] // parts
    found = torch.zeros(len(q), PATCHES, dtype=q.dtype)
    for image in range(len(q)):
        for part in range(parts):
            at = slice(part * width, (part + 1) * width)
            weights = torch.stack([q[image, 0, at] @ k[image, j, at] for j in range(PATCHES + 1)]) / math.sqrt(width)
            found[image] += weights.softmax(0)[1:] / parts
    return found


def reduced(model, given, index):
    """`given` as embeddings, each image's features only those of `index [images, K]`, padded on the left anew."""
    with torch.no_grad():
        features = iter(
            model.model.get_image_features(pixel_values=given["pixel_values"], return_dict=True).pooler_output
        )
        rows, chosen = [], iter(index)
        for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
            parts, at = [], int((1 - mask).sum())
            while at < len(ids):
                if ids[at] == vlms.IMAGE:
                    parts.append(next(features)[next(chosen)])
                    at += PATCHES
                else:
                    parts.append(model.get_input_embeddings()(ids[at : at + 1]))
                    at += 1
            rows.append(torch.cat(parts))
    longest = max(map(len, rows))
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    embeds = torch.stack([torch.cat((row.new_zeros(longest - len(row), row.shape[1]), row)) for row in rows])
    return embeds, mask


@torch.no_grad()
def forced(model, given, tokens):
    """Logits of the last prompt row and of `tokens [B, n]` fed behind it, through a cache, one by one."""
    mask, cache, rows = given["attention_mask"], None, []
    for step in range(tokens.shape[1] + 1):
        new = given["input_ids"] if step == 0 else tokens[:, step - 1 : step]
        place = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        pixels = given["pixel_values"] if step == 0 else None
        out = model(
            input_ids=new, attention_mask=mask, pixel_values=pixels, position_ids=place, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache, mask = out.past_key_values, torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, 1), cache


@torch.no_grad()
def uncached(model, embeds, mask, tokens):
    """Logits of the last row of `embeds` and of `tokens` behind it, in one run without a cache."""
    embeds = torch.cat((embeds, model.get_input_embeddings()(tokens)), 1)
    mask = torch.cat((mask, torch.ones_like(tokens)), 1)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=place, use_cache=False)
    return out.logits[:, -tokens.shape[1] - 1 :]


TOKENS = torch.tensor([[9, 30, 41], [8, 77, 5]])


@pytest.mark.parametrize("heads", ["merged", "mean"])
@pytest.mark.parametrize("order", ["attention", "image"])
def test_the_branch_is_the_model_on_gathered_features(llava, heads, order):
    model, given = llava
    wanted = scores(model, given, heads)
    index = wanted.argsort(descending=True)[:, :3]
    index = index if order == "attention" else index.sort().values
    own, _ = forced(model, given, TOKENS)
    z = uncached(model, *reduced(model, given, index), TOKENS)
    recipe = [regard.place("damro", alpha=0.8, beta=0.0, outliers=3, attention=heads, order=order)]
    with regard.attach(model, recipe) as handle, handle.prompting(given["input_ids"].shape[1]):
        found, cache = forced(model, given, TOKENS)
    torch.testing.assert_close(found, 1.8 * own - 0.8 * z)
    # Its cache holds three tokens of an image in place of sixteen: the longer row had two images.
    held = cache.fork.branches[0].cache
    assert held.get_seq_length() == cache.get_seq_length() - 2 * (PATCHES - 3)
    assert live_bytes(held) < live_bytes(cache) / 2
    prompt = given["input_ids"].shape[1]
    with regard.attach(model, recipe) as handle, handle.prompting(prompt), handle.lending(wanted):
        assert torch.equal(forced(model, given, TOKENS)[0], found)


def test_all_patches_in_their_order_are_the_image(llava):
    model, given = llava
    own, _ = forced(model, given, TOKENS)
    recipe = [regard.place("damro", alpha=2.0, beta=0.0, outliers=PATCHES, order="image")]
    with regard.attach(model, recipe) as handle, handle.prompting(given["input_ids"].shape[1]):
        torch.testing.assert_close(forced(model, given, TOKENS)[0], own)


def test_log_probabilities_are_those_of_transformers_guidance():
    z, other = torch.randn(2, 9, generator=DRAWN), torch.randn(2, 9, generator=DRAWN)

    class Fixed:
        def __call__(self, ids, **_):
            return type("Out", (dict,), {"logits": other[:, None]})()

    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, Fixed(), torch.ones(2, 1).long())
    wanted = guidance(torch.ones(2, 1).long(), z).log_softmax(-1)
    made = {"outliers": 2, "attention": "merged", "order": "attention"}
    found = damro.contrast(WHERE, alpha=0.7, beta=0.0, **made).combine([z, other])
    torch.testing.assert_close(found.log_softmax(-1), wanted)
    only = damro.contrast(WHERE, alpha=0.0, beta=0.4, **made)
    assert torch.equal(only.combine([z]).argmax(-1), z.argmax(-1))
    assert damro.contrast(WHERE, alpha=0.0, beta=0.0, **made) is None


def test_planted_outliers_that_vote_for_a_wrong_label_lose():
    """Patches vote for label 0, two outliers loudly for label 1; the class token attends to these two."""
    votes = torch.full((PATCHES, 2), 0.0)
    votes[:, 0] = 0.2
    votes[[3, 11]] = torch.tensor([0.0, 2.0])
    key = torch.zeros(1, PATCHES + 1, 4)
    key[0, [4, 12], 0] = 9.0
    query = torch.zeros(1, PATCHES + 1, 4)
    query[0, 0, 0] = 3.0
    index = damro.outlying(damro.class_attention(query, key, 2, "merged")[0], 2)
    assert sorted(index.tolist()) == [3, 11]
    z, outliers = votes.sum(0, keepdim=True), votes[index].sum(0, keepdim=True)
    wrong = []
    for alpha in (0.0, 0.25, 0.5, 1.0):
        made = damro.contrast(WHERE, alpha=alpha, beta=1e-9, outliers=2, attention="merged", order="attention")
        mixed = made.combine([z, outliers][: 1 + (alpha > 0)])
        wrong.append(float(mixed.softmax(-1)[0, 1]))
        assert (int(mixed.argmax()) == 0) == (alpha >= 0.5)
    assert wrong == sorted(wrong, reverse=True)


def test_what_has_no_scores_says_so(llava):
    model, given = llava
    recipe = [regard.place("damro", outliers=3)]
    for family in ("internvl", "llava_next"):
        other, inputs = vlms.tiny(family)
        with regard.attach(other, recipe), pytest.raises(RegardError, match=r"lend scores of the"):
            other.generate(**inputs, max_new_tokens=1)
    many = [regard.place("damro", outliers=17)]
    with regard.attach(model, many), pytest.raises(RegardError, match="outliers=17 in an image of 16 tokens"):
        model.generate(**given, max_new_tokens=1)
    bad = {
        "scores of the images' tokens": "loud",
        "scores of 2 images, and the request has 3": torch.rand(2, 16),
        "scores of 9 patches for an image of 16": torch.rand(3, 9),
        "not finite": torch.full((3, 16), torch.nan),
    }
    with regard.attach(model, recipe) as handle:
        for message, lent in bad.items():
            with handle.lending(lent), pytest.raises(RegardError, match=message):
                model.generate(**given, max_new_tokens=1)
    with pytest.raises(RegardError, match="'outliers' of 'damro' must lie in"):
        regard.place("damro", outliers=0)
