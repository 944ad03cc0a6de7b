"""Reading and writing a layer's attention weights by head: separate, fused or interleaved, Linear or Conv1D."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regard.adapters.families import Decoder
from regard.core.errors import RegardError
from regard.core.projections import Projections


@dataclass(frozen=True)
class Layout:
    """Names inside an attention module. `interleaved`: a fused weight holds q, k, v of head 0, then of head 1."""

    inputs: tuple[str, ...]
    output: str
    interleaved: bool = False


LAYOUTS = (
    Layout(("q_proj", "k_proj", "v_proj"), "o_proj"),
    Layout(("qkv_proj",), "o_proj"),
    Layout(("query_key_value",), "dense", interleaved=True),
    Layout(("c_attn",), "c_proj"),
)


def read(decoder: Decoder, layer: int) -> Projections:
    """The projections of `layer`, as float64 copies.

    Raises:
        RegardError: the layer's projections stand under names not known, or are no plain weights.
    """
    attention: Any = decoder.attentions[layer]
    layout = _layout(attention)
    D, sizes = decoder.head_dim, (decoder.heads, decoder.kv_heads, decoder.kv_heads)
    weights = _split([_rows(getattr(attention, name)) for name in layout.inputs], layout, sizes, D)
    biases = [getattr(attention, name).bias for name in layout.inputs]
    held: list[Tensor | None] = [None, None, None]
    if biases[0] is not None:
        told = [bias.detach().double()[:, None] for bias in biases]
        held = [part[..., 0] for part in _split(told, layout, sizes, D)]
    out = _rows(getattr(attention, layout.output))
    config: Any = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    rotary = int(D * share) if hasattr(decoder.module, "rotary_emb") else 0
    normed = any(hasattr(attention, name) for name in ("q_norm", "k_norm", "q_layernorm", "query_layernorm"))
    q, k, v = weights
    q_bias, k_bias, v_bias = held
    return Projections(q, k, v, out.unflatten(1, (decoder.heads, D)), q_bias, k_bias, v_bias, rotary, normed)


def write(decoder: Decoder, layer: int, made: Projections) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter of `layer` that `made` changes, with its new value in the parameter's dtype."""
    attention: Any = decoder.attentions[layer]
    layout = _layout(attention)
    rows = _join([made.q, made.k, made.v], layout)
    found = [_fitted(getattr(attention, name), part) for name, part in zip(layout.inputs, rows, strict=True)]
    if made.q_bias is not None and made.k_bias is not None and made.v_bias is not None:
        biases = _join([b[..., None] for b in (made.q_bias, made.k_bias, made.v_bias)], layout)
        for name, part in zip(layout.inputs, biases, strict=True):
            bias = getattr(attention, name).bias
            found.append((bias, part[:, 0].to(bias)))
    return [*found, _fitted(getattr(attention, layout.output), made.o.flatten(1))]


def _layout(attention: Any) -> Layout:
    for layout in LAYOUTS:
        parts: list[Any] = [getattr(attention, name, None) for name in (*layout.inputs, layout.output)]
        if all(part is not None for part in parts):
            for name, part in zip((*layout.inputs, layout.output), parts, strict=True):
                if type(part) not in (nn.Linear, Conv1D) or not part.weight.is_floating_point():
                    raise RegardError(
                        f"{name} is a {type(part).__name__}, not a plain weight; merge or unload it first"
                    )
            return layout
    known = "; ".join(", ".join((*layout.inputs, layout.output)) for layout in LAYOUTS)
    raise RegardError(f"{type(attention).__name__} has projections under other names; known: {known}")


def _rows(part: Any) -> Tensor:
    """The weight as `[out, in]`, float64."""
    weight = part.weight.detach().double()
    return weight.T if isinstance(part, Conv1D) else weight


def _fitted(part: Any, rows: Tensor) -> tuple[nn.Parameter, Tensor]:
    made = rows.T if isinstance(part, Conv1D) else rows
    return part.weight, made.to(part.weight).contiguous()


def _split(rows: list[Tensor], layout: Layout, sizes: tuple[int, int, int], D: int) -> list[Tensor]:
    """Rows `[out, n]` of the input projections as `[heads, D, n]` of q, k and v."""
    if layout.interleaved:
        return list(rows[0].unflatten(0, (sizes[0], 3 * D)).split(D, dim=1))
    parts = rows if len(rows) == 3 else list(rows[0].split([size * D for size in sizes]))
    return [part.unflatten(0, (size, D)) for part, size in zip(parts, sizes, strict=True)]


def _join(parts: list[Tensor], layout: Layout) -> list[Tensor]:
    """The inverse of `_split`."""
    if layout.interleaved:
        return [torch.cat(parts, dim=1).flatten(0, 1)]
    rows = [part.flatten(0, 1) for part in parts]
    return rows if len(layout.inputs) == 3 else [torch.cat(rows)]
