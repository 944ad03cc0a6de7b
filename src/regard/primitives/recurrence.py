"""One gated recurrence in plain torch, in three equal forms: token by token, all pairs at once, chunk by chunk.

Per value head, with `A_t = exp(decay_t)`:

    S_t = A_t S_{t-1} + beta_t k_t (v_t - [delta] (A_t S_{t-1})^T k_t)^T,    o_t = scale S_t^T q_t.

The three functions take the same arguments and check nothing (`ops/recurrence.py` does):

    q, k            [B, Hk, T, D]
    v, out          [B, H, T, Dv], H a multiple of Hk: value head h uses key head h // (H / Hk)
    decay           None, [H], [B, H, T], or [B, H | Hk, T, D]: logarithms, at most 0, -inf allowed
    beta            None or [B, H, T]
    initial_state   None or [B, H, D, Dv]

They compute in float32 (float64 if an input is), return `out` in v's dtype and the last state in the computing
one, and are differentiable in every tensor. Logarithms are only ever added, never subtracted: a decay of -inf is
exact, its gradient is 0, and nothing overflows.

Source: Lightning Attention-2 (2401.04658, section 3) for the chunks; DeltaNet (2406.06484, section 3) and Kimi
Linear (2510.26692, section 3) for the triangular system of the delta rule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, Tensor]


def stepwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> Result:
    """The definition: one token after the other. Returns `out [B, H, T, Dv]` and the last state."""
    dtype, (q, k, v, decay, beta, state) = _prepare(q, k, v, decay, beta, initial_state)
    heads, rows = v.shape[1:3]
    decay = _per_token(decay, rows)
    if decay is not None:
        decay = decay[..., None] if decay.dim() == 3 else decay.repeat_interleave(heads // decay.shape[1], 1)
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    outs = []
    for t in range(rows):
        if decay is not None:
            state = decay[:, :, t, :, None].exp() * state
        key, write = k[:, :, t, :, None], v[:, :, t, None]
        if delta:
            write = write - key.mT @ state
        if beta is not None:
            write = beta[:, :, t, None, None] * write
        state = state + key * write
        outs.append(scale * (q[:, :, t, None] @ state))
    return torch.cat(outs, 2).to(dtype) if outs else v.to(dtype), state


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> Result:
    """All pairs of tokens at once: the chunked form with a single chunk. Memory grows with `T^2`."""
    call = {"decay": decay, "beta": beta, "delta": delta, "scale": scale, "initial_state": initial_state}
    return chunked(q, k, v, chunk=max(1, q.shape[2]), **call)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    chunk: int = 64,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """All pairs inside chunks of `chunk` tokens, a state between them. Time and memory grow with `T`.

    Only the state goes from chunk to chunk in a loop; everything else is computed for all chunks at once.
    `cu_seqlens [N + 1]` packs N sequences into one row (B = 1); the states are then `[N, H, D, Dv]`. No value of any
    tensor is read on the host.
    """
    dtype, (q, k, v, decay, beta, state) = _prepare(q, k, v, decay, beta, initial_state, cu_seqlens)
    rows, gates = q.shape[2], {"delta": delta, "scale": scale}
    if cu_seqlens is not None and rows:
        layout = _Layout.of(cu_seqlens, rows, chunk)
        inputs = [layout.spread(x) for x in (q, k, v, _per_token(decay, rows), beta)]
        out, state = _run(inputs, state, chunk=chunk, ends=layout.ends, **gates)
        return out.index_select(2, layout.slots).to(dtype), state
    outs, whole = [], rows - rows % chunk
    for start, stop in ((0, whole), (whole, rows)):
        if start < stop:
            part = [x if x is None or x.dim() == 1 else x[:, :, start:stop] for x in (q, k, v, decay, beta)]
            out, state = _run(part, state, chunk=min(chunk, stop - start), **gates)
            outs.append(out)
    return torch.cat(outs, 2).to(dtype) if outs else v.to(dtype), state


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[torch.dtype, list[Any]]:
    """The dtype of v, and everything in the computing dtype; the state is zero where none is given."""
    given = (q, k, v, decay, beta, state)
    exact = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in given) else torch.float32
    made = [None if x is None else x.to(exact) for x in given]
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        made[-1] = v.new_zeros(rows, v.shape[1], q.shape[3], v.shape[3], dtype=exact)
    return v.dtype, made


def _per_token(decay: Tensor | None, rows: int) -> Tensor | None:
    """A decay `[H]` as `[1, H, T]`, since padding must not decay."""
    return decay[None, :, None].expand(1, -1, rows) if decay is not None and decay.dim() == 1 else decay


class _Layout(NamedTuple):
    """Where packed tokens lie once every sequence starts a chunk of its own."""

    slots: Tensor  # [T]
    ends: Tensor  # [N]: the last chunk of each sequence
    total: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, rows: int, chunk: int) -> "_Layout":
        bounds = cu_seqlens.long()
        after = ((bounds.diff() + chunk - 1) // chunk).cumsum(0)
        tokens = torch.arange(rows, device=bounds.device)
        sequence = torch.searchsorted(bounds, tokens, right=True) - 1
        first = torch.cat([after.new_zeros(1), after])[:-1]
        slots = tokens - bounds[sequence] + chunk * first[sequence]
        # The most there can be, so that the device is not asked how many there are.
        return cls(slots, after - 1, chunk * (rows // chunk + len(after)))

    def spread(self, x: Any) -> Any:
        """Tokens `[1, heads, T, ...]` in their places, zeros between; None stays None."""
        if x is None:
            return None
        return x.new_zeros(*x.shape[:2], self.total, *x.shape[3:]).index_copy(2, self.slots, x)


def _run(
    inputs: list[Any],
    state: Tensor,
    *,
    delta: bool,
    scale: float,
    chunk: int,
    ends: Tensor | None = None,
) -> Result:
    """Whole chunks of `q, k, v, decay, beta`.

    Inside, tensors are `[B, Hk, H / Hk, chunks, chunk, ...]`, with 1 where they do not differ.
    """
    q, k, v, decay, beta = inputs
    heads = k.shape[1]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (heads, -1)).unflatten(3, (-1, chunk))

    if decay is not None:
        decay = decay.view(1, heads, -1, 1, 1).expand(-1, -1, -1, -1, chunk) if decay.dim() == 1 else split(decay)
    spans = _spans(decay)
    q, k, v = split(q * scale), split(k), split(v)
    strength = None if beta is None else split(beta)[..., None]
    written = v if strength is None else strength * v
    kept = reach = None
    if delta:
        triangle, seen = spans.products(k, k), k * spans.since
        if strength is not None:
            triangle, seen = strength * triangle, strength * seen
        triangle = triangle.expand(*written.shape[:-2], chunk, chunk)
        right = torch.cat([written, seen.expand(*written.shape[:-1], -1)], -1)
        # The diagonal and what lies above it are not read.
        solved = torch.linalg.solve_triangular(triangle, right, upper=False, unitriangular=True)
        written, reach = solved.split([v.shape[-1], k.shape[-1]], -1)
    onward = (k * spans.until).mT
    added = onward @ written
    if reach is not None:
        kept = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) * spans.whole - onward @ reach
    entering, state = _carry(state.unflatten(1, (heads, -1)), spans.whole, kept, added, ends)
    if reach is not None:
        written = written - reach @ entering
    out = spans.products(q, k) @ written + (q * spans.since) @ entering
    return out.flatten(3, 4).flatten(1, 2), state.flatten(1, 2)


def _carry(
    state: Tensor, whole: Tensor | float, kept: Tensor | None, added: Tensor, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state entering every chunk and the last one.

    A chunk turns a state S into `kept @ S + added`, or `whole * S + added` without the delta rule. Where sequences
    are packed, the state after one of their last chunks (`ends`) is the initial one of the next.
    """
    factor = kept if kept is not None else torch.as_tensor(whole, dtype=added.dtype, device=added.device)
    if factor.dim() == 0:
        factor = factor.expand(*[1] * 6)
    factor = factor.expand(*factor.shape[:3], added.shape[3], *factor.shape[4:])
    own_factor, own_added = factor, added
    if ends is not None:
        starts = state.movedim(0, 2)[None]  # [1, Hk, G, N, D, Dv]
        state = state[:1]
        factor = factor.index_fill(3, ends, 0)
        added = added.index_copy(3, ends[:-1], starts[:, :, :, 1:])
    entering = []
    for now, more in zip(factor.unbind(3), added.unbind(3), strict=True):
        entering.append(state)
        state = (now * state if kept is None else now @ state) + more
    before = torch.stack(entering, 3)
    if ends is not None:
        last = own_factor.index_select(3, ends), before.index_select(3, ends)
        state = (last[0] * last[1] if kept is None else last[0] @ last[1]) + own_added.index_select(3, ends)
        state = state[0].movedim(2, 0)
    return before, state


