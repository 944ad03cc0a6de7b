"""What a model is asked on the command line: a prompt, a text before it, images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.core.errors import RegardError

Prompt = Annotated[str, typer.Option(help="What to say to the model.")]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="An image for a vision-language model; repeat for more."),
]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


@dataclass(frozen=True)
class Asked:
    """A request: what the model is given (on its device), what its tokens are (a TokenMap), and its images (PIL)."""

    inputs: Mapping[str, Any]
    tokens: Any
    images: Sequence[Any] = ()

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.inputs["input_ids"].shape[1]


def ask(name: str, network: Any, tokenizer: Any, prompt: str, images: Sequence[Path] | None, raw: bool) -> Asked:
    """The request of `prompt` and `images` to the model called `name`.

    Raises:
        RegardError: an empty prompt, a file that is no image, images for a text model.
    """
    from regard.adapters import tokens

    if getattr(network.config, "vision_config", None) is None:
        if images:
            raise RegardError(
                f"{name!r} is a text model ({network.config.model_type}) and cannot be shown {str(images[0])!r}: "
                "leave out --image, or name a vision-language model such as 'shapes'"
            )
        inputs = text_inputs(tokenizer, prompt, raw).to(network.device)
        return Asked(inputs, tokens.read(network, inputs, processor=tokenizer))
    from regard.models.pretrained import load_processor

    processor = load_processor(name)
    shown = [_open(path) for path in images or ()]
    inputs = processor(text=[_written(processor, prompt, len(shown), raw)], images=shown or None, return_tensors="pt")
    inputs = inputs.to(network.device, dtype=network.dtype)
    return Asked(inputs, tokens.read(network, inputs, processor=processor), shown)


def text_inputs(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """Token ids and mask of `prompt`, inside the model's chat template if it has one.

    Raises:
        RegardError: the prompt is empty.
    """
    _refuse_empty(prompt)
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def with_text(path: Path | None, prompt: str) -> str:
    """`prompt` after the text of the file `path`, if there is one."""
    from regard.measure.text import load

    return f"{load(path).rstrip()}\n\n{prompt}" if path else prompt


def _refuse_empty(prompt: str) -> None:
    if not prompt.strip():
        raise RegardError("the prompt is empty")


def _written(processor: Any, prompt: str, images: int, raw: bool) -> str:
    """`prompt` as the processor reads it, places for images included."""
    _refuse_empty(prompt)
    if raw or not getattr(processor, "chat_template", None):
        mark = getattr(processor, "image_token", "")
        return prompt if mark and mark in prompt else mark * images + prompt
    content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise RegardError(f"{str(path)!r} cannot be read as an image: {error}") from error
