"""Every store against masked attention over all tokens, in float64, written out here."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Codec
from regard.ops.attention import attend
from regard.primitives.buffer import live_bytes
from regard.primitives.full import Full
from regard.primitives.head_split import HeadSplit
from regard.primitives.ring import Ring
from regard.primitives.stores import build

B, H, HK, D, DV = 2, 4, 2, 8, 8
CPU = torch.device("cpu")


def _rounded(x):
    return ((x * 8).round().to(torch.int8),)


# Coarse and in another basis (negated), so that a read that misses the codes or the basis is seen.
CODEC = Codec("eighths", _rounded, lambda f, dtype: -f[0].to(dtype) / 8, lambda x: -x, lambda x: -x, lambda x: -x)


@pytest.fixture(autouse=True)
def _nan_memory(monkeypatch):
    """Memory that was never written must never be read."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def spoil(x):
        return x.fill_(float("nan") if x.is_floating_point() else 77) if x.dtype != torch.bool else x

    monkeypatch.setattr(torch, "empty", lambda *a, **kw: spoil(empty(*a, **kw)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: spoil(new_empty(*a, **kw)))


def tokens(total, batch=B, kv_heads=HK, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, total, dim, generator=g, dtype=dtype)
        for heads, dim in ((H * kv_heads // HK, D), (kv_heads, D), (kv_heads, DV))
    ]


def dense(q, k, v, allowed):
    """Softmax attention by its equation; `allowed` is a function of (row, kv head, query, key) arrivals."""
    batch, heads, total, _ = q.shape
    group = heads // k.shape[1]
    mask = torch.tensor(
        [
            [[[allowed(b, h // group, i, j) for j in range(total)] for i in range(total)] for h in range(heads)]
            for b in range(batch)
        ]
    )
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.mT * D**-0.5).masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def streams(sink, recent, padding=None):
    def allowed(b, h, i, j):
        shift = 0 if padding is None else padding[b]
        p, s = i - shift, j - shift
        return 0 <= s <= p and (s < sink or p - s < recent)

    return allowed


def step_of(start, stop, batch, padding=None):
    return Step(start, stop - start, batch, CPU, None if padding is None else torch.tensor(padding))


def drive(store, pattern, q, k, v, cuts, padding=None):
    """Outputs of the forwards between `cuts`, joined, and the lses."""
    outs = []
    for start, stop in pairwise(cuts):
        step = step_of(start, stop, q.shape[0], padding)
        view = store.append(k[:, :, start:stop], v[:, :, start:stop], step)
        out, _ = view.attend(q[:, :, start:stop], pattern=pattern, step=step, scale=D**-0.5)
        outs.append(out)
    return torch.cat(outs, dim=2)


def pattern_of(sink, recent):
    return Pattern.sink(sink) | Pattern.window(recent)


def close(a, b, padding=None, tolerance=1e-10):
    """Rows that are real tokens agree."""
    for b_, shift in enumerate(padding or [0] * a.shape[0]):
        torch.testing.assert_close(a[b_, :, shift:], b[b_, :, shift:], atol=tolerance, rtol=tolerance)


cases = st.integers(1, 40).flatmap(
    lambda total: st.tuples(
        st.just(total),
        st.lists(st.integers(1, 40), max_size=8).map(lambda c: [0, *sorted({x for x in c if x < total}), total]),
        st.one_of(st.none(), st.lists(st.integers(0, total - 1), min_size=B, max_size=B)),
    )
)


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(0, 5), st.integers(1, 12), st.booleans())
def test_ring_equals_masked_dense(case, sink, recent, coded):
    total, cuts, padding = case
    q, k, v = tokens(total)
    codec = CODEC if coded else None
    ring = Ring(attend, sink, recent, codec, codec)
    with torch.no_grad():
        out = drive(ring, pattern_of(sink, recent), q, k, v, cuts, padding)
    if coded:
        k, v = (_rounded(x)[0].double() / 8 for x in (k, v))
    close(out, dense(q, k, v, streams(sink, recent, padding)), padding)
    assert ring.length == total
    assert ring.capacity["ring"] <= HK * (sink + recent + max(4, (sink + recent) // 32))


@settings(max_examples=40, deadline=None)
@given(cases, st.booleans())
def test_full_equals_masked_dense(case, coded):
    total, cuts, padding = case
    q, k, v = tokens(total)
    codec = CODEC if coded else None
    with torch.no_grad():
        out = drive(Full(attend, codec, codec), Pattern.causal(), q, k, v, cuts, padding)
    if coded:
        k, v = (_rounded(x)[0].double() / 8 for x in (k, v))
    close(out, dense(q, k, v, streams(0, total, padding)), padding)


@settings(max_examples=40, deadline=None)
@given(cases, st.permutations(range(4)))
def test_mixed_heads_equal_masked_dense(case, order):
    """Four KV heads: full, two rings of different reach, a coded ring; in any order."""
    total, cuts, padding = case
    q, k, v = tokens(total, kv_heads=4)
    reach = [(0, total), (2, 5), (0, 3), (2, 5)]
    kinds = [Pattern.causal(), pattern_of(2, 5), Pattern.window(3), pattern_of(2, 5)]
    codecs = [None, None, None, CODEC]
    pattern = Pattern.stack_heads([kinds[i] for i in order])
    codec = [codecs[i] for i in order]
    store = build(pattern, codec, codec, 4, attend)
    assert isinstance(store, HeadSplit)
    assert len(store.children) == 4
    with torch.no_grad():
        out = drive(store, pattern, q, k, v, cuts, padding)
    for head, i in enumerate(order):
        if i == 3:
            k[:, head], v[:, head] = (_rounded(x[:, head])[0].double() / 8 for x in (k, v))
    rules = [streams(*reach[i], padding) for i in order]
    close(out, dense(q, k, v, lambda b, h, i, j: rules[h](b, h, i, j)), padding)


def test_build_chooses_containers():
    none = [None] * 3
    assert isinstance(build(Pattern.causal(), none, none, 3, attend), Full)
    ring = build(pattern_of(4, 16), none, none, 3, attend)
    assert isinstance(ring, Ring)
    assert (ring.sink, ring.past) == (4, 15)
    split = build(Pattern.causal(), [CODEC, None, CODEC], none, 3, attend)
    assert isinstance(split, HeadSplit)
    assert split.heads == [(0, 2), (1,)]
    with pytest.raises(RegardError, match="3 KV heads, but the pattern has 2"):
        build(Pattern.stack_heads([Pattern.causal()] * 2), none, none, 3, attend)


def test_head_groups_must_cover():
    with pytest.raises(RegardError, match="each of the 2 KV heads once"):
        HeadSplit([([0], Full(attend)), ([2], Full(attend))])


def test_head_order_leaves_dense_output_unchanged():
    q, k, v = tokens(9, kv_heads=4)
    whole = drive(Full(attend), Pattern.causal(), q, k, v, [0, 6, 9])
    split = HeadSplit([([3, 0], Full(attend)), ([2], Full(attend)), ([1], Full(attend))])
    assert torch.equal(drive(split, Pattern.causal(), q, k, v, [0, 6, 9]), whole)


def make(name):
    if name == "full":
        return Full(attend), Pattern.causal(), streams(0, 99)
    if name == "ring":
        return Ring(attend, 2, 6), pattern_of(2, 6), streams(2, 6)
    pattern = Pattern.stack_heads([pattern_of(2, 6), Pattern.causal()])
    rules = [streams(2, 6), streams(0, 99)]
    return build(pattern, [None] * 2, [None] * 2, 2, attend), pattern, lambda b, h, i, j: rules[h](b, h, i, j)


names = pytest.mark.parametrize("name", ["full", "ring", "split"])


@names
@torch.no_grad()
def test_reorder_repeats_and_selects_rows(name):
    store, pattern, rule = make(name)
    rows = torch.tensor([1, 0, 1])
    q, k, v = tokens(20)
    store.state["mark"] = torch.tensor([10, 11])
    drive(store, pattern, q, k, v, [0, 15])
    store.reorder(rows)
    assert store.state["mark"].tolist() == [11, 10, 11]
    q, k, v = (x[rows] for x in (q, k, v))
    step = step_of(15, 20, 3)
    out, _ = store.append(k[:, :, 15:], v[:, :, 15:], step).attend(
        q[:, :, 15:], pattern=pattern, step=step, scale=D**-0.5
    )
    close(out, dense(q, k, v, rule)[:, :, 15:])


@torch.no_grad()
def test_reorder_moves_the_sinks_of_padded_rows():
    padding = [5, 0]
    q, k, v = tokens(24)
    ring = Ring(attend, 3, 4)
    drive(ring, pattern_of(3, 4), q, k, v, [0, 7, 14, 15, 16], padding)
    ring.reorder(torch.tensor([1, 0]))
    q, k, v = (x.flip(0) for x in (q, k, v))
    step = step_of(16, 24, 2, [0, 5])
    out, _ = ring.append(k[:, :, 16:], v[:, :, 16:], step).attend(
        q[:, :, 16:], pattern=pattern_of(3, 4), step=step, scale=D**-0.5
    )
    close(out, dense(q, k, v, streams(3, 4, [0, 5]))[:, :, 16:])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["full", "ring", "split"]),
    st.integers(1, 25),
    st.lists(st.tuples(st.integers(1, 14), st.integers(0, 13)), max_size=5),
)
def test_recorded_forwards_can_be_undone(name, prompt, rounds):
    """Prompt lookup: write a draft, keep its first tokens, write other tokens over the rest."""
    store, pattern, rule = make(name)
    q, k, v = tokens(prompt + sum(kept for _, kept in rounds) + 15)
    wrong = tokens(20, seed=1)
    with torch.no_grad():
        drive(store, pattern, q, k, v, [0, prompt])
        length = prompt
        for width, kept in rounds:
            kept = min(kept, width)
            step = step_of(length, length + width, B)
            draft = [
                torch.cat((x[:, :, length : length + kept], w[:, :, : width - kept]), 2)
                for x, w in zip((q, k, v), wrong, strict=True)
            ]
            store.record()
            store.append(draft[1], draft[2], step).attend(draft[0], pattern=pattern, step=step, scale=1.0)
            store.crop(length + kept)
            length += kept
            assert store.length == length
            assert store.capacity.get("ring", 0) <= HK * (2 + 6 + 4)
        step = step_of(length, length + 15, B)
        q, k, v = (x[:, :, : length + 15] for x in (q, k, v))
        view = store.append(k[:, :, length:], v[:, :, length:], step)
        out, _ = view.attend(q[:, :, length:], pattern=pattern, step=step, scale=D**-0.5)
    close(out, dense(q, k, v, rule)[:, :, length:])


@torch.no_grad()
def test_crop_refuses_what_is_gone_and_changes_nothing():
    q, k, v = tokens(60)
    for store, pattern, _ in (make("ring"), make("split")):
        drive(store, pattern, q, k, v, [0, 30, *range(31, 34)])
        free = store.removable
        with pytest.raises(RegardError, match=f"{free} can be removed"):
            store.crop(33 - free - 1)
        assert store.length == 33
        assert all(child.length == 33 for child in getattr(store, "children", []))
        store.crop(33 - free)
        assert store.length == 33 - free
        with pytest.raises(RegardError, match="-1 arrivals"):
            store.crop(-1)


@torch.no_grad()
def test_short_ring_crops_to_anything():
    store, _, _ = make("ring")
    q, k, v = tokens(60)
    drive(store, pattern_of(2, 6), q, k, v, [0, 8])
    assert store.removable == 8
    store.crop(0)
    assert store.length == 0


@names
@torch.no_grad()
def test_reset_releases_and_starts_anew(name):
    store, pattern, rule = make(name)
    q, k, v = tokens(20)
    drive(store, pattern, q, k, v, [0, 13, 20])
    store.state["mark"] = torch.zeros(2)
    store.reset()
    assert (store.length, list(store.storages()), store.state) == (0, [], {})
    close(drive(store, pattern, q, k, v, [0, 5, 20]), dense(q, k, v, rule))


def test_a_forward_out_of_turn_is_refused():
    q, k, v = tokens(10)
    store = Full(attend)
    drive(store, Pattern.causal(), q, k, v, [0, 4])
    with pytest.raises(RegardError, match="from arrival 6 on met a store that ends at 4"):
        store.append(k, v, step_of(6, 16, B))
    with pytest.raises(RegardError, match=r"\(1, 2\) \(rows, heads\) were written to a store of \(2, 2\)"):
        store.append(k[:1], v[:1], step_of(4, 14, 1))


@torch.no_grad()
def test_capacity_and_bytes_at_3000_tokens():
    _, k, v = tokens(3000, batch=1, dtype=torch.float32)
    sink, recent = 16, 256
    for store in (Full(attend), Ring(attend, sink, recent), Full(attend, CODEC, None)):
        for start, stop in pairwise([0, 1000, *range(1001, 1100), 2000, *range(2001, 2100), 3000]):
            store.append(k[:, :, start:stop], v[:, :, start:stop], step_of(start, stop, 1))
            (slots,) = store.capacity.values()
            held = stop if isinstance(store, Full) else sink + recent
            assert slots <= 1.05 * HK * held
        key_bytes = D if store.key_codec else 4 * D
        assert live_bytes(store.storages()) == slots * (key_bytes + 4 * DV)


@torch.no_grad()
def test_ring_memory_starts_with_the_prompt():
    _, k, v = tokens(10, batch=1)
    ring = Ring(attend, 64, 4096)
    ring.append(k, v, step_of(0, 10, 1))
    assert ring.capacity["ring"] <= HK * 26


def test_live_bytes_counts_a_storage_once():
    x = torch.zeros(10)
    assert live_bytes([x, x[2:], x.view(2, 5), torch.zeros(3)]) == 40 + 12


@names
def test_gradients_of_one_forward_are_those_of_dense(name):
    store, pattern, rule = make(name)
    leaves = [x.requires_grad_() for x in tokens(20)]
    drive(store, pattern, *leaves, [0, 20]).square().sum().backward()
    got = [x.grad for x in leaves]
    assert not any(x.requires_grad for x in store.storages())
    leaves = [x.detach().requires_grad_() for x in leaves]
    dense(*leaves, rule).square().sum().backward()
    for a, b in zip(got, leaves, strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-10, rtol=1e-10)


@names
def test_gradients_reach_the_chunk_but_not_the_past(name):
    store, pattern, rule = make(name)
    q, k, v = tokens(23)
    leaves = [x[:, :, 15:20].clone().requires_grad_() for x in (q, k, v)]
    full = [torch.cat((x[:, :, :15], y, x[:, :, 20:]), 2) for x, y in zip((q, k, v), leaves, strict=True)]
    out = drive(store, pattern, *full, [0, 15, 20])
    # A later append must not disturb what backward needs.
    drive_on = step_of(20, 23, B)
    store.append(full[1][:, :, 20:], full[2][:, :, 20:], drive_on)
    out[:, :, 15:].square().sum().backward()
    got = [x.grad for x in leaves]
    again = [x.detach().requires_grad_() for x in leaves]
    full = [torch.cat((x[:, :, :15], y), 2) for x, y in zip((q, k, v), again, strict=True)]
    dense(*full, rule)[:, :, 15:].square().sum().backward()
    for a, b in zip(got, again, strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-10, rtol=1e-10)


def test_gradients_pass_straight_through_codecs():
    q, k, v = tokens(8)
    k.requires_grad_()
    v.requires_grad_()
    out = drive(Full(attend, CODEC, CODEC), Pattern.causal(), q, k, v, [0, 8])
    out.sum().backward()
    rounded = [(_rounded(x.detach())[0].double() / 8).requires_grad_() for x in (k, v)]
    dense(q, *rounded, streams(0, 9)).sum().backward()
    torch.testing.assert_close(k.grad, rounded[0].grad, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(v.grad, rounded[1].grad, atol=1e-10, rtol=1e-10)


def test_a_store_filled_in_inference_mode_goes_on_outside():
    for name in ("full", "ring"):
        store, pattern, rule = make(name)
        q, k, v = tokens(20)
        with torch.inference_mode():
            drive(store, pattern, q, k, v, [0, 12])
        with torch.no_grad():
            step = step_of(12, 20, B)
            view = store.append(k[:, :, 12:], v[:, :, 12:], step)
            out, _ = view.attend(q[:, :, 12:], pattern=pattern, step=step, scale=D**-0.5)
        close(out, dense(q, k, v, rule)[:, :, 12:])


@names
@torch.no_grad()
def test_what_is_written_is_not_the_caller_s_memory(name):
    store, pattern, rule = make(name)
    q, k, v = tokens(12)
    first = [x[:, :, :6].clone() for x in (k, v)]
    store.append(*first, step_of(0, 6, B))
    for x in first:
        x.zero_()
    step = step_of(6, 12, B)
    out, _ = store.append(k[:, :, 6:], v[:, :, 6:], step).attend(q[:, :, 6:], pattern=pattern, step=step, scale=D**-0.5)
    close(out, dense(q, k, v, rule)[:, :, 6:])
