"""Latent attention: expanded and absorbed against a slow loop, each other, and what a store shows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.ops import latent as ops
from regard.ops.attention import attend as plain
from regard.primitives.latent import Latent

B, H, R, E, DN, DV = 2, 3, 12, 4, 6, 5


def inputs(T, S, *, rows=B, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, H, T, DN + E), (rows, S, R + E), (H, R, DN), (H, R, DV)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def loop(q, latent, keys_up, values_up, *, seen, scale):
    """One head, one query, one key at a time, by the definition of the sheet; `seen(b, t, s)`."""
    rows, heads, T, _ = q.shape
    outs, lses = [], []
    for b, h, t in itertools.product(range(rows), range(heads), range(T)):
        scores, values = [], []
        for s in range(latent.shape[1]):
            if seen(b, t, s):
                c, kappa = latent[b, s, :R], latent[b, s, R:]
                key = torch.cat([keys_up[h].T @ c, kappa])
                scores.append(scale * (q[b, h, t] * key).sum())
                values.append(values_up[h].T @ c)
        if scores:
            outs.append((torch.softmax(torch.stack(scores), 0)[:, None] * torch.stack(values)).sum(0))
            lses.append(torch.logsumexp(torch.stack(scores), 0))
        else:
            outs.append(torch.zeros(values_up.shape[2], dtype=q.dtype))
            lses.append(torch.tensor(-torch.inf, dtype=q.dtype))
    return torch.stack(outs).view(rows, heads, T, -1), torch.stack(lses).view(rows, heads, T)


def agree(found, expected, most=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=most, rtol=most)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (4, 4), (3, 11), (5, 3)])
def test_definition(form, T, S):
    given_, scale = inputs(T, S), 0.37
    expected = loop(*given_, seen=lambda b, t, s: s <= S - T + t, scale=scale)
    agree(ops.attend(*given_, scale=scale, form=form), expected)
    everything = loop(*given_, seen=lambda b, t, s: True, scale=(DN + E) ** -0.5)
    agree(ops.attend(*given_, causal=False, form=form), everything)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_patterns_and_padding(form):
    T, S, padding = 6, 10, [0, 7]
    given_, pattern = inputs(T, S), Pattern.sink(2) | Pattern.window(3)

    def seen(b, t, s):
        query, key = S - T + t - padding[b], s - padding[b]
        return key >= 0 and key <= query and (key < 2 or query - key < 3)

    found = ops.attend(*given_, pattern=pattern, padding=torch.tensor(padding), form=form)
    agree(found, loop(*given_, seen=seen, scale=(DN + E) ** -0.5))
    assert (found[1][1, :, :3] == -torch.inf).all()
    with pytest.raises(RegardError, match="sees no key"):
        ops.attend(*given_, padding=torch.tensor(padding), form=form, empty="raise")


sizes = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(0, 3), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_absorbed_equals_expanded_with_gradients(case):
    T, S, seed, capped, biased = case
    rest = {"softcap": 2.0 if capped else None, "pattern": Pattern.window(4) if seed % 2 else None}
    if biased:
        rest["bias"] = torch.randn(1, H, T, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    results = []
    for form in ("expanded", "absorbed"):
        given_ = inputs(T, S, grad=True, seed=seed)
        out, lse = ops.attend(*given_, form=form, **rest)
        reached = lse[lse > -torch.inf]
        (out.square().sum() + reached.sin().sum()).backward()
        results.append((out, lse, *(x.grad for x in given_)))
    agree(*results)


def test_positions():
    T, S = 3, 8
    given_ = inputs(T, S)
    q_pos, k_pos = torch.tensor([[4, 2, 9]]), torch.tensor([[3, -1, 0, 9, 7, 2, 5, 4]]).expand(B, -1)
    expected = loop(*given_, seen=lambda b, t, s: 0 <= k_pos[b, s] <= q_pos[0, t], scale=(DN + E) ** -0.5)
    for form in ("expanded", "absorbed"):
        agree(ops.attend(*given_, q_positions=q_pos, k_positions=k_pos, form=form), expected)


def test_patterns_that_differ_among_heads_are_expanded():
    given_ = inputs(4, 9)
    pattern = Pattern.stack_heads([Pattern.causal(), Pattern.window(2), Pattern.sink(1)])
    assert ops.choose(*given_, pattern=pattern)[0] == "expanded"
    out = ops.attend(*given_, pattern=pattern)[0]
    for h, one in enumerate((Pattern.causal(), Pattern.window(2), Pattern.sink(1))):
        torch.testing.assert_close(out[:, h], ops.attend(*given_, pattern=one)[0][:, h], atol=1e-12, rtol=0)
    with pytest.raises(RegardError, match="the pattern differs among 3 heads"):
        ops.attend(*given_, pattern=pattern, form="absorbed")


def counted(form, T, S, r, e, dn, dv, heads=2):
    """Multiplications, product by product."""
    pairs = heads * T * S
    if form == "expanded":
        return heads * S * r * dn + heads * S * r * dv + pairs * (dn + e) + pairs * dv
    return heads * T * r * dn + pairs * (r + e) + pairs * r + heads * T * r * dv


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 4000), st.sampled_from([(512, 64, 128, 128), (12, 4, 6, 5), (4, 2, 9, 9)]))
def test_the_cheaper_form(T, S, shape):
    r, e, dn, dv = shape
    size = ops.Sizes(1, 2, T, S, r, e, dn, dv)
    absorbed, expanded = (counted(form, T, S, *shape) for form in ("absorbed", "expanded"))
    assert (size.products("absorbed"), size.products("expanded")) == (absorbed, expanded)
    assert (size.crossover > T) == (absorbed < expanded)


def test_choice():
    assert ops.Sizes(1, 128, 1, 10**9, 512, 64, 128, 128).crossover == pytest.approx(512 * 256 / 768, rel=1e-3)
    assert ops.choose(*inputs(1, 50))[:2] == ("absorbed", "auto")
    form, _, why = ops.choose(*inputs(50, 50))
    assert form == "expanded"
    assert "queries" in why
    assert ops.choose(*inputs(50, 50), form="absorbed") == ("absorbed", "auto", "asked for")


@pytest.mark.parametrize("padding", [None, [0, 2]])
def test_a_store_is_read_through_projections(padding):
    """Chunks written to a store and read through it equal one call over all tokens."""
    q, latent, keys_up, values_up = inputs(9, 9)
    left = None if padding is None else torch.tensor(padding)
    expected = ops.attend(q, latent, keys_up, values_up, padding=left, form="expanded")
    store, outs = Latent(plain), []
    for start, stop in itertools.pairwise((0, 4, 5, 6, 9)):
        step = Step(start, stop - start, B, q.device, left)
        part = latent[:, None, start:stop]
        view = store.append(part[..., :R], part[..., R:], step)
        outs.append(ops.read(view, q[:, :, start:stop], keys_up, values_up, step=step))
        absorbed = view.attend(ops.absorb(q[:, :, start:stop], keys_up), pattern=Pattern.causal(), step=step,
                               scale=(DN + E) ** -0.5)  # fmt: skip
        agree((torch.einsum("bhtr,hrd->bhtd", absorbed[0], values_up), absorbed[1]), outs[-1])
    agree([torch.cat(parts, 2) for parts in zip(*outs, strict=True)], expected)


def test_a_store_is_read_in_places():
    q, latent, keys_up, values_up = inputs(2, 8)
    store, step = Latent(plain), Step(0, 8, B, q.device)
    view = store.append(latent[:, None, :, :R], latent[:, None, :, R:], step)
    index = torch.tensor([[0, 3, -1, 6, 7]])
    found = ops.read(view, q, keys_up, values_up, step=Step(6, 2, B, q.device), index=index)
    expected = loop(q, latent, keys_up, values_up, seen=lambda b, t, s: s in (0, 3, 6, 7) and s <= 6 + t,
                    scale=(DN + E) ** -0.5)  # fmt: skip
    agree(found, expected)


def test_low_precision():
    given_ = inputs(2, 40, seed=3)
    exact = ops.attend(*given_)
    found = ops.attend(*(x.bfloat16() for x in given_))
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert (found[0].double() - exact[0]).abs().max() < 0.05 * exact[0].abs().max()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q, c, u, v: (q, c[..., 1:], u, v), r"r \+ e = 12 \+ 3 for this keys_up, so that q must .* = 9"),
        (lambda q, c, u, v: (q, c, u[:, 1:], v), r"r \+ e = 11 \+ 5.*and values_up r = 11 rows"),
        (lambda q, c, u, v: (q, c, u, v[:, 1:]), r"values_up r = 12 rows: got .*values_up \[3, 11, 5\]"),
        (lambda q, c, u, v: (q[:, 1:], c, u, v), "2 query heads, but keys_up is of 3 and values_up of 3"),
        (lambda q, c, u, v: (q, c, u, v[1:]), "3 query heads, but keys_up is of 3 and values_up of 2"),
        (lambda q, c, u, v: (q, c[:1], u, v), r"q \[B, H, T, dn \+ e\].*disagree"),
        (lambda q, c, u, v: (q, c[:, None], u, v), r"latent \[B, S, r \+ e\].*disagree"),
        (lambda q, c, u, v: (q, c.float(), u, v), "one float dtype, got .*'latent': torch.float32"),
    ],
)  # fmt: skip
def test_bad_input(change, match):
    with pytest.raises(RegardError, match=match):
        ops.attend(*change(*inputs(2, 5)))


def test_bad_choices():
    given_ = inputs(2, 5)
    with pytest.raises(RegardError, match=r"unknown form 'absorb'.*Did you mean 'absorbed'"):
        ops.attend(*given_, form="absorb")
    with pytest.raises(RegardError, match=r"unknown backend 'trition'.*Did you mean 'triton'"):
        ops.attend(*given_, backend="trition")
    with pytest.raises(RegardError, match="kernel is of the absorbed form"):
        ops.attend(*given_, form="expanded", backend="triton")
    with pytest.raises(RegardError, match=r"backend 'triton' refuses: .*CUDA"):
        ops.attend(*given_, backend="triton")
    with pytest.raises(RegardError, match=r"backend 'triton' refuses: .*no other pattern, bias"):
        ops.attend(*given_, backend="triton", pattern=Pattern.window(2))
    with pytest.raises(RegardError, match=r"backend 'triton' refuses: .*gradients"):
        ops.attend(*inputs(2, 5, grad=True), backend="triton")
    with pytest.raises(RegardError, match="unknown choice for empty rows 'nan'"):
        ops.attend(*given_, empty="nan")
    with pytest.raises(RegardError, match="padding must be"):
        ops.attend(*given_, padding=torch.zeros(3, dtype=torch.long))
    with pytest.raises(RegardError, match="not both"):
        ops.attend(*given_, padding=torch.zeros(2, dtype=torch.long), q_positions=torch.zeros(1, 2).long())
