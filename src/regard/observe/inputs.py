"""What a model is run on, as a user gives it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import RegardError


def prepared(model: nn.Module, inputs: Tensor | Mapping[str, Any], keep: int = 1) -> tuple[dict[str, Any], Tensor]:
    """Keywords for one forward of the whole prompt, on the model's device, and which tokens are real, bool `[B, T]`.

    Logits are of the last `keep` rows where the model can (0: all), and no cache is made, unless `inputs` say
    otherwise.

    Raises:
        RegardError: there is no prompt, ids that the vocabulary does not have, a mask of another shape, or a cache that
            holds tokens already.
    """
    device = next(model.parameters()).device
    given: dict[str, Any] = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    prompt = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(prompt, Tensor) or prompt.ndim < 2 or 0 in prompt.shape:
        got = "none" if prompt is None else f"{list(prompt.shape)}"
        raise RegardError(f"a prompt of ids [B, T] is needed, as input_ids or inputs_embeds, got {got}")
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise RegardError(f"the cache holds {cache.get_seq_length()} tokens already; a whole prompt is read at once")
    shape = prompt.shape[:2]
    mask = given.get("attention_mask")
    if mask is not None and mask.shape != shape:
        raise RegardError(f"attention_mask is {list(mask.shape)}, the prompt {list(shape)}")
    given.setdefault("use_cache", cache is not None)
    if keep and "logits_to_keep" in inspect.signature(model.forward).parameters:
        given.setdefault("logits_to_keep", keep)
    real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    if not bool(real.any(1).all()):
        raise RegardError(f"row {int((~real.any(1)).nonzero()[0])} of the prompt is padding alone")
    return given, real
