"""What the kernels over lists of blocks share: tiles of tensors, lists, and the cut of a block."""

import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 as if it were integers; its values are exact in float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """`sums + a @ b` (None: `a @ b`), accumulated in float32; a takes the dtype of b."""
    if INTERPRETED:
        product = tl.dot(a.to(b.dtype).to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        product = tl.dot(a.to(b.dtype), b, sums, input_precision=PRECISION)
    return product


@triton.jit
def fetch(X, strides, batch, head, start, rows, columns, length, BULK: tl.constexpr):
    """Rows `start + rows` of X `[B, heads, length, D]`; 0 beyond `length`. BULK: X is a tensor descriptor."""
    if BULK:
        return X.load([batch, head, start, 0]).reshape((rows.shape[0], columns.shape[0]))
    else:
        at = X + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
        row = start + rows
        spots = at + row.to(tl.int64)[:, None] * strides[2] + columns[None, :]
        return tl.load(spots, mask=(row < length)[:, None], other=0.0)


@triton.jit
def list_of(batch, head, line, shared, lines, most, apart_b, apart_h):
    """Where the list of one line of blocks begins: `(offset into counts, offset into entries)`.

    `shared`: heads that share a list; `most`: entries that each has room for; `apart_b`, `apart_h`: how far batch rows
    and heads lie apart, in lists.
    """
    spot = (batch.to(tl.int64) * apart_b + (head // shared) * apart_h) * lines + line
    return spot, spot * most


@triton.jit
def capped(scores, cap):
    """`cap * tanh(scores / cap)`, and the tanh."""
    # From exp of a negative number alone, so that nothing overflows.
    small = tl.exp2(-2.8853900817779268 * tl.abs(scores / cap))
    tanh = (1 - small) / (1 + small)
    tanh = tl.where(scores < 0, -tanh, tanh)
    return cap * tanh, tanh


@triton.jit
def cut(scores, part, rows, columns, BOUNDS, BITS, M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):
    """-inf where `part` hides keys `columns` of a block from its rows `rows`. TURNED: scores are `[columns, rows]`."""
    bound = tl.load(BOUNDS + part.to(tl.int64) * M + rows, mask=(part >= 0) & (rows < M), other=N << 16)
    low, high = bound & 0xFFFF, bound >> 16
    if TURNED:
        ok = (columns[:, None] >= low[None, :]) & (columns[:, None] < high[None, :])
    else:
        ok = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
    if BITS is not None:
        words: tl.constexpr = (N + 31) // 32
        at = BITS + ((-2 - part).to(tl.int64) * M + rows) * words
        for word in tl.static_range(words):
            bits = tl.load(at + word, mask=(part < -1) & (rows < M), other=-1)
            if TURNED:
                seen = (bits[None, :] >> (columns[:, None] & 31)) & 1
                ok = ok & ((seen != 0) | (columns[:, None] // 32 != word))
            else:
                seen = (bits[:, None] >> (columns[None, :] & 31)) & 1
                ok = ok & ((seen != 0) | (columns[None, :] // 32 != word))
    return tl.where(ok, scores, float("-inf"))
