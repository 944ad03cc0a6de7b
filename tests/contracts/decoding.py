"""The ways people decode, all through unmodified `generate`, and teacher-forced through the cache."""

import contextlib
import functools

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from families import VOCABULARY, tiny

GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


def prompts(rows: int = 2, length: int = 21, padding: int = 4) -> tuple[Tensor, Tensor]:
    """`ids, mask [rows, length]`: the first row left-padded; a repeated phrase, so that prompt lookup finds one."""
    drawn = torch.Generator().manual_seed(1)
    phrase = torch.randint(2, VOCABULARY - 6, (rows, 5), generator=drawn)
    ids = torch.cat([phrase] * (length // 5 + 1), 1)[:, :length].clone()
    ids[:, 7:11] = torch.randint(2, VOCABULARY - 6, (rows, 4), generator=drawn)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :padding] = 0
        ids[0, :padding] = 0
    return ids, mask


def generated(model: nn.Module, way: str, tokens: int = 10, rows: int = 2, padding: int = 4) -> Tensor:
    """Tokens of `model.generate` in one of the ways of `GENERATE`."""
    ids, mask = prompts(1 if way == "prompt lookup" else rows, padding=0 if way == "prompt lookup" else padding)
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **GENERATE[way])


def ways(model: nn.Module) -> dict[str, Tensor]:
    """Tokens of the model as it is, for every way it can be decoded (Qwen2.5-VL 5.17 prefills in one piece only)."""
    found = {way: generated(model, way) for way in GENERATE if way != "chunked prefill"}
    with contextlib.suppress(RuntimeError):
        found["chunked prefill"] = generated(model, "chunked prefill")
    return found


@functools.cache
def possible(family: str) -> tuple[str, ...]:
    """The ways in which family `family` can be decoded at all."""
    return tuple(ways(tiny(family)))


@torch.no_grad()
def forced(model: nn.Module, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """Logits `[B, T, V]` of `ids` fed through one cache in pieces that end at `cuts`."""
    positions = _positions(model, mask)
    cache, start, logits = DynamicCache(config=model.config), 0, []
    for stop in [*cuts, ids.shape[1]]:
        out = model(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[..., start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, 1)


@torch.no_grad()
def at_once(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits `[B, T, V]` of one full forward without a cache."""
    return model(input_ids=ids, attention_mask=mask, position_ids=_positions(model, mask), use_cache=False).logits


def _positions(model: nn.Module, mask: Tensor) -> Tensor:
    """`[B, T]`, or `[3, B, T]` where a model counts time, height and width."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return positions.expand(3, *positions.shape) if "qwen2_5_vl" in model.config.model_type else positions
