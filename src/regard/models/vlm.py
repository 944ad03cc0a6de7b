"""A tiny vision-language model in transformers' LLaVA classes: how it is laid out, and the trained one, `shapes`.

The trained weights lie in `tiny_vlm/`, with a card. `tools/train_tiny_vlm.py` made them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regard.core.errors import RegardError
from regard.core.extras import need

SHAPES = "shapes"
FOLDER = Path(__file__).parent / "tiny_vlm"
SIDE, PATCH = 64, 8
IMAGE, USER, ASSISTANT, SYSTEM = "<image>", "<user>", "<assistant>", "<system>"
PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"
MARKS = (PAD, UNKNOWN, BEGIN, END, IMAGE, USER, ASSISTANT, SYSTEM)
# A turn is its mark, its images and its text; what the assistant said ends in `END`.
CHAT = """{{ bos_token }}
{%- for message in messages %}{{ ' <' + message['role'] + '>' }}
{%- if message['content'] is string %}{{ ' ' + message['content'] }}
{%- else %}{% for part in message['content'] %}{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}
{%- endfor %}{% endif %}
{%- if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"""


def load(
    dtype: torch.dtype | None = None, device: str | torch.device | None = None, folder: Path = FOLDER
) -> tuple[Any, Any]:
    """The trained model and its `LlavaProcessor`, in evaluation mode.

    The processor takes 64 x 64 RGB images (uint8 arrays or tensors, height x width x 3, or PIL images) and texts with
    one `<image>` an image; it pads on the left. `apply_chat_template` writes such a text.

    Args:
        dtype: the weights' dtype; None: float32 (they are kept in bfloat16).
        device: where to put the model; None: the CPU.
        folder: where other weights of the same kind lie.

    Raises:
        RegardError: the folder has no weights, or pillow, with which transformers reads images, is not installed.
    """
    need("PIL")
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    if not (folder / "config.json").is_file():
        raise RegardError(f"no weights of {SHAPES!r}: the folder {folder.name!r} holds no config.json")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def build(words: Sequence[str], seed: int = 0) -> tuple[Any, Any]:
    """The same model with random weights, for a vocabulary of `words`, and its processor.

    A vision tower with a class token (4 layers, 4 heads of 32), whose last but one layer is projected, as LLaVA does;
    a Llama of 6 layers, 6 query and 3 key-value heads of 32. 3.3 million weights.

    Raises:
        RegardError: a word has a space in it, comes twice, or is one of the marks.
    """
    for word in words:
        if len(word.split()) != 1 or word in MARKS or list(words).count(word) > 1:
            raise RegardError(f"{word!r} cannot be a word of the vocabulary: it needs words without spaces, each once")
    tower: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    decoder: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    }
    return assemble(words, tower | {"projection_dim": 128}, decoder | {"num_key_value_heads": 3}, seed)


def assemble(words: Sequence[str], tower: dict[str, Any], decoder: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """A model of these widths with random weights, and its processor."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = make_processor(words)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(mark) for name, mark in _ids().items()}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **tower),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            **ids,
            **decoder,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    return model.eval(), processor


def make_processor(words: Sequence[str]) -> Any:
    """A `LlavaProcessor` whose tokens are the marks and `words`, in that order; all else is unknown."""
    need("PIL")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*MARKS, *words))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
            "system_token": SYSTEM,
        },
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    square = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size=square, crop_size=square, do_resize=True, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT,
    )


def _ids() -> dict[str, str]:
    return {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
