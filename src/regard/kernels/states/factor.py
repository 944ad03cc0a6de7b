"""Decay by channel: its weights split into a share of queries and a share of keys, one chunk at a time.

`2^(H_i - H_j) = 2^(H_i - m) 2^(m - H_j)`: with m in the middle of the chunk both shares stay finite, unless a channel
decays by more than `2^SPAN` in one chunk (`wide`). Then the shares only serve the state (m = 0 for queries, the total
for keys), and `mend` and `mend_gradients` compute products inside the chunk from differences, right for any decay. They
are kernels of their own because what is rare and slow would otherwise take registers from what is not.

Read backwards the two shares change places, so one pass over the tokens serves a scan and its gradients.
"""

import triton
import triton.language as tl

from regard.kernels.states.sweep import at, dot, is_wide, segment_of, strengths, tile


@triton.jit
def along_channels(g, rows):
    """`H` `[C, D]` and its total `[D]`, from decays of tokens and channels `[C, D]`.

    A product with a triangle of ones on the tensor cores: exact in 16 bits. A float32 goes in as three such numbers.
    """
    ones = (rows[:, None] >= rows[None, :]).to(tl.float32)
    g = tl.maximum(g.to(tl.float32), -120.0).to(g.dtype)
    if g.dtype == tl.float32:
        ones = ones.to(tl.bfloat16)
        high = g.to(tl.bfloat16)
        rest = g - high.to(tl.float32)
        low = rest.to(tl.bfloat16)
        H = dot(ones, high, "tf32") + dot(ones, low, "tf32")
        H += dot(ones, (rest - low.to(tl.float32)).to(tl.bfloat16), "tf32")
    else:
        H = dot(ones.to(g.dtype), g, "tf32")
    return H * 1.4426950408889634, tl.sum(g.to(tl.float32), 0) * 1.4426950408889634


@triton.jit
def centre(total, SPAN: tl.constexpr):
    """`(wide, what queries leave out, what keys leave out)`."""
    wide = tl.min(total, 0) < -SPAN
    return wide, tl.where(wide, 0.0, total * 0.5), tl.where(wide, total, total * 0.5)


@triton.jit
def row(x, rows, j):
    """Row j of a tile `[C, D]`."""
    return tl.sum(tl.where(rows[:, None] == j, x.to(tl.float32), 0.0), 0)


@triton.jit
def exact_scores(a, b, H, rows, C: tl.constexpr):
    """`sum_d a_id b_jd 2^(H_id - H_jd)`, column by column."""
    scores = tl.zeros((C, C), tl.float32)
    for j in range(C):
        weight = tl.exp2(tl.minimum(H - row(H, rows, j)[None, :], 0.0))
        one = tl.sum(a * weight * row(b, rows, j)[None, :], 1)
        scores = tl.where(rows[None, :] == j, one[:, None], scores)
    return scores