class _Spans(NamedTuple):
    """Decay inside chunks: factors between 0 and 1."""

    since: Tensor | float  # [..., C, 1 | D]: from the chunk's start through a row
    until: Tensor | float  # [..., C, 1 | D]: after a row, to the chunk's end
    whole: Tensor | float  # [..., 1 | D, 1]: the whole chunk
    products: Callable[[Tensor, Tensor], Tensor]
    """`sum_d a_id b_jd exp(sum_{j < l <= i} decay_ld)` for `j <= i`, else 0: [..., C, C]."""


def _spans(decay: Tensor | None) -> _Spans:
    """Of a decay None, `[..., C]` (a row) or `[B, Hk, G, N, C, D]` (a channel)."""
    if decay is None:
        return _Spans(1.0, 1.0, 1.0, lambda a, b: (a @ b.mT).tril())
    if decay.dim() == 6:
        return _channel_spans(decay)
    rows = decay.shape[-1]
    later = torch.ones(rows, rows, dtype=torch.bool, device=decay.device).triu(1)
    between = decay[..., None, :].expand(*decay.shape, rows).masked_fill(~later, 0).cumsum(-1)
    weights = between.masked_fill(later.mT, -torch.inf).exp().mT
    since = decay.cumsum(-1).exp()[..., None]
    return _Spans(since, weights[..., -1, :, None], since[..., -1:, :], lambda a, b: a @ b.mT * weights)


