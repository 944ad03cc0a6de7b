"""Gradients of log-decays from those of queries and keys.

`exp(G_i - G_j)` gives queries `+q dq` and keys `-k dk` at their own token, and the decay of token t acts on every
later `G`: `dg_t = sum_{i >= t} (q_i dq_i - k_i dk_i)`. Both sums grow with T while their difference does not, so
that rounding would grow too. At an anchor the whole sum is known, `sum S dS` over the values, and it is begun again.
"""

import triton
import triton.language as tl

from regard.kernels.states.factor import along_channels, centre
from regard.kernels.states.sweep import at, dot, is_wide, segment_of, tile


@triton.jit
def whole(G, WIDE, sg, batch, head, heads, token, end, chunk, rows, dims, GROUP_G: tl.constexpr, SPAN: tl.constexpr,
          BLOCKS: tl.constexpr):  # fmt: skip
    """What turns gradients of shares into those of queries and of keys; 1 where `factor.py` mended them already."""
    g = tile(at(G, sg, batch, head, token, GROUP_G), rows, sg[2], dims, rows < end - token)
    H, total = along_channels(g, rows)
    _, entrance, exit = centre(total, SPAN)
    fall, rise = tl.exp2(H - entrance[None, :]), tl.exp2(exit[None, :] - H)
    if token < end:  # noqa: SIM102 (Triton has no lazy `and`)
        if is_wide(WIDE, chunk, head, heads, BLOCKS):
            fall, rise = tl.full(fall.shape, 1.0, tl.float32), tl.full(rise.shape, 1.0, tl.float32)
    return fall, rise


@triton.jit
def summed(own, sums, later, EXACT: tl.constexpr):
    """`dg` by token and channel: what comes later in the chunk, and after it."""
    high = own.to(tl.bfloat16)
    low = own - high.to(tl.float32)
    dg = dot(later, high, "tf32") + dot(later, low.to(tl.bfloat16), "tf32") + sums[None, :]
    if EXACT:
        dg += dot(later, (low - low.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16), "tf32")
    return dg


@triton.jit
def after(KNOWN, LAST, anchor, sequence, head, heads, dims, last, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """What the tokens after this piece sum to; 0 where nobody asks."""
    sums = tl.zeros((BLOCK,), tl.float32)
    if KNOWN is not None:
        if not last:
            sums = tl.load(KNOWN + (anchor * heads + head).to(tl.int64) * DIM + dims)
        elif LAST is not None:
            sums = tl.load(LAST + (sequence * heads + head) * DIM + dims)
    return sums


@triton.jit
def gradient(X, strides, batch, head, token, rows, dims, end):
    """A tile of a gradient `[B, heads, T, D]`, float32."""
    spot = at(X, strides, batch, head, token, 1)
    return tile(spot, rows, strides[2], dims, rows < end - token).to(tl.float32)


@triton.jit
def gates(
    Q, DQ, K, DK, SELF, DQUERY, G, DG, WIDE, KNOWN, LAST, SEQUENCES, sq, sk, so, sg, sx, ss, heads,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, GROUP: tl.constexpr,
    GROUP_G: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The tokens between two anchors of one head, `BLOCK` channels.

    SELF: `dout . u`, what token i makes of itself; it cancels in dg, so DQ and DK come without it (its rounding would
    stay) and leave with it (None: they have it). DQUERY: what the delta rule adds to DK as to a query (see
    gradients.py). CHANNELS: these are gradients of shares (see factor.py) and become those of q and k, unless the chunk
    is wide and was mended.
    KNOWN `[anchors, heads, DIM]`: the sum from each anchor on; LAST `[N, heads, DIM]` (or None, 0): from the end of
    each sequence on. DG (None: not wanted) by token and channel, or by block of channels and token.
    """
    width: tl.constexpr = DIM // BLOCK
    head, sequence = tl.program_id(1), tl.program_id(2)
    piece, block = tl.program_id(0) // width, tl.program_id(0) % width
    batch, start, end, first = segment_of(SEQUENCES, sequence)
    begin = start + piece * EVERY * CHUNK
    if begin >= end:
        return
    rows, dims = tl.arange(0, CHUNK), block * BLOCK + tl.arange(0, BLOCK)
    last = begin + EVERY * CHUNK >= end
    sums = after(KNOWN, LAST, first // EVERY + piece + 1, sequence, head, heads, dims, last, BLOCK, DIM)
    later = (rows[:, None] <= rows[None, :]).to(tl.float32).to(tl.bfloat16)
    for i in range(EVERY):
        token = begin + (EVERY - 1 - i) * CHUNK
        ok = rows < end - token
        here = rows[:, None] * so[2] + dims[None, :]
        dq = gradient(DQ, so, batch, head, token, rows, dims, end)
        dk = gradient(DK, so, batch, head, token, rows, dims, end)
        if CHANNELS:
            chunk = first + piece * EVERY + EVERY - 1 - i
            fall, rise = whole(G, WIDE, sg, batch, head, heads, token, end, chunk, rows, dims, GROUP_G, SPAN, BLOCKS)
            dq, dk = dq * fall, dk * rise
        if SELF is not None:
            q = tile(at(Q, sq, batch, head, token, GROUP), rows, sq[2], dims, ok).to(tl.float32)
            k = tile(at(K, sk, batch, head, token, GROUP), rows, sk[2], dims, ok).to(tl.float32)
            own = q * dq - k * dk
            alone = tl.load(at(SELF, ss, batch, head, token, 1) + rows * ss[2], mask=ok, other=0.0)[:, None]
            dq, dk = dq + alone * k, dk + alone * q
        if DQUERY is not None:
            more = gradient(DQUERY, so, batch, head, token, rows, dims, end) * fall
            if DG is not None:
                own += k * more
            dk += more
        tl.store(at(DQ, so, batch, head, token, 1) + here, dq.to(DQ.dtype.element_ty), mask=ok[:, None])
        tl.store(at(DK, so, batch, head, token, 1) + here, dk.to(DK.dtype.element_ty), mask=ok[:, None])
        if DG is not None:
            if CHANNELS:
                spot = at(DG, sx, batch, head, token, 1) + rows[:, None] * sx[2] + dims[None, :]
                tl.store(spot, summed(own, sums, later, EXACT).to(DG.dtype.element_ty), mask=ok[:, None])
            else:
                dg = tl.cumsum(tl.sum(own, 1), 0, reverse=True) + tl.sum(sums, 0)
                tl.store(at(DG + block.to(tl.int64) * sx[3], sx, batch, head, token, 1) + rows, dg, mask=ok)
            sums += tl.sum(own, 0)
