"""GLA against flash-linear-attention, and against a decay of whole tokens."""

import pytest
import torch

import regard
from recurrences import close, decays, states, tokens
from regard.core.errors import RegardError
from regard.ops.states import gla


def test_gate():
    x = torch.tensor([-100.0, 0.0, 100.0])
    assert gla.gate(x).tolist() == pytest.approx([-100 / 16, -0.6931472 / 16, 0.0], abs=1e-6)


@pytest.mark.parametrize("T", [64, 100])
def test_fla(T):
    naive = pytest.importorskip("fla.ops.gla.naive")
    q, k, v = tokens(Hk=4, T=T, D=3, dtype=torch.float32)
    decay, start = decays("channel", q, v), states(q, v)
    call = {"initial_state": start, "output_final_state": True}
    wanted, last = naive.naive_recurrent_gla(*(x.transpose(1, 2) for x in (q, k, v, decay)), **call)
    close(gla.scan(q, k, v, decay, initial_state=start), (wanted.transpose(1, 2), last), 1e-4)


def test_equal_channels_are_a_decay_of_the_token():
    q, k, v = tokens()
    decay = decays("token", q, v)
    wanted = regard.scan(q, k, v, decay=decay, scale=5**-0.5)
    close(gla.scan(q, k, v, decay[..., None].expand(-1, -1, -1, 5)), wanted)


def test_refuses_gates_that_are_not_logarithms():
    q, k, v = tokens()
    with pytest.raises(RegardError, match="logarithms, at most 0"):
        gla.scan(q, k, v, decays("key channel", q, v).exp())