@triton.jit
def factor(
    Q, K, G, LEFT, RIGHT, ENTRY, FACTORS, WIDE, SEGMENTS, sq, sk, sg, so, heads,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, GROUP_G: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, `BLOCK` channels: LEFT = q's share, RIGHT = k's, ENTRY = k with q's share (or None).

    FACTORS `[chunks, heads, 3, DIM]` scale the state: as queries must find it, before the chunk is added, afterwards.
    WIDE `[chunks, heads, DIM / BLOCK]`.
    """
    width: tl.constexpr = DIM // BLOCK
    index, head, segment = tl.program_id(0) // width, tl.program_id(1), tl.program_id(2)
    block = tl.program_id(0) % width
    batch, start, end, first = segment_of(SEGMENTS, segment)
    token, chunk = start + index * CHUNK, first + index
    if token >= end:
        return
    rows, dims = tl.arange(0, CHUNK), block * BLOCK + tl.arange(0, BLOCK)
    ok = rows < end - token
    g = tile(at(G, sg, batch, head, token, GROUP_G), rows, sg[2], dims, ok)
    q = tile(at(Q, sq, batch, head, token, GROUP), rows, sq[2], dims, ok)
    k = tile(at(K, sk, batch, head, token, GROUP), rows, sk[2], dims, ok)
    H, total = along_channels(g, rows)
    wide, entrance, exit = centre(total, SPAN)
    fall, rise = tl.exp2(H - entrance[None, :]), tl.exp2(exit[None, :] - H)
    here = rows[:, None] * so[2] + dims[None, :]
    tl.store(at(LEFT, so, batch, head, token, 1) + here, (q * fall).to(q.dtype), mask=ok[:, None])
    tl.store(at(RIGHT, so, batch, head, token, 1) + here, (k * rise).to(k.dtype), mask=ok[:, None])
    if ENTRY is not None:
        tl.store(at(ENTRY, so, batch, head, token, 1) + here, (k * fall).to(k.dtype), mask=ok[:, None])
    spot = FACTORS + (chunk * heads + head).to(tl.int64) * 3 * DIM + dims
    tl.store(spot, tl.exp2(entrance))
    tl.store(spot + DIM, tl.exp2(exit - entrance))
    tl.store(spot + 2 * DIM, tl.exp2(total - exit))
    tl.store(WIDE + (chunk * heads + head) * width + block, wide.to(tl.int32))


@triton.jit
def gather(a, b, P, H, rows, TURNED: tl.constexpr, C: tl.constexpr):
    """`sum_j P_ij b_jd 2^(H_id - H_jd)` (TURNED: `sum_i P_ij a_id 2^(H_id - H_jd)`), term by term."""
    out = tl.zeros_like(H)
    for j in range(C):
        fixed = row(H, rows, j)[None, :]
        if TURNED:
            weight = tl.exp2(tl.minimum(fixed - H, 0.0))
            out += row(P, rows, j)[:, None] * row(a, rows, j)[None, :] * weight
        else:
            weight = tl.exp2(tl.minimum(H - fixed, 0.0))
            column = tl.sum(tl.where(rows[None, :] == j, P, 0.0), 1)
            out += column[:, None] * row(b, rows, j)[None, :] * weight
    return out


@triton.jit
def mend(
    Q, K, G, SCORES, TRIANGLE, WIDE, SEGMENTS, sq, sk, sg, heads, span,
    DIM: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, GROUP_G: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """SCORES of the wide chunks among `span` of one head; TRIANGLE: those of keys with keys (or None)."""
    piece, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, end, first = segment_of(SEGMENTS, segment)
    rows, dims = tl.arange(0, CHUNK), tl.arange(0, DIM)
    for index in range(piece * span, tl.minimum((piece + 1) * span, tl.cdiv(end - start, CHUNK))):
        chunk, token = first + index, start + index * CHUNK
        if is_wide(WIDE, chunk, head, heads, BLOCKS):
            ok = rows < end - token
            H, _ = along_channels(tile(at(G, sg, batch, head, token, GROUP_G), rows, sg[2], dims, ok), rows)
            q = tile(at(Q, sq, batch, head, token, GROUP), rows, sq[2], dims, ok)
            k = tile(at(K, sk, batch, head, token, GROUP), rows, sk[2], dims, ok)
            before = rows[:, None] >= rows[None, :]
            spot = (chunk * heads + head).to(tl.int64) * CHUNK * CHUNK + rows[:, None] * CHUNK + rows[None, :]
            scores = tl.where(before, exact_scores(q, k, H, rows, CHUNK), 0.0)
            tl.store(SCORES + spot, scores.to(SCORES.dtype.element_ty))
            if TRIANGLE is not None:
                scores = tl.where(before, exact_scores(k, k, H, rows, CHUNK), 0.0)
                tl.store(TRIANGLE + spot, scores.to(TRIANGLE.dtype.element_ty))


@triton.jit
def mend_gradients(
    Q, K, G, DOUT, WRITTEN, BETA, DVALUE, DQ, DK, DQUERY, WIDE, SEGMENTS,
    sq, sk, sg, sd, so, sv, sw, scale, heads, span,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    GROUP_G: tl.constexpr, STRICT: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradients of shares become those of q and k, in place: wide chunks among `span`, `BLOCK` channels of one head.

    The products inside the chunk, which the sweeps left out, are added. WRITTEN is written with strength BETA, or 1.
    DQUERY, DVALUE: the delta rule's (see gradients.py), or None. STRICT: without the token itself, which gates.py adds.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    piece, head, segment = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2)
    batch, start, end, first = segment_of(SEGMENTS, segment)
    rows, columns = tl.arange(0, CHUNK), tl.arange(0, COLUMNS)
    dims = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    here = rows[:, None] * so[2] + dims[None, :]
    for index in range(piece * span, tl.minimum((piece + 1) * span, tl.cdiv(end - start, CHUNK))):
        token = start + index * CHUNK
        if is_wide(WIDE, first + index, head, heads, BLOCKS):
            ok = rows < end - token
            H, total = along_channels(tile(at(G, sg, batch, head, token, GROUP_G), rows, sg[2], dims, ok), rows)
            _, entrance, exit = centre(total, SPAN)
            fall, rise = tl.exp2(H - entrance[None, :]), tl.exp2(exit[None, :] - H)
            q = tile(at(Q, sq, batch, head, token, GROUP), rows, sq[2], dims, ok)
            k = tile(at(K, sk, batch, head, token, GROUP), rows, sk[2], dims, ok)
            u = tile(at(WRITTEN, sv, batch, head, token, 1), rows, sv[2], columns, ok)
            if BETA is not None:
                u = (u * strengths(BETA, sw, batch, head, token, rows, ok)[:, None]).to(u.dtype)
            dout = tile(at(DOUT, sd, batch, head, token, 1), rows, sd[2], columns, ok)
            P = dot(dout, tl.trans(u), PRECISION) * scale
            P = tl.where((rows[:, None] > rows[None, :]) | ((rows[:, None] == rows[None, :]) & (not STRICT)), P, 0.0)
            spot = at(DQ, so, batch, head, token, 1) + here
            dq = tl.load(spot, mask=ok[:, None], other=0.0) * fall + gather(q, k, P, H, rows, False, CHUNK)
            tl.store(spot, dq.to(DQ.dtype.element_ty), mask=ok[:, None])
            spot = at(DK, so, batch, head, token, 1) + here
            dk = tl.load(spot, mask=ok[:, None], other=0.0) * rise + gather(q, k, P, H, rows, True, CHUNK)
            if DQUERY is not None:
                dvalue = tile(at(DVALUE, sv, batch, head, token, 1), rows, sv[2], columns, ok)
                P = tl.where(rows[:, None] > rows[None, :], -dot(dvalue, tl.trans(u), PRECISION), 0.0)
                dk += gather(k, k, P, H, rows, True, CHUNK)
                of_query = at(DQUERY, so, batch, head, token, 1) + here
                more = tl.load(of_query, mask=ok[:, None], other=0.0) * fall + gather(k, k, P, H, rows, False, CHUNK)
                tl.store(of_query, more.to(DQUERY.dtype.element_ty), mask=ok[:, None])
            tl.store(spot, dk.to(DK.dtype.element_ty), mask=ok[:, None])
