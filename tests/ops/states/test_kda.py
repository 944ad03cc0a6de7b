"""Kimi Delta Attention against flash-linear-attention and its own limits."""

import pytest
import torch

from recurrences import close, decays, states, strengths, tokens
from regard.core.errors import RegardError
from regard.ops.states import delta_net, gated_delta_net, kda


@pytest.mark.parametrize("name", ["naive_recurrent_kda", "naive_chunk_kda"])
def test_fla(name):
    naive = pytest.importorskip("fla.ops.kda.naive")
    q, k, v = tokens(T=64, dtype=torch.float32)
    decay, beta, start = decays("channel", q, v), strengths(v), states(q, v)
    call = {"initial_state": start, "output_final_state": True}
    inputs = (x.transpose(1, 2) for x in (q, k, v, decay, beta))
    wanted, last = getattr(naive, name)(*inputs, **call)
    close(kda.scan(q, k, v, decay, beta, initial_state=start), (wanted.transpose(1, 2), last), 1e-4)


@pytest.mark.parametrize("bound", [None, -5.0])
def test_gate(bound):
    gates = pytest.importorskip("fla.ops.kda.gate")
    drawn = torch.Generator().manual_seed(0)
    x, a, bias = (torch.randn(s, generator=drawn) for s in ((2, 4, 7, 5), (4,), (4, 5)))
    if bound is None:
        wanted = gates.naive_kda_gate(x.transpose(1, 2), a, bias.flatten())
    else:
        wanted = gates.naive_kda_lowerbound_gate(x.transpose(1, 2), a, bias.flatten(), bound)
    got = kda.gate(x, a, bias, bound=bound)
    torch.testing.assert_close(got, wanted.transpose(1, 2))
    assert bool((got <= 0).all())
    assert bound is None or bool((got >= bound).all())


def test_the_bound_of_a_gate_is_negative():
    with pytest.raises(RegardError, match="must be negative, got 5"):
        kda.gate(torch.zeros(1, 2, 3, 4), torch.zeros(2), torch.zeros(2, 4), bound=5.0)


def test_equal_channels_are_the_gated_delta_rule():
    q, k, v = tokens()
    decay, beta = decays("token", q, v), strengths(v)
    wanted = gated_delta_net.scan(q, k, v, decay, beta)
    close(kda.scan(q, k, v, decay[..., None].expand(-1, -1, -1, 5), beta), wanted)


def test_no_decay_is_the_delta_rule():
    q, k, v = tokens()
    beta = strengths(v)
    close(kda.scan(q, k, v, torch.zeros_like(k), beta), delta_net.scan(q, k, v, beta))


def test_a_written_key_answers_with_its_value():
    q, k, v = tokens(Hk=4)
    decay = decays("key channel", q, v)
    _, state = kda.scan(q, k, v, decay, torch.ones_like(v[..., 0]), initial_state=states(q, v))
    torch.testing.assert_close((state.mT @ k[:, :, -1, :, None])[..., 0], v[:, :, -1])


def test_without_writing_the_state_only_decays():
    q, k, v = tokens()
    decay, start = decays("channel", q, v), states(q, v)
    _, state = kda.scan(q, k, v, decay, torch.zeros_like(v[..., 0]), initial_state=start)
    torch.testing.assert_close(state, decay.sum(2).exp()[..., None] * start)


def test_it_is_a_product_of_matrices():
    """`S_t = (I - beta k k^T) diag(a) S_{t-1} + beta k v^T`, each factor of spectral norm at most 1."""
    q, k, v = tokens(1, 1, 1, 12)
    decay, beta, state = decays("channel", q, v), strengths(v), states(q, v)
    _, got = kda.scan(q, k, v, decay, beta, initial_state=state)
    state = state[0, 0]
    for t in range(12):
        key, b = k[0, 0, t], beta[0, 0, t]
        moved = (torch.eye(5, dtype=torch.float64) - b * torch.outer(key, key)) @ decay[0, 0, t].exp().diag()
        assert torch.linalg.matrix_norm(moved, 2) <= 1 + 1e-12
        state = moved @ state + b * torch.outer(key, v[0, 0, t])
    torch.testing.assert_close(got[0, 0], state)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"decay": 0.5}, "decay holds logarithms, at most 0"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]; got 1.5"),
        ({"beta": -0.1}, r"beta must lie in \[0, 1\]; got -0.1"),
    ],
)
def test_refuses(written, words):
    q, k, v = tokens()
    decay = torch.full_like(k, written.get("decay", -0.1))
    beta = torch.full_like(v[..., 0], written.get("beta", 0.5))
    with pytest.raises(RegardError, match=words):
        kda.scan(q, k, v, decay, beta)
