"""Gradients of queries and keys under the delta rule: every chunk on its own, from the states at its two ends.

The forward state S before a chunk and the state S' of the way back behind it (`delta.py: back`) hold all that other
chunks contribute. With u what was written and dv the gradient of v, one pass gives all sums of scan.py at once:

    dq_i = dout_i S^T + sum_{j <= i} (dout_i . u_j) w_ij k_j
    dk_j = u_j S'^T + sum_{i >= j} (u_j . dout_i) w_ij q_i - sum_{i > j} (u_j . dv_i) w_ij k_i
           - dv_j S^T - sum_{i < j} (dv_j . u_i) w_ji k_i

The last line is what k gets as a query of the correction. Decays get `sum S dS` at the end of the chunk and what its
own tokens add (see gates.py).
"""

import triton
import triton.language as tl

from regard.kernels.states.sweep import at, dot, fetch, is_wide, put, rate, segment_of, shares, strengths, weighted


@triton.jit
def ends(x, y, z, DECAY: tl.constexpr):
    """Decay from the chunk's begin to its tokens, from them to its end, and from end to end; see `shares`."""
    if DECAY == 0:
        return 1.0, 1.0, 1.0
    elif DECAY == 3:
        return x[None, :], x[None, :], x * y * z
    else:
        return tl.exp2(x)[:, None], tl.exp2(y)[:, None], tl.exp2(z)


