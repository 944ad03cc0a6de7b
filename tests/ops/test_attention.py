"""attend against a slow loop, its backends against each other, and both against torch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.attention import attend, choose, merge
from regard.primitives import sweep as sweep_module

LOCAL = Pattern.sink(2) | Pattern.window(5)
DENSE = Pattern.dense(torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(3)) > 0.6)
PATTERNS = [
    Pattern.causal(),
    LOCAL,
    Pattern.window(3),
    Pattern.sink(4),
    ~LOCAL,
    ~Pattern.causal(),
    LOCAL & Pattern.predicate(lambda q, k, h: (q + k) % 2 == 0),
    DENSE,
    Pattern.stack_heads([LOCAL, Pattern.causal()]),
    Pattern.stack_heads([Pattern.window(2), Pattern.sink(3)]) | DENSE,
    Pattern.prefix(9),
    Pattern.dense(DENSE.rules[0].table, causal=False),
    Pattern.stack_heads([LOCAL, Pattern.predicate(lambda q, k, h: (q - k).abs() < 6, causal=False)]),
    Pattern.stack_heads([Pattern.causal(), Pattern.full()]),
]


def inputs(T, S, *, B=2, H=4, Hk=2, D=8, Dv=8, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def loop(q, k, v, *, seen, bias=None, softcap=None, scale=None):
    """One query, one head, one key at a time; `seen[b][h][t][s]`. Differentiable, without a matmul."""
    B, H, T, D = q.shape
    group = H // k.shape[1]
    scale = D**-0.5 if scale is None else scale
    outs, lses = [], []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores, values = [], []
                for s in range(k.shape[2]):
                    if not seen[b][h][t][s]:
                        continue
                    score = (q[b, h, t] * k[b, h // group, s]).sum() * scale
                    score = score if softcap is None else softcap * torch.tanh(score / softcap)
                    scores.append(score if bias is None else score + bias.expand(B, H, T, k.shape[2])[b, h, t, s])
                    values.append(v[b, h // group, s])
                if scores:
                    weights = torch.softmax(torch.stack(scores), 0)
                    outs.append((weights[:, None] * torch.stack(values)).sum(0))
                    lses.append(torch.logsumexp(torch.stack(scores), 0))
                else:
                    outs.append(torch.zeros(v.shape[3], dtype=q.dtype))
                    lses.append(torch.tensor(-math.inf, dtype=q.dtype))
    return torch.stack(outs).view(B, H, T, -1), torch.stack(lses).view(B, H, T)


def finite(lse):
    return lse.masked_fill(lse == -torch.inf, 0)


def gradients(result, leaves, seed=1):
    """Gradients of a random linear function of out and lse."""
    out, lse = result
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    b = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(lse.dtype)
    return torch.autograd.grad((out * a).sum() + (finite(lse) * b).sum(), leaves)


def agree(mine, theirs, atol=1e-11):
    torch.testing.assert_close(list(mine), list(theirs), rtol=0, atol=atol)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("T", "S", "Hk", "Dv", "pattern", "softcap", "bias_shape"),
    [
        (5, 5, 2, 8, Pattern.causal(), None, None),
        (3, 7, 1, 8, LOCAL, None, (2, 4, 3, 7)),
        (3, 7, 4, 5, LOCAL, 3.0, (7,)),
        (7, 5, 2, 8, Pattern.window(2), None, (4, 1, 1)),
        (1, 7, 2, 8, Pattern.stack_heads([LOCAL, Pattern.window(1)]), None, None),
        (4, 6, 2, 3, None, 2.0, (1, 1, 6)),
        (6, 4, 2, 8, None, None, None),
    ],
)
def test_attend_equals_a_slow_loop_with_all_gradients(T, S, Hk, Dv, pattern, softcap, bias_shape, backend):
    q, k, v = inputs(T, S, Hk=Hk, Dv=Dv, grad=True)
    bias = torch.randn(bias_shape, dtype=torch.float64, requires_grad=True) if bias_shape else None
    leaves = [q, k, v] + ([bias] if bias is not None else [])
    full = torch.ones(4, T, S, dtype=torch.bool)
    seen = full if pattern is None else pattern.to_dense(T, S, heads=4)
    options = {"bias": bias, "softcap": softcap, "scale": 0.7}
    mine = attend(q, k, v, pattern=pattern, causal=pattern is not None, backend=backend, **options)
    theirs = loop(q, k, v, seen=[seen] * 2, **options)
    agree(mine, theirs)
    agree(gradients(mine, leaves), gradients(theirs, leaves))


@settings(max_examples=80, deadline=None)
@given(
    T=st.integers(1, 40),
    S=st.integers(1, 40),
    pattern=st.sampled_from([None, *PATTERNS]),
    placed=st.sampled_from(["plain", "padded", "shuffled", "per head"]),
    biased=st.booleans(),
    block=st.sampled_from([3, 128]),
)
def test_fused_kernels_equal_the_reference(T, S, pattern, placed, biased, block):
    """Outputs and all gradients, through every split into blocks, heads and keys."""
    q, k, v = inputs(T, S, grad=True)
    positions = {}
    if placed != "plain":
        padding = torch.tensor([[0], [S // 2]])
        order = torch.stack([torch.randperm(S) for _ in range(4)]).view(2, 2, S)
        held = {"padded": torch.arange(S)[None], "shuffled": order[:, 0], "per head": order}[placed]
        positions = {
            "q_positions": torch.arange(S - T, S)[None] - padding,
            "k_positions": held - (padding[:, None] if placed == "per head" else padding),
        }
    bias = torch.randn(4, 1, S, dtype=torch.float64) if biased else None
    options = {"pattern": pattern, "causal": pattern is not None, "bias": bias, **positions}
    expected = attend(q, k, v, backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "BLOCK", block)
        patch.setattr(sweep_module, "WHOLE", block * S)
        mine = attend(q, k, v, backend="sdpa", **options)
    agree(mine, expected)
    agree(gradients(mine, [q, k, v]), gradients(expected, [q, k, v]), atol=1e-10)


@pytest.mark.parametrize("length", [6, 7, 8, 9])
@pytest.mark.parametrize("pattern", [LOCAL, Pattern.window(2, block=4), Pattern.sink(3) | Pattern.window(2, block=3)])
def test_a_pattern_is_causal_exactly_as_long_as_it_covers_all(pattern, length):
    """`sink 2 | window 5` forgets its first key at length 8; up to 7 the plain causal kernel may run."""
    q, k, v = inputs(length, length)
    agree(attend(q, k, v, pattern=pattern, backend="sdpa"), attend(q, k, v, pattern=pattern, backend="reference"))
    last = q[:, :, -1:]
    agree(attend(last, k, v, pattern=pattern), attend(last, k, v, pattern=pattern, backend="reference"))


def test_full_attention_with_a_bias_in_blocks_sees_later_keys(monkeypatch):
    monkeypatch.setattr(sweep_module, "WHOLE", 1)
    monkeypatch.setattr(sweep_module, "BLOCK", 2)
    for rows, keys in ((9, 9), (9, 3), (5, 9)):
        q, k, v = inputs(rows, keys)
        bias = torch.randn(rows, keys, dtype=torch.float64)
        options = {"causal": False, "bias": bias}
        agree(attend(q, k, v, **options), attend(q, k, v, backend="reference", **options))


@pytest.mark.parametrize("use", ["out", "lse", "lse where out is unused in some rows", "tiny out"])
def test_fused_gradients_through_the_lse_alone(use):
    """Rows whose out has no gradient cannot carry the lse's gradient in it."""
    q, k, v = inputs(9, 13, grad=True)
    weight = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    if use == "lse where out is unused in some rows":
        weight[:, ::2, 3:6] = 0
    weight = weight * {"out": 1, "lse": 0, "tiny out": 1e-200}.get(use, 1)
    grads = []
    for backend in ("sdpa", "reference"):
        out, lse = attend(q, k, v, pattern=LOCAL, backend=backend)
        total = 0 if use == "lse" else (out * weight).sum()
        total = total if use == "out" else total + (lse * torch.arange(9)).sum()
        grads.append(torch.autograd.grad(total, [q, k, v], allow_unused=True))
    for mine, theirs in zip(*grads, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_by_finite_differences(backend):
    q, k, v = inputs(4, 6, B=1, H=2, Hk=1, D=3, Dv=3, grad=True)

    def both(q, k, v):
        out, lse = attend(q, k, v, pattern=LOCAL & Pattern.window(3), backend=backend)
        return out, finite(lse)

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_the_reference_differentiates_twice():
    q, k, v = inputs(2, 3, B=1, H=2, Hk=1, D=2, Dv=2, grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, backend="reference"), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Hk", [4, 2])
def test_equal_to_the_bit_to_torch_where_torch_does_the_same(dtype, Hk):
    q, k, v = inputs(33, 33, Hk=Hk, dtype=dtype)
    sdpa = F.scaled_dot_product_attention
    assert torch.equal(attend(q, k, v)[0], sdpa(q, k, v, is_causal=True, enable_gqa=True))
    assert torch.equal(attend(q, k, v, causal=False)[0], sdpa(q, k, v, enable_gqa=True))
    last = q[:, :, -1:]
    assert torch.equal(attend(last, k, v)[0], sdpa(last, k, v, enable_gqa=True))
    assert torch.equal(attend(q, k, v, pattern=Pattern.sink(3) | Pattern.window(30))[0], attend(q, k, v)[0])
    chunk = torch.ones(9, 33, dtype=torch.bool).tril(24)
    assert torch.equal(attend(q[:, :, -9:], k, v)[0], sdpa(q[:, :, -9:], k, v, attn_mask=chunk, enable_gqa=True))
    padding = torch.tensor([[0], [7]])
    at = torch.arange(33)[None] - padding
    mask = Pattern.causal().allow(at, at)
    out, lse = attend(q, k, v, q_positions=at, k_positions=at)
    expected = sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.equal(out[1, :, 7:], expected[1, :, 7:])
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1, :, :7], torch.zeros_like(out[1, :, :7]))
    assert (lse[1, :, :7] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_low_precision_errs_at_most_twice_as_much_as_plain_code(dtype, backend):
    exact = inputs(40, 40, D=16, Dv=16, grad=True)
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in low]
    seen = LOCAL.to_dense(40)[0]

    def plain(q, k, v):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~seen, -torch.inf)
        return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)

    truth = plain(*exact)
    plain_low = plain(*low)
    mine = attend(*low, pattern=LOCAL, backend=backend)
    assert mine[0].dtype == dtype
    assert mine[1].dtype == torch.float32
    trio = [(r[0], r[1], *gradients(r, x)) for r, x in ((truth, exact), (plain_low, low), (mine, low))]
    for name, right, theirs, ours in zip(("out", "lse", "dq", "dk", "dv"), *trio, strict=True):
        budget = 2 * (theirs.double() - right).abs().max()
        assert (ours.double() - right).abs().max() <= budget, name


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("T", "S"), [(5, 9), (9, 5), (1, 7)])
def test_a_full_pattern_is_no_pattern(T, S, backend):
    q, k, v = inputs(T, S)
    padding = {"q_positions": torch.arange(T)[None] - 1, "k_positions": torch.arange(S)[None] - 2}
    for placed in ({}, padding):
        agree(
            attend(q, k, v, pattern=Pattern.full(), backend=backend, **placed),
            attend(q, k, v, causal=False, backend=backend, **placed),
        )
    assert torch.equal(
        attend(q, k, v, pattern=Pattern.prefix(3), backend=backend)[0],
        attend(q, k, v, pattern=Pattern.prefix(3), causal=False, backend=backend)[0],
    )


