"""Everything about a model and the process that detaching must leave as it was."""

from typing import Any

from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Attributes (by identity), hooks, weights and registries."""
    seen: dict[str, Any] = {
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "rope_deltas":  # Qwen2.5-VL's own scratch, new after every generate
                continue
            held = dict(value) if isinstance(value, dict) else id(value)
            seen[f"{name}.{key}"] = {k: id(v) for k, v in held.items()} if isinstance(held, dict) else held
        if hasattr(module, "config"):
            seen[f"{name} implementation"] = module.config._attn_implementation
    for name, tensor in model.state_dict().items():
        seen[f"weight {name}"] = (tensor.data_ptr(), tensor._version)
    return seen
