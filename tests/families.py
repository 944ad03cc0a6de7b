"""Tiny random models of every family regard names, built offline from their configs."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY = 96
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "head_dim": 8,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _causal(config: Any, **more: Any) -> Callable[[], nn.Module]:
    return lambda: tf.AutoModelForCausalLM.from_config(config(**{**_SMALL, **more}))


def _gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config)


def _llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tf.LlamaConfig(**_SMALL)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=95))


def _qwen2_5_vl() -> nn.Module:
    text = {**_SMALL, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=95, video_token_id=94, vision_start_token_id=93
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _causal(tf.LlamaConfig),
    "mistral": _causal(tf.MistralConfig, sliding_window=8),
    "qwen2": _causal(tf.Qwen2Config, use_sliding_window=True, max_window_layers=1, **_MIXED),
    "qwen3": _causal(tf.Qwen3Config),
    "gemma2": _causal(tf.Gemma2Config, query_pre_attn_scalar=8, **_MIXED),
    "gemma3": _causal(tf.Gemma3TextConfig, query_pre_attn_scalar=8, **_MIXED),
    "phi3": _causal(tf.Phi3Config),
    "olmo2": _causal(tf.Olmo2Config),
    "granite": _causal(tf.GraniteConfig),
    "smollm3": _causal(tf.SmolLM3Config, no_rope_layer_interval=2),
    "mixtral": _causal(tf.MixtralConfig, **_EXPERTS),
    "qwen3_moe": _causal(tf.Qwen3MoeConfig, **_EXPERTS),
    "gpt_neox": _causal(tf.GPTNeoXConfig),
    "gpt2": _gpt2,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A random model of family `name` in eval mode, the same for the same seed; weights large enough to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().eval()
    if name in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model
