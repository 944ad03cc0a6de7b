"""Token maps of eight vision-language families against their models, their processors, and attached generation."""

import importlib.util
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as tf
from transformers.image_processing_utils import select_best_resolution

import processors
import regard
import vlms
from families import tiny as tiny_text
from regard import RegardError
from regard.adapters import requests, tokens
from regard.adapters.families import open_decoder
from regard.core.token_map import Kind, TokenMap

# One that runs everywhere and changes nothing, and two that do.
EXACT = [regard.place("streaming", sink=4, window=400)]
STREAM = [regard.place("streaming", sink=2, window=7)]
CODES = [regard.place("saw_int4", key_bits=8, value_bits=8), regard.place("act", theta=0.02)]
pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="image processors need Pillow")


def embedded(model, batch):
    """What the decoder is given, `[B, n, d]`: the image tokens' features among words."""
    with patch.object(model.get_decoder(), "forward", wraps=model.get_decoder().forward) as forward, torch.no_grad():
        model(**batch)
    return forward.call_args.kwargs["inputs_embeds"]


def pieces(name, batch):
    """Every piece of the pixels that is encoded by itself: its index into them, its row and image, and its tile."""
    owner = [(0, 0), (1, 0), (1, 1)]
    pixels = batch["pixel_values"]
    if name.startswith("qwen"):
        ends = batch["image_grid_thw"].prod(1).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return [((slice(a, b),), *own, 0) for a, b, own in zip(starts, ends, owner, strict=True)]
    if name == "internvl":
        images = [image for image, count in zip(owner, (3, 1, 5), strict=True) for image in [image] * count]
        return [((i,), *image, images[:i].count(image)) for i, image in enumerate(images)]
    if name == "llava_next":
        return [((i, tile), *own, tile) for i, own in enumerate(owner) for tile in range(3 if i < 2 else 5)]
    if name in ("idefics3", "smolvlm"):
        one, two = [(0, tile) for tile in range(3)], [(0, 0), *((1, tile) for tile in range(5))]
        rows = [(0, place, own) for place, own in enumerate(one)] + [(1, place, own) for place, own in enumerate(two)]
        return [((row, place), row, *own) for row, place, own in rows]
    return [((i,), *own, 0) for i, own in enumerate(owner[: len(pixels)])]


@pytest.mark.parametrize("name", vlms.FAMILIES)
def test_the_tokens_of_an_image_are_those_that_change_with_its_pixels(name):
    model, batch = vlms.tiny(name)
    found = tokens.read(model, batch)
    assert torch.equal(found.of(Kind.VISUAL), batch["input_ids"] == vlms.IMAGE)
    before, covered = embedded(model, batch), Counter()
    for index, row, image, tile in pieces(name, batch):
        pixels = batch["pixel_values"].clone()
        pixels[index] = pixels[index].flip(-1) + 0.5
        changed = (embedded(model, batch | {"pixel_values": pixels}) != before).any(-1)
        spans = [span for span in found.spans if (span.row, span.image) == (row, image)]
        expected = torch.zeros_like(changed)
        if name == "llava_next" and tile:
            (fine,) = [span for span in spans if span.separators]
            expected[row, fine.start : fine.stop] = in_tile(fine, batch["image_sizes"][index[0]], tile)
        else:
            span = spans[tile if len(spans) > tile and name != "llava_next" else 0]
            expected[row, span.start : span.stop] = True
        assert torch.equal(changed, expected), (index, changed.nonzero(), expected.nonzero())
        covered[row, image] += int(changed.sum())
    for (row, image), count in covered.items():
        spans = [span for span in found.spans if (span.row, span.image) == (row, image)]
        assert count == sum(span.stop - span.start - span.separators * (span.grid or (1, 1, 1))[1] for span in spans)


