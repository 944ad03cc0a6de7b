"""Two-sided spans of attention against the sentence that defines them, one pair at a time."""

from functools import partial
from itertools import product

import pytest
import torch

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops import attention
from regard.ops.attention import attend
from regard.primitives.columns import column_mass, column_rows
from regard.primitives.reference import reference

B, H, HK, T, S, D = 3, 4, 2, 9, 14, 8
LOCAL = Pattern.sink(1) | Pattern.window(3)
PATTERNS = [None, LOCAL, Pattern.stack_heads([Pattern.window(2), Pattern.causal()])]
# Rows 0 and 2 share one; one begins before the first query, one is a single token, two are neighbours.
SPANS = [(0, 10, 14), (0, 6, 8), (0, 8, 9), (1, 3, 11), (2, 10, 14)]
PADDED = [(0, 1, 7), (0, 7, 11), (1, 3, 11), (2, 10, 13)]
PADDING = torch.tensor([3, 0, 1])[:, None]


def drawn(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def placed(how):
    """Spans, and what says where queries and keys are: the last ones; behind padding; heads that hold other keys."""
    arrivals = torch.arange(S)[None]
    if how == "aligned":
        return SPANS, {}
    keys = (arrivals - PADDING)[:, torch.randperm(S, generator=torch.Generator().manual_seed(1))]
    if how == "by head":
        keys = torch.stack((keys, keys.flip(1).masked_fill(arrivals % 5 == 0, -1)), 1)
    return PADDED, {"q_positions": (arrivals - PADDING)[:, S - T :], "k_positions": keys}


def defined(pattern, spans, q_positions=None, k_positions=None):
    """Who sees whom, `[B, HK, T, S]`."""
    at = torch.arange(S - T, S).expand(B, -1) if q_positions is None else q_positions
    keys = torch.arange(S)[None] if k_positions is None else k_positions
    keys = (keys if keys.ndim == 3 else keys[:, None]).expand(B, HK, -1)
    pattern, mask = pattern or Pattern.causal(), torch.zeros(B, HK, T, S, dtype=torch.bool)
    rules = [pattern.head(h if pattern.heads else 0).to_dense(S).view(S, S) for h in range(HK)]
    for b, h, t, s in product(range(B), range(HK), range(T), range(S)):
        p, r = int(at[b, t]), int(keys[b, h, s])
        ahead = any(row == b and start <= p < r < stop for row, start, stop in spans)
        mask[b, h, t, s] = p >= 0 and r >= 0 and (bool(rules[h][p, r]) or ahead)
    return mask


@pytest.mark.parametrize("how", ["aligned", "padded", "by head"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_definition(pattern, how):
    spans, places = placed(how)
    mask = defined(pattern, spans, **places)
    assert not torch.equal(mask, defined(pattern, (), **places))
    drawn_qkv = (drawn(B, H, T, D, grad=True), *(drawn(B, HK, S, D, seed=seed, grad=True) for seed in (1, 2)))
    upstream = drawn(B, H, T, D, seed=3), drawn(B, H, T, seed=4)
    for bias, softcap in ((None, None), (drawn(B, 1, T, S), None), (drawn(H, 1, S), 2.0)):
        call = {"bias": bias, "softcap": softcap}
        made = [reference(*drawn_qkv, mask=mask, scale=D**-0.5, **call)]
        for backend in ("auto", "reference", *["sdpa"] * (softcap is None)):
            made.append(attend(*drawn_qkv, pattern=pattern, two_sided=spans, backend=backend, **call, **places))
        found = []
        for out, lse in made:
            loss = (out * upstream[0]).sum() + (lse.masked_fill(lse == -torch.inf, 0) * upstream[1]).sum()
            found.append((out, lse, *torch.autograd.grad(loss, drawn_qkv)))
        for other in found[1:]:
            for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found[0], other, strict=True):
                assert torch.allclose(a, b, atol=1e-12), name


def test_a_prompt_that_sees_itself_takes_no_mask(monkeypatch):
    """Both halves are square and causal, so that no pair is masked and nothing of T x T is made."""
    calls, real = [], attention.fused
    monkeypatch.setattr(attention, "sweep", None)
    monkeypatch.setattr(attention, "fused", lambda *x, **how: calls.append((x[0].shape, how)) or real(*x, **how))
    q, k, v = drawn(2, H, 50, D), *(drawn(2, HK, 50, D, seed=seed) for seed in (1, 2))
    out, lse = attend(q, k, v, two_sided=[(row, 0, 50) for row in range(2)])
    assert [(shape[0], shape[2], how.get("square")) for shape, how in calls] == [(2, 50, True), (2, 49, True)]
    whole = attend(q, k, v, causal=False, backend="reference")
    assert torch.allclose(out, whole[0])
    assert torch.allclose(lse, whole[1])


def test_what_keys_are_given_counts_rows_before_them():
    spans, places = placed("padded")
    q, k = drawn(B, H, T, D), drawn(B, HK, S, D, seed=1)
    mask = defined(LOCAL, spans, **places)
    _, lse = attend(q, k, k, pattern=LOCAL, two_sided=spans, **places)
    weights = reference(q, k, torch.eye(S).double().expand(B, HK, S, S), mask=mask, scale=D**-0.5)[0]
    given = column_mass(q, k, lse, pattern=LOCAL, scale=D**-0.5, two_sided=attention.checked(spans, B), **places)
    assert torch.allclose(given, weights.sum(2), atol=1e-12)
    assert torch.equal(column_rows(LOCAL, *places.values(), attention.checked(spans, B)), mask[:, :1].sum(2))


@pytest.mark.parametrize(
    ("spans", "call", "said"),
    [
        ([(0, 2, 6), (0, 5, 9)], {}, r"row=0, start=2, stop=6. and .*start=5, stop=9. overlap"),
        ([(0, -2, 6)], {}, "start=-2, stop=6. needs 0 <= start < stop.*below 0 is padding"),
        ([(1, 6, 6)], {}, "start=6, stop=6. needs 0 <= start < stop"),
        ([(3, 2, 6)], {}, "is of row 3, and the batch has rows 0 to 2"),
        ([(0, 2, 15)], {}, "stop=15. ends behind the last of 14 keys"),
        ([(0, 2)], {}, r"is .row, start, stop. in whole numbers, got \(0, 2\)"),
        ([(0, 2.0, 6)], {}, r"in whole numbers, got \(0, 2.0, 6\)"),
        ([(0, 2, 6)], {"causal": False}, "there is none in full attention"),
        ([(0, 2, 6)], {"pattern": Pattern.prefix(4)}, "there is none in .*which is two-sided itself"),
        ([(0, 10, 14)], {"backend": "block"}, "backend 'block' refuses"),
        ([(0, 10, 14)], {"backend": "decode"}, "backend 'decode' refuses"),
    ],
)
def test_bad_spans_are_named(spans, call, said):
    run = partial(attend, drawn(B, H, T, D), drawn(B, HK, S, D), drawn(B, HK, S, D))
    with pytest.raises(RegardError, match=said):
        run(two_sided=spans, **call)
