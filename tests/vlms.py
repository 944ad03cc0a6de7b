"""Tiny random vision-language models of eight families, each with a batch that their processors could have made.

The batch has two rows: one image and much padding on the left, and two images (for LLaVA-NeXT, Idefics3, SmolVLM,
InternVL and both Qwen of different sizes) between more words. The counts of placeholders are written down from what the
models compute; each model checks them against its features when it runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 96
PAD, BOS, IMAGE, VIDEO, START, END, GLOBAL, TILE, NEWLINE = 0, 1, 95, 94, 93, 92, 91, 90, 89
WORDS = range(4, 80)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_QWEN: dict[str, Any] = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]

Made = tuple[Any, dict[str, Tensor]]


def _batch(rows: list[list[int]], **more: Tensor) -> dict[str, Tensor]:
    """`rows` padded on the left, and what else a model is given."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **more}


def _words(count: int, seed: int) -> list[int]:
    return torch.randint(WORDS.start, WORDS.stop, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _prompts(*images: list[int]) -> list[list[int]]:
    """A row with the first image, and one with the other two: `images` are their tokens, markers included."""
    one, two, three = images
    return [
        [BOS, *_words(2, 0), *one, *_words(4, 1)],
        [BOS, *_words(3, 2), *two, *_words(2, 3), *three, *_words(6, 4)],
    ]


def pixels(*shape: int) -> Tensor:
    """Random pixels, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def llava() -> Made:
    vision = tf.CLIPVisionConfig(**_VISION)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**_TEXT), image_token_index=IMAGE)
    ids = _prompts(*[[IMAGE] * 16] * 3)
    return tf.LlavaForConditionalGeneration(config), _batch(ids, pixel_values=pixels(3, 3, 16, 16))


def llava_next() -> Made:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION), text_config=tf.LlamaConfig(**_TEXT), image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    # Heights and widths; of the first image, two of four rows of patches are padding.
    sizes, fine = torch.tensor([[8, 32], [32, 16], [30, 30]]), [2 * (8 + 1), 8 * (4 + 1), 8 * (8 + 1)]
    ids = _prompts(*([IMAGE] * (16 + tokens) for tokens in fine))
    return tf.LlavaNextForConditionalGeneration(config), _batch(
        ids, pixel_values=pixels(3, 5, 3, 16, 16), image_sizes=sizes
    )


def _qwen(model: nn.Module, grids: list[list[int]], patch: int) -> Made:
    ids = _prompts(*([START, *[IMAGE] * (t * h * w // 4), END] for t, h, w in grids))
    grid = torch.tensor(grids)
    batch = _batch(ids, pixel_values=pixels(int(grid.prod(1).sum()), 3 * 2 * patch**2), image_grid_thw=grid)
    return model, batch | {"mm_token_type_ids": (batch["input_ids"] == IMAGE).long()}


def qwen2_5_vl() -> Made:
    config = tf.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_config={**_QWEN_VISION, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN,
    )
    return _qwen(tf.Qwen2_5_VLForConditionalGeneration(config), [[1, 4, 6], [1, 8, 4], [1, 4, 4]], 4)


def qwen3_vl() -> Made:
    config = tf.Qwen3VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_config={
            **_QWEN_VISION, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        **_QWEN,
    )  # fmt: skip
    return _qwen(tf.Qwen3VLForConditionalGeneration(config), [[1, 4, 6], [1, 8, 4], [1, 4, 4]], 4)


def internvl() -> Made:
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**{**_VISION, "image_size": (16, 16), "patch_size": (4, 4)}),
        text_config=tf.Qwen2Config(**_TEXT), image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    ids = _prompts(*([START, *[IMAGE] * (4 * tiles), END] for tiles in (3, 1, 5)))
    return tf.InternVLForConditionalGeneration(config), _batch(ids, pixel_values=pixels(9, 3, 16, 16))


def _tiled(rows: int, columns: int) -> list[int]:
    """Idefics3's tokens of an image of so many tiles of four tokens, and of the whole of it."""
    row = [*[START, TILE, *[IMAGE] * 4] * columns, NEWLINE]
    return [*row * rows, *[NEWLINE] * (rows > 0), START, GLOBAL, *[IMAGE] * 4, START]


def _idefics(model: Any, config: Any, vision: Any) -> Made:
    text = tf.LlamaConfig(**_TEXT)
    config = config(
        vision_config=vision(**_VISION), text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )
    ids = _prompts(_tiled(2, 1), _tiled(0, 0), _tiled(2, 2))
    # The first row has three tiles and three that stand for nothing.
    tiles, mask = pixels(2, 6, 3, 16, 16), torch.ones(2, 6, 16, 16, dtype=torch.bool)
    tiles[0, 3:], mask[0, 3:] = 0, False
    return model(config), _batch(ids, pixel_values=tiles, pixel_attention_mask=mask)


def idefics3() -> Made:
    return _idefics(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config, tf.Idefics3VisionConfig)


def smolvlm() -> Made:
    return _idefics(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig, tf.SmolVLMVisionConfig)


def _paligemma(text: Any) -> Any:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**_VISION, vision_use_head=False), text_config=text, projection_dim=32,
        hidden_size=32, vocab_size=VOCABULARY, image_token_index=IMAGE,
    )  # fmt: skip
    return tf.PaliGemmaForConditionalGeneration(config)


def paligemma2(window: int) -> Any:
    """A random float64 PaliGemma 2, whose sliding layer shows a prompt all of itself too."""
    torch.manual_seed(0)
    text = tf.Gemma2Config(**_TEXT, sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    return _paligemma(text).eval().double()


def paligemma() -> Made:
    # Its images stand before its text.
    text = [[*[IMAGE] * 16, BOS, *_words(6, 0)], [*[IMAGE] * 32, BOS, *_words(9, 1)]]
    batch = _batch(text, pixel_values=pixels(3, 3, 16, 16))
    # All of the prompt is prefix, and sees itself both ways.
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return _paligemma(tf.GemmaConfig(**_TEXT)), batch


def gemma3() -> Made:
    text = tf.Gemma3TextConfig(
        **_TEXT, query_pre_attn_scalar=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**_VISION, vision_use_head=False), text_config=text,
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    ids = _prompts(*[[NEWLINE, START, *[IMAGE] * 4, END, NEWLINE]] * 3)
    model = tf.Gemma3ForConditionalGeneration(config)
    # Zero in a new model, so that images would say nothing.
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    batch = _batch(ids, pixel_values=pixels(3, 3, 16, 16))
    return model, batch | {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


FAMILIES: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (llava, llava_next, qwen2_5_vl, qwen3_vl, internvl, idefics3, smolvlm, paligemma, gemma3)
}


def tiny(name: str, seed: int = 0) -> Made:
    """A random float64 model of family `name` in eval mode, the same for the same seed, and its batch of two rows."""
    torch.manual_seed(seed)
    model, batch = FAMILIES[name]()
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
