"""The gated recurrence behind every paper of the `states` site: `scan` over a text, `step` for one token.

`primitives/recurrence.py` is the definition. `scan` checks what it is given, settles padding and packing, and takes
the fastest form that computes exactly that: Triton kernels on a GPU, chunks in plain torch elsewhere. A named
backend never falls back.
"""

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.errors import choose as one_of
from regard.primitives.recurrence import chunked, quadratic, stepwise

__all__ = ["choose", "scan", "step", "without_padding"]

BACKENDS = ("auto", "stepwise", "quadratic", "chunked", "triton")
Result = tuple[Tensor, Tensor]
FORMS = {"stepwise": stepwise, "quadratic": quadratic}
LONGEST_CHUNK, SHORTEST_CHUNK = 64, 16


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    beta_max: float | None = None,
    backend: str = "auto",
) -> Result:
    """Read a text into a state, and out of it again; per value head, with `A_t = exp(decay_t)`,

        S_t = A_t S_{t-1} + beta_t k_t (v_t - [delta] (A_t S_{t-1})^T k_t)^T,    o_t = scale S_t^T q_t.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`, H a multiple of Hk: value head h uses key head `h // (H / Hk)`.
        decay: logarithms, at most 0: None, `[H]`, `[B, H, T]`, or a channel each, `[B, H or Hk, T, D]`.
        beta: write strength `[B, H, T]`; None: 1.
        delta: write what the state does not answer yet instead of the value.
        scale: of the outputs.
        initial_state: `[B, H, D, Dv]`, `[N, H, D, Dv]` where packed; float32, float64 for float64; None: 0.
        cu_seqlens: integers `[N + 1]` from 0 to T, increasing: N sequences in one row (B = 1).
        mask: bool `[B, T]`, False at padding on either side: it leaves the state alone, and its output is 0.
        check: whether the values of gates and of `cu_seqlens` are looked at; None: on a CPU only, since a GPU would
            have to be waited for.
        beta_max: the largest beta; None: 2 with the delta rule (its transitions stay contractions), else 1.
        backend: "auto", "stepwise", "quadratic", "chunked" or "triton".

    Returns:
        out `[B, H, T, Dv]` in v's dtype and the last state, shaped as `initial_state`, in float32 (float64 for
        float64). Gradients flow through both, to every tensor.

    Raises:
        RegardError: shapes, dtypes or head counts disagree, a gate is out of its range, `cu_seqlens` does not cut
            the text, or a named backend refuses.
    """
    one_of("backend", backend, BACKENDS)
    _check(q, k, v, decay, beta, initial_state, cu_seqlens, mask)
    if mask is not None:
        q, k, v, decay, beta = without_padding(mask, q, k, v, decay, beta)
    if q.device.type == "cpu" if check is None else check:
        check_values(decay, beta, (2.0 if delta else 1.0) if beta_max is None else beta_max)
        check_bounds(cu_seqlens, q.shape[2])
    gates = {"decay": decay, "beta": beta, "delta": delta, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    name, _ = choose(q, k, v, **gates, backend=backend)
    # Under autocast the sums would be rounded to half precision.
    with torch.autocast(q.device.type, enabled=False):
        return _run(name, q, k, v, scale=scale, **gates)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """One token of `scan`: updates `state` in place and returns `out [B, H, 1, Dv]`. No gradients, no check of values.

    Args:
        q: as `scan` takes it and all that follows, with T = 1.
        k: likewise.
        v: likewise.
        state: `[B, H, D, Dv]`, float32 (float64 for float64).
        decay: likewise.
        beta: likewise.
        delta: likewise.
        scale: likewise.

    Raises:
        RegardError: more than one token, or shapes or dtypes disagree.
    """
    _check_tokens(q, k, v)
    if q.shape[2] != 1:
        raise RegardError(f"a step takes one token, got T = {q.shape[2]}; use scan")
    _check_gates(q, v, decay, beta)
    _check_state(q, v, state, q.shape[0])
    call = {"decay": decay, "beta": beta, "delta": delta, "scale": scale}
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cuda" and _refusal("step", q, k, v, state=state, **call) is None:
            return _kernel("step").step(q, k, v, state=state, **call)
        out, after = stepwise(q, k, v, initial_state=state, **call)
        state.copy_(after)
    return out


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[str, str]:
    """The backend that `scan` would run, and why: `("stepwise" | "quadratic" | "chunked" | "triton", reason)`.

    Raises:
        RegardError: no such backend, or a named one refuses the call; the message says why.
    """
    one_of("backend", backend, BACKENDS)
    if backend not in ("auto", "triton"):
        return backend, "asked for"
    if backend == "auto" and q.device.type != "cuda":
        return "chunked", f"the tensors are on {q.device.type}"
    call = {"decay": decay, "beta": beta, "delta": delta, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    reason = _refusal("scan", q, k, v, **call)
    if backend == "triton" and reason is not None:
        raise RegardError(f"backend 'triton' refuses: {reason}. Use backend='chunked' or 'auto'")
    if reason is not None:
        return "chunked", reason
    return "triton", "asked for" if backend == "triton" else "the kernels do this exactly"


def _kernel(name: str) -> ModuleType:
    """A Triton kernel, imported when a call is first sent to it."""
    return importlib.import_module(f"regard.kernels.states.{name}")


def _refusal(name: str, *tensors: Tensor, **call: Any) -> str | None:
    """Why the kernel refuses the call; None if it does not."""
    try:
        kernel = _kernel(name)
    except ModuleNotFoundError as error:
        return f"its kernel cannot be loaded ({error})"
    return kernel.refuses(*tensors, **call)


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None, **call: Any) -> Result:
    if name == "triton" and q.shape[2]:
        return _kernel("scan").scan(q, k, v, **call, cu_seqlens=cu_seqlens)
    if name not in FORMS:
        return chunked(q, k, v, **call, cu_seqlens=cu_seqlens, chunk=_chunk(q.shape[2], cu_seqlens))
    if cu_seqlens is not None:
        return _one_by_one(FORMS[name], q, k, v, cu_seqlens, **call)
    return FORMS[name](q, k, v, **call)


def _chunk(rows: int, cu_seqlens: Tensor | None) -> int:
    """Short sequences are padded to whole chunks, so they get short ones; their mean length is known without a look."""
    mean = rows if cu_seqlens is None else rows // max(1, len(cu_seqlens) - 1)
    return min(LONGEST_CHUNK, max(SHORTEST_CHUNK, 1 << mean.bit_length()))


def _one_by_one(
    form: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    **call: Any,
) -> Result:
    """Packed sequences, each on its own."""
    # One of no tokens, so that there is something to join where no sequence is.
    parts = [form(*(x[:, :, :0] for x in (q, k, v)))]
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        own = [x if x is None or x.dim() == 1 else x[:, :, start:stop] for x in (decay, beta)]
        state = None if initial_state is None else initial_state[i : i + 1]
        tokens = (x[:, :, start:stop] for x in (q, k, v))
        parts.append(form(*tokens, decay=own[0], beta=own[1], initial_state=state, **call))
    return torch.cat([out for out, _ in parts], 2), torch.cat([state for _, state in parts[1:]] or [parts[0][1][:0]])


def without_padding(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> list:
    """`[q, k, v, decay, beta]` with zeros at padding: nothing is written there, read there, or forgotten.

    `mask [B, T]` is bool, False at padding; the rest is as `scan` takes it. A decay `[H]` comes back `[B, H, T]`.
    """
    if decay is not None and decay.dim() == 1:
        decay = decay[None, :, None].expand(q.shape[0], -1, q.shape[2])
    hide = ~mask[:, None, :]
    return [
        x if x is None else x.masked_fill(hide if x.dim() == 3 else hide[..., None], 0) for x in (q, k, v, decay, beta)
    ]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Shapes and dtypes."""
    _check_tokens(q, k, v)
    _check_gates(q, v, decay, beta)
    check_packing(q.shape[0], q.shape[2], cu_seqlens, mask)
    _check_state(q, v, state, q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    four = q.dim() == k.dim() == v.dim() == 4
    if not four or q.shape != k.shape or (q.shape[0], q.shape[2]) != (v.shape[0], v.shape[2]):
        raise RegardError(
            "q [B, Hk, T, D], k [B, Hk, T, D] and v [B, H, T, Dv] disagree: "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not k.shape[1] or not v.shape[1] or v.shape[1] % k.shape[1]:
        near = max(1, round(v.shape[1] / max(1, k.shape[1]))) * k.shape[1]
        raise RegardError(
            f"{v.shape[1]} value heads on {k.shape[1]} key heads: value heads must be a multiple of key heads, "
            f"such as {near}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise RegardError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def _check_gates(q: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> None:
    (batch, key_heads, rows, width), heads = q.shape, v.shape[1]
    if decay is not None:
        legal = [[heads], [batch, heads, rows], *([batch, h, rows, width] for h in sorted({heads, key_heads}))]
        if list(decay.shape) not in legal or not decay.is_floating_point():
            raise RegardError(
                f"decay must be float and {' or '.join(map(str, legal))}, got {list(decay.shape)} {decay.dtype}"
            )
    if beta is not None and (beta.shape != (batch, heads, rows) or not beta.is_floating_point()):
        raise RegardError(
            f"beta must be float and [B, H, T] = {[batch, heads, rows]}, got {list(beta.shape)} {beta.dtype}"
        )


def check_packing(batch: int, rows: int, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    """Shapes and dtypes of what cuts `[batch, rows]` tokens into sequences, or hides some.

    Raises:
        RegardError: they do not fit the tokens, or both are given.
    """
    if mask is not None and (mask.shape != (batch, rows) or mask.dtype != torch.bool):
        raise RegardError(f"mask must be bool and [B, T] = {[batch, rows]}, got {list(mask.shape)} {mask.dtype}")
    if cu_seqlens is None:
        return
    if mask is not None:
        raise RegardError("packed sequences have no padding; give cu_seqlens or mask, not both")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise RegardError(f"cu_seqlens must be int32 or int64 [N + 1], got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if batch != 1:
        raise RegardError(f"cu_seqlens packs sequences into one row; B must be 1, got {batch}")


def _check_state(q: Tensor, v: Tensor, state: Tensor | None, count: int) -> None:
    if state is None:
        return
    shape = [count, v.shape[1], q.shape[3], v.shape[3]]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if list(state.shape) != shape or state.dtype != exact:
        raise RegardError(
            f"the state of {q.dtype} tokens must be {shape} {exact}, got {list(state.shape)} {state.dtype}"
        )


def check_values(decay: Tensor | None, beta: Tensor | None, beta_max: float) -> None:
    """Raise RegardError unless log-decays are at most 0 and beta in `[0, beta_max]`; NaN is neither."""
    if decay is not None and decay.numel() and not bool((decay <= 0).all()):
        raise RegardError(f"decay holds logarithms, at most 0 (0 is no decay); got {_worst(decay, -torch.inf, 0.0)}")
    if beta is not None and beta.numel() and not bool(((beta >= 0) & (beta <= beta_max)).all()):
        raise RegardError(f"beta must lie in [0, {beta_max:g}]; got {_worst(beta, 0.0, beta_max)}")


def _worst(x: Tensor, low: float, high: float) -> str:
    """The first value outside, and where."""
    where = (~((x >= low) & (x <= high))).nonzero()[0].tolist()
    return f"{x[tuple(where)].item():g} at {where}"


def check_bounds(cu_seqlens: Tensor | None, rows: int) -> None:
    """Raise RegardError unless `cu_seqlens` rises from 0 to `rows`."""
    if cu_seqlens is None:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise RegardError(f"cu_seqlens must begin with 0 and end with T = {rows}, got {bounds[0]} and {bounds[-1]}")
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if stop <= start:
            raise RegardError(f"cu_seqlens must increase, got {start}, {stop} at {i}, {i + 1}")
