"""Any Store, shown to transformers as one layer of its cache, and the cache of such layers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from regard.core.errors import RegardError
from regard.core.slots import Image, Slots, State
from regard.core.step import Step
from regard.core.store import Store, View
from regard.ops import decode
from regard.ops.layer import run

# torch.compile leaves stores to Python: their shapes change with every token.
eager: Callable[[Any], Any] = torch.compiler.disable


def _autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that attention has under autocast: the kernels below torch's own attention do not obey it."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class StoreView:
    """What `update` returns in place of keys and values: the store's view with this forward's step."""

    def __init__(self, view: View, slots: Slots, step: Step, state: State):
        self._view, self._slots, self._step, self._state = view, slots, step, state

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention of `q [B, H, T, D]` with everything the layer's slots say: `out [B, H, T, Dv]`."""
        return run(self._slots, self._view, _autocast(q), self._step, self._state, scale=scale, softcap=softcap)


class StoreLayer(CacheLayerMixin):
    """A transformers cache layer that keeps nothing itself: `store` does.

    It reports the request's logical length, and the mask sizes of the layer it stands for, so that
    positions and the masks of layers that are not attached stay as they were.

    Args:
        recipe: digest of the placements it was made under.
        window: the sliding window of the layer it stands for, None if that layer saw everything.
    """

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, store: Store, slots: Slots, recipe: str, window: int | None):
        super().__init__()
        self.store, self.slots, self.recipe, self.sliding_window = store, slots, recipe, window
        self.is_sliding = window is not None
        self.step: Step | None = None
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores allocate when first written."""

    @eager
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write `key_states`, `value_states [B, Hk, T, *]`; the returned view takes their place."""
        if self.step is None:
            raise RegardError(f"this cache was made under recipe {self.recipe}; attach that recipe to go on with it")
        for edit in self.slots.prepare:
            key_states, value_states = edit.key(key_states, self.step), edit.value(value_states, self.step)
        key_states, value_states = _autocast(key_states), _autocast(value_states)
        if self.step.at is None:
            seen = self.store.append(key_states, value_states, self.step)
        else:
            seen = self.store.put(key_states, value_states, self.step, decode)
        view = StoreView(seen, self.slots, self.step, self.store.state)
        self.is_initialized = True
        return view, view

    def get_seq_length(self) -> int:
        """The request's logical length, however little is held."""
        return self.store.length

    def get_max_length(self) -> int:
        """As the layer it stands for: its window, or -1 for no bound."""
        return self.sliding_window if self.sliding_window is not None else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the layer it stands for: keys it would return, and the arrival of the first."""
        held = self.store.length
        if self.sliding_window is None:
            return held + query_length, 0
        kept = min(held, self.sliding_window - 1)
        return kept + query_length, held - kept

    def activate_past_recording(self) -> None:
        """Keep what the next `crop` may bring back."""
        self.record_past = True
        self.store.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens."""
        self.store.crop(self.store.length + tokens_to_remove)
        if self.record_past:
            self.store.record()

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes the old row `beam_idx[i]`."""
        self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        rows = _rows(self.store)
        if rows is not None:
            self.store.reorder(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` names (numbers or a bool mask)."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.store.reorder(rows)

    def offload(self) -> None:
        """Refused.

        Raises:
            RegardError: always.
        """
        raise RegardError("a cache with offloading=True holds no regard stores; use a plain DynamicCache")

    prefetch = offload

    def storages(self) -> Iterator[Tensor]:
        """Every tensor of the store that keeps memory alive."""
        return self.store.storages()

    def raw(self) -> Iterator[Tensor]:
        """Those of `storages` that hold keys or values as they come."""
        return self.store.raw()


@dataclass(frozen=True)
class Shown:
    """One image of a request: its last token's arrival, and its features as the request and its branches see it."""

    last: int
    views: tuple[Image, ...]


@dataclass(eq=False)
class Branch:
    """One branch of a request: what it reads in place of the request's prompt.

    Args:
        own: its prompt `[B, N]`, padded on the left.
        padding: `[B]` how far; None where no row is padded.
        longest: tokens of its longest prompt.
        cache: what it has read; None: nothing yet.
    """

    own: Tensor
    padding: Tensor | None
    longest: int
    cache: "StoreCache | None" = None

    def reorder(self, rows: Tensor) -> None:
        """Row `i` becomes the old row `rows[i]`."""
        self.own = self.own[rows]
        self.padding = self.padding if self.padding is None else self.padding[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)


