"""Lightning Attention-2 against its sums, its own backward formulas and flash-linear-attention."""

import pytest
import torch

from recurrences import close, states, tokens
from regard.core.errors import RegardError
from regard.ops.states.lightning import scan

SLOPES = torch.tensor([0.0, 0.1, 0.7, 3.0], dtype=torch.float64)


def looped(q, k, v, slopes):
    """The sum of the paper, pair by pair; as many key heads as value heads."""
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        for j in range(t + 1):
            weight = (-slopes * (t - j)).exp() * (q[:, :, t] * k[:, :, j]).sum(-1)
            out[:, :, t] += weight[..., None] * v[:, :, j]
    return out


def test_it_is_the_sum_of_the_paper():
    q, k, v = tokens(Hk=4, T=17)
    torch.testing.assert_close(scan(q, k, v, SLOPES)[0], looped(q, k, v, SLOPES))
    torch.testing.assert_close(scan(q, k, v)[0], looped(q, k, v, torch.zeros_like(SLOPES)))


def test_backward_formulas():
    """Section 3.2: rows and states in a loop over chunks, forwards for dq and backwards for dk and dv."""
    q, k, v = (x.requires_grad_() for x in tokens(Hk=4, T=30))
    out, _ = scan(q, k, v, SLOPES)
    grad = torch.randn_like(out)
    out.backward(grad)
    C, r = 10, torch.arange(1, 11, dtype=torch.float64)[:, None]
    decay = torch.exp(-SLOPES)[:, None, None]
    mask = torch.where(r >= r.T, decay ** (r - r.T).clamp(min=0), 0)
    with torch.no_grad():
        Q, K, V, dO = (x.split(C, 2) for x in (q, k, v, grad))
        S = torch.zeros(2, 4, 5, 3, dtype=torch.float64)
        dS, dq, dk, dv = torch.zeros_like(S), [], [], []
        for c in range(3):
            dq.append((dO[c] @ V[c].mT * mask) @ K[c] + decay**r * dO[c] @ S.mT)
            S = decay**C * S + (decay ** (C - r) * K[c]).mT @ V[c]
        for c in (2, 1, 0):
            dk.insert(0, (dO[c] @ V[c].mT * mask).mT @ Q[c] + decay ** (C - r) * V[c] @ dS.mT)
            dv.insert(0, (Q[c] @ K[c].mT * mask).mT @ dO[c] + decay ** (C - r) * K[c] @ dS)
            dS = decay**C * dS + (decay**r * Q[c]).mT @ dO[c]
    for x, parts in ((q, dq), (k, dk), (v, dv)):
        torch.testing.assert_close(x.grad, torch.cat(parts, 2), atol=1e-9, rtol=1e-9)


def test_features_in_parts_add_up():
    q, k, v = tokens(D=6)
    parts = [scan(q[..., at], k[..., at], v, SLOPES)[0] for at in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), scan(q, k, v, SLOPES)[0])


def test_it_is_linear_in_the_values():
    q, k, v = tokens()
    w = torch.randn_like(v)
    both = scan(q, k, 2 * v - 3 * w, SLOPES)[0]
    torch.testing.assert_close(both, 2 * scan(q, k, v, SLOPES)[0] - 3 * scan(q, k, w, SLOPES)[0])


def test_an_infinite_slope_keeps_the_token_alone():
    q, k, v = tokens(Hk=4)
    out, _ = scan(q, k, v, torch.full((4,), torch.inf, dtype=torch.float64))
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)


def test_left_padding_is_exact():
    q, k, v = tokens(T=20)
    mask = torch.arange(20).expand(2, 20) >= torch.tensor([[0], [6]])
    out, state = scan(q, k, v, SLOPES, mask=mask)
    alone = scan(q[1:, :, 6:], k[1:, :, 6:], v[1:, :, 6:], SLOPES)
    close((out[1:, :, 6:], state[1:]), alone)


@pytest.mark.parametrize("T", [64, 100])
def test_fla(T):
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    q, k, v = tokens(Hk=4, T=T, dtype=torch.float32)
    g = -SLOPES.float().expand(2, T, 4)
    start = states(q, v)
    wanted, last = naive.naive_recurrent_simple_gla(
        *(x.transpose(1, 2) for x in (q, k, v)), g, scale=1.0, initial_state=start
    )
    close(scan(q, k, v, SLOPES.float(), initial_state=start), (wanted.transpose(1, 2), last), 1e-4)


@pytest.mark.parametrize(
    ("slopes", "words"),
    [
        (torch.ones(3), r"\[H\] = \[4\], got \[3\]"),
        (torch.ones(1, 4), r"\[H\] = \[4\], got \[1, 4\]"),
        (torch.ones(4, dtype=torch.int64), "must be float"),
        (torch.tensor([0.0, 1.0, torch.nan, 1.0]), "at least 0 .*got nan"),
        (torch.tensor([0.0, 1.0, -0.5, 1.0]), "at least 0 .*got -0.5"),
    ],
)
def test_refuses(slopes, words):
    with pytest.raises(RegardError, match=words):
        scan(*tokens(dtype=torch.float32), slopes)


def test_no_tokens():
    q, k, v = tokens(T=0)
    state = states(q, v)
    out, last = scan(q, k, v, SLOPES, initial_state=state)
    assert out.shape == (2, 4, 0, 3)
    assert torch.equal(last, state)
