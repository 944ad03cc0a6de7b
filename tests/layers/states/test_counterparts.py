"""Mixers against the layers transformers has, with its weights copied."""

import inspect

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from regard.layers.states import gated_delta_net, softmax, tnl


@pytest.fixture
def plain(monkeypatch):
    """transformers' own formulas: where fla is installed it would send them to kernels that need a GPU."""
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        if hasattr(modeling_qwen3_next, name):
            monkeypatch.setattr(modeling_qwen3_next, name, inspect.unwrap(getattr(modeling_qwen3_next, name)))


@pytest.mark.usefixtures("plain")
def test_gated_delta_net_equals_qwen3_next():
    """Two key heads, four value heads; Qwen interleaves its projections by key head, and has one convolution."""
    torch.manual_seed(0)
    width, heads, value_heads, d, e = 32, 2, 4, 16, 8
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=width, linear_num_key_heads=heads, linear_num_value_heads=value_heads, linear_key_head_dim=d,
            linear_value_head_dim=e, layer_types=["linear_attention"], num_hidden_layers=1,
        ),
        0,
    )  # fmt: skip
    ours = gated_delta_net.Mixer(width, heads, value_heads=value_heads, expand_v=1.0, eps=1e-6)
    group = value_heads // heads
    q, k, v, gate = theirs.in_proj_qkvz.weight.view(heads, -1, width).split([d, d, group * e, group * e], 1)
    beta, decay = theirs.in_proj_ba.weight.view(heads, 2 * group, width).split([group, group], 1)
    q_conv, k_conv, v_conv = theirs.conv1d.weight.split([heads * d, heads * d, value_heads * e])
    weights = {
        "inputs.q.weight": q, "inputs.k.weight": k, "inputs.v.weight": v, "gate.weight": gate,
        "inputs.beta.weight": beta, "decay.weight": decay, "out.weight": theirs.out_proj.weight, "a": theirs.A_log,
        "bias": theirs.dt_bias, "norm.weight": theirs.norm.weight, "inputs.q_conv.weight": q_conv,
        "inputs.k_conv.weight": k_conv, "inputs.v_conv.weight": v_conv,
    }  # fmt: skip
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    ours.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    x = torch.randn(2, 21, width)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_tnl_equals_minimax(layer):
    """MiniMax: SiLU on values too, RMS norm with weights over all heads, a sigmoid gate, its own slopes."""
    torch.manual_seed(0)
    width, heads, layers = 32, 4, 4
    config = MiniMaxConfig(
        hidden_size=width, num_attention_heads=heads, head_dim=8, num_hidden_layers=layers, block_size=5,
        layer_types=["linear_attention"] * layers,
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, layer)
    ours = tnl.Mixer(
        width, heads, layer=layer, layers=layers, positions=False, gate="sigmoid", norm="rms", value_silu=True,
        schedule="minimax", eps=theirs.norm.variance_epsilon,
    )  # fmt: skip
    torch.nn.init.normal_(theirs.norm.weight)
    # Theirs keeps q, k, v of a head together, ours all queries before all keys.
    qkv = theirs.qkv_proj.weight.view(heads, 3, 8, width).transpose(0, 1).reshape(3 * width, width)
    ours.load_state_dict(
        {"qkv.weight": qkv, "gate.weight": theirs.output_gate.weight, "norm.weight": theirs.norm.weight,
         "out.weight": theirs.out_proj.weight}
    )  # fmt: skip
    x = torch.randn(2, 17, width)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x, None, None)[0], atol=1e-5, rtol=1e-4)


def test_softmax_equals_llama():
    """Grouped queries and rotary positions."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, rope_theta=500.0)
    config._attn_implementation = "sdpa"
    theirs, ours = LlamaAttention(config, 0), softmax.Mixer(32, 4, kv_heads=2, base=500.0)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    ours.load_state_dict({f"{mine}.weight": getattr(theirs, name).weight for mine, name in names.items()})
    x = torch.randn(2, 13, 32)
    turns = LlamaRotaryEmbedding(config)(x, torch.arange(13)[None])
    with torch.no_grad():
        expected = theirs(x, position_embeddings=turns, attention_mask=None)[0]
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)