@dataclass(eq=False)
class Fork:
    """What runs beside a request, and what its branches are fed from.

    Args:
        ids: tokens of the request that arrived so far, `[B, n]`.
        places: their positions `[axes, B, n]` where the model counts more than one; None: it counts one.
        prompt: arrivals of the prompt that the branches' prompts stand for; None: they have not begun.
        branches: one for each of the mechanism's, once they have begun.
        images: of each row.
        fresh: images that were encoded for prompts that are not complete yet.
        seen: the last of them, which says how the language model is given images.
    """

    ids: Tensor
    places: Tensor | None = None
    prompt: int | None = None
    branches: list[Branch] = field(default_factory=list)
    images: list[list[Shown]] = field(default_factory=list)
    fresh: list[Any] = field(default_factory=list)
    seen: Any = None

    def tokens(self, branch: Branch) -> Tensor:
        """All that `branch` is to read, `[B, m]`: its prompt, and what followed the request's."""
        return torch.cat((branch.own, self.ids[:, self.prompt :]), dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Row `i` becomes the old row `rows[i]`."""
        rows = rows.to(self.ids.device)
        self.ids = self.ids[rows]
        self.places = self.places if self.places is None else self.places[:, rows]
        self.images = [self.images[row] for row in rows.tolist()] if self.images else []
        for branch in self.branches:
            branch.reorder(rows)

    def keeps(self, length: int) -> bool:
        """Whether its prompt still stands when the request is cut to `length` arrivals."""
        return self.prompt is not None and length >= self.prompt

    def removable(self, length: int) -> int | None:
        """How many tokens its branches can forget when the request is cut to `length` arrivals; None: any number."""
        caches = [branch.cache for branch in self.branches if branch.cache is not None]
        return min((cache.removable for cache in caches), default=None) if self.keeps(length) else None

    def crop(self, length: int) -> None:
        """Forget the request's arrivals from `length` on; branches whose prompt is cut begin anew."""
        self.ids = self.ids[:, :length]
        self.places = self.places if self.places is None else self.places[..., :length]
        if not self.keeps(length):
            self.prompt, self.branches = None, []
            self.images = [[image for image in row if image.last < length] for row in self.images]
        for branch in self.branches:
            if branch.cache is not None:
                branch.cache.crop(min(self.tokens(branch).shape[1] - branch.cache.get_seq_length(), 0))


class StoreCache(DynamicCache):
    """A DynamicCache some of whose layers are StoreLayers.

    `recipe` is the digest of the placements it was made under; `prompt` where its prompt ended, None while
    the prompt lasts; `fork` the branches of the request, if it has some; `recording` whether layers
    keep what the next crop may bring back.
    """

    recipe: str
    prompt: int | None = None
    fork: Fork | None = None
    recording: bool = False

    @classmethod
    def of(cls, cache: DynamicCache, layers: Mapping[int, StoreLayer], recipe: str) -> "StoreCache":
        """The same, still empty cache object (its user holds it), with `layers` put in."""
        cache.__class__ = cls
        assert isinstance(cache, StoreCache)
        for index, layer in layers.items():
            cache.layers[index] = layer
        cache.recipe = recipe
        return cache

    def store_layers(self) -> Iterator[StoreLayer]:
        """The layers that are attached."""
        return (layer for layer in self.layers if isinstance(layer, StoreLayer))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row `i` becomes the old row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self._fork_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        super().batch_repeat_interleave(repeats)
        if self.fork is not None:
            self._fork_rows(torch.arange(self.fork.ids.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` names (numbers or a bool mask)."""
        super().batch_select_indices(indices)
        self._fork_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _fork_rows(self, rows: Tensor) -> None:
        if self.fork is not None:
            self.fork.reorder(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; a positive number is the length to keep (transformers 5.17).

        Raises:
            RegardError: a layer has already evicted what would be needed; no layer has changed.
        """
        # transformers 5.17 counts in 0-d tensors, which would spread to every length.
        tokens_to_remove, length = int(tokens_to_remove), int(self.get_seq_length())
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        removable, fork = self.removable, self.fork
        if fork is not None and (most := fork.removable(length - gone)) is not None:
            removable = min(removable, most)
        if gone > removable:
            raise RegardError(
                f"cannot remove the last {gone} of {length} tokens: {removable} can be removed, layers under recipe "
                f"{self.recipe} evicted what comes before; call activate_past_recording() before forwards to undo"
            )
        super().crop(-gone)
        if fork is not None:
            fork.crop(length - gone)

    @property
    def removable(self) -> int:
        """How many of the last tokens every store can forget."""
        found = [layer.store.removable for layer in self.store_layers()]
        return min(found, default=self.get_seq_length())

    def activate_past_recording(self) -> None:
        """Keep what the next `crop` may bring back, in branches too."""
        super().activate_past_recording()
        self.recording = True
        for branch in self.fork.branches if self.fork is not None else ():
            if branch.cache is not None:
                branch.cache.activate_past_recording()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.prompt = self.fork = None
        for layer in self.layers:
            # The model's own layers: transformers 5.17 would keep their length, and zeros.
            if isinstance(layer, CacheLayerMixin) and not isinstance(layer, StoreLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False


def _rows(store: Store) -> int | None:
    first = next(store.storages(), None)
    return None if first is None else first.shape[0]
