"""What the delta rule needs besides sweeps: the triangle of each chunk solved, and its own way back.

Inside a chunk the corrections `x_i = v_i - (decayed state before i)^T k_i` depend on each other through
`A_ij = beta_i (k_i . k_j) w_ij`, j before i: `(I + A) u = beta (v - S^T k)` with `u = beta x` what is written.
`(I + A)^-1` does not depend on the state, so all chunks are solved at once and the sweeps only multiply.
"""

import triton
import triton.language as tl

from regard.kernels.states.sweep import (
    advanced,
    along_tokens,
    anchor,
    at,
    at_once,
    begun,
    dot,
    fetch,
    is_wide,
    products,
    put,
    rate,
    read,
    scaled,
    segment_of,
    shares,
    state_spot,
    strengths,
    tile,
)


@triton.jit
def inverse(A, rows, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """`(I + A)^-1` of a strictly lower triangle `[C, C]`, by blocks of 1, 2, 4, ...: each step joins two.

    `[[P, 0], [L, Q]]^-1 = [[P', 0], [-Q' L P', Q']]`: as stable as substitution, unlike the Neumann series. Up to
    blocks of 16, only the blocks on the diagonal are multiplied.
    """
    N: tl.constexpr = CHUNK // 16
    grid = tl.arange(0, N)
    diagonal = (grid[:, None] == grid[None, :])[:, None, :, None]
    small = tl.sum(tl.where(diagonal, A.reshape((N, 16, N, 16)), 0.0), 2)
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    part = tl.where(i == j, 1.0, 0.0) - tl.where((i // 2 == j // 2) & (i > j), small, 0.0)
    for power in tl.static_range(1, 4):
        joined = (i // 2 ** (power + 1) == j // 2 ** (power + 1)) & (i // 2**power > j // 2**power)
        lower = dot(tl.where(joined, small, 0.0), part, PRECISION)
        part -= dot(part, lower, PRECISION)
    solved = tl.where(diagonal, part[:, :, None, :], 0.0).reshape((CHUNK, CHUNK))
    i, j = rows[:, None], rows[None, :]
    for power in tl.static_range(4, 10):
        if 2**power < CHUNK:
            joined = (i // 2 ** (power + 1) == j // 2 ** (power + 1)) & (i // 2**power > j // 2**power)
            lower = dot(tl.where(joined, A, 0.0), solved, PRECISION)
            solved -= dot(solved, lower, PRECISION)
    return solved


@triton.jit
def solve(
    K, ENTRY, RIGHT, G, WIDE, BETA, TRIANGLE, SEGMENTS, sk, so, sg, sw, heads,
    DIM: tl.constexpr, CHUNK: tl.constexpr, GROUP_K: tl.constexpr, GROUP_G: tl.constexpr,
    DECAY: tl.constexpr, EXACT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`(I + A)^-1` of one chunk and head, `TRIANGLE [chunks, heads, C, C]`; ENTRY, RIGHT, WIDE: see factor.py.

    In wide chunks, TRIANGLE holds the products of keys already, without strengths.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    index, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, end, first = segment_of(SEGMENTS, segment)
    token, chunk = start + index * CHUNK, first + index
    if token >= end:
        return
    rows, dims = tl.arange(0, CHUNK), tl.arange(0, DIM)
    ok = rows < end - token
    here = (chunk * heads + head).to(tl.int64) * CHUNK * CHUNK + rows[:, None] * CHUNK + rows[None, :]
    if DECAY == 3:
        entry = tile(at(ENTRY, so, batch, head, token, 1), rows, so[2], dims, ok)
        A = dot(entry, tl.trans(tile(at(RIGHT, so, batch, head, token, 1), rows, so[2], dims, ok)), PRECISION)
        wide = is_wide(WIDE, chunk, head, heads, BLOCKS)
        A = tl.where(wide, tl.load(TRIANGLE + here, mask=wide, other=0.0).to(tl.float32), A)
    else:
        k = tile(at(K, sk, batch, head, token, GROUP_K), rows, sk[2], dims, ok)
        A = dot(k, tl.trans(k), PRECISION)
        if DECAY == 1:
            A *= tl.exp2(tl.abs(rows[:, None] - rows[None, :]).to(tl.float32) * rate(G, head))
        elif DECAY == 2:
            g = tl.load(at(G, sg, batch, head, token, GROUP_G) + rows * sg[2], mask=ok, other=0.0)
            H, _ = along_tokens(g, False)
            A *= tl.exp2(tl.minimum(H[:, None] - H[None, :], 0.0))
    beta = strengths(BETA, sw, batch, head, token, rows, ok)
    A = tl.where(rows[:, None] > rows[None, :], A, 0.0) * beta[:, None]
    solved = inverse(A, rows, CHUNK, PRECISION)
    tl.store(TRIANGLE + here, solved.to(TRIANGLE.dtype.element_ty))


@triton.jit
def back(
    Q, K, ENTRY, SCORES, WIDE, FACTORS, DOUT, ERROR, DVALUE, DBETA, LATER, G, BETA, TRIANGLE, BEGIN, END, SEGMENTS,
    sq, sk, se, sd, so, sg, sw, sx, sn, sm, scale, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, GROUP_G: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr,
    BULK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The delta rule backwards, one segment of one head, `BLOCK` columns of v.

    `du = scale (P^T dout + k S')` is turned into `z = (I + A)^-T du`, the gradient of `beta x`; then
    DVALUE = beta z is the gradient of v, and DBETA `[blocks, B, heads, T]` what these columns give that of beta, with
    ERROR = x. S' `= sum w (q^T dout - k^T beta z / scale)` lies in BEGIN and END, and behind every chunk in LATER
    `[chunks, heads, DIM, COLUMNS]`. With decay by channel, Q and K are the shares of factor.py, which ENTRY, SCORES and
    FACTORS come with.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    block, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, end, first = segment_of(SEGMENTS, segment)
    rows, dims, skipped = tl.arange(0, CHUNK), tl.arange(0, DIM), block * BLOCK
    columns = skipped + tl.arange(0, BLOCK)
    S = begun(BEGIN, sn, segment, head, dims, columns, DIM, BLOCK)
    slope = rate(G, head) if DECAY == 1 else 0.0
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(chunks):
        token, chunk = start + (chunks - 1 - i) * CHUNK, first + chunks - 1 - i
        ok = rows < end - token
        if LATER is not None:
            anchor(LATER, None, S, chunk, head, heads, dims, columns, False, 1, DIM, COLUMNS)
        solved = at_once(TRIANGLE, chunk, head, heads, rows, token < end, CHUNK)
        x, y, z = shares(
            G, FACTORS, sg, batch, head, heads, token, end, chunk, slope, rows, dims, DIM, GROUP_G, DECAY, True
        )
        wide = is_wide(WIDE, chunk, head, heads, BLOCKS) if WIDE is not None else False
        q = fetch(Q, sq, batch, head, token, rows, dims, 0, ok, GROUP, BULK)
        k = fetch(K, sk, batch, head, token, rows, dims, 0, ok, GROUP, BULK)
        dout = fetch(DOUT, sd, batch, head, token, rows, columns, skipped, ok, 1, BULK)
        if DECAY == 3:
            S = scaled(S, x, DECAY)
        scores, _ = products(
            k, q, x, SCORES, wide, chunk, head, heads, rows, DECAY, True, False, False, CHUNK, PRECISION
        )
        du = read(k, S.to(k.dtype), x, DECAY, PRECISION) + dot(scores.to(k.dtype), dout, PRECISION)
        ascent = dot(tl.trans(solved), (du * scale).to(solved.dtype), PRECISION)
        beta = strengths(BETA, sw, batch, head, token, rows, ok)
        dvalue = ascent * beta[:, None]
        if ERROR is not None:
            error = fetch(ERROR, so, batch, head, token, rows, columns, skipped, ok, 1, BULK).to(tl.float32)
            put(DVALUE, so, batch, head, token, rows, columns, skipped, ok, dvalue, BULK)
            spot = at(DBETA + block.to(tl.int64) * sx[3], sx, batch, head, token, 1) + rows
            tl.store(spot, tl.sum(ascent * error, 1), mask=ok)
        if DECAY == 3:
            k = fetch(ENTRY, se, batch, head, token, rows, dims, 0, ok, 1, BULK)
        if DECAY == 1 or DECAY == 2:
            dvalue *= tl.exp2(y)[:, None]
        S = advanced(S, q, dout, x, y, z, wide, DECAY, PRECISION)
        dvalue = (dvalue * (-1.0 / scale)).to(k.dtype)
        S += scaled(dot(tl.trans(k), dvalue, PRECISION), z, DECAY if DECAY == 3 else 0)
    if END is not None:
        tl.store(END + state_spot(sm, segment, head, dims, columns), S)
