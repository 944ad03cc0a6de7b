"""Gradients of log-decays from those of queries and keys.

`exp(G_i - G_j)` gives queries `+q dq` and keys `-k dk` at their own token, and the decay of token t acts on every
later `G`: `dg_t = sum_{i >= t} (q_i dq_i - k_i dk_i)`. Both sums grow with T while their difference does not, so
that rounding would grow too. At an anchor the whole sum is known, `sum S dS` over the values, and it is begun again.
"""

import triton
import triton.language as tl

from regard.kernels.states.factor import along_channels, centre
from regard.kernels.states.sweep import at, dot, is_wide, tile


@triton.jit
def gates(
    Q, DQ, K, DK, DKEY, DQUERY, G, DG, WIDE, KNOWN, LAST, SEQUENCES, sq, sk, so, sg, sx, heads,
    DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr, GROUP: tl.constexpr,
    GROUP_G: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The tokens between two anchors of one head, `BLOCK` channels.

    DKEY, DQUERY: what the delta rule adds to DK, as to a key and as to a query. CHANNELS: these are gradients of shares
    (see factor.py) and become those of q and k, unless the chunk is wide and was mended. KNOWN
    `[anchors, heads, DIM]`: the sum from each anchor on; LAST `[N, heads, DIM]` (or None, 0): from the end of each
    sequence on. DG (None: not wanted) by token and channel, or by block of channels and token.
    """
    width: tl.constexpr = DIM // BLOCK
    head, sequence = tl.program_id(1), tl.program_id(2)
    piece, block = tl.program_id(0) // width, tl.program_id(0) % width
    batch = tl.load(SEQUENCES + sequence * 4).to(tl.int64)
    start, end = tl.load(SEQUENCES + sequence * 4 + 1), tl.load(SEQUENCES + sequence * 4 + 2)
    first = tl.load(SEQUENCES + sequence * 4 + 3)
    begin = start + piece * EVERY * CHUNK
    if begin >= end:
        return
    rows, dims = tl.arange(0, CHUNK), block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    if DG is not None:
        if begin + EVERY * CHUNK < end:
            sums = tl.load(KNOWN + ((first // EVERY + piece + 1) * heads + head).to(tl.int64) * DIM + dims)
        elif LAST is not None:
            sums = tl.load(LAST + (sequence * heads + head) * DIM + dims)
    later = (rows[:, None] <= rows[None, :]).to(tl.float32).to(tl.bfloat16)
    for i in range(EVERY):
        token = begin + (EVERY - 1 - i) * CHUNK
        ok = rows < end - token
        here = rows[:, None] * so[2] + dims[None, :]
        to_q, to_k = at(DQ, so, batch, head, token, 1) + here, at(DK, so, batch, head, token, 1) + here
        dq = tl.load(to_q, mask=ok[:, None], other=0.0).to(tl.float32)
        dk = tl.load(to_k, mask=ok[:, None], other=0.0).to(tl.float32)
        if DKEY is not None:
            dk += tl.load(at(DKEY, so, batch, head, token, 1) + here, mask=ok[:, None], other=0.0).to(tl.float32)
        if CHANNELS:
            g = tile(at(G, sg, batch, head, token, GROUP_G), rows, sg[2], dims, ok)
            H, total = along_channels(g, rows)
            wide, entrance, exit = centre(total, SPAN)
            fall, rise = tl.exp2(H - entrance[None, :]), tl.exp2(exit[None, :] - H)
            if token < end:
                if is_wide(WIDE, first + piece * EVERY + EVERY - 1 - i, head, heads, BLOCKS):
                    fall, rise = tl.full(fall.shape, 1.0, tl.float32), tl.full(rise.shape, 1.0, tl.float32)
            dq, dk = dq * fall, dk * rise
            tl.store(to_q, dq.to(DQ.dtype.element_ty), mask=ok[:, None])
        if DG is not None:
            q = tile(at(Q, sq, batch, head, token, GROUP), rows, sq[2], dims, ok).to(tl.float32)
            k = tile(at(K, sk, batch, head, token, GROUP), rows, sk[2], dims, ok).to(tl.float32)
            own = q * dq - k * dk
        if DQUERY is not None:
            more = tl.load(at(DQUERY, so, batch, head, token, 1) + here, mask=ok[:, None], other=0.0).to(tl.float32)
            if CHANNELS:
                more *= fall
            if DG is not None:
                own += k * more
            dk += more
        if CHANNELS or DKEY is not None:
            tl.store(to_k, dk.to(DK.dtype.element_ty), mask=ok[:, None])
        if DG is not None:
            if CHANNELS:
                high = own.to(tl.bfloat16)
                low = own - high.to(tl.float32)
                dg = dot(later, high, "tf32") + dot(later, low.to(tl.bfloat16), "tf32") + sums[None, :]
                if EXACT:
                    dg += dot(later, (low - low.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16), "tf32")
                spot = at(DG, sx, batch, head, token, 1) + rows[:, None] * sx[2] + dims[None, :]
                tl.store(spot, dg.to(DG.dtype.element_ty), mask=ok[:, None])
            else:
                dg = tl.cumsum(tl.sum(own, 1), 0, reverse=True) + tl.sum(sums, 0)
                tl.store(at(DG + block.to(tl.int64) * sx[3], sx, batch, head, token, 1) + rows, dg, mask=ok)
            sums += tl.sum(own, 0)
