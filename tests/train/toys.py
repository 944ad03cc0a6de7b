"""A Llama small enough to train in a test, with dropout so that random states matter."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(vocabulary=256, seed=0, layers=1, width=32, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        **({"attention_dropout": 0.1} | changes),
    )  # fmt: skip
    return LlamaForCausalLM(config)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    """Whether two models hold the very same bits."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
