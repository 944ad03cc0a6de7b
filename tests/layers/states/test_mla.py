"""The mixer of latent attention against transformers' DeepSeek layers, with their weights, and its bad sizes."""

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from regard.core.errors import RegardError
from regard.layers import mixers
from regard.primitives.memory import Memory

WIDTH, HEADS, TOKENS, BASE = 32, 4, 13, 500.0
SIZES = {"head_size": 7, "value_size": 9, "rank": 10, "rope_size": 6}
NAMES = {"q": "q_proj", "down": "kv_a_proj_with_mqa", "norm": "kv_a_layernorm", "up": "kv_b_proj", "out": "o_proj"}


def pair(kind, config, q_rank, bias, interleaved):
    """One of transformers' layers and ours with its weights, in float64."""
    torch.manual_seed(0)
    made = config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=q_rank, kv_lora_rank=10,
        qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9, attention_bias=bias,
        **({"rope_interleave": interleaved} if config is DeepseekV3Config else {}),
    )  # fmt: skip
    made._attn_implementation = "sdpa"
    theirs = kind(made, 0).double().eval()
    names = NAMES if q_rank is None else NAMES | {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q": "q_b_proj"}
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        # Theirs computes in float32, whatever it is given.
        if (norm := getattr(theirs, name)) is not None:
            setattr(theirs, name, torch.nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon).double())
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    options = SIZES | {"q_rank": q_rank, "bias": bias, "base": BASE, "interleaved": interleaved}
    ours = mixers.build("mla", WIDTH, HEADS, layer=0, layers=1, options=options).double()
    weights = theirs.state_dict()
    ours.load_state_dict(
        {f"{mine}.{part}": weights[f"{name}.{part}"] for mine, name in names.items() for part in ("weight", "bias")
         if f"{name}.{part}" in weights}
    )  # fmt: skip
    return theirs, ours


def angles():
    return torch.arange(TOKENS)[:, None] * BASE ** (torch.arange(0, 6, 2).double() / -6)


@torch.no_grad()
def agree(ours, expected, x):
    torch.testing.assert_close(ours(x), expected, atol=1e-8, rtol=0)
    memory = Memory()
    parts = [ours(x[:, a:b], memory=memory) for a, b in ((0, 5), (5, 6), (6, 9), (9, 13))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("q_rank", "bias"), [(None, False), (12, True)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_equals_deepseek_v3(q_rank, bias, interleaved):
    theirs, ours = pair(v3.DeepseekV3Attention, DeepseekV3Config, q_rank, bias, interleaved)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    turns = torch.cat((angles(), angles()), -1)[None]
    with torch.no_grad():
        expected = theirs(x, position_embeddings=(turns.cos(), turns.sin()), attention_mask=None)[0]
    agree(ours, expected, x)


@pytest.mark.parametrize(("q_rank", "bias"), [(None, True), (12, False)])
def test_equals_deepseek_v2(q_rank, bias, monkeypatch):
    theirs, ours = pair(v2.DeepseekV2Attention, DeepseekV2Config, q_rank, bias, True)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    turns = torch.polar(torch.ones_like(angles()), angles())[None]
    # Theirs turns in float32, whatever it is given.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.contiguous)
    with torch.no_grad():
        expected = theirs(x, position_embeddings=turns, attention_mask=None)[0]
    agree(ours, expected, x)


def test_autocast():
    """Whole and from memory, and the gradients of all weights, in their own dtype."""
    torch.manual_seed(0)
    ours, x = mixers.build("mla", WIDTH, HEADS, layer=0, layers=1, options=SIZES), torch.randn(2, TOKENS, WIDTH)
    names, weights = zip(*ours.named_parameters(), strict=True)
    wanted = ours(x)
    gradients = torch.autograd.grad(wanted.square().sum(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        found, memory = ours(x), Memory()
        parts = [ours(x[:, a:b], memory=memory) for a, b in ((0, 12), (12, 13))]
    assert found.dtype == torch.bfloat16
    for y in (found, torch.cat(parts, 1)):
        assert (y - wanted).norm() <= 0.02 * wanted.norm()
    told = torch.autograd.grad(found.float().square().sum(), weights)
    for name, g, exact in zip(names, told, gradients, strict=True):
        assert g.dtype == torch.float32
        assert (g - exact).norm() <= 0.05 * exact.norm(), name


def test_what_is_remembered():
    """r + e numbers a token, whatever the heads."""
    mixer, memory = mixers.build("mla", WIDTH, HEADS, layer=0, layers=1, options=SIZES), Memory()
    mixer(torch.randn(3, TOKENS, WIDTH), memory=memory)
    assert memory.nbytes == 3 * TOKENS * (10 + 6) * 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rope_size": 5}, "rope_size must be even, 0 or more, got 5"),
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"q_rank": -1}, "q_rank must be 1 or more, got -1"),
        ({"value_size": 0}, "value_size must be 1 or more, got 0"),
        ({"latent_rank": 8}, "unknown option of mixer mla 'latent_rank'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(RegardError, match=match):
        mixers.build("mla", WIDTH, HEADS, layer=0, layers=1, options=options)