def in_tile(span, size, tile):
    """Which tokens of LLaVA-NeXT's fine grid come from `tile`; the newline column from none."""
    best = select_best_resolution(size.tolist(), vlms.PINPOINTS)
    rows, columns = best[0] // 4, best[1] // 4
    _, high, wide = span.grid
    top, left = (rows - high) // 2, (columns - (wide - 1)) // 2
    r, c = torch.meshgrid(torch.arange(high) + top, torch.arange(wide) + left, indexing="ij")
    inside = (r // 4 * (columns // 4) + c // 4 + 1 == tile) & (torch.arange(wide) < wide - 1)
    return inside.flatten()


@pillow
@pytest.mark.parametrize("name", vlms.FAMILIES)
def test_images_have_as_many_tokens_as_their_processor_put_there(name):
    processor, said = processors.PROCESSORS[name](), []
    expand = processor.replace_image_token

    def replace(*args, **kwargs):
        said.append(expand(*args, **kwargs))
        return said[-1]

    with patch.object(processor, "replace_image_token", replace):
        batch = processors.processed(name, processor)
    found = tokens.read(vlms.tiny(name)[0], batch, processor=processor)
    assert torch.equal(found.of(Kind.VISUAL), batch["input_ids"] == vlms.IMAGE)
    token = processor.tokenizer.convert_ids_to_tokens(vlms.IMAGE)
    counts = Counter()
    for span in found.spans:
        counts[span.row, span.image] += span.stop - span.start
    assert list(counts.values()) == [text.count(token) for text in said]
    assert list(counts) == [(0, 0), (1, 0), (1, 1)]
    # Letters are the user's, the first token is not, and markers and newlines that belong to an image are neither.
    letters = (batch["input_ids"] >= 4) & (batch["input_ids"] < 30)
    assert torch.equal(found.of(Kind.QUERY) & (batch["input_ids"] != vlms.NEWLINE), letters)


@pillow
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_tiles_lie_where_the_processor_cut_them(name):
    processor = processors.PROCESSORS[name]()
    batch = processors.processed(name, processor)
    found = tokens.read(vlms.tiny(name)[0], batch)
    for (row, image), size in zip([(0, 0), (1, 0), (1, 1)], processors.SIZES, strict=True):
        _, down, across = processor.image_processor.get_number_of_image_patches(*size, {})
        spans = [span for span in found.spans if (span.row, span.image) == (row, image)]
        boxes = [(r / down, c / across, (r + 1) / down, (c + 1) / across) for r in range(down) for c in range(across)]
        assert [span.box for span in spans] == [*boxes, (0, 0, 1, 1)]
        for tile, span in enumerate(spans[:-1]):
            marker = processor.tokenizer.convert_ids_to_tokens(int(batch["input_ids"][row, span.start - 1]))
            assert marker == f"<row_{tile // across + 1}_col_{tile % across + 1}>"


@pillow
def test_each_crop_of_gemma_is_an_image():
    processor = processors.PROCESSORS["gemma3"]()
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_min_ratio_to_activate": 1.2}
    batch = processors.processed("gemma3", processor, **crops)
    found = tokens.read(vlms.tiny("gemma3")[0], batch)
    assert len(found.spans) == len(batch["pixel_values"]) > 3
    assert all(span.grid == (1, 2, 2) for span in found.spans)


def test_qwen2_vl_lays_its_images_out_as_its_successor():
    model, batch = vlms.tiny("qwen2_5_vl")
    older = tf.Qwen2VLConfig(image_token_id=vlms.IMAGE, video_token_id=vlms.VIDEO)
    assert tokens.read(older, batch).spans == tokens.read(model, batch).spans


@pillow
@pytest.mark.parametrize(("name", "pieces"), [("qwen2_5_vl", 1), ("qwen3_vl", 3)])
def test_clips(name, pieces):
    processor = processors.PROCESSORS[name]()
    grid = torch.tensor([[3, 4, 6]])
    metadata = SimpleNamespace(fps=2, frames_indices=[0, 1, 2, 3, 4, 5])
    clip = processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    clip = clip if pieces > 1 else f"<|vision_start|>{clip}<|vision_end|>"
    batch = processor.tokenizer([f"<s>{image}a", f"<s>ab{clip}c{image}d"], padding=True, return_tensors="pt")
    batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "video_grid_thw": grid}
    batch |= {"pixel_values": vlms.pixels(32, 96), "pixel_values_videos": vlms.pixels(72, 96)}
    found = tokens.read(vlms.tiny(name)[0], batch)
    assert torch.equal(found.of(Kind.VISUAL), torch.isin(batch["input_ids"], torch.tensor([vlms.IMAGE, vlms.VIDEO])))
    shown = [(span.row, span.image, span.kind, span.grid) for span in found.spans]
    frames = [(1, 0, "video", (3 // pieces, 2, 3))] * pieces
    assert shown == [(0, 0, "image", (1, 2, 2)), *frames, (1, 1, "image", (1, 2, 2))]


TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<2' + '>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}{{ '<3' + '>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def test_what_a_chat_template_adds_is_template():
    words = processors.tokenizer({"<image>": vlms.IMAGE, "<3>": 3})
    processor = SimpleNamespace(
        tokenizer=words, chat_template=TEMPLATE,
        apply_chat_template=lambda *args, **kwargs: words.apply_chat_template(*args, chat_template=TEMPLATE, **kwargs),
    )  # fmt: skip
    turns = [("user", "<image>abc"), ("assistant", "de"), ("user", "fa")]
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = words.apply_chat_template(said, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False)
    batch = words(text.replace("<image>", "<image>" * 16), add_special_tokens=False, return_tensors="pt")
    model, given = vlms.tiny("llava")
    found = tokens.read(model, {**batch, "pixel_values": given["pixel_values"][:1]}, processor=processor)
    query = words.convert_ids_to_tokens(batch["input_ids"][found.of(Kind.QUERY)].tolist())
    assert "".join(query) == "abcdefa"
    assert found.kinds[0, 0] == Kind.FIRST
    assert int(found.of(Kind.VISUAL).sum()) == 16
    asked = batch["input_ids"] == vlms.WORDS[1]
    marked = tokens.read(model, {**batch, "pixel_values": given["pixel_values"][:1]}, query=asked)
    assert torch.equal(marked.of(Kind.QUERY), asked)


def test_a_text_model_has_no_images():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 1, 20, 21], [1, 20, 21, 22, 23]])
    found = tokens.read(tiny_text("llama"), {"input_ids": ids, "attention_mask": mask})
    assert found.kinds.tolist() == [[-1, -1, 0, 2, 2], [0, 2, 2, 2, 2]]
    assert not found.spans


def listed(steps):
    """Kinds of all arrivals that forwards brought, by row."""
    return torch.cat([step.tokens.at(step.arrivals).expand(step.batch, -1) for step in steps], 1)


@pytest.mark.parametrize("name", vlms.CAUSAL)
def test_generation_with_images_knows_its_tokens(name, monkeypatch):
    model, batch = vlms.tiny(name)
    found, seen, real = tokens.read(model, batch), [], requests.Step
    monkeypatch.setattr(requests, "Step", lambda *args: seen.append(real(*args)) or seen[-1])
    for options in ({}, {"num_beams": 2}, {"prefill_chunk_size": 5}):
        call = {**batch, **options, "max_new_tokens": 3, "do_sample": False, "use_cache": True}
        try:
            expected = model.generate(**call)
        except (RuntimeError, TypeError, ValueError):
            # Most of these models give every chunk all of the pixels, and then count them.
            assert "prefill_chunk_size" in options
            continue
        seen.clear()
        with regard.attach(model, EXACT) as handle, handle.reading(found):
            assert torch.equal(model.generate(**call), expected)
        kinds, times = listed(seen), options.get("num_beams", 1)
        n = found.length
        assert torch.equal(kinds[:, :n], found.kinds.repeat_interleave(times, 0))
        assert kinds.shape[1] > n
        assert bool((kinds[:, n:] == Kind.GENERATED).all())


@pytest.mark.parametrize("placements", [STREAM, CODES], ids=["streaming", "codes and act"])
@pytest.mark.parametrize("name", vlms.CAUSAL)
def test_a_cache_serves_images_as_one_forward_does(name, placements):
    model, batch = vlms.tiny(name)
    found = tokens.read(model, batch)
    with regard.attach(model, placements) as handle, handle.reading(found), torch.no_grad():
        told = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = told.sequences[:, batch["input_ids"].shape[1] :]
        ids = torch.cat((batch["input_ids"], new[:, :-1]), 1)
        whole = batch | {"input_ids": ids, "attention_mask": extended(batch["attention_mask"], ids, 1)}
        if "mm_token_type_ids" in batch:
            whole["mm_token_type_ids"] = extended(batch["mm_token_type_ids"], ids, 0)
        else:
            whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with handle.prompting(found.length):
            logits = model(**whole).logits[:, found.length - 1 :]
    # `generate` hands out float32.
    assert torch.allclose(torch.stack(told.logits, 1), logits.float(), atol=1e-5)


def extended(mask, ids, value):
    return torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=value)


