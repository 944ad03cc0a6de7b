"""Bytes: what is counted is what is allocated, and what is allocated is what the formulas say."""

import pytest
import torch
import transformers as tf
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import regard
from regard.adapters.memory import dense_bytes, live_bytes
from regard.core.step import Step
from regard.primitives.full import Full
from regard.primitives.ring import Ring

LENGTH, LAYERS, KV_HEADS, DIM, FLOAT = 3000, 2, 2, 32, 4
SIZES = {16: DIM * FLOAT, 8: DIM + 8, 4: DIM // 2 + 8}


def build(**more) -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=4096, **more,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def prefill(model: nn.Module, length: int = LENGTH, rows: int = 1) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model.model(input_ids=torch.randint(0, 50, (rows, length)), past_key_values=cache, use_cache=True)
    return cache


def mechanism(name: str) -> list:
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    return {
        "ring": [regard.place("streaming", sink=4, window=256)],
        "split": [regard.place("duo", gates=gates, sparsity=0.5, sink=16, recent=128)],
        "4 bits": [regard.place("saw_int4", key_bits=4, value_bits=4)],
        "8 and 16 bits": [regard.place("saw_int4", key_bits=8, value_bits=16)],
        "ring of codes on one layer": [
            regard.place("streaming", layers=[1], sink=4, window=256),
            regard.place("saw_int4", layers=[1], key_bits=8, value_bits=4),
        ],
    }[name]


# Bytes of a key and a value, for the heads that keep everything and for those that keep sink + recent.
FORMULAS = {
    "ring": ({}, {4 + 256: (4, 16, 16)}),
    "split": ({2: (16, 16)}, {16 + 128: (2, 16, 16)}),
    "4 bits": ({4: (4, 4)}, {}),
    "8 and 16 bits": ({4: (8, 16)}, {}),
    "ring of codes on one layer": ({2: (16, 16)}, {4 + 256: (2, 8, 4)}),
}


def expected(name: str) -> float:
    """The sheet's bytes for LENGTH tokens: nothing spare."""
    full, rings = FORMULAS[name]
    total = sum(heads * LENGTH * (SIZES[k] + SIZES[v]) for heads, (k, v) in full.items())
    return total + sum(heads * kept * (SIZES[k] + SIZES[v]) for kept, (heads, k, v) in rings.items())


@pytest.mark.parametrize("name", FORMULAS)
def test_live_bytes_are_the_formula_and_at_most_five_percent_spare(name):
    model = build()
    with regard.attach(model, mechanism(name)) as handle:
        cache = prefill(model)
        held = live_bytes(cache)
        assert expected(name) <= held <= 1.05 * expected(name)
        assert handle.nbytes == held
        for layer in cache.store_layers():
            for store in getattr(layer.store, "children", [layer.store]):
                assert sum(t.nbytes for t in store.storages()) == capacity_bytes(store)
        del cache, layer, store
        assert handle.nbytes == 0


def capacity_bytes(store: Full | Ring) -> int:
    """Formula times allocated slots."""
    bits = [16 if codec is None else int(codec.name[3:].split()[0]) for codec in (store.key_codec, store.value_codec)]
    (slots,) = store.capacity.values()
    return slots * sum(SIZES[b] for b in bits)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_profiler_sees_the_same_bytes(name):
    model = build()
    with regard.attach(model, mechanism(name)):
        prefill(model, 8)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            cache = prefill(model)
    net = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert net == pytest.approx(live_bytes(cache), rel=0.02)


def test_transformers_own_layers_are_counted_by_storage():
    model = build(layer_types=["full_attention", "sliding_attention"], sliding_window=100)
    cache = prefill(model, 1000, rows=2)
    full, sliding = (2 * 2 * KV_HEADS * 1000 * DIM * FLOAT for _ in range(2))
    assert cache.layers[1].keys.shape[2] == 99
    kept = cache.layers[1].keys.untyped_storage().nbytes() + cache.layers[1].values.untyped_storage().nbytes()
    assert kept in (sliding, sliding * 99 // 1000)
    assert live_bytes(cache) == full + kept
    assert dense_bytes(model, 2, 1000) == (full + sliding) // 2


def test_a_storage_that_several_views_share_is_counted_once():
    cache = prefill(build(), 50)
    both = torch.zeros(2, 1, 2, 50, 32)
    cache.layers[0].keys, cache.layers[0].values = both[0], both[1][:, :, 3:]
    cache.layers[1].keys = cache.layers[1].values = both[0]
    assert live_bytes(cache) == both.nbytes


@pytest.mark.parametrize("name", ["8 and 16 bits", "ring of codes on one layer"])
def test_only_what_is_stored_as_it_comes_counts_as_bf16(name):
    model = build()
    with regard.attach(model, mechanism(name)):
        cache = prefill(model)
        raw = sum(t.nbytes for layer in cache.layers for t in plain(layer))
        assert raw > 0
        assert live_bytes(cache, raw_itemsize=2) == live_bytes(cache) - raw // 2


def plain(layer):
    """Tensors of fp32 numbers as wide as a head: here no code is fp32 and no scale is that wide."""
    held = layer.storages() if hasattr(layer, "storages") else (layer.keys, layer.values)
    return [t for t in held if t.dtype == torch.float32 and t.shape[-1] == DIM]


def test_two_wide_heads_are_raw_too():
    """A head dimension of 2 looks like a pair (scale, low): what is raw is known, not guessed."""
    store, x = Full(regard.attend), torch.zeros(1, 1, 10, 2)
    store.append(x, x, Step(0, 10, 1, x.device))
    assert [t.shape for t in store.raw()] == [t.shape for t in store.storages()]
