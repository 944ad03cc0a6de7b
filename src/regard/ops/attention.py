"""Exact attention over any `Pattern`, on the fastest path that computes exactly that.

`reference` (`primitives/reference.py`) is the definition. `sdpa` runs torch's fused kernels with their lse
and skips the keys that a pattern of finite reach cannot see. On a GPU, `block` runs kernels over the blocks that a
pattern opens (`ops/blocks.py`), and `decode` reads every key once for few queries (`ops/decode.py`). A named backend
never falls back.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.errors import choose as one_of
from regard.core.pattern import Pattern
from regard.core.reach import FOR_EVER
from regard.core.rules import Causal, Rule, covers
from regard.core.shapes import group_size
from regard.core.two_sided import TwoSided, checked
from regard.kernels import device
from regard.ops import blocks
from regard.ops import decode as decoding
from regard.ops.two_sided import joined
from regard.primitives.merge import merge
from regard.primitives.reference import reference
from regard.primitives.sdpa import fused, refuses
from regard.primitives.sweep import sweep, visible

__all__ = ["attend", "choose", "merge"]

Part = tuple[Tensor, Tensor]
BACKENDS = ("auto", "reference", "sdpa", "block", "decode")
RUNS = {"block": blocks.run, "decode": decoding.run}


class Verdict(NamedTuple):
    """What a backend says of a call: why it cannot do it, why `auto` leaves it to others (None: neither), its use."""

    backend: str
    refuses: str | None
    yields: str | None
    gain: str


def verdicts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    aligned: bool = True,
) -> Iterator[Verdict]:
    """Of every backend, in the order in which `auto` asks them; `aligned` says that no positions are given."""
    yield from _kernels(q, k, v, pattern, bias, aligned)
    yield from _anywhere(q, k, v, bias, softcap)


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None, bias: Tensor | None, aligned: bool
) -> Iterator[Verdict]:
    """Of those that run on a GPU only."""
    reason = decoding.refuses(q, k, v, pattern=pattern, bias=bias)
    better = None if reason else decoding.yields(q, k, pattern=pattern, aligned=aligned)
    yield Verdict("decode", reason, better, "few queries over many keys: each is read once")
    reason = blocks.refuses(q, k, v, bias=bias)
    better = None if reason else blocks.yields(q, k, pattern)
    yield Verdict("block", reason, better, "the pattern's blocks are read, and no mask of all pairs is built")


def _anywhere(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None) -> Iterator[Verdict]:
    """Of those that run on any device."""
    reason = refuses(q, k, v, bias=bias, softcap=softcap)
    yield Verdict("sdpa", reason, None, "torch's fused kernels do this exactly")
    yield Verdict("reference", None, None, reason or "the definition, for all that others refuse")


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    aligned: bool = True,
    backend: str = "auto",
) -> tuple[str, str]:
    """The backend that `attend` would run, one of `BACKENDS`, and why. `aligned` says that no positions are given.

    Raises:
        RegardError: no such backend, or a named one refuses the call; the message says why.
    """
    if backend not in BACKENDS:
        one_of("backend", backend, BACKENDS)
    if backend == "reference":
        return "reference", "asked for"
    if backend == "sdpa" or (backend == "auto" and device.refuses(q)):
        # Asking the kernels takes longer than a short call on a CPU.
        asked = _anywhere(q, k, v, bias, softcap)
    else:
        asked = verdicts(q, k, v, pattern=pattern, bias=bias, softcap=softcap, aligned=aligned)
    for verdict in asked:
        if verdict.backend == backend:
            if verdict.refuses is None:
                return backend, "asked for"
            raise RegardError(f"backend {backend!r} refuses: {verdict.refuses}. Use backend='reference' or 'auto'")
        if backend == "auto" and verdict.refuses is None and verdict.yields is None:
            return verdict.backend, verdict.gain
    raise AssertionError("the definition refuses nothing")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    two_sided: Sequence[tuple[int, int, int]] = (),
    empty: str = "zero",
    backend: str = "auto",
) -> Part:
    """Attention of every query over the keys its pattern allows, with the log-sum-exp of the scores.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`.
        v: `[B, Hk, S, Dv]`.
        pattern: who sees whom, by position; its heads are KV heads. None: causal, or full if not `causal`.
        bias: broadcastable to `[B, H, T, S]`, added to the scaled (and capped) scores.
        causal: False with no pattern is full attention; patterns say themselves whether they are cut.
        scale: of the scores; None: `D ** -0.5`.
        softcap: `s` becomes `softcap * tanh(s / softcap)` before the bias.
        q_positions: integer `[1|B, T]`; None: the last `T` of `0..S-1`, so the last query sees the last key.
        k_positions: integer `[1|B, S]` or `[1|B, Hk, S]`, in any order; None: `0..S-1`. Negative ones are
            padding: such keys are not seen, such queries are empty rows.
        two_sided: spans `(row, start, stop)`: queries at `start..stop - 1` of a batch row also see the keys after them
            up to `stop - 1`; the pattern goes on deciding what lies behind them.
        empty: a row that sees nothing gives out 0 and lse -inf ("zero"), or an error ("raise").
        backend: one of `BACKENDS`.

    Returns:
        out `[B, H, T, Dv]` in q's dtype, lse `[B, H, T]` in float32 (float64 for float64); both have gradients.

    Raises:
        RegardError: shapes, head counts or spans disagree, a named backend refuses, or a row is empty under "raise".
    """
    _check(q, k, v, pattern, bias, causal, q_positions, k_positions, empty)
    aligned = q_positions is None and k_positions is None
    spans = _spans(two_sided, q, k.shape[2] if aligned else None, pattern, causal) if two_sided else ()
    name, _ = choose(q, k, v, pattern=pattern, bias=bias, softcap=softcap, aligned=aligned, backend=backend)
    if pattern is None and causal:
        pattern = Pattern.causal()
    elif pattern is not None and pattern.is_full:
        pattern = None
    call = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    places = {"q_positions": q_positions, "k_positions": k_positions}
    if backend == "reference" or 0 in (*q.shape, k.shape[2]):
        out, lse = reference(q, k, v, mask=_mask(q, k, pattern, spans, places), bias=bias, **call)
    else:
        out, lse = _run(name, q, k, v, pattern, bias, places, call)
        if spans:
            out, lse = joined(partial(attend, backend=backend, **call), q, k, v, (out, lse), spans, bias, **places)
    if empty == "raise":
        raise_if_empty(lse)
    return out, lse


def _spans(
    two_sided: Sequence[tuple[int, int, int]], q: Tensor, keys: int | None, pattern: Pattern | None, causal: bool
) -> tuple[TwoSided, ...]:
    """The spans in order, where there is a causal cut for them to lift; None: `keys` have positions of their own."""
    if not (causal if pattern is None else pattern.cut):
        told = "full attention" if pattern is None else f"{pattern!r}, which is two-sided itself"
        raise RegardError(f"two-sided spans lift the causal cut, and there is none in {told}")
    spans = checked(two_sided, q.shape[0])
    for span in spans:
        if keys is not None and span.stop > keys:
            raise RegardError(f"{span} ends behind the last of {keys} keys")
    return spans


def _run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None,
    bias: Tensor | None,
    places: dict[str, Tensor | None],
    call: dict[str, Any],
) -> Part:
    """The least work that is exact."""
    if name in RUNS:
        return RUNS[name](q, k, v, pattern=pattern, **places, **call)
    aligned = all(place is None for place in places.values())
    if aligned and name == "sdpa" and pattern is not None and pattern.cut:
        rules = tuple(Causal() if covers(rule, k.shape[2]) else rule for rule in pattern.rules)
        pattern = Pattern(rules, pattern.heads)
    if aligned and name == "sdpa" and bias is None:
        # First of all, so that plain decoding costs what `scaled_dot_product_attention` costs.
        plain = _plain(q, k, v, pattern, call)
        if plain is not None:
            return plain
    q_pos, k_pos = _positions(q, k, pattern, **places)
    if pattern is None:
        return _group(name, q, k, v, None, q_pos, k_pos, bias, aligned, call)
    return _by_heads(name, q, k, v, pattern, q_pos, k_pos, bias, aligned, call)


def _mask(
    q: Tensor, k: Tensor, pattern: Pattern | None, spans: Sequence[TwoSided], places: dict[str, Tensor | None]
) -> Tensor:
    """Every pair at once, for the definition."""
    at, k_pos = _positions(q, k, pattern, **places)
    return visible(pattern, at.expand(q.shape[0], -1) if spans else at, k_pos, spans)


def _positions(
    q: Tensor, k: Tensor, pattern: Pattern | None, q_positions: Tensor | None, k_positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The positions given, or right-aligned ones."""
    rows, keys = q.shape[2], k.shape[2]
    # Full attention does not place its queries among the keys: more queries than keys are no padding there.
    first = 0 if pattern is None else keys - rows
    q_pos = torch.arange(first, first + rows, device=q.device)[None] if q_positions is None else q_positions
    return q_pos, torch.arange(keys, device=q.device)[None] if k_positions is None else k_positions


def raise_if_empty(lse: Tensor) -> None:
    """Raise RegardError if some row of `lse [B, H, T]` saw no key."""
    rows = (lse == -torch.inf).nonzero()
    if len(rows):
        row, head, query = rows[0].tolist()
        raise RegardError(f"batch row {row}, head {head}, query {query} sees no key; pass empty='zero' for out 0")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None,
    bias: Tensor | None,
    causal: bool,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    empty: str,
) -> None:
    """Raise RegardError for arguments that do not belong together."""
    if empty not in ("zero", "raise"):
        one_of("choice for empty rows", empty, ("zero", "raise"))
    four = q.dim() == k.dim() == v.dim() == 4
    if not (four and q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]):
        raise RegardError(
            "q [B, H, T, D], k [B, Hk, S, D] and v [B, Hk, S, Dv] disagree: "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    group_size(q, k)
    if pattern is not None and pattern.cut and not causal:
        raise RegardError(
            f"causal=False goes with no pattern or a two-sided one; {pattern!r} is cut at the query's own position"
        )
    if pattern is not None and pattern.heads not in (None, k.shape[1]):
        raise RegardError(f"a pattern of {pattern.heads} heads for {k.shape[1]} key heads")
    if bias is not None:
        full = (*q.shape[:3], k.shape[2])
        padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        fits = len(padded) == 4 and all(n in (1, m) for n, m in zip(padded, full, strict=True))
        if not fits or not bias.is_floating_point():
            got = f"{list(bias.shape)} {bias.dtype}"
            raise RegardError(f"a bias must be float and broadcast to {list(full)}, got {got}")
    if q_positions is not None and (q_positions.dim() != 2 or q_positions.shape[1] != q.shape[2]):
        raise RegardError(f"q_positions must be [1 or B, {q.shape[2]}], got {list(q_positions.shape)}")
    if k_positions is not None:
        fits = k_positions.dim() in (2, 3) and k_positions.shape[-1] == k.shape[2]
        if not fits or (k_positions.dim() == 3 and k_positions.shape[1] not in (1, k.shape[1])):
            raise RegardError(
                f"k_positions must be [1 or B, {k.shape[2]}] or [1 or B, {k.shape[1]}, {k.shape[2]}], "
                f"got {list(k_positions.shape)}"
            )
    for positions in (q_positions, k_positions):
        if positions is not None and positions.shape[0] not in (1, q.shape[0]):
            raise RegardError(f"positions of {positions.shape[0]} rows for a batch of {q.shape[0]}")


def _by_heads(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    aligned: bool,
    call: dict[str, Any],
) -> Part:
    """One run for all heads, or one for the heads of each rule where that lets a rule skip keys or its mask."""
    members: dict[Rule, list[int]] = {}
    for h, rule in enumerate(pattern.rules):
        members.setdefault(rule, []).append(h)
    alone = {rule: pattern.head(heads[0]) for rule, heads in members.items()}
    skips = any(one.cut and (one.reach() != (FOR_EVER,) or (aligned and one.is_causal)) for one in alone.values())
    if len(members) == 1:
        (pattern,) = alone.values()
    if len(members) == 1 or not skips:
        return _group(name, q, k, v, pattern, q_pos, k_pos, bias, aligned, call)
    group = q.shape[1] // k.shape[1]
    order, outs, lses = [], [], []
    for rule, heads in members.items():
        queries = [h * group + g for h in heads for g in range(group)]
        own = k_pos if k_pos.dim() == 2 or k_pos.shape[1] == 1 else _heads(k_pos, heads)
        own_bias = bias
        if bias is not None and bias.dim() >= 3 and bias.shape[-3] > 1:
            own_bias = _heads(bias.reshape((1,) * (4 - bias.dim()) + bias.shape), queries)
        parts = (_heads(q, queries), _heads(k, heads), _heads(v, heads))
        out, lse = _group(name, *parts, alone[rule], q_pos, own, own_bias, aligned, call)
        order, outs, lses = order + queries, [*outs, out], [*lses, lse]
    back = sorted(range(len(order)), key=order.__getitem__)
    return _heads(torch.cat(outs, 1), back), _heads(torch.cat(lses, 1), back)


def _heads(x: Tensor, index: list[int]) -> Tensor:
    """Heads `index` of `x [B, heads, ...]`: a view where they are one run."""
    if index == list(range(index[0], index[0] + len(index))):
        return x.narrow(1, index[0], len(index))
    return x.index_select(1, torch.tensor(index, device=x.device))


def _group(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    aligned: bool,
    call: dict[str, Any],
) -> Part:
    if name == "sdpa" and aligned and bias is None:
        plain = _plain(q, k, v, pattern, call)
        if plain is not None:
            return plain
    positions = {"q_pos": q_pos, "k_pos": k_pos, "aligned": aligned}
    kernel, width = (fused, None) if name == "sdpa" else (reference, q.shape[0] * q.shape[1])
    return sweep(kernel, q, k, v, pattern=pattern, bias=bias, width=width, **positions, **call)


def _plain(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None, call: dict[str, Any]) -> Part | None:
    """Full or causal attention over aligned positions without a mask, None where a mask is needed."""
    rows, keys = q.shape[2], k.shape[2]
    if pattern is None:
        return fused(q, k, v, **call)
    if not pattern.is_causal or rows > keys:
        return None
    if rows == 1:
        return fused(q, k, v, **call)
    if rows == keys:
        return fused(q, k, v, square=True, **call)
    if q.device.type != "cuda":
        return None
    # There a mask would cost the flash kernel; on CPU it is as fast as this, and equal to SDPA to the bit.
    past = keys - rows
    before = fused(q, k[:, :, :past], v[:, :, :past], **call)
    return merge([before, fused(q, k[:, :, past:], v[:, :, past:], square=True, **call)])