def test_flex_attention_agrees():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs(24, 40, dtype=torch.float32)
    for pattern in [LOCAL, DENSE, *PATTERNS[-5:]]:
        mask = pattern.to_block_mask(24, 40, heads=4, block_size=8)
        theirs = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        mine, lse = attend(q, k, v, pattern=pattern)
        held = lse != -torch.inf
        torch.testing.assert_close(mine[held], theirs[held], rtol=0, atol=2e-6)


def test_parts_of_the_keys_merge_to_the_whole():
    q, k, v = inputs(7, 20, grad=True)
    at = torch.arange(13, 20)[None]
    keys = torch.arange(20)[None]
    whole = attend(q, k, v, pattern=~Pattern.window(9))
    cuts = [slice(0, 5), slice(5, 6), slice(6, 20)]
    parts = [
        attend(q, k[:, :, c], v[:, :, c], pattern=~Pattern.window(9), q_positions=at, k_positions=keys[:, c])
        for c in cuts
    ]
    agree(merge(parts), whole)
    agree(gradients(merge(parts), [q, k, v]), gradients(whole, [q, k, v]), atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_empty_rows_are_zero_or_raise_and_never_nan(backend):
    q, k, v = inputs(5, 5, grad=True)
    options = {"pattern": ~Pattern.window(3), "backend": backend}
    out, lse = attend(q, k, v, **options)
    assert torch.equal(out[:, :, :3], torch.zeros_like(out[:, :, :3]))
    assert (lse[:, :, :3] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 3:]).all()
    for grad in gradients((out, lse), [q, k, v]):
        assert torch.isfinite(grad).all()
    with pytest.raises(RegardError, match="batch row 0, head 0, query 0 sees no key"):
        attend(q, k, v, empty="raise", **options)
    attend(q, k, v, empty="raise", backend=backend)


