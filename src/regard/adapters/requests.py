"""Requests of an attached model: whose cache this is, and what each forward is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from regard.adapters.cache_layer import StoreCache, StoreLayer
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
        # A cache lives as long as its user holds it.
        self.caches: WeakSet[StoreCache] = WeakSet()
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
            with self.prompting(1 if first is None else first.shape[1]):
                return generate(*args, **kwargs)

        return told

    @contextmanager
    def prompting(self, length: int) -> Iterator[None]:
        """Requests inside have a prompt of `length` arrivals, however many forwards it comes in."""
        before, self._prompt = self._prompt, length
        try:
            yield
        finally:
            self._prompt = before

    def preparing(self, prepare: Callable[..., None]) -> Callable[..., None]:
        """`_prepare_cache_for_generation`, adopting the cache at birth: what it is asked then must reach its stores."""

        def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            kind = getattr(generation_config, "cache_implementation", None)
            if kind not in (None, "dynamic", "dynamic_full"):
                raise RegardError(
                    f"cache_implementation={kind!r} cannot hold regard's stores; leave it out, or say 'dynamic'"
                )
            prepare(generation_config, model_kwargs, *args, **kwargs)
            if (cache := model_kwargs.get("past_key_values")) is not None:
                self._adopt(cache)

        return prepared

    def begin(self, tokens: Tensor, cache: Cache | None, mask: Tensor | None) -> StoreCache:
        """Start a forward of `tokens [B, T, ...]`; returns the cache it must use.

        Raises:
            RegardError: the cache cannot hold stores or is another recipe's; the mask has holes.
        """
        if cache is None:
            cache = DynamicCache(config=self._config)
        cache = self._adopt(cache)
        running = list(cache.store_layers())
        start, (batch, width) = running[0].get_seq_length(), tokens.shape[:2]
        padding = _padding(mask, batch, start, width)
        if not self._responding:
            cache.prompt = self._prompt
        elif cache.prompt is None:
            cache.prompt = start
        step = Step(start, width, batch, tokens.device, padding, cache.prompt)
        for layer in running:
            layer.step = step
        self._running = running
        return cache

    def end(self) -> None:
        """The forward is over, or failed."""
        for layer in self._running:
            layer.step = None
        self._running = []

    def _adopt(self, cache: Cache) -> StoreCache:
        if type(cache) not in (DynamicCache, StoreCache) or getattr(cache, "offloading", False):
            kind = type(cache).__name__ + (" with offloading" if getattr(cache, "offloading", False) else "")
            raise RegardError(f"{kind} cannot hold regard's stores; pass a DynamicCache, or none")
        assert isinstance(cache, DynamicCache)
        if isinstance(cache, StoreCache):
            other = f"recipe {cache.recipe}"
        elif cache.get_seq_length() > 0:
            other = "no recipe"
        else:
            other = None
        if other not in (None, f"recipe {self._recipe}"):
            raise RegardError(
                f"this cache was made under {other}, the model is attached under recipe {self._recipe}; "
                "start a new cache, or attach what it was made under"
            )
        if not isinstance(cache, StoreCache):
            if len(cache.layers) < len(self._slots):
                cache.layers[:] = DynamicCache(config=self._config).layers
            new = {index: self._layer(slots, index) for index, slots in enumerate(self._slots) if slots is not None}
            cache = StoreCache.of(cache, new, self._recipe)
        self.caches.add(cache)
        return cache

    def _layer(self, slots: Slots, index: int) -> StoreLayer:
        store = build(slots.pattern, slots.key_codec, slots.value_codec, self._decoder.kv_heads, attend)
        return StoreLayer(store, slots, self._recipe, self._decoder.windows[index])


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
    arrivals = torch.arange(start + width, device=mask.device)
    hidden = ~real & (arrivals >= padding[:, None])
    # Padding on the right is never seen again if it ends this forward, and nothing follows it.
    between = hidden[:, :start].any() | (hidden[:, :-1] & real[:, 1:]).any()
    if bool(between):
        raise RegardError("attention_mask hides tokens between visible ones; pad prompts on the left")
    return padding


def _shape(mask: Any) -> str:
    return f"a mask of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
