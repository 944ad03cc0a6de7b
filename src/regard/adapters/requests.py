"""Requests of an attached model: whose cache this is, and what each forward is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from regard.adapters.cache_layer import StoreLayer
from regard.adapters.families import Decoder
from regard.core.errors import RegardError
from regard.core.slots import Slots
from regard.core.step import Step
from regard.ops.attention import attend
from regard.primitives.stores import build


class Requests:
    """The caches made under one handle, and the Step of the forward that runs.

    Args:
        decoder: the opened model, with the config it had before it was attached.
        config: that config.
        slots: what each layer does differently, None where it does nothing.
        recipe: digest of the placements.
    """

    def __init__(self, decoder: Decoder, config: Any, slots: tuple[Slots | None, ...], recipe: str):
        self._decoder, self._config, self._slots, self._recipe = decoder, config, slots, recipe
        # A cache lives as long as its user holds it; its value is where its prompt ended, None while it lasts.
        self.prompts: WeakKeyDictionary[Cache, int | None] = WeakKeyDictionary()
        self._responding = False
        self._prompt: int | None = None
        self._running: list[StoreLayer] = []

    @contextmanager
    def responding(self) -> Iterator[None]:
        """Rows of forwards inside are response rows."""
        before, self._responding = self._responding, True
        try:
            yield
        finally:
            self._responding = before

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, telling requests how long the prompt is; nothing else can: prefill may come in chunks."""

        def told(*args: Any, **kwargs: Any) -> Any:
            named = map(kwargs.get, ("inputs", "input_ids", "inputs_embeds"))
            first = next((x for x in (*args[:1], *named) if isinstance(x, Tensor)), None)
            before, self._prompt = self._prompt, 1 if first is None else first.shape[1]
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt = before

        return told

    def preparing(self, prepare: Callable[..., None]) -> Callable[..., None]:
        """`_prepare_cache_for_generation`, adopting the cache at birth: what it is asked then must reach its stores."""

        def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            prepare(generation_config, model_kwargs, *args, **kwargs)
            if (cache := model_kwargs.get("past_key_values")) is not None:
                self._adopt(cache)

        return prepared

    def begin(self, tokens: Tensor, cache: Cache | None, mask: Tensor | None) -> Cache:
        """Start a forward of `tokens [B, T, ...]`; returns the cache it must use.

        Raises:
            RegardError: the cache cannot hold stores or is another recipe's; the mask has holes.
        """
        if cache is None:
            cache = DynamicCache(config=self._config)
        self._adopt(cache)
        self._running = [layer for layer in cache.layers if isinstance(layer, StoreLayer)]
        start, (batch, width) = self._running[0].get_seq_length(), tokens.shape[:2]
        if self._responding and self.prompts[cache] is None:
            self.prompts[cache] = start
        elif self._prompt is not None:
            self.prompts[cache] = self._prompt
        padding = _padding(mask, batch, start, width)
        step = Step(start, width, batch, tokens.device, padding, self.prompts[cache])
        for layer in self._running:
            layer.step = step
        return cache

    def end(self) -> None:
        """The forward is over, or failed."""
        for layer in self._running:
            layer.step = None
        self._running = []

    def _adopt(self, cache: Cache) -> None:
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            kind = type(cache).__name__ + (" with offloading" if getattr(cache, "offloading", False) else "")
            raise RegardError(f"{kind} cannot hold regard's stores; pass a DynamicCache, or none")
        made_under = {layer.recipe for layer in cache.layers if isinstance(layer, StoreLayer)}
        if made_under == {self._recipe}:
            self.prompts.setdefault(cache, None)
            return
        if made_under or cache.get_seq_length() > 0:
            other = f"recipe {made_under.pop()}" if made_under else "no recipe"
            raise RegardError(f"this cache was made under {other}, the model is attached under {self._recipe}")
        if not cache.layers:
            cache.layers.extend(DynamicCache(config=self._config).layers)
        for index, slots in enumerate(self._slots):
            if slots is not None:
                cache.layers[index] = self._layer(slots, index)
        self.prompts[cache] = None

    def _layer(self, slots: Slots, index: int) -> StoreLayer:
        store = build(slots.pattern, slots.key_codec, slots.value_codec, self._decoder.kv_heads, attend)
        return StoreLayer(store, slots.pattern, self._recipe, self._decoder.windows[index])


def _padding(mask: Any, batch: int, start: int, width: int) -> Tensor | None:
    """Left padding `[B]` said by a 2-D mask of all arrivals so far; None where no row is padded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise RegardError(f"attached layers take a 2-D padding mask, got {_shape(mask)}")
    if mask.shape != (batch, start + width):
        raise RegardError(
            f"attention_mask is {_shape(mask)}; this forward brings {batch} rows to {start + width} tokens in all"
        )
    real = mask.bool()
    if bool(real.all()):
        return None
    padding = (~real).long().cumprod(1).sum(1)
    arrivals = torch.arange(start, device=mask.device)
    if not bool((real[:, :start] | (arrivals[None] < padding[:, None])).all()):
        raise RegardError("attention_mask hides tokens between visible ones; pad prompts on the left")
    return padding


def _shape(mask: Any) -> str:
    return f"a mask of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
