"""Decoding against the loop that says what it is, in float64; pages, lengths and positions in every combination."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops import decode as decoding
from regard.ops.attention import attend
from regard.ops.decode import decode


def drawn(seed, B=2, H=4, Hk=2, T=2, S=11, D=8, Dv=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((B, H, T, D), (B, Hk, S, D), (B, Hk, S, Dv))]  # fmt: skip


def loop(q, k, v, lengths, seen):
    """One score at a time; `seen(b, h, t, j)` says whether a query sees a key that is there."""
    B, H, T, D = q.shape
    out, lse = torch.zeros(B, H, T, v.shape[3], dtype=q.dtype), torch.full((B, H, T), -torch.inf, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            head = h * k.shape[1] // H
            for t in range(T):
                keys = [j for j in range(lengths[b]) if seen(b, head, t, j)]
                scores = [float(q[b, h, t] @ k[b, head, j]) / math.sqrt(D) for j in keys]
                total = sum(math.exp(score) for score in scores)
                for j, score in zip(keys, scores, strict=True):
                    out[b, h, t] += math.exp(score) / total * v[b, head, j]
                if keys:
                    lse[b, h, t] = math.log(total)
    return out, lse


def paged(x, size, table):
    """`x [B, Hk, S, D]` as a pool of NaN with its keys where `table` says."""
    B, Hk, S, D = x.shape
    pool = torch.full((int(table.max()) + 1, Hk, size, D), torch.nan, dtype=x.dtype)
    for b in range(B):
        for j in range(S):
            pool[table[b, j // size], :, j % size] = x[b, :, j]
    return pool


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 11), min_size=2, max_size=2), st.booleans())
def test_ragged_lengths(seed, lengths, causal):
    q, k, v = drawn(seed)
    found = decode(q, k, v, lengths=torch.tensor(lengths), causal=causal)
    # A request may be shorter than its new tokens: then the first of them see nothing.
    expected = loop(q, k, v, lengths, lambda b, h, t, j: not causal or j <= lengths[b] - 2 + t)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_random_page_table_is_the_same_as_contiguous_keys(seed, size):
    torch.manual_seed(seed)
    q, k, v = drawn(seed, B=3)
    lengths, n = torch.randint(0, 12, (3,)), -(-11 // size)
    table = torch.randperm(3 * n + 2)[: 3 * n].view(3, n)
    pools = [paged(x, size, table) for x in (k, v)]
    # Neither what lies behind a request nor entries of pages behind it is read.
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // size) :] = 10**6
    expected = decode(q, k.clone(), v.clone(), lengths=lengths)
    for pages in (table, table.int()):
        torch.testing.assert_close(decode(q, *pools, lengths=lengths, pages=pages), expected, rtol=0, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5), st.none() | st.integers(1, 9), st.booleans())
def test_positions_with_holes(seed, sink, recent, by_head):
    torch.manual_seed(seed)
    q, k, v = drawn(seed)
    at = torch.randint(-2, 15, (2, 2, 11) if by_head else (1, 11))
    asked = torch.randint(-1, 15, (2, 2))
    places = at if by_head else at[:, None].expand(2, 2, -1)

    def seen(b, h, t, j):
        p, q = int(places[b, h, j]), int(asked[b, t])
        return 0 <= p <= q and (recent is None or p < sink or q - p < recent)

    lengths = torch.tensor([11, 7])
    found = decode(q, k, v, lengths=lengths, positions=at, q_positions=asked, sink=sink, recent=recent)
    torch.testing.assert_close(found, loop(q, k, v, [11, 7], seen), rtol=0, atol=1e-12)


def test_it_is_attend():
    q, k, v = drawn(0, S=40)
    torch.testing.assert_close(decode(q, k, v, scale=0.3, softcap=2.0), attend(q, k, v, scale=0.3, softcap=2.0))
    pattern = Pattern.sink(3) | Pattern.window(6)
    torch.testing.assert_close(decode(q, k, v, sink=3, recent=6), attend(q, k, v, pattern=pattern))
    torch.testing.assert_close(decode(q, k, v, causal=False), attend(q, k, v, causal=False))


def test_gradients_of_the_reference():
    q, k, v = (x.requires_grad_() for x in drawn(0, B=1, S=5))
    table = torch.tensor([[2, 0, 1]])

    def run(q, k, v):
        pools = [torch.cat([x, x[:, :, :1]], 2).unflatten(2, (3, 2)).transpose(1, 2)[0] for x in (k, v)]
        return decode(q, *(x[[1, 2, 0]] for x in pools), lengths=torch.tensor([5]), pages=table)

    assert torch.autograd.gradcheck(run, (q, k, v))
    torch.testing.assert_close(run(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": torch.tensor([3])}, r"lengths must be \[2\], got \[1\]"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "lengths must be int32 or int64, got torch.float32"),
        ({"lengths": torch.tensor([3, 12])}, "request 1 has 12 keys; there is room for 0 to 11"),
        ({"lengths": torch.tensor([-1, 3])}, "request 0 has -1 keys"),
        ({"positions": torch.zeros(2, 3, 11, dtype=torch.long)}, r"positions must be \[1, 11\] or .* got \[2, 3, 11\]"),
        ({"q_positions": torch.zeros(2, 1, dtype=torch.long)}, r"q_positions must be \[1, 2\] or \[2, 2\]"),
        ({"pages": torch.zeros(2, 1, 1, dtype=torch.long)}, r"pages must be \[B, n\]"),
        ({"pages": torch.zeros(3, 1, dtype=torch.long)}, r"pages must be \[2, 1\], got \[3, 1\]"),
        ({"pages": torch.tensor([[0], [2]])}, "entry 0 of the page table of request 1 is 2; pages are 0 to 1"),
        ({"pages": torch.tensor([[0], [-1]])}, "entry 0 of the page table of request 1 is -1"),
        ({"pages": torch.tensor([[1], [1]])}, "page 1 is held by request 0 and by request 1 .*check=False"),
        ({"workers": 0}, "1 worker or more, got 0"),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
        ({"backend": "triton"}, "backend 'triton' refuses: kernels run on a CUDA device, not on cpu"),
    ],
)
def test_refuses_by_name(change, words):
    q, k, v = drawn(0)
    with pytest.raises(RegardError, match=words):
        decode(q, k, v, **change)


def test_refuses_shapes_that_disagree():
    q, k, v = drawn(0)
    with pytest.raises(RegardError, match=r"disagree: got \[2, 4, 2, 8\], \[2, 2, 11, 8\], \[2, 2, 10, 6\]"):
        decode(q, k, v[:, :, :10])
    with pytest.raises(RegardError, match="do not divide 3 query heads"):
        decode(q[:, :3], k, v)


def test_shared_pages_and_dead_ones_pass_where_they_may():
    q, k, v = drawn(0)
    shared = torch.tensor([[1], [1]])
    out, _ = decode(q, k, v, pages=shared, check=False)
    torch.testing.assert_close(out, decode(q, k[[1, 1]], v[[1, 1]])[0])
    out, lse = decode(q, k, v, pages=shared, lengths=torch.tensor([11, 0]))
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


def test_attend_says_why_it_does_not_decode():
    q, k, v = drawn(0, S=600)
    for pattern, bias, words in [
        (Pattern.predicate(lambda q, k, h: k < 3), None, "not predicate"),
        (Pattern.window(3) & Pattern.sink(2), None, "not window 3 & sink 2"),
        (Pattern.stack_heads([Pattern.window(3), Pattern.causal()]), None, "the same in all heads"),
        (Pattern.predicate(lambda q, k, h: k < 3, causal=False), None, "not "),
        (None, torch.zeros(1), "no bias"),
        (Pattern.full(), None, "not on cpu"),
        (None, None, "not on cpu"),
    ]:
        assert words in decoding.serves(q, k, v, pattern=pattern, bias=bias)
        with pytest.raises(RegardError, match="backend 'decode' refuses"):
            attend(q, k, v, pattern=pattern, bias=bias, backend="decode")


def test_attend_leaves_to_others_what_they_do_better():
    q, k, _ = drawn(0, T=1, S=600)
    short, stream = Pattern.window(5), Pattern.sink(2) | Pattern.window(5)
    assert "9 keys are few" in decoding.yields(q, k[:, :, :9], pattern=None)
    assert "skips most of the 600 keys" in decoding.yields(q, k, pattern=stream)
    assert "launched sooner" in decoding.yields(q, k, pattern=None)
    assert "launched sooner" in decoding.yields(q, k, pattern=Pattern.window(600))
    assert decoding.yields(q, k, pattern=stream, aligned=False) is None
    assert decoding.yields(q, k, pattern=short) is None
    assert decoding.yields(drawn(0, T=2, S=600)[0], k, pattern=None) is None
    assert decoding.yields(q.float(), k, pattern=None) is None
