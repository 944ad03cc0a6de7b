"""What is steered: the tiny vision-language model `shapes`, questions asked together, and a mechanism as tried."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.adapters import tokens
from regard.adapters.families import open_decoder
from regard.core.token_map import TokenMap
from regard.measure import hallucination
from regard.measure import scene_questions as ask
from regard.models import vlm

# The most tokens of an answer, and of a caption.
SHORT, LONG = 8, 28


@dataclass(eq=False)
class Kept:
    """What was made once is kept."""

    _kept: dict[Any, Any] = field(default_factory=dict, init=False)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first called under `name`."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


@dataclass(eq=False)
class Batch(Kept):
    """Questions that are asked together: what the model is given, what its tokens are, and whose they are."""

    inputs: dict[str, Tensor]
    tokens: TokenMap
    at: Sequence[int]
    most: int


@dataclass(eq=False)
class Bench(Kept):
    """The model that is steered, and its processor."""

    model: Any
    processor: Any

    @classmethod
    def open(cls, device: str) -> "Bench":
        """The trained model on `device`."""
        return cls(*vlm.load(device=device))

    @cached_property
    def eager(self) -> Any:
        """The same model, whose attention returns its weights."""
        other, _ = vlm.load(device=self.model.device)
        other.set_attn_implementation("eager")
        return other

    @cached_property
    def depth(self) -> int:
        """Layers of the language model."""
        return open_decoder(self.model).layers

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self.processor.tokenizer(text)["input_ids"]

    def text(self, ids: Tensor) -> list[str]:
        """`ids [B, n]` as words, without marks."""
        return self.processor.batch_decode(ids, skip_special_tokens=True)

    def pixels(self, images: Tensor) -> Tensor:
        """`images [N, 64, 64, 3]` uint8 as the processor makes them, `[N, 3, 64, 64]`, on the model's device."""
        shares = images.to(self.model.device).permute(0, 3, 1, 2).float() / 255
        return (shares - 0.5) / 0.5

    def batch(
        self, images: Tensor, texts: Sequence[str], at: Sequence[int] = (), ends: Sequence[str] | None = None
    ) -> Batch:
        """Questions about `images [N, 64, 64, 3]`, padded on the left; `ends` follow the prompts.

        What the processor makes of them, without its loop over images.
        """
        chats = {text: hallucination.prompt(self.processor, text) for text in set(texts)}
        prompts = [chats[text] + end for text, end in zip(texts, ends or [""] * len(texts), strict=True)]
        # A patch is a token; the class token is left out. Many ask the same.
        wide = {one: one.replace(vlm.IMAGE, vlm.IMAGE * (vlm.SIDE // vlm.PATCH) ** 2) for one in dict.fromkeys(prompts)}
        made = self.processor.tokenizer(list(wide.values()), return_tensors="pt", padding=True)
        number = {one: at for at, one in enumerate(wide)}
        rows = torch.tensor([number[one] for one in prompts])
        given = {name: made[name][rows].to(self.model.device) for name in ("input_ids", "attention_mask")}
        given["pixel_values"] = self.pixels(images)
        said = tokens.read(self.model, given, processor=self.processor).to(self.model.device)
        return Batch(given, said, at, LONG if ask.TEXTS["caption"] in texts else SHORT)

    def captioning(self, rows: int) -> dict[str, Tensor]:
        """Ids and mask of `rows` prompts for a caption."""
        blank = torch.zeros(1, vlm.SIDE, vlm.SIDE, 3, dtype=torch.uint8)
        inputs = self.batch(blank, [ask.TEXTS["caption"]]).inputs
        return {name: inputs[name].expand(rows, -1) for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True, eq=False)
class Setting:
    """A mechanism as it is tried.

    Args:
        stem: which.
        task: what it is fitted for, `existence`, `captions` or `all`.
        layers: where it is placed.
        options: the mechanism's own, without tensors.
        extra: what fits, and what is lent, are told besides.
        tensors: fitted options.
    """

    stem: str
    task: str
    layers: Sequence[int] | str
    options: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"layers": self.layers, **self.options, **self.extra}