def test_padding_longer_than_a_chunk_agrees_with_the_map():
    model: Any = tiny_text("llama").double()
    mask = torch.tensor([[0] * 9 + [1] * 5, [1] * 14])
    ids = torch.randint(4, 80, (2, 14), generator=torch.Generator().manual_seed(3)) * mask
    with regard.attach(model, EXACT) as handle, handle.reading(TokenMap.of_text(mask)):
        call = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
        found = model.generate(ids, prefill_chunk_size=4, **call)
        assert torch.equal(found, model.generate(ids, **call))
    said = r"has \[0, 0\] padding tokens on the left, the request \[9, 0\]"
    other = TokenMap.of_text(mask.flip(1))
    with regard.attach(model, EXACT) as handle, handle.reading(other), pytest.raises(RegardError, match=said):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("paligemma", "PaliGemmaForConditionalGeneration lets tokens of its prompt see later ones"),
        ("gemma3", "got dict .a model that makes masks around its decoder, as Gemma 3"),
    ],
)
def test_families_that_look_both_ways_are_refused_by_name(name, said):
    model, batch = vlms.tiny(name)
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(RegardError, match=said), regard.attach(model, EXACT):
            model(**batch)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", vlms.CAUSAL)
def test_the_parts_of_a_layer_are_known(name):
    decoder = open_decoder(vlms.tiny(name)[0])
    assert {type(decoder.part(0, "feed_forward")).__name__[-3:]} == {"MLP"}