def test_fused_kernels_read_strides_right():
    """Below SDPA the kernels take any last dimension for contiguous: spread and repeated numbers must be copied."""
    q, k, v = inputs(6, 6, dtype=torch.float32)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    agree(attend(*odd, backend="sdpa"), attend(q, k, v, backend="reference"), atol=1e-6)
    flat = v[..., :1].expand(-1, -1, -1, 8)
    agree(attend(q, k, flat, backend="sdpa"), attend(q, k, flat, backend="reference"), atol=1e-6)
    leaf = q.clone().requires_grad_()
    grads = [torch.autograd.grad(attend(leaf, k, v, backend=b)[0].sum(), leaf) for b in ("sdpa", "reference")]
    agree(*grads, atol=1e-6)


def test_no_keys_and_no_queries():
    q, k, v = inputs(3, 0)
    out, lse = attend(q, k, v)
    assert out.shape == (2, 4, 3, 8)
    assert not out.any()
    assert (lse == -torch.inf).all()
    q, k, v = inputs(0, 3)
    assert attend(q, k, v)[0].shape == (2, 4, 0, 8)


def test_long_local_attention_builds_nothing_of_the_size_of_its_scores():
    """The kernel sees sink, band and block, never all keys; other patterns see a bounded mask."""
    calls = []

    def spy(q, k, v, *, mask, **_):
        calls.append((q.shape[2], k.shape[2], mask.numel()))
        return q, q[..., 0]

    q, k, v = (torch.zeros(1, 1, 8192, 8),) * 3
    at = torch.arange(8192)[None]
    common = {"q_pos": at, "k_pos": at, "bias": None, "aligned": True}
    sweep_module.sweep(spy, q, k, v, pattern=Pattern.sink(16) | Pattern.window(256), **common)
    assert sum(rows for rows, _, _ in calls) == 8192
    assert max(keys for _, keys, _ in calls) <= 16 + 256 + 128
    calls.clear()
    sweep_module.sweep(spy, q, k, v, pattern=Pattern.predicate(lambda q, k, h: k % 7 != q % 7), **common)
    assert max(size for _, _, size in calls) <= sweep_module.LIMIT


