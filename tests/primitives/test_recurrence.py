"""The three forms of the recurrence are equal, differentiable and finite."""

import itertools
import time

import pytest
import torch
from torch.autograd import gradcheck

from recurrences import KINDS, close, cut, decays, states, strengths, tokens
from regard.primitives.recurrence import chunked, quadratic, stepwise


def looped(q, k, v, decay, beta, delta, scale, state):
    """The definition over plain numbers of one head: no batch, no form of torch."""
    T, D, Dv = len(q), len(q[0]), len(v[0])
    S, out = [row[:] for row in state], []
    for t in range(T):
        S = [[decay[t][d] * x for x in S[d]] for d in range(D)]
        told = [sum(S[d][e] * k[t][d] for d in range(D)) if delta else 0.0 for e in range(Dv)]
        S = [[S[d][e] + beta[t] * k[t][d] * (v[t][e] - told[e]) for e in range(Dv)] for d in range(D)]
        out.append([scale * sum(S[d][e] * q[t][d] for d in range(D)) for e in range(Dv)])
    return out, S


@pytest.mark.parametrize("delta", [False, True])
def test_stepwise_is_the_definition(delta):
    q, k, v = tokens(1, 1, 1, 6)
    decay, beta, state = decays("channel", q, v), strengths(v), states(q, v)
    got = stepwise(q, k, v, decay=decay, beta=beta, delta=delta, scale=0.3, initial_state=state)
    plain = (x[0, 0].tolist() for x in (q, k, v, decay.exp(), beta))
    wanted = looped(*plain, delta, 0.3, state[0, 0].tolist())
    close(got, [torch.tensor(x, dtype=torch.float64)[None, None] for x in wanted], 1e-13)


@pytest.mark.parametrize(("kind", "delta", "written"), itertools.product(KINDS, [False, True], [False, True]))
@pytest.mark.parametrize("T", [1, 16, 70])
def test_forms_are_equal(kind, delta, written, T):
    q, k, v = tokens(T=T)
    call = {"decay": decays(kind, q, v), "beta": strengths(v) if written else None, "delta": delta, "scale": 0.3}
    call["initial_state"] = states(q, v) if written else None
    wanted = stepwise(q, k, v, **call)
    close(quadratic(q, k, v, **call), wanted)
    for chunk in (1, 3, 16, 64):
        close(chunked(q, k, v, chunk=chunk, **call), wanted)


@pytest.mark.parametrize(("kind", "delta"), itertools.product(KINDS, [False, True]))
def test_packed_sequences_are_separate(kind, delta):
    q, k, v = tokens(B=1)
    cuts = [0, 5, 6, 30, 37]
    decay, beta, state = decays(kind, q, v), strengths(v), states(q, v, rows=4)
    call = {"delta": delta, "scale": 0.3}
    packed = {"initial_state": state, "cu_seqlens": torch.tensor(cuts)}
    out, last = chunked(q, k, v, decay=decay, beta=beta, chunk=8, **call, **packed)
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = [cut(x, start, stop) for x in (q, k, v, decay, beta)]
        own = stepwise(*part[:3], decay=part[3], beta=part[4], initial_state=state[i : i + 1], **call)
        close((out[:, :, start:stop], last[i : i + 1]), own)


def chunked_packed(*args, **call):
    return chunked(*args, chunk=4, cu_seqlens=torch.tensor([0, 1, 6]), **call)


