"""Configs of hybrid decoders as papers have them."""

import math
from collections.abc import Sequence
from typing import Any

from regard.models.hybrid_config import HybridConfig
from regard.models.layouts import SOFTMAX


def tnl(*, vocab_size: int, hidden_size: int, layers: int, heads: int, **more: Any) -> HybridConfig:
    """TransNormerLLM [003]: lightning attention in every layer, SRMSNorm, SGLU, embeddings times `sqrt(width)`.

    Learned relative positions stand in the first layer only. The factor of the embeddings is inferred.
    """
    fixed: dict[str, Any] = {"norm": "srms", "mlp": "sglu", "embedding_scale": math.sqrt(hidden_size)}
    made = {"mixers": ["tnl"] * layers, "num_attention_heads": heads, **fixed, **more}
    return HybridConfig(vocab_size=vocab_size, hidden_size=hidden_size, **made)


def recall(
    mixers: Sequence[str], *, vocab_size: int, hidden_size: int, heads: int, length: int, **more: Any
) -> HybridConfig:
    """The frame of multi-query associative recall [153]: mixers under LayerNorm and nothing else.

    Embeddings are tied and drop 0.1. Softmax attention has one head, no rotary positions and drops 0.1 of its weights;
    where no other mixer is, positions are learned, up to `length`.
    """
    options = {SOFTMAX: {"heads": 1, "rope": False, "dropout": 0.1}} if SOFTMAX in mixers else {}
    fixed: dict[str, Any] = {"norm": "layer", "mlp": "none", "embedding_dropout": 0.1, "mixer_options": options}
    if set(mixers) == {SOFTMAX}:
        fixed |= {"positions": "learned", "max_position_embeddings": length}
    made = {"mixers": list(mixers), "num_attention_heads": heads, "norm_eps": 1e-5, **fixed, **more}
    return HybridConfig(vocab_size=vocab_size, hidden_size=hidden_size, **made)
