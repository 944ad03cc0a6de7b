"""Where the parts of a model stand: families as data, and recognition by structure for all others.

A family differs from another only in names. What is asked of any model is that it holds one stack of
decoder layers, each with one causal self-attention module that knows its `layer_idx` and looks its
attention function up in the transformers registry. A module around the decoder may make its masks.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from regard.core.errors import RegardError

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
MASKS = "create_causal_mask"


@dataclass(frozen=True)
class Family:
    """Names inside the decoder: its layers, the norm behind them, and in a layer the attention and feed-forward part.

    `attention_out` and `feed_forward_out` name the module whose output is added to the residual stream, where
    that is a norm behind the part.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    feed_forward: str = "mlp"
    norm: str = "norm"
    attention_out: str = ""
    feed_forward_out: str = ""


_NORMED_BEHIND = Family(attention_out="post_attention_layernorm", feed_forward_out="post_feedforward_layernorm")


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": _NORMED_BEHIND,
    "gemma3_text": _NORMED_BEHIND,
    "phi3": Family(),
    "olmo2": _NORMED_BEHIND,
    "granite": Family(),
    "smollm3": Family(),
    "mixtral": Family(),
    "qwen3_moe": Family(),
    "qwen2_5_vl_text": Family(),
    "qwen3_vl_text": Family(),
    "gpt_neox": Family(attention="attention", norm="final_layer_norm"),
    "gpt2": Family(layers="h", attention="attn", norm="ln_f"),
}


@dataclass(frozen=True)
class Decoder:
    """The opened model: its decoder module, its layers and their attention modules in order, and their shape.

    `names` are the family's, None where the model was recognised by structure. `around` is the module that makes masks
    in the decoder's place, None: it makes its own.
    """

    module: nn.Module
    family: str
    names: Family | None
    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    around: nn.Module | None = None

    @property
    def config(self) -> Any:
        """The decoder's config."""
        return self.module.config

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.attentions)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    def part(self, layer: int, name: str) -> nn.Module:
        """The module of `layer` that the family calls `name`: `feed_forward`, `attention_out`, `feed_forward_out`.

        Raises:
            RegardError: the model was recognised by structure, which does not tell.
        """
        if self.names is None:
            raise RegardError(f"where the {name.replace('_', ' ')} of family {self.family} stands is not known")
        return getattr(self.blocks[layer], getattr(self.names, name) or getattr(self.names, name.removesuffix("_out")))


def uses_registry(attention: nn.Module) -> bool:
    """Whether this module's own file looks attention functions up in the transformers registry."""
    return any(hasattr(sys.modules.get(cls.__module__), REGISTRY) for cls in type(attention).__mro__[:2])


def looks_ahead(config: Any) -> bool:
    """Whether attention under `config` is causal by its masks alone."""
    return bool(getattr(config, "use_bidirectional_attention", None))


def _is_attention(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and (getattr(module, "is_causal", False) is True or looks_ahead(getattr(module, "config", None)))
        and not getattr(module, "is_cross_attention", False)
        and uses_registry(module)
    )


def _stack(owner: nn.Module, layers: nn.ModuleList, family: Family | None) -> tuple[nn.Module, ...] | None:
    found = []
    for index, layer in enumerate(layers):
        if family is not None:
            inside = [part] if (part := getattr(layer, family.attention, None)) is not None else []
        else:
            inside = [part for part in layer.modules() if _is_attention(part)]
        if len(inside) != 1 or getattr(inside[0], "layer_idx", None) != index:
            return None
        found.append(inside[0])
    return tuple(found) or None


def _stacks(model: nn.Module) -> list[dict[str, Any]]:
    stacks = []
    for owner in model.modules():
        kind = getattr(getattr(owner, "config", None), "model_type", "")
        family = FAMILIES.get(kind)
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and hasattr(owner, "config"):
                known = family if family is not None and name == family.layers else None
                attentions = _stack(owner, child, known)
                if attentions and all(map(_is_attention, attentions)):
                    told = kind if known else f"{kind or type(owner).__name__} (by structure)"
                    found = {"module": owner, "family": told, "names": known}
                    stacks.append(found | {"blocks": tuple(child), "attentions": attentions})
    return stacks


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    from transformers import DynamicCache

    cache_layers = DynamicCache(config=config).layers
    if len(cache_layers) != layers:
        raise RegardError(f"the config plans {len(cache_layers)} cache layers for {layers} attention layers")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    odd = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if odd:
        raise RegardError(
            f"layers of type {', '.join(odd)} are not opened yet; known: full_attention, sliding_attention"
        )
    return tuple(getattr(layer, "sliding_window", None) for layer in cache_layers)


def _around(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The module that holds `decoder`, where its own file makes masks and it is no decoder itself."""
    for owner in model.modules():
        if any(child is decoder for child in owner.children()) and hasattr(owner, "config"):
            masks = getattr(sys.modules[type(owner).__module__], MASKS, None)
            return owner if masks is not None and hasattr(owner.config, "text_config") else None
    return None


def open_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of `model` (wrapped by PEFT, or inside a vision-language model, or bare).

    Raises:
        RegardError: the model has no such stack, or several, is not causal, or shares keys between layers; the
            message says what was looked for and not found.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RegardError(f"{type(model).__name__} is an encoder-decoder; regard opens decoder-only models")
    stacks = _stacks(model)
    if len(stacks) != 1:
        found = ", ".join(type(stack["module"]).__name__ for stack in stacks) or "none"
        raise RegardError(
            f"{type(model).__name__} was not recognised: looked for one list of decoder layers, each with one causal "
            f"self-attention module with a layer_idx that uses transformers' {REGISTRY}; found {found}"
        )
    attentions, config = stacks[0]["attentions"], stacks[0]["module"].config
    around = _around(model, stacks[0]["module"])
    if looks_ahead(config) and around is None:
        raise RegardError(
            f"{type(model).__name__} lets all tokens of its prompt see later ones (use_bidirectional_attention), and "
            "attached layers are causal"
        )
    if any(getattr(part, "is_kv_shared_layer", False) for part in attentions):
        raise RegardError(f"{type(model).__name__} shares keys and values between layers, which is not opened yet")
    heads = config.num_attention_heads
    groups = {int(getattr(part, "num_key_value_groups", 1)) for part in attentions}
    if len(groups) != 1:
        raise RegardError(
            f"layers of {type(model).__name__} differ in their number of key heads: groups {sorted(groups)}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(
        **stacks[0],
        heads=heads,
        kv_heads=heads // groups.pop(),
        head_dim=head_dim,
        windows=_windows(config, len(attentions)),
        around=around,
    )
