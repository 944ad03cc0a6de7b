"""The gated recurrence (docs/design.md, section 7) on a GPU: one call, forward and every gradient.

A gradient is a scan. With u what is written (v, or the delta rule's correction), `<` before, and weights w:

    out_i = sum_{j <= i} (q_i . k_j) w_ij u_j        dq_i = sum_{j <= i} (dout_i . u_j) w_ij k_j
    du_j = sum_{i >= j} (k_j . q_i) w_ij dout_i      dk_j = sum_{i >= j} (u_j . dout_i) w_ij q_i

and the delta rule adds to dk the same sums over earlier and later tokens, strict, with -dv in place of dout
and k in place of q, because its correction reads the state as a query would: gradients.py has all of them at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels import ahead, device
from regard.kernels.states import delta as delta_rule
from regard.kernels.states.factor import factor, mend, mend_gradients
from regard.kernels.states.gates import gates
from regard.kernels.states.gradients import chunk_gradients
from regard.kernels.states.problem import Factors, Problem, bulked, four, on_hopper, three
from regard.kernels.states.segments import EVERY, join
from regard.kernels.states.sweep import CHANNEL, COLUMN, HEAD, NONE, TOKEN, sweep

SIZES = (16, 32, 64, 128, 256)
# Chunks that one program looks through for wide ones.
LOOK = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str | None:
    """Why the kernels cannot do this call, or None if they can."""
    reason = device.refuses(q)
    if reason:
        return reason
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return (
            f"the kernels take q, k, v of one dtype, bfloat16, float16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if decay is not None and decay.dtype not in DTYPES:
        return f"the kernels take decays in bfloat16, float16 or float32, got {decay.dtype}"
    for name, size in (("D", q.shape[3]), ("Dv", v.shape[3])):
        if size not in SIZES:
            return f"the kernels take {name} of {', '.join(map(str, SIZES))}, got {size}"
    if q.shape[3] == 256 and (v.shape[3] < 64 or q.dtype == torch.float32):
        return f"with D = 256 the kernels need Dv of at least 64 and 16-bit inputs, got {v.shape[3]} and {q.dtype}"
    if q.shape[3] == 128 and v.shape[3] < 64 and q.dtype == torch.float32:
        # One stage of loads and less than 64 columns: Triton 3.6 compiles such states wrongly for Hopper (docs/log.md).
        return f"with D = 128 in float32 the kernels need Dv of at least 64, got {v.shape[3]}"
    if delta and q.shape[3] == 16 and q.dtype != torch.float32 and decay is not None and decay.dim() == 4:
        # On Hopper, Triton 3.6 compiles the triangle of chunks wrongly there (docs/log.md); right from D = 32 on.
        return f"with the delta rule and decay by channel the kernels take D of 16 in float32 only, got {q.dtype}"
    if decay is not None and decay.dim() == 1 and decay.requires_grad and q.dtype != torch.float32:
        return "one decay a head adds up over all tokens: its gradient needs float32"
    if 0 in q.shape:
        return "there is nothing to compute"
    return None


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
) -> tuple[Tensor, Tensor]:
    """`regard.scan` for calls that `refuses` does not refuse, values unchecked.

    Returns:
        out `[B, H, T, Dv]` in the dtype of v and the final state `[B or N, H, D, Dv]` float32; differentiable once.
    """
    if beta is not None and not delta:
        v, beta = v * beta[..., None].to(v.dtype), None
    if cu_seqlens is None:
        spans = _rows(v.shape[0], v.shape[2])
    else:
        ends = cu_seqlens.tolist()
        spans = tuple((0, start, end) for start, end in pairwise(ends))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if decay is not None and decay.dim() != 3 and decay.stride(-1) != 1:
        decay = decay.contiguous()
    given, place = (q, k, v, decay, beta, initial_state), v.device

    def call(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _Scan.apply(*tensors, float(scale), spans, place)  # type: ignore[return-value]

    ahead.rehearse(lambda *tensors: call(*tensors)[0], given, _alike(v, given, spans))
    return call(*given)


def _alike(v: Tensor, tensors: Sequence[Tensor | None], spans: Sequence[Any]) -> tuple[Any, ...]:
    """What calls that launch the same kernels have in common; not all of it, but then one or the other compiles."""
    told = [
        x if x is None else (x.dtype, x.requires_grad, x.dim(), x.shape[-1] if x.dim() == 4 else 0, x.shape[:2][-1])
        for x in tensors
    ]
    # Whether sequences are cut depends on how many there are, and how long.
    length, inside = v.shape[2].bit_length(), v.stride(2) > v.stride(1)
    return (*told, len(spans), length, inside, torch.is_grad_enabled(), v.device)


@lru_cache
def _rows(batch: int, tokens: int) -> tuple[tuple[int, int, int], ...]:
    """A sequence a row; the same tuple every time, so that it is found at once where segments are kept."""
    return tuple((row, 0, tokens) for row in range(batch))


def factored(p: Problem, q: Tensor, k: Tensor, entry: bool, triangle: Tensor | None = None) -> Factors:
    """Launch `factor` if channels decay on their own; `triangle` receives what `solve` needs of wide chunks."""
    if p.kind != CHANNEL:
        return Factors(q, k)
    chunks = p.segments.chunks
    f = Factors(
        left=p.like(p.dim, q),
        right=p.like(p.dim, q),
        entry=p.like(p.dim, q) if entry else None,
        scores=p.matrices(),
        scaling=torch.empty(chunks, p.heads, 3, p.dim, dtype=torch.float32, device=p.device),
        wide=torch.empty(chunks, p.heads, p.blocks, dtype=torch.int32, device=p.device),
    )
    keywords = {"DIM": p.dim, "CHUNK": p.chunk, "GROUP": p.group, "GROUP_G": p.group_g}
    ahead.launch(factor, (p.grid[0] * p.blocks, *p.grid[1:]))(
        q, k, p.decay, f.left, f.right, f.entry, f.scaling, f.wide, p.segments.table,
        three(q), three(k), p.strides_g, three(f.left), p.heads,
        BLOCK=p.dim // p.blocks, SPAN=p.span, **keywords, num_warps=4,
    )  # fmt: skip
    ahead.launch(mend, (-(-p.segments.longest // LOOK), *p.grid[1:]))(
        q, k, p.decay, f.scores, triangle, f.wide, p.segments.table,
        three(q), three(k), p.strides_g, p.heads, LOOK,
        BLOCKS=p.blocks, **keywords, num_warps=8, num_stages=1,
    )  # fmt: skip
    return f


def run(
    p: Problem,
    f: Factors,
    b: Tensor,
    c: Tensor | None,
    *,
    a: Tensor | None = None,
    out: Tensor | None = None,
    turned: bool = False,
    reverse: bool = False,
    strict: bool = False,
    alone: Tensor | None = None,
    scale: float = 1.0,
    begin: Tensor | None = None,
    end: Tensor | None = None,
    total: Tensor | None = None,
    anchors: Tensor | None = None,
    meet: Tensor | None = None,
    every: int = EVERY,
    rule: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> None:
    """Launch `sweep` over all segments. `turned`: the decays lie on the columns of c, the state on its side.

    `strict`: without the token itself, whose product goes to `alone`. `rule`: (beta, triangle, error or None); without
    a triangle, c is written with strength beta. Without c, it is zeros, as wide as b.
    """
    if rule is alone is anchors is meet is None and not strict and on_hopper(p, (NONE, HEAD), (a, b, c, out)):
        from regard.kernels.states import hopper

        hopper.sweep(p, b, c, a=a, out=out, scale=scale, begin=begin, end=end, total=total, reverse=reverse)
        return
    beta, triangle, error = rule or (None, None, None)
    entry = None if triangle is None else f.entry
    # With outputs, registers do not suffice for decays by token, and the other is as fast.
    kinds = (NONE, TOKEN, CHANNEL) if out is None else (CHANNEL,)
    if triangle is not None and on_hopper(p, kinds, (a, b, c, out, entry, error)):
        from regard.kernels.states import hopper_delta

        hopper_delta.sweep(p, f, b, c, rule, a=a, out=out, scale=scale, begin=begin, end=end)
        return
    if c is None:
        c = torch.zeros(b.shape[3], dtype=p.dtype, device=p.device).expand(p.batch, p.heads, p.tokens, -1)
    dim, columns = b.shape[3], c.shape[3]
    keywords, (blocks, block) = p.launch(dim, columns)
    of_out = error if out is None else out
    group = lambda x: 1 if x is None else p.heads // x.shape[1]  # noqa: E731
    strides, groups = [three(x) for x in (a, b, c, entry, of_out)], [group(x) for x in (a, b, c)]
    bulk, (a, b, entry), (c, out, error) = bulked(p, (a, b, entry), dim, (c, out, error), block)
    ahead.launch(sweep, (blocks, p.heads, p.segments.count))(
        a, b, c, out, alone, p.decay, f.scaling, f.wide, None if turned else f.scores,
        beta, triangle, entry, error, begin, end, total, anchors, meet, p.segments.table,
        *strides, p.strides_g, three(beta if alone is None else alone), four(begin), four(end), scale, p.heads,
        DIM=dim, COLUMNS=columns, BLOCK=block, GROUP_A=groups[0], GROUP_B=groups[1], GROUP_C=groups[2],
        DECAY=COLUMN if turned and p.kind == CHANNEL else p.kind, REVERSE=reverse, STRICT=strict, BULK=bulk,
        BLOCKS=p.blocks, EVERY=every, **p.settings, **keywords,
    )  # fmt: skip


def carried(
    p: Problem, f: Factors, b: Tensor, c: Tensor, first: Tensor | None, matrix: Tensor | None, reverse: bool,
    local: Callable[[Tensor], None] | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The state each segment begins with and the last one, where sequences are cut; else `first` and None."""
    if p.segments.count == p.segments.sequences:
        return first, None
    dim, columns = b.shape[3], c.shape[3]
    ends, begins, last = p.states(dim, columns), p.states(dim, columns), p.states(dim, columns, p.segments.sequences)
    passed = matrix
    if local is not None:
        local(ends)
    else:
        passed = torch.empty(p.segments.count, p.heads, dim, dtype=torch.float32, device=p.device)
        run(p, f, b, c, reverse=reverse, end=ends, total=passed)
    block = min(columns, 32)
    ahead.launch(join, (columns // block, p.heads, p.segments.sequences))(
        ends, passed, begins, first, last, p.segments.offsets, four(first), p.heads,
        DIM=dim, COLUMNS=columns, BLOCK=block, MATRIX=matrix is not None, REVERSE=reverse,
    )  # fmt: skip
    return begins, last


def solve(p: Problem, f: Factors, k: Tensor, beta: Tensor, triangle: Tensor) -> None:
    """Write the triangle of every chunk, `[chunks, H, C, C]`, which `factored` has begun."""
    ahead.launch(delta_rule.solve, p.grid)(
        k, f.entry, f.right, p.decay, f.wide, beta, triangle, p.segments.table,
        three(k), three(f.entry), p.strides_g, three(beta), p.heads,
        DIM=p.dim, GROUP_K=p.group, DECAY=p.kind, BLOCKS=p.blocks, **p.settings, num_warps=4, num_stages=1,
    )  # fmt: skip


def back(
    p: Problem, f: Factors, dout: Tensor, scale: float, taught: tuple[Tensor, Tensor],
    begin: Tensor | None, end: Tensor | None, given: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Launch the delta rule's way back; `taught`: (beta, triangle), `given`: (error, dvalue, dbeta, later)."""
    beta, triangle = taught
    error, dvalue, dbeta, later = given or (None,) * 4
    keywords, (blocks, block) = p.launch(p.dim, p.columns)
    strides = [three(x) for x in (f.left, f.right, f.entry, dout, dvalue)]
    group = p.heads // f.left.shape[1]
    bulk, (left, right, entry), (dout_, error, dvalue) = bulked(
        p, (f.left, f.right, f.entry), p.dim, (dout, error, dvalue), block
    )
    ahead.launch(delta_rule.back, (blocks, p.heads, p.segments.count))(
        left, right, entry, f.scores, f.wide, f.scaling, dout_, error, dvalue, dbeta, later, p.decay,
        beta, triangle, begin, end, p.segments.table, *strides, p.strides_g, three(beta),
        (0, 0, 0, 0) if dbeta is None else (*dbeta.stride()[1:], dbeta.stride(0)), four(begin), four(end),
        scale, p.heads, DIM=p.dim, COLUMNS=p.columns, BLOCK=block, GROUP=group, DECAY=p.kind,
        BULK=bulk, BLOCKS=p.blocks, **p.settings, **keywords,
    )  # fmt: skip


def transition(p: Problem, f: Factors, given: tuple[Tensor, Tensor, None]) -> Tensor:
    """The matrix each segment applies to its first state under the delta rule: what a sweep makes of the identity."""
    eye = torch.eye(p.dim, dtype=torch.float32, device=p.device)
    matrix = p.states(p.dim, p.dim)
    run(p, f, f.right, None, begin=eye.expand(p.segments.count, p.heads, -1, -1), end=matrix, rule=given)
    return matrix


class _Scan(torch.autograd.Function):
    """Sweeps with gradients, see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, q, k, v, decay, beta, first, scale, spans, place):
        p = Problem(q, v, decay, spans, place)
        triangle = None if beta is None else p.matrices()
        f = factored(p, q, k, entry=beta is not None, triangle=triangle)
        out = p.like(p.columns, q)
        matrix = error = given = local = None
        if beta is not None:
            solve(p, f, k, beta, triangle)
            given = (beta, triangle, None)
            if p.segments.count > p.segments.sequences:
                matrix = transition(p, f, given)
                local = lambda end: run(p, f, f.right, v, end=end, rule=given)  # noqa: E731
        begins, last = carried(p, f, f.right, v, first, matrix, False, local)
        end = p.states(p.dim, p.columns) if last is None else None
        if beta is not None:
            learns = any(x is not None and x.requires_grad for x in (q, k, v, decay, beta, first))
            error = p.like(p.columns, q) if learns else None
            given = (beta, triangle, error)
        run(p, f, f.right, v, a=f.left, out=out, scale=scale, begin=begins, end=end, rule=given)
        last = end if last is None else last
        ctx.save_for_backward(q, k, v, beta, begins, last, triangle, matrix, error)
        ctx.problem, ctx.scale, ctx.first = p, scale, first is not None and first.requires_grad
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dlast):
        q, k, v, beta, begins, last, triangle, matrix, error = ctx.saved_tensors
        p: Problem = ctx.problem
        f = factored(p, q, k, entry=beta is not None)
        dout = torch.zeros_like(v) if dout is None else dout
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        first = None if dlast is None else dlast.float() / ctx.scale
        learned = p.decay is not None and ctx.needs_input_grad[3]
        if beta is None:
            g = _plain(p, f, v, dout, ctx.scale, (begins, first), learned)
        else:
            g = _delta(p, f, dout, ctx.scale, (beta, triangle, matrix, error), (begins, first), learned)
        if p.kind == CHANNEL:
            _mended(p, f, (q, k), dout, beta, g, ctx.scale)
        final = last * dlast if learned and dlast is not None else None
        ddecay = _decays(p, f, (q, k), g, final)
        dbegin = g.first * ctx.scale if ctx.first else None
        return _grouped(g.q, q), _grouped(g.k, k), g.v, ddecay, g.beta, dbegin, None, None, None


@dataclass
class Gradients:
    """Gradients of one scan; `first` is over the scale.

    `written`: the values written; over beta under the delta rule. `alone` `[B, H, T]`: what a token makes of itself,
    missing in `q` and `k` where it is given. `known`: what decays have summed to from each anchor on (see gates.py).
    `query`: what the delta rule adds to `k` as to a query, where gates.py has to know. `decay`: in parts to be added.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    written: Tensor
    first: Tensor | None
    known: Tensor | None
    query: Tensor | None = None
    beta: Tensor | None = None
    alone: Tensor | None = None
    decay: Tensor | None = None


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the value heads of each key head."""
    return x if x.shape[1] == like.shape[1] else x.unflatten(1, (like.shape[1], -1)).sum(2)


def _turn(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT


def _plain(p, f, v, dout, scale, states, learned) -> Gradients:
    """Gradients without the delta rule."""
    begins, first = states
    dq, dk, dv = p.like(p.dim, f.left), p.like(p.dim, f.left), p.like(p.columns, f.left)
    anchors, known, alone = _anchors(p) if learned else (None, None, None)
    sides = {"turned": True, "strict": learned, "scale": scale, "anchors": anchors}
    run(p, f, v, f.right, a=dout, out=dq, alone=alone, begin=_turn(begins), **sides)
    ends, last = carried(p, f, f.left, dout, first, None, True, None)
    end = p.states(p.dim, p.columns) if last is None else None
    run(p, f, f.left, dout, a=f.right, out=dv, scale=scale, reverse=True, begin=ends, end=end)
    run(p, f, dout, f.left, a=v, out=dk, reverse=True, begin=_turn(ends), meet=known, **sides)
    known = None if known is None else known.mul_(scale)
    return Gradients(dq, dk, dv, v, end if last is None else last, known, alone=alone)


def _anchors(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what gradients of decays need: states at anchors, turned; what is known there; `Gradients.alone`."""
    count, sizes = p.segments.chunks // EVERY, {"dtype": torch.float32, "device": p.device}
    return (
        torch.empty(count, p.heads, p.columns, p.dim, dtype=p.fine, device=p.device),
        torch.empty(count, p.heads, p.dim, **sizes),
        torch.empty(p.batch, p.heads, p.tokens, **sizes),
    )


def _delta(p, f, dout, scale, taught, states, learned) -> Gradients:
    """Gradients of the delta rule."""
    beta, triangle, matrix, error = taught
    begins, first = states
    dv = torch.empty_like(error)
    sizes = {"dtype": torch.float32, "device": p.device}
    dbeta = torch.empty(p.launch(p.dim, p.columns)[1][0], *beta.shape, **sizes)
    local = None if matrix is None else lambda end: back(p, f, dout, scale, (beta, triangle), None, end, None)
    ends, last = carried(p, f, f.left, dout, first, matrix, True, local)
    end = p.states(p.dim, p.columns) if last is None else None
    later, before = (
        torch.empty(p.segments.chunks, p.heads, p.dim, p.columns, dtype=p.dtype, device=p.device) for _ in range(2)
    )
    back(p, f, dout, scale, (beta, triangle), ends, end, (error, dv, dbeta, later))
    run(p, f, f.right, error, begin=begins, anchors=before, every=1, rule=(beta, None, None))
    g = Gradients(
        p.like(p.dim, dout), p.like(p.dim, dout), dv, error, end if last is None else last, None,
        beta=dbeta.sum(0).to(beta.dtype),
    )  # fmt: skip
    block = min(p.dim, 64)
    if p.kind == CHANNEL:
        g.query, g.alone = p.like(p.dim, dout), torch.empty(beta.shape, **sizes)
        # One behind the last anchor, where the last chunk writes too.
        g.known = torch.empty(p.segments.chunks // EVERY + 1, p.heads, p.dim, **sizes) if learned else None
    elif learned:
        g.decay = torch.empty(p.dim // block, *beta.shape, **sizes)
    _keys_and_queries(p, f, dout, (before, later), beta, g, scale, block)
    return g


def _keys_and_queries(p, f, dout, states, beta, g: Gradients, scale, block) -> None:
    """Launch `chunk_gradients`, `block` channels a program."""
    step = min(p.columns, 64)
    strides = [three(x) for x in (f.left, f.right, f.entry, dout, g.v, g.q)]
    group = p.heads // f.left.shape[1]
    bulk, (left, right, entry, *made), read = bulked(
        p, (f.left, f.right, f.entry, g.q, g.k, g.query), block, (dout, g.v, g.written), step
    )
    of_decay = (0, 0, 0, 0) if g.decay is None else (*g.decay.stride()[1:], g.decay.stride(0))
    # A third stage was timed, and found right, for these sizes alone.
    timed = bulk and p.dim == p.columns == 128 and not p.settings["EXACT"]
    # Triton 3.6 reads shared memory out of bounds with 4 warps unless values are as wide as keys (docs/log.md).
    warps = 4 if p.dim == p.columns else 8
    ahead.launch(chunk_gradients, (p.grid[0] * (p.dim // block), *p.grid[1:]))(
        left, right, entry, *read, beta, *states, *made, g.alone, g.known, g.decay, p.decay, f.scaling, f.wide,
        p.segments.table, *strides, p.strides_g, three(beta), of_decay, three(g.alone), scale, p.heads,
        DIM=p.dim, COLUMNS=p.columns, BLOCK=block, STEP=step, GROUP=group, DECAY=p.kind, EVERY=EVERY,
        BULK=bulk, BLOCKS=p.blocks, **p.settings, num_warps=warps, num_stages=3 if timed else 2,
    )  # fmt: skip


def _mended(p, f, qk, dout, beta, g: Gradients, scale) -> None:
    """Launch `mend_gradients`."""
    q, k = qk
    ahead.launch(mend_gradients, (-(-p.segments.longest // LOOK) * p.blocks, *p.grid[1:]))(
        q, k, p.decay, dout, g.written, beta, g.v, g.q, g.k, g.query, f.wide, p.segments.table,
        three(q), three(k), p.strides_g, three(dout), three(g.q), three(g.written), three(beta), scale,
        p.heads, LOOK,
        DIM=p.dim, COLUMNS=p.columns, BLOCK=p.dim // p.blocks, GROUP=p.group, STRICT=g.alone is not None,
        SPAN=p.span, BLOCKS=p.blocks, **p.settings, num_warps=8, num_stages=1,
    )  # fmt: skip


def _decays(p, f, qk, g: Gradients, final) -> Tensor | None:
    """The gradient of the decays (None: not wanted); the gradients of q and k are finished on the way, in place."""
    channels = p.kind == CHANNEL
    ddecay = g.decay
    if g.known is not None or channels:
        ddecay = _gates(p, f, qk, g, final)
    if ddecay is None:
        return None
    if not channels:
        ddecay = ddecay.sum(0)
    if p.kind == HEAD:
        ddecay = ddecay.sum((0, 2))
    elif p.group_g > 1:
        ddecay = ddecay.unflatten(1, (-1, p.group_g)).sum(2)
    return ddecay.to(p.decay.dtype)


def _gates(p, f, qk, g: Gradients, final) -> Tensor | None:
    """Launch `gates`: the gradient of the decays, in parts unless by channel; those of q and k are finished."""
    q, k = qk
    channels = p.kind == CHANNEL
    blocks = p.blocks if channels else max(1, p.dim // 128)
    ddecay = None
    if g.known is not None:
        shape = (p.batch, p.heads, p.tokens)
        dtype = p.decay.dtype if channels and p.group_g == 1 else torch.float32
        ddecay = torch.empty((*shape, p.dim) if channels else (blocks, *shape), dtype=dtype, device=p.device)
    strides = (0,) * 4 if ddecay is None else ddecay.stride() if channels else (*ddecay.stride()[1:], ddecay.stride(0))
    ahead.launch(gates, (-(-p.whole.longest // EVERY) * blocks, p.heads, p.whole.count))(
        q, g.q, k, g.k, g.alone, g.query, p.decay, ddecay, f.wide, g.known,
        None if final is None else final.sum(-1), p.whole.table, three(q), three(k), three(g.q), p.strides_g,
        strides, three(g.alone), p.heads,
        DIM=p.dim, BLOCK=p.dim // blocks, EVERY=EVERY, GROUP=p.group, CHANNELS=channels, SPAN=p.span, BLOCKS=p.blocks,
        **p.settings, num_warps=4 if channels else 8, num_stages=1,
    )  # fmt: skip
    return ddecay
