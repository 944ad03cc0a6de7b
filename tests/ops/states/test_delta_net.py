"""DeltaNet against flash-linear-attention, and against what the delta rule promises."""

import pytest
import torch

import regard
from recurrences import close, states, strengths, tokens
from regard.core.errors import RegardError
from regard.ops.states import delta_net


@pytest.mark.parametrize("T", [64, 100])
def test_fla(T):
    naive = pytest.importorskip("fla.ops.delta_rule.naive")
    q, k, v = tokens(Hk=4, T=T, dtype=torch.float32)
    beta, start = strengths(v), states(q, v)
    wanted = naive.delta_rule_recurrence(q, k, v, beta, initial_state=start)
    close(delta_net.scan(q, k, v, beta, initial_state=start), wanted, 1e-4)


def test_a_written_key_answers_with_its_value():
    q, k, v = tokens(Hk=4)
    for t in (1, 20, 37):
        told = (x[:, :, :t] for x in (q, k, v, torch.ones_like(v[..., 0])))
        _, state = delta_net.scan(*told, initial_state=states(q, v))
        torch.testing.assert_close((state.mT @ k[:, :, t - 1, :, None])[..., 0], v[:, :, t - 1])


def test_orthonormal_keys_are_linear_attention():
    q, _, v = tokens(1, 1, 1, 5)
    k = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0][None, None]
    wanted = regard.scan(q, k, v, scale=5**-0.5)
    close(delta_net.scan(q, k, v, torch.ones(1, 1, 5, dtype=torch.float64)), wanted)


def test_strengths_above_one_must_be_allowed():
    q, k, v = tokens()
    beta = 2 * strengths(v)
    with pytest.raises(RegardError, match=r"beta must lie in \[0, 1\]"):
        delta_net.scan(q, k, v, beta)
    wanted = delta_net.scan(q, k, v, beta, negative_eigenvalues=True, backend="stepwise")
    close(delta_net.scan(q, k, v, beta, negative_eigenvalues=True), wanted)
    with pytest.raises(RegardError, match=r"beta must lie in \[0, 2\]"):
        delta_net.scan(q, k, v, beta + 1.5, negative_eigenvalues=True)
