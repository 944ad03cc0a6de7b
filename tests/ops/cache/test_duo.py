"""DuoAttention: oracles of the paper's sheet."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.attention import attend
from regard.ops.cache.duo import blend, distillation_loss, keep, learning_rate, streaming_heads
from regard.primitives.stores import build

L, HK, SINK, RECENT = 3, 2, 2, 5
OPTIONS = {"sparsity": 0.5, "threshold": None, "sink": SINK, "recent": RECENT}
GATES = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])


def where(layer):
    return Where(layer=layer, layers=L, heads=4, kv_heads=HK, head_dim=8)


def stream(total):
    i, j = torch.arange(total)[:, None], torch.arange(total)
    return (j <= i) & ((j < SINK) | (i - j < RECENT))


def test_sparsity_0_is_dense_and_1_is_streaming():
    for layer in range(L):
        assert keep(where(layer), gates=GATES, **OPTIONS | {"sparsity": 0.0}).is_causal
        every = keep(where(layer), gates=GATES, **OPTIONS | {"sparsity": 1.0})
        assert torch.equal(every.to_dense(20), stream(20).expand(HK, 20, 20))
    assert keep(where(0), gates=None, **OPTIONS | {"sparsity": 0.0}).is_causal


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=12, max_size=12),
    st.floats(0, 1),
)
def test_exactly_the_wanted_share_streams_lowest_gates_first(values, sparsity):
    gates = torch.tensor(values).view(4, 3)
    chosen = streaming_heads(gates, sparsity)
    assert int(chosen.sum()) == round(sparsity * 12)
    order = sorted((gate, place) for place, gate in enumerate(values))
    assert {place for _, place in order[: int(chosen.sum())]} == set(chosen.flatten().nonzero()[:, 0].tolist())


def test_gates_of_all_layers_compete():
    chosen = streaming_heads(GATES, 0.5)
    assert chosen.tolist() == [[False, True], [True, False], [True, False]]
    told = keep(where(1), gates=GATES, **OPTIONS).to_dense(20)
    assert torch.equal(told[0], stream(20))
    assert torch.equal(told[1], torch.ones(20, 20, dtype=torch.bool).tril())


def test_threshold_replaces_sparsity():
    pattern = keep(where(0), gates=GATES, **OPTIONS | {"threshold": 0.5})
    assert [r.recent for r in pattern.reach()] == [None, RECENT]
    assert keep(where(1), gates=GATES, **OPTIONS | {"threshold": 0.5}).is_causal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": None}, "needs its gates"),
        ({"gates": torch.ones(HK, L)}, r"gates \[2, 3\], this model needs .* \[3, 2\]"),
        ({"gates": torch.full((L, HK), float("nan"))}, "not finite"),
        ({"recent": 0}, "recent=0"),
        ({"sink": -1}, "sink=-1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(RegardError, match=message):
        keep(where(0), **{"gates": GATES, **OPTIONS, **change})


@torch.no_grad()
def test_two_caches_equal_masked_dense_attention_per_head_in_constant_memory():
    total = 70
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, total, 8, generator=g, dtype=torch.float64) for h in (4, HK, HK))
    pattern = keep(where(0), gates=GATES, **OPTIONS)
    store = build(pattern, [None] * HK, [None] * HK, HK, attend)
    outs = []
    for start, stop in pairwise([0, 20, 40, *range(41, total + 1)]):
        step = Step(start, stop - start, 1, torch.device("cpu"))
        view = store.append(k[:, :, start:stop], v[:, :, start:stop], step)
        outs.append(view.attend(q[:, :, start:stop], pattern=pattern, step=step, scale=0.3)[0])
        assert store.capacity["ring"] <= SINK + RECENT + 4
    mask = torch.stack([torch.ones(total, total, dtype=torch.bool).tril(), stream(total)]).repeat_interleave(2, 0)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=1e-12, rtol=1e-12)


def test_blend_is_full_at_1_and_stream_at_0_and_clamps():
    full, stream_ = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    out = blend(torch.tensor([1.5, -0.5]), full, stream_)
    assert torch.equal(out[:, :2], full[:, :2])
    assert torch.equal(out[:, 2:], stream_[:, 2:])


def test_loss_is_0_when_all_gates_are_1_and_only_gates_get_gradients():
    gates = torch.ones(1, HK, requires_grad=True)
    full, stream_ = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8)
    hidden, mixed = (x.transpose(1, 2).flatten(2) for x in (full, blend(gates[0], full, stream_)))
    assert distillation_loss(hidden, mixed, gates, weight=0.0).item() == 0
    torch.testing.assert_close(distillation_loss(hidden, mixed, gates).item(), 0.05)
    distillation_loss(hidden, mixed, gates).backward()
    assert gates.grad.numel() == HK


def test_loss_counts_answer_tokens_only():
    full, mixed = torch.zeros(1, 3, 2), torch.tensor([[[9.0, 9.0], [1.0, 3.0], [9.0, 9.0]]])
    answers = torch.tensor([[False, True, False]])
    loss = distillation_loss(full, mixed, torch.tensor([[0.5, 2.0]]), answers=answers)
    assert loss.item() == pytest.approx((1 + 9) / 2 + 0.05 * 0.75)


def test_learning_rate_rises_holds_and_falls():
    rates = [learning_rate(step, 2000) for step in range(2000)]
    assert rates[0] == rates[-1] == pytest.approx(0.002)
    assert rates[199] == pytest.approx(0.01)
    assert rates[399] == rates[1600] == pytest.approx(0.02)
    assert rates[1799] == pytest.approx(0.02 * 201 / 400)


def test_training_finds_the_retrieval_head():
    """One head copies from far away, three look at themselves; 200 steps tell them apart."""
    g = torch.Generator().manual_seed(1)
    total, dim = 48, 16
    v = torch.randn(1, 4, total, dim, generator=g)
    place = torch.randn(total, dim, generator=g) * 2
    k = place.expand(1, 4, -1, -1)
    # Head 0 asks for position i - 24, the others for their own.
    q = torch.stack([place.roll(24, 0), place, place, place])[None]
    full, _ = attend(q, k, v)
    streamed, _ = attend(q, k, v, pattern=Pattern.sink(2) | Pattern.window(8))
    gates = torch.ones(1, 4, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], lr=0.02, weight_decay=0.0)
    for step in range(200):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, 200)
        hidden, mixed = (x.transpose(1, 2).flatten(2) for x in (full, blend(gates[0], full, streamed)))
        optimiser.zero_grad()
        distillation_loss(hidden, mixed, gates).backward()
        optimiser.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
    assert gates[0, 0] > 0.9
    assert (gates[0, 1:] < 0.1).all()
