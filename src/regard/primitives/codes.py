"""Codes read and written where they lie, by the kernels that a codec brings along (`Codec.kernels`).

Where none can, what calls this decodes first or encodes in plain torch, as on a CPU.
"""

from typing import TypeGuard

import torch
from torch import Tensor

from regard.core.pattern import Pattern
from regard.core.rules import Causal, Either, Rule, Sink, Window, covers
from regard.core.step import Step
from regard.core.store import Codec, Fields, Form, Kernels, Part


def kernels(x: Tensor, key: Codec | None, value: Codec | None) -> Kernels | str:
    """The kernels that both codecs name, where `x` lies, or why there are none."""
    named = {codec.kernels for codec in (key, value) if codec is not None}
    found = named.pop() if len(named) == 1 else None
    return "no kernel knows these codes" if found is None else found(x)


def forms(key: Codec | None, value: Codec | None) -> tuple[Form | None, Form | None]:
    """What the kernels know of either."""
    return None if key is None else key.form, None if value is None else value.form


def blank(x: Tensor, codec: Codec | None, tokens: int) -> Fields:
    """Fields for `tokens` vectors such as those of `x [B, Hk, T, D]`; they hold anything."""
    B, Hk, _, D = x.shape
    if codec is None:
        return (x.new_empty(B, Hk, tokens, D),)
    assert codec.form is not None
    codes = x.new_empty(B, Hk, tokens, D * codec.form.bits // 8, dtype=torch.uint8)
    return codes, x.new_empty(B, Hk, tokens, 2, dtype=torch.float32)


def writer(k: Tensor, v: Tensor, key: Codec | None, value: Codec | None) -> Kernels | None:
    """The kernels that write `k`, `v`; None where there are none, or where gradients flow into what is stored."""
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        return None
    found = kernels(k, key, value)
    if isinstance(found, str):
        return None
    return None if found.refuses_write(k, v, blank(k, key, 0), blank(v, value, 0), *forms(key, value)) else found


def encoded(k: Tensor, v: Tensor, key: Codec | None, value: Codec | None) -> tuple[Fields, Fields] | None:
    """The fields of `k` and `v`, written in one launch; None where no kernel does."""
    found = writer(k, v, key, value)
    if found is None:
        return None
    keys, values = blank(k, key, k.shape[2]), blank(v, value, v.shape[2])
    write(found, k, v, keys, values, key, value, 0)
    return keys, values


def write(
    found: Kernels,
    k: Tensor,
    v: Tensor,
    keys: Fields,
    values: Fields,
    key: Codec | None,
    value: Codec | None,
    at: int | Tensor,
    heads: Tensor | None = None,
) -> None:
    """Write `k`, `v`, or these heads of them, to the slots of `keys` and `values` from `at` on: see `Kernels.write`."""
    form_key, form_value = forms(key, value)
    found.write(k, v, keys, values, key=form_key, value=form_value, start=at, heads=heads)


def read(
    q: Tensor,
    keys: Fields,
    values: Fields,
    *,
    key: Codec | None,
    value: Codec | None,
    positions: Tensor | None,
    pattern: Pattern,
    step: Step,
    scale: float,
    lengths: Tensor | None = None,
    part_of: Part | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attention of `q [B, H, T, D]` straight from codes: `(out, lse)`; None where no kernel does this exactly.

    `positions [1|B, S]` of the keys; None: consecutive, ending with the last query. `lengths [B]` of the requests, on
    the device; None: all that `keys` has.
    """
    found = kernels(q, key, value)
    band = span(pattern, keys[0].shape[2] if positions is None and lengths is None else None)
    form_key, form_value = forms(key, value)
    own = q if part_of is None else q[:, : part_of.group * keys[0].shape[1]]
    if isinstance(found, str) or band is None or found.refuses(own, keys, values, form_key, form_value):
        return None
    return found.read(
        q, keys, values, key=form_key, value=form_value, scale=scale, lengths=lengths,
        positions=positions,
        q_positions=None if positions is None else step.queries(q.device), sink=band[0], recent=band[1],
        part_of=part_of,
    )  # fmt: skip


def told(q: Tensor, kv_heads: int, pattern: Pattern, key: Codec | None, value: Codec | None) -> str:
    """Which read a short forward of queries such as `q [B, H, T, D]` gets, for `explain`."""
    found = kernels(q, key, value)
    if not isinstance(found, str):
        x = q[:, :1].expand(-1, kv_heads, -1, -1)
        found = found.refuses(q, blank(x, key, 0), blank(x, value, 0), *forms(key, value))
        if found is None and span(pattern, None) is None:
            found = f"the kernel that reads codes knows windows and sinks, not {pattern}"
    return "codes read as they lie" if found is None else f"codes decoded to be read ({found})"


def span(pattern: Pattern, keys: int | None = None) -> tuple[int, int | None] | None:
    """`(sink, recent)` such that all heads see `p_k < sink` and `p_q - p_k < recent`; None where they do not.

    `keys` are consecutive from position 0 on, so that a rule that covers them all cuts nothing; None: they are not.
    """
    rules: set[Rule] = {Causal() if keys is not None and covers(rule, keys) else rule for rule in pattern.rules}
    if len(rules) != 1:
        return None
    rule = rules.pop()
    parts = (rule.left, rule.right) if isinstance(rule, Either) else (rule,)
    if parts == (Causal(),):
        return 0, None
    sizes = {type(part): part.size for part in parts if _bare(part)}
    return (sizes.get(Sink, 0), sizes.get(Window, 0)) if len(sizes) == len(parts) else None


def _bare(rule: Rule) -> TypeGuard[Window | Sink]:
    """Whether `rule` is a number of positions."""
    return isinstance(rule, Sink) or (isinstance(rule, Window) and rule.block == 1)
