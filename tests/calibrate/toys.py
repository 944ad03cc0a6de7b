"""Llama models written by hand: every weight is zero but those that a test plants."""

import torch
import transformers as tf
from torch import Tensor, nn

HEAD = 16
# Of a head's rotary pairs this one turns slowest: what is written there does not mind positions.
STILL = HEAD // 2 - 1


def blank(layers: int, vocabulary: int, hidden: int, heads: int = 4) -> nn.Module:
    """A model whose layers add nothing and whose logits are 0."""
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8}, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
    return model


@torch.no_grad()
def plant(model: nn.Module, layer: int, head: int, seek: Tensor, sight: float, read: Tensor, write: Tensor) -> None:
    """Make a head look for keys along `seek [d]`, and write what it reads there.

    Args:
        model: a blank one, whose embeddings all have the same number in their last dimension.
        layer, head: which.
        seek: the direction that keys are found by; zero: all keys alike.
        sight: how strongly.
        read: `[n, d]` directions that values read, n <= HEAD.
        write: `[d, n]` where the output goes.
    """
    part, first = model.model.layers[layer].self_attn, head * HEAD
    part.q_proj.weight[first + STILL, -1] = sight
    part.k_proj.weight[first + STILL] = sight * seek
    part.v_proj.weight[first : first + len(read)] = read
    part.o_proj.weight[:, first : first + len(read)] = write
