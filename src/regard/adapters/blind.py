"""The prompt without its image, run layer by layer beside the forward that completes the request's prompt.

Layers take turns: the request's attention of a layer, then all of that layer without the image, then the rest of the
request's. So a mechanism sees both sides of a layer before either goes on, and edits both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.families import Decoder
from regard.adapters.requests import Requests
from regard.core.errors import RegardError
from regard.core.step import Step
from regard.core.token_map import Kind
from regard.ops.branching import packed

# In the state of the first layer that compares: embeddings of a prompt that is not complete yet, by arrival.
PROMPT = "prompt so far"


class Blind:
    """Begins the prompt without its image when a forward completes the prompt.

    Args:
        decoder: the opened model.
        requests: of the attached model.
        first: the first layer that compares, by `name`.
    """

    def __init__(self, decoder: Decoder, requests: Requests, first: int, name: str):
        self._decoder, self._requests, self._first, self._name = decoder, requests, first, name

    @classmethod
    def of(cls, decoder: Decoder, requests: Requests) -> "Blind | None":
        """One for the mechanisms that compare, None: there are none."""
        slots = ((index, held) for index, held in enumerate(requests.slots) if held is not None)
        found = ((index, edit.name) for index, held in slots for edit in held.mix if edit.compares)
        first = next(found, None)
        return None if first is None else cls(decoder, requests, *first)

    @torch.no_grad()
    def follow(self, given: dict[str, Any]) -> None:
        """Before the decoder runs with `given`: keeps what the prompt brings, and begins where it is complete.

        Raises:
            RegardError: the cache holds tokens of another prompt; rows are marked; the prompt ends in an image.
        """
        step = self._requests.step
        assert step is not None
        if step.tokens is None or step.answer is None or step.start >= step.answer:
            return
        if self._requests.marked:
            raise RegardError(f"marks name rows of the prompt with its image; {self._name!r} runs it without, too")
        new = given.get("inputs_embeds")
        if new is None:
            embeddings: Any = self._decoder.module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
            new = embeddings(given["input_ids"])
        state = self._requests.layer(self._first).store.state
        past = state.pop(PROMPT, new[:, :0])[:, : step.start]
        if past.shape[1] < step.start:
            raise RegardError(
                f"{self._name!r} compares a prompt of {step.answer} tokens with the same without its image, and did "
                f"not see the first {step.start} as part of it: begin a new cache for another turn"
            )
        prompt = torch.cat((past, new), 1)
        if step.stop < step.answer:
            state[PROMPT] = prompt
        else:
            step.blind = self._begun(prompt[:, : step.answer], step)

    def _begun(self, prompt: Tensor, step: Step) -> "_Layers":
        """The prompt's embeddings `[B, n, d]` without those of images, before the first layer."""
        assert step.tokens is not None
        kinds = step.tokens.at(torch.arange(prompt.shape[1], device=prompt.device)[None]).expand(prompt.shape[:2])
        kept = (kinds != Kind.VISUAL) & (kinds != Kind.PADDING)
        if not bool(kept[:, -1].all()):
            raise RegardError(f"{self._name!r} compares the prompt's last token, which the token map gives to an image")
        tokens, mask = packed(prompt, kept)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if "mrope_section" in (getattr(self._decoder.config, "rope_parameters", None) or {}):
            positions = positions.expand(3, *positions.shape)
        requests = self._requests
        before = requests.step, requests.cache
        try:
            with requests.aside(tokens.shape[1]), _noting(self._decoder) as calls:
                cache = requests.begin(tokens, requests.fresh(), mask)
                # Around the module's hooks: to them, the request's forward runs.
                self._decoder.module.forward(
                    inputs_embeds=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
            assert requests.step is not None
            return _Layers(self._decoder.blocks, calls, requests, requests.step, cache)
        finally:
            requests.step, requests.cache = before


class _Layers:
    """A forward whose layers are run when they are asked for; it is `Step.blind`."""

    def __init__(self, blocks: Sequence[nn.Module], calls: "list[_Call]", requests: Requests, step: Step, cache: Any):
        self._blocks, self._calls, self._requests, self._step, self._cache = blocks, calls, requests, step, cache
        self._stream, self._next = calls[0][0], 0

    @torch.no_grad()
    def __call__(self, layer: int, told: dict[Any, Any]) -> dict[Any, Any]:
        self._step.shared.update(told)
        with self._requests.inside(self._step, self._cache):
            for index in range(self._next, layer + 1):
                _, args, kwargs = self._calls[index]
                # Around the layer's hooks: they collect what the request's layers return.
                out = self._blocks[index].forward(self._stream, *args, **kwargs)
                self._stream, self._next = out[0] if isinstance(out, tuple) else out, index + 1
        return self._step.shared


_Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


@contextmanager
def _noting(decoder: Decoder) -> Iterator[list[_Call]]:
    """Inside, a forward of the decoder runs no layer; yields what each would have been called with."""
    calls: list[_Call] = []
    holders = (part for part in decoder.module.children() if isinstance(part, nn.ModuleList))
    layers = next(part for part in holders if tuple(part) == decoder.blocks)
    try:
        for index, block in enumerate(decoder.blocks):
            layers[index] = _Standin(block, calls)
        yield calls
    finally:
        for index, block in enumerate(decoder.blocks):
            layers[index] = block


class _Standin(nn.Module):
    """In a layer's place: notes its call, and returns the stream that entered the first."""

    def __init__(self, block: nn.Module, calls: list[_Call]):
        super().__init__()
        # In a tuple, so that torch does not take the layer for a part of this one.
        self._held, self._calls = (block,), calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        stream = args[0] if args else kwargs.pop("hidden_states")
        self._calls.append((stream, args[1:], kwargs))
        return self._calls[0][0]
