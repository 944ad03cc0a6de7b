"""TransNormerLLM's slopes against the released rule, MiniMax's layer and flash-linear-attention's formula."""

import math

import pytest
import torch

from recurrences import close, states, tokens
from regard.core.errors import RegardError
from regard.ops.states import tnl


def released(heads):
    """ALiBi's slopes as the released code builds them."""

    def power(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power(heads)
    near = 2 ** math.floor(math.log2(heads))
    return power(near) + released(2 * near)[0::2][: heads - near]


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_slopes_are_the_released_ones(heads):
    for layer in range(4):
        wanted = torch.tensor(released(heads), dtype=torch.float64) * (1 - layer / 3 + 1e-5)
        torch.testing.assert_close(tnl.slopes(heads, layer, 4), wanted)


def test_slopes_by_hand():
    torch.testing.assert_close(tnl.slopes(8, 0, 2) / (1 + 1e-5), 0.5 ** torch.arange(1, 9, dtype=torch.float64))
    assert tnl.slopes(8, 1, 2).max() <= 0.5e-5
    fla = tnl.slopes(4, 1, 2, "fla")
    torch.testing.assert_close(fla, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))


def test_layers_decay_less_with_depth():
    for schedule in ("tnl", "minimax", "fla"):
        depth = torch.stack([tnl.slopes(4, layer, 6, schedule) for layer in range(6)])
        assert bool((depth.diff(dim=0) <= 0).all())
        assert bool((depth >= 0).all())


def test_the_core_of_minimax():
    """The layer's projections made neutral: what remains is the recurrence with MiniMax's slopes."""
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    configuration = pytest.importorskip("transformers.models.minimax.configuration_minimax")
    config = configuration.MiniMaxConfig(
        hidden_size=24, num_attention_heads=4, head_dim=6, num_hidden_layers=3, block_size=8, hidden_act="linear"
    )
    layer = modeling.MiniMaxLightningAttention(config, 1).double()
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2, 21, 24, generator=drawn, dtype=torch.float64)
    caught = []
    layer.norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        layer(x, None, None)
        q, k, v = layer.qkv_proj(x).reshape(2, 21, 4, 18).transpose(1, 2).split(6, -1)
    out, _ = tnl.scan(q, k, v, layer=1, layers=3, schedule="minimax")
    # Its slopes are rounded to float32.
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), caught[0], atol=1e-6, rtol=1e-6)


def test_a_text_in_parts():
    q, k, v = tokens()
    call = {"layer": 1, "layers": 3, "initial_state": states(q, v)}
    wanted = tnl.scan(q, k, v, **call)
    first, call["initial_state"] = tnl.scan(*(x[:, :, :9] for x in (q, k, v)), **call)
    second, last = tnl.scan(*(x[:, :, 9:] for x in (q, k, v)), **call)
    close((torch.cat([first, second], 2), last), wanted)


def test_positions_count_by_their_difference():
    theta = tnl.lrpe_start(2, 5).double()
    assert theta.shape == (2, 1, 5)
    assert theta[0, 0, 0] == 1
    torch.testing.assert_close(theta[1, 0, 0].item(), 10000 ** (-2 * 5 / 10))
    q, k, _ = tokens(T=6)
    for shift in (0, 100):
        places = torch.arange(6) + shift
        scores = tnl.lrpe(q, theta, places) @ tnl.lrpe(k, theta, places).mT
        for t in range(6):
            for j in range(6):
                wanted = (q[:, :, t] * k[:, :, j] * (theta[:, 0] * (t - j)).cos()).sum(-1)
                torch.testing.assert_close(scores[:, :, t, j], wanted)
    rows = torch.stack([torch.arange(6), torch.arange(6) + 3])
    torch.testing.assert_close(tnl.lrpe(q, theta, rows)[1], tnl.lrpe(q, theta, rows[1])[1])


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"schedule": "minmax"}, "Did you mean 'minimax'"),
        ({"layer": 3, "layers": 3}, r"layer in 0..2, got heads=4, layer=3"),
        ({"layer": -1, "layers": 3}, "layer=-1"),
    ],
)
def test_refuses(written, words):
    with pytest.raises(RegardError, match=words):
        tnl.scan(*tokens(), **written)
