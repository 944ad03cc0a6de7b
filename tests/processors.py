"""Real processors of the families of `vlms`, built from a tokenizer of a few words; they need Pillow.

Their tokens are those of `vlms`, so that its models take what they make.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import transformers as tf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import vlms

SIZES = [(20, 60), (40, 20), (33, 35)]
_SIDE = {"height": 16, "width": 16}
_IMAGE = {"<image>": vlms.IMAGE}
_QWEN = {
    "<|image_pad|>": vlms.IMAGE, "<|video_pad|>": vlms.VIDEO, "<|vision_start|>": vlms.START,
    "<|vision_end|>": vlms.END,
}  # fmt: skip
_IDEFICS = {
    "<image>": vlms.IMAGE, "<fake_token_around_image>": vlms.START, "<global-img>": vlms.GLOBAL,
    **{f"<row_{row + 1}_col_{column + 1}>": 60 + 4 * row + column for row in range(4) for column in range(4)},
}  # fmt: skip


def tokenizer(special: dict[str, int], **named: str) -> Any:
    """One word a letter and a newline, and the tokens `special`; `named` are those that a family calls by name."""
    words = {"<pad>": vlms.PAD, "<s>": vlms.BOS, "<unk>": 2, "\n": vlms.NEWLINE, **special}
    words |= {chr(ord("a") + i): vlms.WORDS.start + i for i in range(26)}
    words |= {f"<{i}>": i for i in range(vlms.VOCABULARY) if i not in words.values()}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z\n]"), "isolated")
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=named,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


@contextmanager
def _without_torchvision() -> Iterator[Any]:
    """Video processors need torchvision, so processors get a stand-in, which their own check would refuse."""
    with patch.object(tf.ProcessorMixin, "check_argument_for_proper_class"):
        yield SimpleNamespace(merge_size=2, temporal_patch_size=2)


def _llava() -> Any:
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_SIDE)
    return tf.LlavaProcessor(
        images, tokenizer(_IMAGE), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_next() -> Any:
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=_SIDE, image_grid_pinpoints=vlms.PINPOINTS
    )
    return tf.LlavaNextProcessor(
        images, tokenizer(_IMAGE), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _qwen(kind: Any) -> Any:
    images = tf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    with _without_torchvision() as videos:
        return kind(images, tokenizer(_QWEN), videos)


def _internvl() -> Any:
    words = tokenizer(
        {"<IMG_CONTEXT>": vlms.IMAGE, "<img>": vlms.START, "</img>": vlms.END, "<video>": vlms.VIDEO},
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    with _without_torchvision() as videos:
        return tf.InternVLProcessor(
            tf.GotOcr2ImageProcessorPil(size=_SIDE, max_patches=6), words, videos, image_seq_length=4
        )


def _idefics(images: Any) -> Any:
    if "torchvision" in (getattr(images, "_backends", None) or ()):
        pytest.skip(f"{images.__name__} of this transformers needs torchvision")
    return images(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})


def _smolvlm() -> Any:
    from transformers.models.smolvlm import processing_smolvlm

    with _without_torchvision() as videos, patch.object(processing_smolvlm, "num2words", str):
        return tf.SmolVLMProcessor(_idefics(tf.SmolVLMImageProcessorPil), tokenizer(_IDEFICS), videos, image_seq_len=4)


def _paligemma() -> Any:
    images: Any = tf.SiglipImageProcessorPil(size=_SIDE)
    images.image_seq_length = 16
    return tf.PaliGemmaProcessor(images, tokenizer(_IMAGE, image_token="<image>"))


def _gemma3() -> Any:
    words = tokenizer(
        {"<image_soft_token>": vlms.IMAGE, "<start_of_image>": vlms.START, "<end_of_image>": vlms.END},
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    return tf.Gemma3Processor(tf.Gemma3ImageProcessorPil(size=_SIDE), words, image_seq_length=4)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": lambda: _qwen(tf.Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: _qwen(tf.Qwen3VLProcessor),
    "internvl": _internvl,
    "idefics3": lambda: tf.Idefics3Processor(
        _idefics(tf.Idefics3ImageProcessorPil), tokenizer(_IDEFICS), image_seq_len=4
    ),
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}
_AROUND = dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), ("<|vision_start|>", "<|vision_end|>"))


def processed(name: str, processor: Any, **options: Any) -> Any:
    """What `processor` of family `name` makes of two prompts: one of the images of `SIZES`, and two."""
    drawn = np.random.default_rng(0)
    images = [drawn.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    image = processor.image_token
    if name.startswith("qwen"):
        image = f"<|vision_start|>{image}<|vision_end|>"
    texts = [f"<s>a{image}b", f"<s>cd{image}e{image}f"]
    if name == "paligemma":
        texts = [f"{image}b", f"{image}{image}cde"]
    return processor(images=[images[:1], images[1:]], text=texts, padding=True, return_tensors="pt", **options)