@triton.jit
def over_values(
    DOUT, DVALUE, ERROR, STATES, LATER, sd, su, corner, batch, head, token, rows, ok,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LEARNED: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dout x^T`, `dv x^T` `[C, C]`, `dout S^T`, `dv S^T`, `x S'^T` `[C, BLOCK]` and `sum S S'` `[BLOCK]` over values.

    Without strengths and decays inside the chunk.
    """
    of_out, of_value = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    dq, dk = tl.zeros((CHUNK, BLOCK), tl.float32), tl.zeros((CHUNK, BLOCK), tl.float32)
    dquery, met = tl.zeros((CHUNK, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for column in range(0, COLUMNS, STEP):
        columns = column + tl.arange(0, STEP)
        dout = fetch(DOUT, sd, batch, head, token, rows, columns, column, ok, 1, BULK)
        dvalue = fetch(DVALUE, su, batch, head, token, rows, columns, column, ok, 1, BULK)
        error = fetch(ERROR, su, batch, head, token, rows, columns, column, ok, 1, BULK)
        state, later = tl.load(STATES + corner + columns[None, :]), tl.load(LATER + corner + columns[None, :])
        of_out += dot(dout, tl.trans(error), PRECISION)
        of_value += dot(dvalue, tl.trans(error), PRECISION)
        dq += dot(dout, tl.trans(state), PRECISION)
        dquery += dot(dvalue, tl.trans(state), PRECISION)
        dk += dot(error, tl.trans(later), PRECISION)
        if LEARNED:
            met += tl.sum(state.to(tl.float32) * later.to(tl.float32), 1)
    return of_out, of_value, dq, dquery, dk, met


@triton.jit
def chunk_gradients(
    Q, K, ENTRY, DOUT, DVALUE, ERROR, BETA, STATES, LATER, DQ, DK, DQUERY, SELF, KNOWN, DG, G, FACTORS, WIDE, SEGMENTS,
    sq, sk, se, sd, su, so, sg, sw, sx, ss, scale, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, GROUP_G: tl.constexpr, DECAY: tl.constexpr, EVERY: tl.constexpr, EXACT: tl.constexpr,
    BULK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, `BLOCK` of its channels; values are read `STEP` columns at a time.

    ERROR: u over BETA. STATES, LATER `[chunks, heads, DIM, COLUMNS]`: S and S'. DG `[DIM / BLOCK, B, heads, T]`: parts.
    With decay by channel, Q, K and ENTRY are shares (see factor.py), whose gradients gates.py finishes: it needs SELF,
    DQUERY, the last line above, and at anchors KNOWN (None: decays learn nothing).
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    index, head, segment = tl.program_id(0) // (DIM // BLOCK), tl.program_id(1), tl.program_id(2)
    block = tl.program_id(0) % (DIM // BLOCK)
    batch, start, end, first = segment_of(SEGMENTS, segment)
    token, chunk, skipped = start + index * CHUNK, first + index, block * BLOCK
    if token >= end:
        return
    rows, dims = tl.arange(0, CHUNK), skipped + tl.arange(0, BLOCK)
    ok, slope = rows < end - token, rate(G, head) if DECAY == 1 else 0.0
    x, y, z = shares(G, FACTORS, sg, batch, head, heads, token, end, chunk, slope, rows, dims, DIM, GROUP_G, DECAY,
                     False)  # fmt: skip
    corner = (chunk * heads + head).to(tl.int64) * DIM * COLUMNS + dims[:, None] * COLUMNS
    of_out, of_value, dq, dquery, dk, met = over_values(
        DOUT, DVALUE, ERROR, STATES, LATER, sd, su, corner, batch, head, token, rows, ok,
        COLUMNS, STEP, BLOCK, CHUNK, DG is not None or KNOWN is not None, BULK, PRECISION,
    )  # fmt: skip
    # One gradient after the other: together they fill the registers.
    k = fetch(K, sk, batch, head, token, rows, dims, skipped, ok, GROUP, BULK)
    beta = strengths(BETA, sw, batch, head, token, rows, ok)
    alone = tl.sum(tl.where(rows[:, None] == rows[None, :], of_out, 0.0), 1) * (beta * scale)
    near = weighted(tl.where(rows[:, None] > rows[None, :], beta[None, :], 0.0), x, DECAY)
    if DECAY == 3:
        near = tl.where(is_wide(WIDE, chunk, head, heads, BLOCKS), 0.0, near)
    of_out, of_value = (of_out * near * scale).to(k.dtype), (of_value * near).to(k.dtype)
    fall, rise, kept = ends(x, y, z, DECAY)
    dq = dq * fall * scale + dot(of_out, k, PRECISION)
    q = fetch(Q, sq, batch, head, token, rows, dims, skipped, ok, GROUP, BULK)
    own = tl.sum(q * dq, 1)
    put(DQ, so, batch, head, token, rows, dims, skipped, ok, dq if DECAY == 3 else dq + alone[:, None] * k, BULK)
    dquery = -dquery * fall - dot(of_value, k, PRECISION)
    own += tl.sum(k * dquery, 1)
    dk = dk * rise * (beta * scale)[:, None]
    met, dk = met * kept * scale + tl.sum(dk * k, 0), dk + dot(tl.trans(of_out), q, PRECISION)
    if DECAY == 3:
        tl.store(at(SELF, ss, batch, head, token, 1) + rows * ss[2], alone, mask=ok & (block == 0))
        put(DQUERY, so, batch, head, token, rows, dims, skipped, ok, dquery, BULK)
        if KNOWN is not None:
            spot = KNOWN + ((chunk // EVERY + 1) * heads + head).to(tl.int64) * DIM + dims
            tl.store(spot, met, mask=(dims >= 0) & (chunk % EVERY == EVERY - 1))
        entry = fetch(ENTRY, se, batch, head, token, rows, dims, skipped, ok, 1, BULK)
        put(DK, so, batch, head, token, rows, dims, skipped, ok, dk - dot(tl.trans(of_value), entry, PRECISION), BULK)
    else:
        dk -= dot(tl.trans(of_value), k, PRECISION)
        if DG is not None:
            dg = tl.cumsum(own - tl.sum(k * dk, 1), 0, reverse=True) + tl.sum(met, 0)
            tl.store(at(DG + block.to(tl.int64) * sx[3], sx, batch, head, token, 1) + rows, dg, mask=ok)
        put(DK, so, batch, head, token, rows, dims, skipped, ok, dk + dquery + alone[:, None] * q, BULK)
