"""Gated DeltaNet against flash-linear-attention and transformers."""

import inspect

import pytest
import torch

from recurrences import close, decays, states, strengths, tokens
from regard.ops.states import delta_net, gated_delta_net


def test_gate():
    x = torch.tensor([[[0.0, 50.0], [-50.0, 1.0]]])
    gate = gated_delta_net.gate(x, torch.tensor([0.0, 1.0]), torch.tensor([0.5, -1.0]))
    wanted = [[-0.974077, -50.5], [0.0, -2.718282 * 0.693147]]
    torch.testing.assert_close(gate[0], torch.tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [64, 100])
def test_fla(T):
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    q, k, v = tokens(Hk=4, T=T, dtype=torch.float32)
    decay, beta, start = decays("token", q, v), strengths(v), states(q, v)
    call = {"initial_state": start, "output_final_state": True}
    inputs = (x.transpose(1, 2) for x in (q, k, v, beta, decay))
    wanted, last = naive.naive_recurrent_gated_delta_rule(*inputs, **call)
    close(gated_delta_net.scan(q, k, v, decay, beta, initial_state=start), (wanted.transpose(1, 2), last), 1e-4)


@pytest.mark.parametrize("T", [64, 100])
def test_transformers(T):
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v = tokens(Hk=4, T=T, dtype=torch.float32)
    decay, beta, start = decays("token", q, v), strengths(v), states(q, v)
    call = {"initial_state": start, "output_final_state": True}
    inputs = (x.transpose(1, 2) for x in (q, k, v, decay, beta))
    # Where flash-linear-attention is installed, the name leads to its kernels, which need a GPU.
    wanted, last = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)(*inputs, **call)
    close(gated_delta_net.scan(q, k, v, decay, beta, initial_state=start), (wanted.transpose(1, 2), last), 1e-4)


def test_no_decay_is_delta_net():
    q, k, v = tokens()
    beta = strengths(v)
    close(gated_delta_net.scan(q, k, v, torch.zeros_like(beta), beta), delta_net.scan(q, k, v, beta))
