"""The latent store against plain attention over one key head, and what it refuses."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.attention import attend
from regard.ops.cache import saw_int4
from regard.primitives.buffer import live_bytes
from regard.primitives.latent import Latent

B, H, R, E = 2, 3, 10, 4
CPU = torch.device("cpu")


def tokens(total, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (H, total, R + E), (1, total, R), (1, total, E)
    return [torch.randn(B, *shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def write(store, c, kappa, start, stop, padding=None):
    step = Step(start, stop - start, B, CPU, None if padding is None else torch.tensor(padding))
    return store.append(c[:, :, start:stop], kappa[:, :, start:stop], step), step


def expected(q, c, kappa, pattern, padding):
    """Latents as the keys and the values of one head, all at once."""
    keys = torch.cat((c, kappa), -1)
    at = torch.arange(q.shape[2])[None] - torch.tensor(padding or [0] * B)[:, None]
    return attend(q, keys, c, pattern=pattern, scale=0.3, q_positions=at, k_positions=at, backend="reference")[0]


cases = st.integers(1, 30).flatmap(
    lambda total: st.tuples(
        st.just(total),
        st.lists(st.integers(1, 30), max_size=6).map(lambda c: [0, *sorted({x for x in c if x < total}), total]),
        st.one_of(st.none(), st.lists(st.integers(0, total - 1), min_size=B, max_size=B)),
        st.sampled_from([Pattern.causal(), Pattern.sink(1) | Pattern.window(4)]),
    )
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_any_chunks_equal_one_forward(case):
    total, cuts, padding, pattern = case
    q, c, kappa = tokens(total)
    store, outs = Latent(attend), []
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            view, step = write(store, c, kappa, start, stop, padding)
            outs.append(view.attend(q[:, :, start:stop], pattern=pattern, step=step, scale=0.3)[0])
    torch.testing.assert_close(torch.cat(outs, 2), expected(q, c, kappa, pattern, padding), atol=1e-10, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.lists(st.integers(0, B - 1), min_size=1, max_size=4))
def test_cut_and_reordered_it_goes_on(total, kept, rows):
    q, c, kappa = tokens(total + 3)
    store = Latent(attend)
    with torch.no_grad():
        write(store, c, kappa, 0, total)
        store.crop(kept)
        kept = min(kept, total)
        assert store.length == kept
        store.reorder(torch.tensor(rows))
        q, c, kappa = (x[rows] for x in (q, c, kappa))
        step = Step(kept, total + 3 - kept, len(rows), CPU)
        view = store.append(c[:, :, kept:], kappa[:, :, kept:], step)
        out = view.attend(q[:, :, kept:], pattern=Pattern.causal(), step=step, scale=0.3)[0]
    whole = expected(q, c, kappa, Pattern.causal(), [0] * len(rows))
    torch.testing.assert_close(out, whole[:, :, kept:], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("total", [1, 1000, 5000])
@torch.no_grad()
def test_every_token_is_held_once(total):
    """r + e numbers a token, for any number of heads; at most 5 % more slots, from 1,000 tokens on."""
    _, c, kappa = tokens(total, torch.bfloat16)
    store = Latent(attend)
    view, _ = write(store, c, kappa, 0, total)
    slots = store.capacity["latent"]
    assert list(store.capacity) == ["latent"]
    assert live_bytes(store.storages()) == live_bytes(store.raw()) == B * slots * (R + E) * 2
    assert total <= slots <= max(total * 1.05, total + 16)
    for part in range(total, total + 40):
        view = store.append(c[:, :, :1], kappa[:, :, :1], Step(part, 1, B, CPU))
    assert view.latent.shape == (B, total + 40, R + E)
    assert view.rank == R
    # What the View shows is the store's own memory, keys and values alike.
    held = {x.untyped_storage().data_ptr() for x in (*view.key_fields, *view.value_fields, *store.storages())}
    assert held == {view.latent.untyped_storage().data_ptr()}
    store.reset()
    assert store.length == live_bytes(store.storages()) == 0


def test_gradients_reach_this_forward():
    q, c, kappa = tokens(6)
    c.requires_grad_()
    kappa.requires_grad_()
    store = Latent(attend)
    write(store, c, kappa, 0, 4)
    view, step = write(store, c, kappa, 4, 6)
    view.attend(q[:, :, 4:], pattern=Pattern.causal(), step=step, scale=0.3)[0].sum().backward()
    for grad in (c.grad, kappa.grad):
        assert (grad[:, :, :4] == 0).all()
        assert (grad[:, :, 4:] != 0).all()


def test_bad_writes():
    _, c, kappa = tokens(6)
    store = Latent(attend)
    write(store, c, kappa, 0, 3)
    step = Step(3, 3, B, CPU)
    bad = {
        r"one for all heads; got \[2, 2, 3, 10\]": (c[:, :, 3:].repeat(1, 2, 1, 1), kappa[:, :, 3:].repeat(1, 2, 1, 1)),
        r"one for all heads; got \[2, 1, 3, 10\] and \[2, 1, 2, 4\]": (c[:, :, 3:], kappa[:, :, 4:]),
        r"r \+ e = 9 \+ 4 were written to a latent store of 10 \+ 4": (c[:, :, 3:, 1:], kappa[:, :, 3:]),
        r"r \+ e = 9 \+ 5 were written": (c[:, :, 3:, 1:], torch.cat((kappa, kappa), -1)[:, :, 3:, :5]),
        "latents are torch.float64, their rotary keys torch.float32": (c[:, :, 3:], kappa[:, :, 3:].float()),
        "torch.float32 was written to a latent store of torch.float64": (c[:, :, 3:].float(), kappa[:, :, 3:].float()),
        r"\(1, 1\) \(rows, heads\) were written to a store of \(2, 1\)": (c[:1, :, 3:], kappa[:1, :, 3:]),
    }
    for match, (some, turned) in bad.items():
        with pytest.raises(RegardError, match=match):
            store.append(some, turned, step)
    with pytest.raises(RegardError, match="from arrival 5 on met a store that ends at 3"):
        store.append(c[:, :, 5:], kappa[:, :, 5:], Step(5, 1, B, CPU))
    with pytest.raises(RegardError, match="cannot crop to -1 arrivals"):
        store.crop(-1)
    assert store.length == 3
    write(store, c, kappa, 3, 6)


def test_codecs_are_refused():
    where = Where(layer=0, layers=1, heads=2, kv_heads=1, head_dim=16)
    key, value = saw_int4.encode(where, key_bits=4, value_bits=4, block=None, rotate_v=False)
    with pytest.raises(RegardError, match=f"a latent store takes no codec, got {key.name!r}"):
        Latent(attend, key, value)
    with pytest.raises(RegardError, match="a latent store takes no codec"):
        Latent(attend, None, value)
