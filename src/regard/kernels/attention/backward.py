"""Gradients of attention over lists of blocks.

With p the probabilities and `delta = rowsum(dout * out) - dlse`,

    dv_j = sum_i p_ij dout_i        ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i

`row_gradients` walks lists as the forward does, `column_gradients` the rows that see a tile of keys. Nothing is added
by two programs, so results are the same to the bit in every run, at seven products a tile.
"""

import triton
import triton.language as tl

from regard.kernels.attention.forward import LOG2E
from regard.kernels.attention.tiles import capped, cut, dot, fetch, list_of


@triton.jit(do_not_specialize=["T", "padded"])
def prepare(
    OUT, DOUT, LSE, DLSE, TOP, DELTA, strides_out, strides_dout, T, padded,
    DIM: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`delta`, and lse to base 2, where a row is empty +inf: so its probabilities are 0. Both `[B, H, padded]`.

    PACKED: TOP is `[B, H, padded / ROWS, 2, ROWS]` instead and holds both; DELTA is not used.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims, ok = tl.arange(0, DIM), row < T
    out = tl.load(
        OUT + batch * strides_out[0] + head * strides_out[1] + row[:, None] * strides_out[2] + dims[None, :],
        mask=ok[:, None], other=0.0,
    )  # fmt: skip
    dout = tl.load(
        DOUT + batch * strides_dout[0] + head * strides_dout[1] + row[:, None] * strides_dout[2] + dims[None, :],
        mask=ok[:, None], other=0.0,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    line = batch * tl.num_programs(1) + head
    if DLSE is not None:
        delta -= tl.load(DLSE + line * T + row, mask=ok, other=0.0)
    lse = tl.load(LSE + line * T + row, mask=ok, other=float("-inf"))
    top = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    if PACKED:
        at = TOP + (line * padded + tl.program_id(0) * ROWS) * 2 + tl.arange(0, ROWS)
        tl.store(at, top)
        tl.store(at + ROWS, delta)
    else:
        tl.store(TOP + line * padded + row, top)
        tl.store(DELTA + line * padded + row, delta)


@triton.jit(do_not_specialize=["T"])
def finish(SUMS, DQ, strides, T, scale, DIM: tl.constexpr, ROWS: tl.constexpr):
    """`scale` times float32 sums `[B, H, T, DIM]`, in DQ's dtype; torch's `mul` of two dtypes is 1.35 times as slow."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    ok = (row < T)[:, None]
    line = (batch * tl.num_programs(1) + head) * T
    sums = tl.load(SUMS + (line + row)[:, None] * DIM + dims[None, :], mask=ok)
    at = DQ + batch * strides[0] + head * strides[1] + row[:, None] * strides[2] + dims[None, :]
    tl.store(at, (sums * scale).to(DQ.dtype.element_ty), mask=ok)


@triton.jit
def slope(scores, top, factor, cap, part, rows, columns, BOUNDS, BITS, M: tl.constexpr, N: tl.constexpr,
          PARTIAL: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Probabilities of a tile from its products, and what the cap does to their gradient."""
    inner = 1.0
    if cap is not None:
        scores, tanh = capped(scores * (factor / LOG2E), cap)
        scores, inner = scores * LOG2E, 1 - tanh * tanh
    scaling = factor if cap is None else 1.0
    if PARTIAL:
        scores = cut(scores, part, rows, columns, BOUNDS, BITS, M, N, TURNED)
    top = top[None, :] if TURNED else top[:, None]
    return tl.exp2(scores * scaling - top), inner


@triton.jit(do_not_specialize=["shared", "lines", "most", "apart_b", "apart_h", "T", "S", "padded"])
def column_gradients(
    Q, K, V, DOUT, DK, DV, TOP, DELTA, FULL, COUNT, INDEX, PART, BOUNDS, BITS,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv, shared, lines, most, apart_b, apart_h,
    scale, factor, cap, T, S, padded,
    DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `KEYS` keys and their values of one head, by turned lists.

    Grid: tiles of keys, key heads, batch rows.
    """
    start, head, batch = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    inside, keys, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    k = fetch(K, strides_k, batch, head, start, keys, dims, S, BULK)
    v = fetch(V, strides_v, batch, head, start, keys, dims, S, BULK)
    dk, dv = tl.zeros((KEYS, DIM), tl.float32), tl.zeros((KEYS, DIM), tl.float32)
    split: tl.constexpr = M // ROWS
    seen = start % N + keys
    for member in range(GROUP):
        query = head * GROUP + member
        line = (batch * tl.num_programs(1) * GROUP + query).to(tl.int64) * padded
        spot, first = list_of(batch, query, start // N, shared, lines, most, apart_b, apart_h)
        full, count = tl.load(FULL + spot), tl.load(COUNT + spot)
        for PARTIAL in tl.static_range(2):
            begin = full * split if PARTIAL else 0
            end = (count if PARTIAL else full) * split
            block = tl.load(INDEX + first + begin // split, mask=begin < end, other=0)
            for i in tl.range(begin, end):
                at = block * M + (i % split) * ROWS
                block = tl.load(INDEX + first + (i + 1) // split, mask=i + 1 < end, other=0)
                part = tl.load(PART + first + i // split) if PARTIAL else -1
                q = fetch(Q, strides_q, batch, query, at, inside, dims, T, BULK)
                dout = fetch(DOUT, strides_dout, batch, query, at, inside, dims, T, BULK)
                top = tl.load(TOP + line + at + inside)
                delta = tl.load(DELTA + line + at + inside)
                scores = dot(k, q.trans(), None, PRECISION)
                rows = (i % split) * ROWS + inside
                p, inner = slope(scores, top, factor, cap, part, rows, seen, BOUNDS, BITS, M, N, PARTIAL, True)
                dv = dot(p, dout, dv, PRECISION)
                ds = p * (dot(v, dout.trans(), None, PRECISION) - delta[None, :])
                if cap is not None:
                    ds = ds * inner
                ds = ds.to(q.dtype)
                dk = dot(ds, q, dk, PRECISION)
    row = start + keys
    ok = (row < S)[:, None]
    at = DK + batch.to(tl.int64) * strides_dk[0] + head.to(tl.int64) * strides_dk[1]
    tl.store(at + row.to(tl.int64)[:, None] * strides_dk[2] + dims[None, :], (dk * scale).to(DK.dtype.element_ty), ok)
    at = DV + batch.to(tl.int64) * strides_dv[0] + head.to(tl.int64) * strides_dv[1]
    tl.store(at + row.to(tl.int64)[:, None] * strides_dv[2] + dims[None, :], dv.to(DV.dtype.element_ty), ok)


@triton.jit(do_not_specialize=["shared", "lines", "most", "apart_b", "apart_h", "T", "S", "padded"])
def row_gradients(
    Q, K, V, DOUT, DQ, TOP, DELTA, FULL, COUNT, INDEX, PART, BOUNDS, BITS,
    strides_q, strides_k, strides_v, strides_dout, strides_dq, shared, lines, most, apart_b, apart_h,
    scale, factor, cap, T, S, padded,
    DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `ROWS` queries of one head, by the lists of the forward.

    Grid: tiles of rows, query heads, batch rows.
    """
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    inside, keys, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    spot, first = list_of(batch, head, start // M, shared, lines, most, apart_b, apart_h)
    full, count = tl.load(FULL + spot), tl.load(COUNT + spot)
    q = fetch(Q, strides_q, batch, head, start, inside, dims, T, BULK)
    dout = fetch(DOUT, strides_dout, batch, head, start, inside, dims, T, BULK)
    line = (batch * tl.num_programs(1) + head).to(tl.int64) * padded
    top, delta = tl.load(TOP + line + start + inside), tl.load(DELTA + line + start + inside)
    dq = tl.zeros((ROWS, DIM), tl.float32)
    split: tl.constexpr = N // KEYS
    for PARTIAL in tl.static_range(2):
        begin = full * split if PARTIAL else 0
        end = (count if PARTIAL else full) * split
        block = tl.load(INDEX + first + begin // split, mask=begin < end, other=0)
        for i in tl.range(begin, end):
            at = block * N + (i % split) * KEYS
            block = tl.load(INDEX + first + (i + 1) // split, mask=i + 1 < end, other=0)
            part = tl.load(PART + first + i // split) if PARTIAL else -1
            k = fetch(K, strides_k, batch, head // GROUP, at, keys, dims, S, BULK)
            v = fetch(V, strides_v, batch, head // GROUP, at, keys, dims, S, BULK)
            scores = dot(q, k.trans(), None, PRECISION)
            seen = (i % split) * KEYS + keys
            own = start % M + inside
            p, inner = slope(scores, top, factor, cap, part, own, seen, BOUNDS, BITS, M, N, PARTIAL, False)
            ds = p * (dot(dout, v.trans(), None, PRECISION) - delta[:, None])
            if cap is not None:
                ds = ds * inner
            dq = dot(ds.to(k.dtype), k, dq, PRECISION)
    row = start + inside
    at = DQ + batch.to(tl.int64) * strides_dq[0] + head.to(tl.int64) * strides_dq[1]
    spots = at + row.to(tl.int64)[:, None] * strides_dq[2] + dims[None, :]
    tl.store(spots, (dq * scale).to(DQ.dtype.element_ty), mask=(row < T)[:, None])
