"""Attention forward over lists of blocks: one program a tile of rows; whole blocks first, then those that are cut."""

import triton
import triton.language as tl

from regard.kernels.attention.tiles import capped, cut, dot, fetch, list_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def absorb(q, k, v, state, factor, cap, part, rows, columns, BOUNDS, BITS, M: tl.constexpr, N: tl.constexpr,
         PARTIAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over one tile of keys; `state`: output, sum and largest score (base 2) of each row so far."""
    out, total, top = state
    scores = dot(q, k.trans(), None, PRECISION)
    if cap is not None:
        scores = capped(scores * (factor / LOG2E), cap)[0] * LOG2E
    if PARTIAL:
        scores = cut(scores, part, rows, columns, BOUNDS, BITS, M, N, False)
    # Without a cap the scale and the base go into one fused multiply-add.
    scaling = factor if cap is None else 1.0
    new = tl.maximum(top, tl.max(scores, 1) * scaling)
    least = tl.where(new == float("-inf"), 0.0, new) if PARTIAL else new
    p = tl.exp2(scores * scaling - least[:, None])
    shrink = tl.exp2(top - least)
    total = total * shrink + tl.sum(p, 1)
    return dot(p, v, out * shrink[:, None], PRECISION), total, new


@triton.jit(do_not_specialize=["shared", "lines", "most", "apart_b", "apart_h", "T", "S"])
def attend_rows(
    Q, K, V, OUT, LSE, FULL, COUNT, INDEX, PART, BOUNDS, BITS,
    strides_q, strides_k, strides_v, strides_out, shared, lines, most, apart_b, apart_h, factor, cap, T, S,
    DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`softmax(q k^T) v` of `ROWS` rows of one head. Grid: tiles of rows, query heads, batch rows.

    `factor`: the scale, to base 2. `cap`: None or the softcap.
    """
    # The last rows first: where lists grow with position, the longest of a head start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    start = tile * ROWS
    inside, keys, dims = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    spot, first = list_of(batch, head, start // M, shared, lines, most, apart_b, apart_h)
    full, count = tl.load(FULL + spot), tl.load(COUNT + spot)
    q = fetch(Q, strides_q, batch, head, start, inside, dims, T, BULK)
    state = (
        tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32),
    )  # fmt: skip
    split: tl.constexpr = N // KEYS
    rows = start % M + inside
    for PARTIAL in tl.static_range(2):
        begin = full * split if PARTIAL else 0
        end = (count if PARTIAL else full) * split
        # One entry ahead, so that no copy waits for the list.
        block = tl.load(INDEX + first + begin // split, mask=begin < end, other=0)
        for i in tl.range(begin, end):
            at = block * N + (i % split) * KEYS
            block = tl.load(INDEX + first + (i + 1) // split, mask=i + 1 < end, other=0)
            part = tl.load(PART + first + i // split) if PARTIAL else -1
            k = fetch(K, strides_k, batch, head // GROUP, at, keys, dims, S, BULK)
            v = fetch(V, strides_v, batch, head // GROUP, at, keys, dims, S, BULK)
            columns = (i % split) * KEYS + keys
            state = absorb(q, k, v, state, factor, cap, part, rows, columns, BOUNDS, BITS, M, N, PARTIAL, PRECISION)
    out, total, top = state
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    row = start + inside
    ok = row < T
    tl.store(LSE + (batch.to(tl.int64) * tl.num_programs(1) + head) * T + row, lse, mask=ok)
    at = OUT + batch.to(tl.int64) * strides_out[0] + head.to(tl.int64) * strides_out[1]
    spots = at + row.to(tl.int64)[:, None] * strides_out[2] + dims[None, :]
    tl.store(spots, out.to(OUT.dtype.element_ty), mask=ok[:, None])
