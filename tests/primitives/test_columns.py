"""Column sums of attention against one row and one key at a time."""

import math

import pytest
import torch

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.attention import attend
from regard.primitives import columns
from regard.primitives.columns import column_mass, column_rows

LOCAL = Pattern.sink(2) | Pattern.window(5)
PATTERNS = [None, Pattern.causal(), LOCAL, ~LOCAL, Pattern.stack_heads([LOCAL, Pattern.window(2)])]
# Row 0 is padded by 3: its first rows are empty and its first keys nobody's. A row of -1 does not count.
PADDING = torch.tensor([3, 0])
S, T = 17, 9


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, n, 8, generator=g, dtype=torch.float64) for heads, n in ((4, T), (2, S)))
    k_pos = torch.arange(S) - PADDING[:, None]
    q_pos = torch.arange(-1, T - 1)[None] * 2 - PADDING[:, None]
    return q.to(dtype), k.to(dtype), q_pos, k_pos


def loop(q, k, q_pos, k_pos, pattern, scale, softcap):
    mass, counted = torch.zeros(2, 4, S), torch.zeros(2, 4, S)
    for b in range(2):
        for h in range(4):
            for t in range(T):
                weights = {}
                for s in range(S):
                    at, key = q_pos[b, t : t + 1], k_pos[b, s : s + 1]
                    if at < 0 or key < 0:
                        continue
                    if pattern is not None:
                        rule = pattern.head(0 if pattern.heads is None else h // 2)
                        if not rule.allow(at[None], key[None]).item():
                            continue
                    score = float(q[b, h, t] @ k[b, h // 2, s]) * scale
                    weights[s] = math.exp(score if softcap is None else softcap * math.tanh(score / softcap))
                for s, weight in weights.items():
                    mass[b, h, s] += weight / sum(weights.values())
                    counted[b, h, s] += 1
    return mass, counted


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("limit", [2**23, 300])
def test_sums_over_rows(monkeypatch, pattern, softcap, limit):
    monkeypatch.setattr(columns, "LIMIT", limit)
    q, k, q_pos, k_pos = inputs()
    positions = {"q_positions": q_pos, "k_positions": k_pos}
    options = {"scale": 0.3, "softcap": softcap}
    lse = attend(q, k, k, pattern=pattern, causal=pattern is not None, **positions, **options)[1]
    assert bool((lse == -torch.inf).any()), "the case has no empty row"
    mass, counted = loop(q, k, q_pos, k_pos, pattern, **options)
    found = column_mass(q, k, lse, pattern=pattern, **positions, **options)
    torch.testing.assert_close(found.float(), mass, atol=1e-5, rtol=1e-5)
    rows = column_rows(pattern, q_pos, k_pos)
    assert torch.equal(rows.repeat_interleave(4 // rows.shape[1], 1).float(), counted)


def test_keys_of_several_positions_a_head_and_half_precision():
    q, k, q_pos, k_pos = inputs(torch.bfloat16)
    apart = torch.stack((k_pos, k_pos.flip(1)), 1)
    lse = attend(q, k, k, pattern=LOCAL, q_positions=q_pos, k_positions=apart)[1]
    given = {"pattern": LOCAL, "q_positions": q_pos, "k_positions": apart, "scale": 8**-0.5}
    mass = column_mass(q, k, lse, **given)
    assert mass.dtype == torch.float32
    rows = (lse > -torch.inf).sum(-1).float()
    torch.testing.assert_close(mass.sum(-1), rows, atol=0.05, rtol=0.01)


def test_gradients_are_those_of_the_probabilities():
    q, k, q_pos, k_pos = inputs()
    q.requires_grad_(True)
    given = {"q_positions": q_pos, "k_positions": k_pos, "scale": 0.3}
    mass = column_mass(q, k, attend(q, k, k, pattern=LOCAL, **given)[1], pattern=LOCAL, **given)
    (found,) = torch.autograd.grad(mass[:, :, 5].sum(), q)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~LOCAL.allow(q_pos, k_pos), -torch.inf)
    probabilities = scores.softmax(-1).nan_to_num(0)
    (want,) = torch.autograd.grad(probabilities[..., 5].sum(), q)
    torch.testing.assert_close(found, want.nan_to_num(0))
    assert found.abs().sum() > 0


def test_an_lse_of_another_shape_is_named():
    q, k, q_pos, k_pos = inputs()
    with pytest.raises(RegardError, match=r"lse must be \[B, H, T\] = \[2, 4, 9\], got \[2, 4, 1\]"):
        column_mass(q, k, torch.zeros(2, 4, 1), pattern=None, q_positions=q_pos, k_positions=k_pos, scale=1.0)
