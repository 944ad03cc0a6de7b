"""Bytes of a cache as they are: live storages, each counted once, whatever views share them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from regard.adapters.cache_layer import StoreLayer
from regard.adapters.families import open_decoder


def _layers(cache: Any) -> Iterator[Any]:
    """The layers of a cache, and those of its branches."""
    yield from cache.layers
    fork = getattr(cache, "fork", None)
    for branch in fork.branches if fork is not None else ():
        if branch.cache is not None:
            yield from _layers(branch.cache)


def tensors(cache: Any) -> Iterator[Tensor]:
    """Every tensor a transformers cache keeps alive, attached or not."""
    for layer in _layers(cache):
        if isinstance(layer, StoreLayer):
            yield from layer.storages()
        else:
            yield from (part for part in vars(layer).values() if isinstance(part, Tensor) and part.ndim == 4)


def raw_tensors(cache: Any) -> Iterator[Tensor]:
    """Those of `tensors` that hold keys or values as they come."""
    for layer in _layers(cache):
        if isinstance(layer, StoreLayer):
            yield from layer.raw()
        else:
            yield from (part for name in ("keys", "values") if isinstance(part := getattr(layer, name, None), Tensor))


def live_bytes(cache: Any, raw_itemsize: int | None = None) -> int:
    """Bytes of the live storages behind `cache`, each counted once.

    Args:
        cache: a transformers cache.
        raw_itemsize: bytes to count for one element of keys and values stored as they come. None counts
            what is allocated; 2 says what the same cache takes in a bf16 model (codes and scales stay).
    """
    seen = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors(cache)}
    if raw_itemsize is not None:
        for part in raw_tensors(cache):
            storage = part.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes() // part.element_size() * raw_itemsize
    seen.pop(0, None)
    return sum(seen.values())


def dense_bytes(model: nn.Module, batch: int, length: int, itemsize: int = 2) -> int:
    """Bytes of the keys and values of `length` tokens in every layer, all heads, `itemsize` bytes a number (bf16)."""
    decoder = open_decoder(model)
    return 2 * batch * length * decoder.layers * decoder.kv_heads * decoder.head_dim * itemsize
