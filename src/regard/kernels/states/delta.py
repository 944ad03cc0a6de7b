"""What the delta rule needs besides sweeps: the triangle of each chunk solved, and its own way back.

Inside a chunk the corrections `x_i = v_i - (decayed state before i)^T k_i` depend on each other through
`A_ij = beta_i (k_i . k_j) w_ij`, j before i: `(I + A) u = beta (v - S^T k)` with `u = beta x` what is written.
`(I + A)^-1` does not depend on the state, so all chunks are solved at once and the sweeps only multiply.
"""

import triton
import triton.language as tl

from regard.kernels.states.factor import along_channels, exact_scores
from regard.kernels.states.sweep import (
    along_head,
    along_tokens,
    at,
    at_once,
    dot,
    fetch,
    is_wide,
    put,
    rate,
    shares,
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
    """`(I + A)^-1` of one chunk and head, `TRIANGLE [chunks, heads, C, C]`; ENTRY, RIGHT, WIDE: see factor.py."""
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    index, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = tl.load(SEGMENTS + segment * 4).to(tl.int64)
    token, end = tl.load(SEGMENTS + segment * 4 + 1) + index * CHUNK, tl.load(SEGMENTS + segment * 4 + 2)
    if token >= end:
        return
    chunk = tl.load(SEGMENTS + segment * 4 + 3) + index
    rows, dims = tl.arange(0, CHUNK), tl.arange(0, DIM)
    ok = rows < end - token
    if DECAY == 3:
        entry = tile(at(ENTRY, so, batch, head, token, 1), rows, so[2], dims, ok)
        A = dot(entry, tl.trans(tile(at(RIGHT, so, batch, head, token, 1), rows, so[2], dims, ok)), PRECISION)
        if is_wide(WIDE, chunk, head, heads, BLOCKS):
            k = tile(at(K, sk, batch, head, token, GROUP_K), rows, sk[2], dims, ok)
            H, total = along_channels(tile(at(G, sg, batch, head, token, GROUP_G), rows, sg[2], dims, ok), rows)
            A = exact_scores(k, k, H, rows, CHUNK)
    else:
        k = tile(at(K, sk, batch, head, token, GROUP_K), rows, sk[2], dims, ok)
        A = dot(k, tl.trans(k), PRECISION)
        if DECAY == 1:
            A *= tl.exp2(tl.abs(rows[:, None] - rows[None, :]).to(tl.float32) * rate(G, head))
        elif DECAY == 2:
            g = tl.load(at(G, sg, batch, head, token, GROUP_G) + rows * sg[2], mask=ok, other=0.0)
            H, total = along_tokens(g, False)
            A *= tl.exp2(tl.minimum(H[:, None] - H[None, :], 0.0))
    beta = strengths(BETA, sw, batch, head, token, rows, ok)
    A = tl.where(rows[:, None] > rows[None, :], A, 0.0) * beta[:, None]
    solved = inverse(A, rows, CHUNK, PRECISION)
    corner = (chunk * heads + head).to(tl.int64) * CHUNK * CHUNK
    tl.store(TRIANGLE + corner + rows[:, None] * CHUNK + rows[None, :], solved.to(TRIANGLE.dtype.element_ty))


@triton.jit
def back(
    Q, K, ENTRY, SCORES, WIDE, FACTORS, DOUT, ERROR, DVALUE, WRITTEN, DBETA, G, BETA, TRIANGLE, BEGIN, END, SEGMENTS,
    sq, sk, se, sd, so, sg, sw, sx, sn, sm, scale, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, GROUP_G: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr,
    BULK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The delta rule backwards, one segment of one head, `BLOCK` columns of v.

    `du = scale (P^T dout + k S')` is turned into `z = (I + A)^-T du`, the gradient of `beta x`; then
    DVALUE = beta z is the gradient of v, WRITTEN = beta x what was written, DBETA `[blocks, B, heads, T]` the part
    of beta's gradient in these columns. S' `= sum w (q^T dout - k^T beta z / scale)` lies in BEGIN and END.
    With decay by channel, Q and K are the shares of factor.py, and ENTRY, SCORES, FACTORS come with them.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    block, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = tl.load(SEGMENTS + segment * 4).to(tl.int64)
    start, end = tl.load(SEGMENTS + segment * 4 + 1), tl.load(SEGMENTS + segment * 4 + 2)
    first = tl.load(SEGMENTS + segment * 4 + 3)
    rows, dims, columns = tl.arange(0, CHUNK), tl.arange(0, DIM), block * BLOCK + tl.arange(0, BLOCK)
    skipped = block * BLOCK
    later = rows[:, None] <= rows[None, :]
    S = tl.zeros((DIM, BLOCK), tl.float32)
    if DECAY == 3:
        held = tl.full((DIM,), 1.0, tl.float32)
    if BEGIN is not None:
        S = tl.load(BEGIN + segment * sn[0] + head * sn[1] + dims[:, None] * sn[2] + columns[None, :] * sn[3])
        S = S.to(tl.float32)
    if DECAY == 1:
        slope = rate(G, head)
        weight = tl.exp2(tl.abs(rows[:, None] - rows[None, :]).to(tl.float32) * slope)
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(chunks):
        index = chunks - 1 - i
        token = start + index * CHUNK
        ok = rows < end - token
        solved = at_once(TRIANGLE, first + index, head, heads, rows, token < end, CHUNK)
        q = fetch(Q, sq, batch, head, token, rows, dims, 0, ok, GROUP, BULK)
        k = fetch(K, sk, batch, head, token, rows, dims, 0, ok, GROUP, BULK)
        dout = fetch(DOUT, sd, batch, head, token, rows, columns, skipped, ok, 1, BULK)
        kind = k.dtype
        if DECAY == 1:
            H, total = along_head(slope, tl.minimum(end - token, CHUNK), rows, True)
        elif DECAY == 2:
            g = tl.load(at(G, sg, batch, head, token, GROUP_G) + rows * sg[2], mask=ok, other=0.0)
            H, total = along_tokens(g, True)
            weight = tl.exp2(tl.minimum(H[:, None] - H[None, :], 0.0))
        elif DECAY == 3:
            entering, kept, leaving = shares(FACTORS, first + index, head, heads, dims, DIM)
            S *= (held * entering)[:, None]
        corner = ((first + index) * heads + head).to(tl.int64) * CHUNK * CHUNK
        state = S.to(kind)
        du = dot(k, state, PRECISION)
        scores = tl.where(later, dot(k, tl.trans(q), PRECISION), 0.0)
        if DECAY == 3:
            if is_wide(WIDE, first + index, head, heads, BLOCKS):
                scores = tl.load(SCORES + corner + rows[:, None] + rows[None, :] * CHUNK).to(tl.float32)
            k = fetch(ENTRY, se, batch, head, token, rows, dims, 0, ok, 1, BULK)
        elif DECAY != 0:
            scores *= weight
            du *= tl.exp2(H)[:, None]
        du += dot(scores.to(kind), dout, PRECISION)
        z = dot(tl.trans(solved), (du * scale).to(solved.dtype), PRECISION)
        beta = strengths(BETA, sw, batch, head, token, rows, ok)
        dvalue = z * beta[:, None]
        if ERROR is not None:
            error = fetch(ERROR, so, batch, head, token, rows, columns, skipped, ok, 1, BULK).to(tl.float32)
            put(DVALUE, so, batch, head, token, rows, columns, skipped, ok, dvalue, BULK)
            put(WRITTEN, so, batch, head, token, rows, columns, skipped, ok, error * beta[:, None], BULK)
            spot = at(DBETA + block.to(tl.int64) * sx[3], sx, batch, head, token, 1) + rows
            tl.store(spot, tl.sum(z * error, 1), mask=ok)
        if DECAY == 3:
            S *= kept[:, None]
            held = leaving
        elif DECAY != 0:
            rest = tl.exp2(total - H)[:, None]
            dout = (dout * rest).to(kind)
            dvalue *= rest
            S *= tl.exp2(total)
        S += dot(tl.trans(q), dout, PRECISION)
        S += dot(tl.trans(k), (dvalue * (-1.0 / scale)).to(kind), PRECISION)
    if END is not None:
        if DECAY == 3:
            S *= held[:, None]
        spot = END + segment * sm[0] + head * sm[1] + dims[:, None] * sm[2] + columns[None, :] * sm[3]
        tl.store(spot, S)