def _channel_spans(decay: Tensor) -> _Spans:
    """Channels decay each for itself, so that no matrix of weights serves them all.

    Blocks of rows are joined two by two. A row of the right block sees the keys of the left one through their border:
    `a exp(border to row)` times `b exp(key to border)`. Both exponents are sums of logarithms of the block itself, at
    most 0, so that nothing overflows and nothing cancels.
    """
    rows = decay.shape[-2]
    size = 1 << (rows - 1).bit_length()
    since = F.pad(decay, (0, 0, 0, size - rows))[..., None, :]  # [..., blocks, rows of a block, D]
    until = torch.zeros_like(since)
    levels = []
    while since.shape[-3] > 1:
        left, right = since[..., 0::2, :, :], since[..., 1::2, :, :]
        left_until, right_until = until[..., 0::2, :, :], until[..., 1::2, :, :]
        levels.append((right.exp(), left_until.exp()))
        since = torch.cat([left, left[..., -1:, :] + right], -2)
        until = torch.cat([left_until + right[..., -1:, :], right_until], -2)

    def products(a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.pad(x, (0, 0, 0, size - rows)) for x in (a, b))
        made = (a * b).sum(-1)[..., None, None]  # [..., blocks, rows, rows]
        for after, before in levels:
            pair = (-1, 2, after.shape[-2])
            cross = (a.unflatten(-2, pair)[..., 1, :, :] * after) @ (b.unflatten(-2, pair)[..., 0, :, :] * before).mT
            made = made.expand(*cross.shape[:-3], *made.shape[-3:])
            above = torch.cat([made[..., 0::2, :, :], torch.zeros_like(cross)], -1)
            made = torch.cat([above, torch.cat([cross, made[..., 1::2, :, :]], -1)], -2)
        return made[..., 0, :rows, :rows]

    since, until = since[..., 0, :rows, :].exp(), until[..., 0, :rows, :].exp()
    return _Spans(since, until, since[..., -1, :, None], products)
