"""The one kernel behind a scan and all its gradients: a weighted running sum, in either direction.

    out_i = scale * sum_j (a_i . b_j) w_ij c_j,      w_ij = exp(sum of the decays between j and i),

over the tokens j up to i in the direction of the sweep. The state `S = sum_j w_j b_j^T c_j` crosses chunks in
registers; inside a chunk the product is dense.

`H_i`, used throughout, is the logarithm (base 2) of the decay from where the sweep enters the chunk to token i. It
falls along the sweep, so `H_i - H_j` and `total - H_j` are never positive. Where every channel decays on its own,
`factor.py` has multiplied a and b (or c and out) by their shares of w beforehand, and only the state is left to scale.
"""

import triton
import triton.language as tl

# What decays: nothing, one rate a head, one a token, one a token and channel: of b, of c (`sweep` only).
NONE, HEAD, TOKEN, CHANNEL, COLUMN = 0, 1, 2, 3, 4


# Triton's interpreter multiplies bfloat16 as if it were integers; its values are exact in float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b`, accumulated in float32."""
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def tile(start, rows, stride, columns, ok):
    """`[rows, columns]` of a matrix whose columns are adjacent; 0 where `ok` is False."""
    return tl.load(start + rows[:, None] * stride + columns[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def rate(G, head):
    """The decay of a head, to base 2; no smaller than what float32 can tell from 0."""
    return tl.maximum(tl.load(G + head).to(tl.float32) * 1.4426950408889634, -173.0)


@triton.jit
def along_head(rate, steps, rows, REVERSE: tl.constexpr):
    """`H` `[C]` and its total, for a chunk of `steps` tokens that all decay at `rate`."""
    gone = tl.maximum(steps - 1 - rows, 0) if REVERSE else tl.minimum(rows + 1, steps)
    return gone.to(tl.float32) * rate, steps.to(tl.float32) * rate


@triton.jit
def along_tokens(g, REVERSE: tl.constexpr):
    """`H` `[C]` and its total, from decays of tokens `[C]`."""
    g = tl.maximum(g.to(tl.float32) * 1.4426950408889634, -173.0)
    total = tl.sum(g, 0)
    inclusive = tl.cumsum(g, 0)
    return (total - inclusive if REVERSE else inclusive), total


@triton.jit
def strengths(BETA, strides, batch, head, token, rows, ok):
    """Write strengths `[C]`, kept off 0, so that what was not written can be told from what was."""
    beta = tl.load(at(BETA, strides, batch, head, token, 1) + rows * strides[2], mask=ok, other=0.0)
    return tl.maximum(beta.to(tl.float32), 1e-10)


@triton.jit
def at(pointer, strides, batch, head, token, GROUP: tl.constexpr):
    """Where the rows of `token` begin, in a tensor `[B, heads / GROUP, T, D]`; int64, once a chunk."""
    return pointer + batch * strides[0] + (head // GROUP) * strides[1] + token.to(tl.int64) * strides[2]


@triton.jit
def fetch(X, strides, batch, head, token, rows, columns, skipped, ok, GROUP: tl.constexpr, BULK: tl.constexpr):
    """A tile `[C, columns]` of X `[B, heads / GROUP, T, D]`, from column `skipped` on; 0 beyond the sequence.

    BULK: X is a tensor descriptor, which the copy engine reads: no registers for addresses.
    """
    if BULK:
        return X.load([batch.to(tl.int32), head // GROUP, token, skipped]).reshape((rows.shape[0], columns.shape[0]))
    else:
        return tile(at(X, strides, batch, head, token, GROUP), rows, strides[2], columns, ok)


@triton.jit
def put(X, strides, batch, head, token, rows, columns, skipped, ok, value, BULK: tl.constexpr):
    """Write a tile of X `[B, heads, T, D]`; rows beyond the sequence are not written."""
    if BULK:
        value = value.to(X.dtype)
        X.store([batch.to(tl.int32), head, token, skipped], value.reshape((1, 1, rows.shape[0], columns.shape[0])))
    else:
        spot = at(X, strides, batch, head, token, 1) + rows[:, None] * strides[2] + columns[None, :]
        tl.store(spot, value.to(X.dtype.element_ty), mask=ok[:, None])


@triton.jit
def at_once(MATRIX, chunk, head, heads, rows, always, CHUNK: tl.constexpr):
    """The matrix of a chunk, straight into registers: below a condition, loads are not buffered for several chunks.

    Shared memory is what limits how many programs a multiprocessor runs.
    """
    matrix = tl.zeros((CHUNK, CHUNK), MATRIX.dtype.element_ty)
    if always:
        corner = (chunk * heads + head).to(tl.int64) * CHUNK * CHUNK
        matrix = tl.load(MATRIX + corner + rows[:, None] * CHUNK + rows[None, :])
    return matrix


@triton.jit
def is_wide(WIDE, chunk, head, heads, BLOCKS: tl.constexpr):
    """Whether `factor.py` found a chunk wide, in any of its blocks of channels."""
    return tl.max(tl.load(WIDE + (chunk * heads + head) * BLOCKS + tl.arange(0, BLOCKS)), 0) != 0


@triton.jit
def segment_of(SEGMENTS, segment):
    """`(batch row, first token, end, first chunk)`."""
    batch = tl.load(SEGMENTS + segment * 4).to(tl.int64)
    start, end = tl.load(SEGMENTS + segment * 4 + 1), tl.load(SEGMENTS + segment * 4 + 2)
    return batch, start, end, tl.load(SEGMENTS + segment * 4 + 3)


@triton.jit
def state_spot(strides, segment, head, rows, columns):
    """Offsets of a state's entries."""
    return segment * strides[0] + head * strides[1] + rows[:, None] * strides[2] + columns[None, :] * strides[3]


@triton.jit
def begun(BEGIN, strides, segment, head, dims, columns, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The state a segment begins with."""
    if BEGIN is None:
        return tl.zeros((DIM, BLOCK), tl.float32)
    else:
        return tl.load(BEGIN + state_spot(strides, segment, head, dims, columns)).to(tl.float32)


@triton.jit
def shares(
    G, FACTORS, sg, batch, head, heads, token, end, chunk, slope, rows, offsets,
    WIDTH: tl.constexpr, GROUP_G: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What decays do in a chunk, as three values.

    One rate a head or token: `H`, `total - H` `[C]` and the total, logarithms. By channel, from `factor.py`: what
    scales the state before it is read, before the chunk is added (1 unless the chunk is wide), and afterwards.
    """
    if DECAY == 0:
        return 0.0, 0.0, 0.0
    elif DECAY == 1 or DECAY == 2:
        if DECAY == 1:
            H, total = along_head(slope, tl.minimum(end - token, rows.shape[0]), rows, REVERSE)
        else:
            ok = rows < end - token
            g = tl.load(at(G, sg, batch, head, token, GROUP_G) + rows * sg[2], mask=ok, other=0.0)
            H, total = along_tokens(g, REVERSE)
        return H, total - H, total
    else:
        spot = FACTORS + (chunk * heads + head).to(tl.int64) * 3 * WIDTH + offsets
        return tl.load(spot), tl.load(spot + WIDTH), tl.load(spot + 2 * WIDTH)


@triton.jit
def scaled(S, by, DECAY: tl.constexpr):
    """The state times what its rows (3), its columns (4) or all of it (scalars) decay by."""
    if DECAY == 0:
        return S
    elif DECAY == 3:
        return S * by[:, None]
    elif DECAY == 4:
        return S * by[None, :]
    else:
        return S * by


@triton.jit
def weighted(scores, H, DECAY: tl.constexpr):
    """Products inside a chunk times `2^(H_i - H_j)`, where a token decays as a whole."""
    if DECAY == 1 or DECAY == 2:
        return scores * tl.exp2(tl.minimum(H[:, None] - H[None, :], 0.0))
    else:
        return scores


@triton.jit
def read(a, state, H, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """What queries find in the state that enters the chunk."""
    out = dot(a, state, PRECISION)
    if DECAY == 1 or DECAY == 2:
        out *= tl.exp2(H)[:, None]
    return out


@triton.jit
def advanced(S, b, c, x, y, z, wide, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """The state after the chunk; x, y, z: see `shares`."""
    if DECAY == 1 or DECAY == 2:
        c = (c * tl.exp2(y)[:, None]).to(b.dtype)
        S = scaled(S, tl.exp2(z), DECAY)
    if DECAY == 3 or DECAY == 4:
        if wide:
            S = scaled(S, y, DECAY)
        return scaled(S + dot(tl.trans(b), c, PRECISION), z, DECAY)
    else:
        return S + dot(tl.trans(b), c, PRECISION)


@triton.jit
def anchor(ANCHORS, MEET, S, chunk, head, heads, dims, columns, REVERSE: tl.constexpr, EVERY: tl.constexpr,
           DIM: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """At every `EVERY`th chunk: write the state forwards; backwards, its product with the state that was written."""
    if chunk % EVERY == 0:
        place = ((chunk // EVERY) * heads + head).to(tl.int64)
        spot = ANCHORS + place * DIM * COLUMNS + dims[:, None] * COLUMNS + columns[None, :]
        if REVERSE:
            tl.store(MEET + place * COLUMNS + columns, tl.sum(tl.load(spot).to(tl.float32) * S, 0))
        else:
            tl.store(spot, S.to(ANCHORS.dtype.element_ty))


@triton.jit
def corrected(
    c, key, state, x, TRIANGLE, BETA, ERROR, sw, so, batch, head, heads, token, end, chunk, rows, columns, skipped,
    DECAY: tl.constexpr, BULK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the delta rule writes in place of c: see delta.py."""
    ok = rows < end - token
    solved = at_once(TRIANGLE, chunk, head, heads, rows, token < end, CHUNK)
    beta = strengths(BETA, sw, batch, head, token, rows, ok)
    error = (c - read(key, state, x, DECAY, PRECISION)) * beta[:, None]
    written = dot(solved, error.to(solved.dtype), PRECISION)
    if ERROR is not None:
        put(ERROR, so, batch, head, token, rows, columns, skipped, ok, written / beta[:, None], BULK)
    return written.to(c.dtype)


@triton.jit
def products(
    a, b, H, SCORES, wide, chunk, head, heads, rows,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, MENDED: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`(a_i . b_j) w_ij` of a chunk, 0 where j comes after i; and `a_i . b_i`."""
    before = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
    if STRICT:
        before = before & (rows[:, None] != rows[None, :])
    full = dot(a, tl.trans(b), PRECISION)
    scores = weighted(tl.where(before, full, 0.0), H, DECAY)
    if SCORES is not None:
        if wide:
            corner = (chunk * heads + head).to(tl.int64) * CHUNK * CHUNK
            near, far = (1, CHUNK) if REVERSE else (CHUNK, 1)
            scores = tl.load(SCORES + corner + rows[:, None] * near + rows[None, :] * far).to(tl.float32)
    elif MENDED:
        scores = tl.where(wide, 0.0, scores)
    return scores, tl.sum(tl.where(rows[:, None] == rows[None, :], full, 0.0), 1)


@triton.jit
def sweep(
    A, B, C, OUT, SELF, G, FACTORS, WIDE, SCORES, BETA, TRIANGLE, ENTRY, ERROR, BEGIN, END, TOTAL, ANCHORS, MEET,
    SEGMENTS, sa, sb, sc, se, so, sg, sw, sn, sm, scale, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP_A: tl.constexpr,
    GROUP_B: tl.constexpr, GROUP_C: tl.constexpr, GROUP_G: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    STRICT: tl.constexpr, BULK: tl.constexpr, BLOCKS: tl.constexpr, EXACT: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """One segment of one head, `BLOCK` columns of c.

    Pointers that are None switch their part off. A, OUT: without them only the state is carried. STRICT: token i itself
    is left out; SELF `[B, heads, T]` receives a_i . b_i. WIDE: see factor.py; the products a . b of such a chunk lie in
    SCORES or are added later. BETA: c is written with this strength, by the delta rule if there is a TRIANGLE; ERROR
    receives it over beta; ENTRY: b with the decay up to it. BEGIN, END: the state `[n, heads, DIM, COLUMNS]` before,
    after. TOTAL: all decay of the segment. ANCHORS, MEET: see `anchor`. Strides: (batch, head, token); of states, all.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    block, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, end, first = segment_of(SEGMENTS, segment)
    rows, dims, columns = tl.arange(0, CHUNK), tl.arange(0, DIM), block * BLOCK + tl.arange(0, BLOCK)
    WIDTH: tl.constexpr = COLUMNS if DECAY == 4 else DIM
    offsets = columns if DECAY == 4 else dims
    S, passed = begun(BEGIN, sn, segment, head, dims, columns, DIM, BLOCK), tl.zeros((DIM,), tl.float32)
    slope = rate(G, head) if DECAY == 1 else 0.0
    for i in range(tl.cdiv(end - start, CHUNK)):
        index = tl.cdiv(end - start, CHUNK) - 1 - i if REVERSE else i
        token, chunk = start + index * CHUNK, first + index
        ok = rows < end - token
        x, y, z = shares(G, FACTORS, sg, batch, head, heads, token, end, chunk, slope, rows, offsets, WIDTH,
                         GROUP_G, DECAY, REVERSE)  # fmt: skip
        wide = is_wide(WIDE, chunk, head, heads, BLOCKS) if WIDE is not None else False
        if ANCHORS is not None and not REVERSE:
            anchor(ANCHORS, MEET, S, chunk, head, heads, dims, columns, REVERSE, EVERY, DIM, COLUMNS)
        b = fetch(B, sb, batch, head, token, rows, dims, 0, ok, GROUP_B, BULK)
        c = fetch(C, sc, batch, head, token, rows, columns, block * BLOCK, ok, GROUP_C, BULK)
        if DECAY == 3 or DECAY == 4:
            S = scaled(S, x, DECAY)
        state = S.to(b.dtype)
        if TRIANGLE is not None:
            key = fetch(ENTRY, se, batch, head, token, rows, dims, 0, ok, 1, BULK) if DECAY == 3 else b
            c = corrected(c, key, state, x, TRIANGLE, BETA, ERROR, sw, so, batch, head, heads, token, end, chunk, rows,
                          columns, block * BLOCK, DECAY, BULK, CHUNK, PRECISION)  # fmt: skip
        elif BETA is not None:
            c = (c * strengths(BETA, sw, batch, head, token, rows, ok)[:, None]).to(c.dtype)
        if OUT is not None:
            a = fetch(A, sa, batch, head, token, rows, dims, 0, ok, GROUP_A, BULK)
            scores, own = products(a, b, x, SCORES, wide, chunk, head, heads, rows, DECAY, REVERSE, STRICT,
                                   WIDE is not None, CHUNK, PRECISION)  # fmt: skip
            out = (read(a, state, x, DECAY, PRECISION) + dot(scores.to(b.dtype), c, PRECISION)) * scale
            put(OUT, so, batch, head, token, rows, columns, block * BLOCK, ok, out, BULK)
            if SELF is not None:
                tl.store(at(SELF, sw, batch, head, token, 1) + rows * sw[2], own * scale, mask=ok & (block == 0))
        S = advanced(S, b, c, x, y, z, wide, DECAY, PRECISION)
        if TOTAL is not None:
            passed += tl.log2(x) + tl.log2(y) + tl.log2(z) if DECAY == 3 else z
        if MEET is not None:
            anchor(ANCHORS, MEET, S, chunk, head, heads, dims, columns, REVERSE, EVERY, DIM, COLUMNS)
    if TOTAL is not None:
        tl.store(TOTAL + (segment * heads + head) * DIM + dims, passed)
    if END is not None:
        tl.store(END + state_spot(sm, segment, head, dims, columns), S)
