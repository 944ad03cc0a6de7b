"""The cache of a hybrid decoder: transformers' own layers for softmax attention, a latent store for latent attention,
a `Memory` for every other mixer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from regard.core.errors import RegardError
from regard.core.step import Step
from regard.layers import mixers as kinds
from regard.ops.attention import attend
from regard.primitives.latent import Latent
from regard.primitives.memory import Memory


class RecurrentLayer(CacheLayerMixin):
    """What one recurrent layer remembers, as a layer of a transformers cache."""

    is_croppable = False
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """A mixer fills its memory itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused.

        Raises:
            RegardError: always.
        """
        raise RegardError("this layer is recurrent: it holds a state, no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a layer that saw every token."""
        return self.memory.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.memory.seen

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless nothing is to be removed."""
        self.memory.crop(int(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        self.memory.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes the old row `beam_idx[i]`."""
        self.memory.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        self.memory.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` names (numbers or a bool mask)."""
        self.memory.select(indices)

    def offload(self) -> None:
        """A state is small and always read: it stays where it is."""

    prefetch = offload


class LatentLayer(CacheLayerMixin):
    """The latents of one layer, as a layer of a transformers cache; `latents` is what its mixer writes with."""

    is_croppable = True
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.store = Latent(attend)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """A store is made by its first tokens."""

    def latents(self, c: Tensor, kappa: Tensor) -> Tensor:
        """Append latents `c [B, 1, T, r]` with their rotary keys `kappa [B, 1, T, e]`; all, `[B, 1, S, r + e]`."""
        step = Step(self.store.length, c.shape[2], c.shape[0], c.device)
        return self.store.append(c, kappa, step).key_fields[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append latents and rotary keys; all that is held of both."""
        held = self.latents(key_states, value_states)
        return held[..., : self.store.rank], held[..., self.store.rank :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a layer that holds every token."""
        return self.store.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.store.length

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens."""
        self.store.crop(self.store.length + min(int(tokens_to_remove), 0))

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes the old row `beam_idx[i]`."""
        self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        if self.store.length:
            rows = torch.arange(self.store.buffer.fields[0].shape[0])
            self.store.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` names (numbers or a bool mask)."""
        self.store.reorder(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """Latents are read at every step: they stay where they are."""

    prefetch = offload


class Latents:
    """A `LatentLayer`, as the mixer writes to it; `seen` is the request's length."""

    def __init__(self, layer: LatentLayer, seen: int):
        self.layer, self.seen = layer, seen

    def latents(self, c: Tensor, kappa: Tensor) -> Tensor:
        """Append `[B, 1, T, *]`; all that this forward's queries read, `[B, 1, S, r + e]`."""
        return self.layer.latents(c, kappa)

    def advance(self, tokens: int) -> None:
        """`tokens` more went by."""
        self.seen += tokens


class KeyValues:
    """A transformers cache layer, as the softmax mixer writes to it; `seen` is the request's length."""

    def __init__(self, layer: DynamicLayer, seen: int):
        self.layer, self.seen = layer, seen

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, Hk, T, *]`; all that this forward's queries read."""
        return self.layer.update(keys, values)

    def advance(self, tokens: int) -> None:
        """`tokens` more went by."""
        self.seen += tokens


class HybridCache(Cache):
    """One layer of cache for every layer of a `HybridForCausalLM`; its length is the request's, whatever layers hold.

    Args:
        mixers: the mixer of every layer.
        windows: the sliding window of every softmax layer, None elsewhere and where there is none.
    """

    def __init__(self, mixers: Sequence[str], windows: Sequence[int | None]):
        super().__init__(layers=[_layer(*of) for of in zip(mixers, windows, strict=True)])
        self.mixers, self.seen = tuple(mixers), 0

    def memory(self, layer: int) -> "Memory | Latents | KeyValues":
        """What the mixer of layer number `layer` writes to."""
        held: Any = self.layers[layer]
        if isinstance(held, RecurrentLayer):
            return held.memory
        return Latents(held, self.seen) if isinstance(held, LatentLayer) else KeyValues(held, self.seen)

    def advance(self, tokens: int) -> None:
        """Every layer has read `tokens` more."""
        self.seen += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the request, padding included; all layers agree between forwards."""
        return self.seen

    @property
    def recurrent(self) -> bool:
        """Whether some layer cannot forget single tokens."""
        return any(isinstance(layer, RecurrentLayer) for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; a positive number is the length to keep (transformers 5.17).

        Raises:
            RegardError: a layer is recurrent and there is something to remove; no layer has changed.
        """
        given = int(tokens_to_remove)
        gone = -given if given <= 0 else max(self.seen - given, 0)
        if gone > self.seen:
            raise RegardError(f"cannot remove {gone} of {self.seen} tokens")
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.crop(-gone)
        super().crop(-gone)
        self.seen -= gone

    def activate_past_recording(self) -> None:
        """Refused where a layer is recurrent: this is the first step of decoding with drafts.

        Raises:
            RegardError: a layer is recurrent.
        """
        if self.recurrent:
            raise RegardError(NO_DRAFTS)
        super().activate_past_recording()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        layer: Any
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer | LatentLayer):
                layer.reset()
            else:
                # transformers 5.17 would keep the length, and zeros.
                layer.keys = layer.values = None
                layer.is_initialized = False
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = 0

    def storages(self) -> Iterator[Tensor]:
        """Every tensor that keeps memory alive."""
        layer: Any
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                yield from layer.memory.storages()
            elif isinstance(layer, LatentLayer):
                yield from layer.store.storages()
            else:
                yield from (part for part in (layer.keys, layer.values) if isinstance(part, torch.Tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of the live storages, each counted once."""
        held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in self.storages()}
        return sum(held.values())


NO_DRAFTS = (
    "a recurrent layer cannot take tokens back, so that drafts (assistant_model, prompt_lookup_num_tokens) cannot be "
    "decoded with this model; leave them out"
)


def _layer(mixer: str, window: int | None) -> CacheLayerMixin:
    held = kinds.holds(mixer)
    if held != "keys":
        return LatentLayer() if held == "latents" else RecurrentLayer()
    return DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