@pytest.mark.parametrize("form", [quadratic, chunked, chunked_packed])
@pytest.mark.parametrize(("kind", "delta"), itertools.product(KINDS, [False, True]))
def test_gradients(form, kind, delta):
    q, k, v = tokens(1, 1, 2, 6, 2, 1)
    state = states(q, v, rows=2 if form is chunked_packed else 1)
    given = [x if x is None else x.requires_grad_() for x in (q, k, v, decays(kind, q, v), strengths(v), state)]
    more = {"chunk": 4} if form is chunked else {}

    def run(q, k, v, decay, beta, state):
        return form(q, k, v, decay=decay, beta=beta, initial_state=state, delta=delta, scale=0.3, **more)

    assert gradcheck(run, given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("low", [-1e4, -torch.inf])
@pytest.mark.parametrize(("kind", "delta"), itertools.product(KINDS[1:], [False, True]))
def test_extreme_gates(kind, delta, low, dtype):
    """Decays of 0 and of nearly or exactly nothing, beta 0 and 1, in one text: finite, and as the definition."""
    q, k, v = tokens(T=70, dtype=dtype)
    drawn = torch.Generator().manual_seed(4)
    decay = decays(kind, q, v)
    decay = torch.where(torch.rand(decay.shape, generator=drawn) < 0.3, low, decay)
    decay = torch.where(torch.rand(decay.shape, generator=drawn) < 0.3, 0.0, decay).to(dtype)
    beta = torch.rand(v.shape[:3], generator=drawn).round().to(dtype)
    results = []
    for form, more in ((stepwise, {}), (quadratic, {}), (chunked, {"chunk": 64}), (chunked, {"chunk": 16})):
        given = [x.clone().requires_grad_() for x in (q, k, v, decay, beta, states(q, v))]
        out, state = form(*given[:3], decay=given[3], beta=given[4], initial_state=given[5], delta=delta, **more)
        (out.square().sum() + state.square().sum()).backward()
        results.append([out, state, *(x.grad for x in given)])
        assert all(bool(x.isfinite().all()) for x in results[-1])
    for other in results[1:]:
        close(other, results[0], 1e-9 if dtype == torch.float64 else 2e-4)


def test_a_decay_of_nothing_forgets_all_and_a_decay_of_zero_nothing():
    q, k, v = tokens(1, 1, 1, 20)
    gone = chunked(q, k, v, decay=torch.full((1,), -torch.inf, dtype=q.dtype), chunk=8)[0]
    torch.testing.assert_close(gone, (q * k).sum(-1, keepdim=True) * v)
    close(chunked(q, k, v, decay=torch.zeros(1, 1, 20, 5, dtype=q.dtype)), chunked(q, k, v))


def test_weak_gates_over_a_long_text_do_not_overflow():
    """Accumulated decays reach exp(-5 * 64) in a chunk, far below what float32 can invert."""
    q, k, v = tokens(1, 1, 1, 256, 8, 8, torch.float32)
    decay = torch.full((1, 1, 256, 8), -5.0)
    for delta in (False, True):
        wanted = stepwise(q, k, v, decay=decay, delta=delta)
        close(chunked(q, k, v, decay=decay, delta=delta), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    q, k, v = tokens(dtype=torch.float32)
    half = [x.to(dtype) for x in (q, k, v)]
    out, state = chunked(*half, decay=decays("token", q, v), beta=strengths(v), delta=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    wanted = chunked(*(x.float() for x in half), decay=decays("token", q, v), beta=strengths(v), delta=True)
    torch.testing.assert_close(state, wanted[1])
    torch.testing.assert_close(out, wanted[0].to(dtype))


@pytest.mark.parametrize("form", [stepwise, quadratic, chunked])
def test_no_tokens(form):
    q, k, v = tokens(T=0)
    state = states(q, v)
    out, last = form(q, k, v, initial_state=state)
    assert out.shape == v.shape
    assert torch.equal(last, state)
    assert form(q, k, v)[1].eq(0).all()


@pytest.mark.slow
def test_chunks_are_five_times_faster_than_all_pairs():
    """Forward and backward at T 4,096, H 4, D 64, against the quadratic product written as plainly as can be."""
    inputs = tokens(1, 4, 4, 4096, 64, 64, torch.float32)
    decay = -0.1 * torch.arange(1, 5)

    def plain(q, k, v):
        distance = torch.arange(4096)[:, None] - torch.arange(4096)
        weights = torch.where(distance >= 0, (decay[:, None, None] * distance).exp(), 0)
        return (q @ k.mT * weights) @ v

    def timed(form, count):
        times = []
        for _ in range(count):
            given = [x.clone().requires_grad_() for x in inputs]
            start = time.perf_counter()
            form(*given).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    slow, fast = timed(plain, 2), timed(lambda *given: chunked(*given, decay=decay)[0], 4)
    print(f"plain {slow:.3f} s, chunked {fast:.3f} s")
    assert slow > 5 * fast