def cut(batch, **more):
    """The batch less its last tokens, as truncation leaves it."""
    return batch | {name: batch[name][:, :-12] for name in ("input_ids", "attention_mask")} | more


BAD = {
    "truncated": ("llava", lambda b: cut(b), r"input_ids have \d+ image tokens, the images make 48"),
    "an image too many": (
        "llava", lambda b: b | {"pixel_values": torch.cat((b["pixel_values"],) * 2)}, r"48 image tokens.*make 96",
    ),
    "grids of another prompt": (
        "qwen2_5_vl", lambda b: b | {"image_grid_thw": b["image_grid_thw"].flip(0)}, "in the order of the prompts",
    ),
    "a grid too few": (
        "qwen3_vl", lambda b: b | {"image_grid_thw": b["image_grid_thw"][:2]}, "without a line of image_grid_thw",
    ),
    "a grid too many": (
        "qwen3_vl",
        lambda b: b | {"image_grid_thw": torch.cat((b["image_grid_thw"],) * 2)},
        "image_grid_thw has 3 more lines",
    ),
    "a tile too few": ("internvl", lambda b: b | {"pixel_values": b["pixel_values"][:-1]}, "8 tiles of 4"),
    "tiles of nothing": (
        "idefics3", lambda b: b | {"pixel_values": b["pixel_values"] * 0}, "36 image tokens, the images make 0",
    ),
    "sizes of other images": (
        "llava_next", lambda b: b | {"image_sizes": b["image_sizes"] // 2}, "image tokens, the images make",
    ),
    "no pixels": (
        "paligemma", lambda b: {key: b[key] for key in ("input_ids", "attention_mask")}, "there are no pixel_values",
    ),
    "no sizes": (
        "llava_next", lambda b: {key: b[key] for key in b if key != "image_sizes"}, "image_sizes must be.*got nothing",
    ),
    "lists": ("internvl", lambda b: b | {"pixel_values": list(b["pixel_values"])}, "pixel_values must be.*got list"),
    "no ids": ("llava", lambda b: {"pixel_values": b["pixel_values"]}, "input_ids must be a tensor"),
    "a hole": (
        "llava", lambda b: b | {"attention_mask": b["attention_mask"].index_fill(1, torch.tensor([30]), 0)},
        "hides tokens between visible ones",
    ),
    "a mask of another prompt": (
        "llava", lambda b: b | {"attention_mask": b["attention_mask"][:, 1:]}, r"attention_mask is \[2, 43\]",
    ),
    "breaks between rows": ("llava", lambda b: b | {"image_sizes": torch.ones(3, 2)}, "image_sizes.*TokenMap.of_text"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_agree_is_named(what):
    name, spoil, said = BAD[what]
    model, batch = vlms.tiny(name)
    with pytest.raises(RegardError, match=said):
        tokens.read(model, spoil(batch))


def test_other_models_are_named():
    _, batch = vlms.tiny("llava")
    with pytest.raises(RegardError, match="llama is a text model and has no place for pixel_values"):
        tokens.read(tiny_text("llama"), batch)
    with pytest.raises(RegardError, match=r"how llava_onevision lays out.*llava, .*TokenMap.of_text"):
        tokens.read(tf.LlavaOnevisionConfig(), batch)
    with pytest.raises(RegardError, match=r"query is torch.int64 \[2, 44\], expected bool \[2, 44\]"):
        tokens.read(vlms.tiny("llava")[0], batch, query=batch["input_ids"])


def test_a_map_is_moved_and_repeated_once_a_request(monkeypatch):
    """However many tokens are decoded, with beams and without."""
    model: Any = tiny_text("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    ids, seen, repeat = mask * 7, [], Counter()
    said, whole = requests.Requests._said, TokenMap.repeat
    monkeypatch.setattr(requests.Requests, "_said", lambda *told: seen.append(said(*told)) or seen[-1])
    monkeypatch.setattr(TokenMap, "repeat", lambda self, times: repeat.update([times]) or whole(self, times))
    told = TokenMap.of_text(mask)
    with regard.attach(model, EXACT) as handle, handle.reading(told):
        for beams in (1, 3, 1):
            seen.clear()
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=beams)
            assert len(seen) == 4
            assert len(set(map(id, seen))) == 1
            assert (seen[0] is told) == (beams == 1)
    assert repeat == {3: 1}
