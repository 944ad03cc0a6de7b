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
from regard.core.token_map import Kind, TokenMap
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
        self._decoder, self._config, self.slots, self._recipe = decoder, config, slots, recipe
        # A cache lives as long as its user holds it.
        self.caches: WeakSet[StoreCache] = WeakSet()
        # The forward that runs: its Step and its cache.
        self.step: Step | None = None
        self.cache: StoreCache | None = None
        # Rows of the batch that `generate` was given; it may repeat them.
        self.rows: int | None = None
        self._aside = False
        self._responding = False
        self._prompt: int | None = None
        self._marks: Tensor | tuple[int, int] | None = None
        self._tokens: TokenMap | None = None
        # It where forwards run, with its rows as often as batches have them: made once, whatever is decoded.
        self._moved: dict[tuple[torch.device, int], TokenMap] = {}

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
            before, self.rows = self.rows, 1 if first is None else first.shape[0]
            try:
                with self.prompting(1 if first is None else first.shape[1]):
                    return generate(*args, **kwargs)
            finally:
                self.rows = before

        return told

    @contextmanager
    def prompting(self, length: int) -> Iterator[None]:
        """Requests inside have a prompt of `length` arrivals, however many forwards it comes in."""
        before, self._prompt = self._prompt, length
        try:
            yield
        finally:
            self._prompt = before

    @contextmanager
    def marking(self, marks: Tensor | tuple[int, int]) -> Iterator[None]:
        """Requests inside have these rows marked: `[1|B, n]` bool by arrival, or positions `start` to `stop - 1`."""
        if isinstance(marks, Tensor):
            if marks.ndim != 2 or marks.dtype != torch.bool:
                raise RegardError(f"marks must be bool [rows, arrivals], got {marks.dtype} {list(marks.shape)}")
        elif not 0 <= marks[0] < marks[1]:
            raise RegardError(f"a marked span (start, stop) needs 0 <= start < stop, got {tuple(marks)}")
        before, self._marks = self._marks, marks
        try:
            yield
        finally:
            self._marks = before

    @contextmanager
    def reading(self, tokens: TokenMap) -> Iterator[None]:
        """Tokens of requests inside are what `tokens` says."""
        if not isinstance(tokens, TokenMap):
            raise RegardError(f"what tokens are is said by a TokenMap, got {type(tokens).__name__}")
        before = (self._tokens, self._moved)
        self._tokens, self._moved = tokens, {}
        try:
            yield
        finally:
            self._tokens, self._moved = before

    @contextmanager
    def aside(self, prompt: int) -> Iterator[None]:
        """Forwards inside belong to a request that runs already, and have a prompt of `prompt` arrivals."""
        before = (self._aside, self._responding, self._prompt)
        self._aside, self._responding, self._prompt = True, False, prompt
        try:
            yield
        finally:
            self._aside, self._responding, self._prompt = before

    @contextmanager
    def inside(self, step: Step, cache: StoreCache) -> Iterator[None]:
        """Layers run inside belong to a forward `step` that was begun aside, on `cache`."""
        before = (self._aside, self.step, self.cache)
        self._aside, self.step, self.cache = True, step, cache
        try:
            yield
        finally:
            self._aside, self.step, self.cache = before

    @property
    def marked(self) -> bool:
        """Whether rows are marked."""
        return self._marks is not None

    def fresh(self) -> StoreCache:
        """An empty cache that is nobody's request."""
        return self._adopt(DynamicCache(config=self._config))

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
                self.caches.add(self._adopt(cache))

        return prepared

    def begin(self, tokens: Tensor, cache: Cache | None, mask: Tensor | None) -> StoreCache:
        """Start a forward of `tokens [B, T, ...]`; returns the cache it must use.

        Raises:
            RegardError: the cache cannot hold stores or is another recipe's; the mask has holes.
        """
        if cache is None:
            cache = DynamicCache(config=self._config)
        cache = self._adopt(cache)
        if not self._aside:
            # A branch is counted with its request.
            self.caches.add(cache)
        running = list(cache.store_layers())
        start, (batch, width) = cache.get_seq_length(), tokens.shape[:2]
        padding = _padding(mask, batch, start, width)
        if not self._responding:
            cache.prompt = self._prompt
        elif cache.prompt is None:
            cache.prompt = start
        marks = self._marked(batch, padding, tokens.device)
        said = self._said(batch, padding, start + width, tokens.device)
        step = Step(start, width, batch, tokens.device, padding, cache.prompt, marks, said)
        for layer in running:
            for edit in layer.slots.rows:
                edit.check(step)
            for stem, need in layer.slots.needs if not self._aside else ():
                if need in ("map", "image"):
                    known = step.said(stem)
                if need == "image":
                    known.require(Kind.VISUAL, stem)
        for layer in running:
            layer.step = step
        self.step, self.cache = step, cache
        return cache

    def layer(self, index: int) -> StoreLayer:
        """The cache layer of decoder layer `index` in the forward that runs."""
        assert self.cache is not None
        found = self.cache.layers[index]
        assert isinstance(found, StoreLayer)
        return found

    def end(self) -> None:
        """The forward is over, or failed."""
        for layer in self.cache.store_layers() if self.cache is not None else ():
            layer.step = None
        self.step = self.cache = None

    def _marked(self, batch: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
        """The marks in force, `[1|B, n]` bool by arrival."""
        if not isinstance(self._marks, tuple):
            if self._marks is None:
                return None
            return self._marks.repeat_interleave(self._times("marks", self._marks.shape[0], batch), dim=0)
        start, stop = self._marks
        shift = torch.zeros(1, dtype=torch.long) if padding is None else padding.cpu()
        arrivals = torch.arange(stop + int(shift.max())) - shift[:, None]
        return ((arrivals >= start) & (arrivals < stop)).to(device)

    def _said(self, batch: int, padding: Tensor | None, stop: int, device: torch.device) -> TokenMap | None:
        """What the tokens are; a map must agree with the padding of the arrivals before `stop`."""
        if self._tokens is None or self._aside:
            return None
        times = self._times("a token map", self._tokens.rows, batch)
        tokens = self._moved.get((device, times))
        if tokens is None:
            tokens = self._tokens.to(device)
            tokens = self._moved[device, times] = tokens if times == 1 else tokens.repeat(times)
        told = tokens.padding.clamp(max=stop)
        if tokens.padded if padding is None else bool((told != padding).any()):
            found = [0] if padding is None else padding.tolist()
            raise RegardError(f"the token map has {told.tolist()} padding tokens on the left, the request {found}")
        return tokens

    def _times(self, what: str, rows: int, batch: int) -> int:
        """How often each of `rows` is repeated in a batch: `generate` does it for its beams or sequences."""
        if rows in (1, batch):
            return 1
        if rows != self.rows or batch % rows:
            raise RegardError(f"{what} of {rows} rows for a batch of {batch}")
        return batch // rows

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
            if len(cache.layers) < len(self.slots):
                cache.layers[:] = DynamicCache(config=self._config).layers
            new = {index: self._layer(slots, index) for index, slots in enumerate(self.slots) if slots is not None}
            cache = StoreCache.of(cache, new, self._recipe)
        return cache

    def _layer(self, slots: Slots, index: int) -> StoreLayer:
        codecs, ragged = (slots.key_codec, slots.value_codec), bool(slots.rows)
        store = build(slots.pattern, *codecs, self._decoder.kv_heads, attend, ragged=ragged)
        return StoreLayer(store, slots, self._recipe, self._decoder.windows[index])


def _padding(mask: Any, batch: int, start: int, width: int) -> Tensor | None:
    """Left padding `[B]` said by a 2-D mask of all arrivals so far; None where no row is padded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        why = " (a model that makes masks around its decoder, as Gemma 3 for images, is not opened yet)"
        told = _shape(mask) + why * isinstance(mask, dict)
        raise RegardError(f"attached layers take a 2-D padding mask, got {told}")
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