def test_a_named_backend_refuses_with_its_reason_and_auto_says_why():
    q, k, v = inputs(3, 3, Dv=5)
    with pytest.raises(RegardError, match="Dv = D, got 5 and 8"):
        attend(q, k, v, backend="sdpa")
    assert choose(q, k, v) == ("reference", "torch's fused kernels need Dv = D, got 5 and 8")
    v = v[..., :1].expand(-1, -1, -1, 8)
    with pytest.raises(RegardError, match="softcap"):
        attend(q, k, v, softcap=30.0, backend="sdpa")
    bias = torch.zeros(3, requires_grad=True)
    with pytest.raises(RegardError, match="bias no gradient"):
        attend(q, k, v, bias=bias, backend="sdpa")
    assert choose(q, k, v)[0] == "sdpa"
    with pytest.raises(RegardError, match="no keys"):
        attend(q, k[:, :, :0], v[:, :, :0], backend="sdpa")
    with pytest.raises(RegardError, match="Did you mean 'reference'"):
        attend(q, k, v, backend="referense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 6, 8)}, r"\[2, 3, 6, 8\]"),
        ({"k": torch.zeros(2, 3, 6, 8), "v": torch.zeros(2, 3, 6, 8)}, "3 key heads do not divide 4"),
        ({"q": torch.zeros(4, 5, 8)}, r"\[4, 5, 8\]"),
        ({"pattern": Pattern.stack_heads([LOCAL] * 3)}, "3 heads for 2 key heads"),
        ({"pattern": LOCAL, "causal": False}, "window 5 is cut at the query's own position"),
        ({"bias": torch.zeros(3, 6)}, r"\[3, 6\]"),
        ({"bias": torch.ones(5, 6, dtype=torch.bool)}, "bool"),
        ({"q_positions": torch.zeros(1, 4).long()}, r"q_positions must be \[1 or B, 5\]"),
        ({"k_positions": torch.zeros(1, 3, 6).long()}, r"k_positions must be .* got \[1, 3, 6\]"),
        ({"k_positions": torch.zeros(3, 6).long()}, "3 rows for a batch of 2"),
        ({"empty": "nan"}, "'nan'"),
    ],
)
def test_what_does_not_belong_together_is_named(change, message):
    call = dict(zip("qkv", inputs(5, 6, dtype=torch.float32), strict=True)) | change
    with pytest.raises(RegardError, match=message):
        attend(call.pop("q"), call.pop("k"), call.pop("v"), **call)
