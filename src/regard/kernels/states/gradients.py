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

from regard.kernels.states.sweep import at, dot, fetch, is_wide, put, rate, segment_of, shares, weighted


@triton.jit
def gradients(
    Q, K, ENTRY, DOUT, DVALUE, WRITTEN, STATES, LATER, DQ, DK, DQUERY, SELF, KNOWN, DG, G, FACTORS, WIDE, SEGMENTS,
    sq, sk, se, sd, su, so, sg, sx, ss, scale, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, GROUP_G: tl.constexpr, DECAY: tl.constexpr, EVERY: tl.constexpr, EXACT: tl.constexpr,
    BULK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, `BLOCK` of its channels; values are read `STEP` columns at a time.

    STATES, LATER `[chunks, heads, DIM, COLUMNS]`: S and S'. DG `[DIM / BLOCK, B, heads, T]` (None: not wanted).
    With decay by channel, Q, K and ENTRY are the shares of factor.py, for whose gradients gates.py does the rest: it
    needs SELF and, at anchors, KNOWN (None: decays learn nothing), and DQUERY, the last line above, by itself.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    width: tl.constexpr = DIM // BLOCK
    index, head, segment = tl.program_id(0) // width, tl.program_id(1), tl.program_id(2)
    block = tl.program_id(0) % width
    batch, start, end, first = segment_of(SEGMENTS, segment)
    token, chunk = start + index * CHUNK, first + index
    if token >= end:
        return
    skipped = block * BLOCK
    rows, dims = tl.arange(0, CHUNK), skipped + tl.arange(0, BLOCK)
    ok = rows < end - token
    slope = rate(G, head) if DECAY == 1 else 0.0
    x, y, z = shares(G, FACTORS, sg, batch, head, heads, token, end, chunk, slope, rows, dims, DIM, GROUP_G, DECAY,
                     False)  # fmt: skip
    corner = (chunk * heads + head).to(tl.int64) * DIM * COLUMNS + dims[:, None] * COLUMNS
    of_out, of_value = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    dq, dk = tl.zeros((CHUNK, BLOCK), tl.float32), tl.zeros((CHUNK, BLOCK), tl.float32)
    dquery, met = tl.zeros((CHUNK, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for column in range(0, COLUMNS, STEP):
        columns = column + tl.arange(0, STEP)
        dout = fetch(DOUT, sd, batch, head, token, rows, columns, column, ok, 1, BULK)
        dvalue = fetch(DVALUE, su, batch, head, token, rows, columns, column, ok, 1, BULK)
        u = fetch(WRITTEN, su, batch, head, token, rows, columns, column, ok, 1, BULK)
        state, later = tl.load(STATES + corner + columns[None, :]), tl.load(LATER + corner + columns[None, :])
        of_out += dot(dout, tl.trans(u), PRECISION)
        of_value += dot(dvalue, tl.trans(u), PRECISION)
        dq += dot(dout, tl.trans(state), PRECISION)
        dquery += dot(dvalue, tl.trans(state), PRECISION)
        dk += dot(u, tl.trans(later), PRECISION)
        if DG is not None or KNOWN is not None:
            met += tl.sum(state.to(tl.float32) * later.to(tl.float32), 1)
    if DECAY == 1 or DECAY == 2:
        fall = tl.exp2(x)[:, None]
        dq, dquery, dk, met = dq * fall, dquery * fall, dk * tl.exp2(y)[:, None], met * tl.exp2(z)
    elif DECAY == 3:
        dq, dquery, dk, met = dq * x[None, :], dquery * x[None, :], dk * x[None, :], met * (x * y * z)
    q = fetch(Q, sq, batch, head, token, rows, dims, skipped, ok, GROUP, BULK)
    k = fetch(K, sk, batch, head, token, rows, dims, skipped, ok, GROUP, BULK)
    if DG is not None or KNOWN is not None:
        met = (met + tl.sum(dk * k, 0)) * scale
    same = rows[:, None] == rows[None, :]
    alone = tl.sum(tl.where(same, of_out, 0.0), 1) * scale
    near = weighted(tl.where(rows[:, None] > rows[None, :], 1.0, 0.0), x, DECAY)
    of_out, of_value = of_out * near * scale, (of_value * near).to(k.dtype)
    if DECAY == 3:
        if SELF is None:
            of_out = tl.where(same, alone[:, None], of_out)
        else:
            tl.store(at(SELF, ss, batch, head, token, 1) + rows * ss[2], alone, mask=ok & (block == 0))
        wide = is_wide(WIDE, chunk, head, heads, BLOCKS)
        of_out, of_value = tl.where(wide, 0.0, of_out), tl.where(wide, 0.0, of_value)
        entry = fetch(ENTRY, se, batch, head, token, rows, dims, skipped, ok, 1, BULK)
    else:
        entry = k
    of_out = of_out.to(k.dtype)
    dq = dq * scale + dot(of_out, k, PRECISION)
    dk = dk * scale + dot(tl.trans(of_out), q, PRECISION)
    dk -= dot(tl.trans(of_value), entry, PRECISION)
    dquery = -dquery - dot(of_value, k, PRECISION)
    if DECAY == 3:
        put(DQUERY, so, batch, head, token, rows, dims, skipped, ok, dquery, BULK)
        if KNOWN is not None:  # noqa: SIM102 (Triton has no lazy `and`)
            if chunk % EVERY == EVERY - 1:
                tl.store(KNOWN + ((chunk // EVERY + 1) * heads + head).to(tl.int64) * DIM + dims, met)
    else:
        if DG is not None:
            dg = tl.cumsum(tl.sum(q * dq - k * (dk - dquery), 1), 0, reverse=True) + tl.sum(met, 0)
            tl.store(at(DG + block.to(tl.int64) * sx[3], sx, batch, head, token, 1) + rows, dg, mask=ok)
        dq, dk = dq + alone[:, None] * k, dk + dquery + alone[:, None] * q
    put(DQ, so, batch, head, token, rows, dims, skipped, ok, dq, BULK)
    put(DK, so, batch, head, token, rows, dims, skipped, ok, dk, BULK)
