"""Probabilities summed over rows, where attention sums over keys: what tiles of rows give to every key.

The log-sum-exp of the rows is known, so one product of queries and keys is all there is to do. A program keeps a
block of keys and goes through the rows that see it; probabilities add up entry by entry in registers, and are summed
over rows once a tile. Nothing is added to memory, so that every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.core.shapes import group_size
from regard.kernels import device
from regard.kernels.attention.arguments import three
from regard.kernels.attention.forward import LOG2E
from regard.kernels.attention.tiles import dot

DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Keys of a program, rows of a step, warps, stages, by whether D is at most 64; float32 apart (docs/log.md).
LAUNCHES = {True: (128, 64, 8, 3), False: (128, 64, 8, 2)}
EXACT = (64, 32, 8, 1)
FAR = 1e30  # the lse of a row that gives nothing: 2 ** -FAR is 0, and 0 * FAR too


def refuses(q: Tensor, k: Tensor) -> str | None:
    """Why the kernel cannot do this call, or None if it can."""
    if reason := device.refuses(q):
        return reason
    if q.dtype != k.dtype or q.dtype not in DTYPES:
        return f"the kernel takes q and k of one dtype, bfloat16, float16 or float32, got {q.dtype} and {k.dtype}"
    if q.shape[3] not in DIMS:
        return f"the kernel takes D of {', '.join(map(str, DIMS))}, got {q.shape[3]}"
    return "there is nothing to compute" if 0 in q.shape or 0 in k.shape else None


def totals(
    q: Tensor, k: Tensor, lse: Tensor, *, tiles: int, scale: float, first: int = 0, window: int | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`sum exp(s_ij - lse_i)` over the rows i of a tile, and `-sum p log p` of its rows; causal, without gradients.

    Row i stands at arrival `first + i` and sees keys up to its own, the last `window` of them (None: all). Tile r holds
    rows `r * T // tiles` to `(r + 1) * T // tiles - 1`. For calls that `refuses` does not refuse.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`, `S >= first + T`.
        lse: `[B, H, T]` float32; -inf: a row that gives nothing.
        tiles: 1 to T.
        scale: of the scores.
        first: arrival of the first row.
        window: keys that a row sees at most.
        entropy: whether it is wanted.

    Returns:
        `[B, H, tiles, S]` and `[B, H, tiles]` (or None), float32.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    KEYS, ROWS, warps, stages = EXACT if q.dtype == torch.float32 else LAUNCHES[D <= 64]
    blocks, longest = -(-S // KEYS), -(-T // tiles)
    steps = -(-longest // ROWS)
    top = torch.where(lse == -torch.inf, FAR, lse.float() * LOG2E.value).contiguous()
    mass = torch.zeros(B, H, tiles, S, dtype=torch.float32, device=q.device)
    spread = torch.zeros(B, H, tiles, blocks, dtype=torch.float32, device=q.device) if entropy else None
    total_rows[(H, B, blocks)](
        q, k, top, mass, spread, three(q), three(k), tiles, steps, T, S, first, window or 0, scale * LOG2E.value,
        DIM=D, KEYS=KEYS, ROWS=ROWS, GROUP=group_size(q, k), WINDOWED=window is not None, ENTROPY=entropy,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return mass, None if spread is None else spread.sum(-1) / -LOG2E.value


@triton.jit(do_not_specialize=["tiles", "steps", "T", "S", "first", "window"])
def total_rows(
    Q, K, TOP, MASS, SPREAD, strides_q, strides_k, tiles, steps, T, S, first, window, factor,
    DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, WINDOWED: tl.constexpr,
    ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one query head. Grid: query heads, batch rows, blocks of keys; those most seen come first.

    `steps`: of `ROWS` rows, for a tile. `TOP`: lse to base 2. `factor`: the scale, to base 2. `SPREAD`: sums of
    p log2 p `[B, H, tiles, blocks]`.
    """
    head, batch, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    inside, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    keys = block * KEYS + tl.arange(0, KEYS)
    place = batch * tl.num_programs(0) + head
    Q += batch * strides_q[0] + head.to(tl.int64) * strides_q[1]
    K += batch * strides_k[0] + (head // GROUP).to(tl.int64) * strides_k[1]
    k = tl.load(K + keys.to(tl.int64)[:, None] * strides_k[2] + dims[None, :], mask=(keys < S)[:, None], other=0.0)
    # Rows `begin` to `end - 1` see some key of the block; those before `cut` not all of them.
    begin, cut, end = tl.maximum(block * KEYS - first, 0), block * KEYS + KEYS - 1 - first, T
    if WINDOWED:
        end = tl.minimum(T, cut + window)
    wide = tl.cast(tiles, tl.int64)
    low = tl.where(begin < end, (begin + 1) * wide - 1, 0) // T * steps
    high = tl.where(begin < end, end * wide - 1 + T, 0) // T * steps
    middle = high if WINDOWED else tl.maximum(low, tl.minimum(high, (cut * wide - 1 + T) // T * steps))
    sums, spread = tl.zeros((KEYS, ROWS), tl.float32), tl.zeros((KEYS, ROWS), tl.float32)
    for PARTIAL in tl.static_range(2):
        for i in tl.range(low if PARTIAL == 0 else middle, middle if PARTIAL == 0 else high):
            tile = i // steps
            start, stop = tile * T // wide + i % steps * ROWS, (tile + 1) * T // wide
            rows = start + inside
            q = tl.load(Q + rows[:, None] * strides_q[2] + dims[None, :], mask=(rows < stop)[:, None], other=0.0)
            top = tl.load(TOP + place * T + rows, mask=rows < stop, other=1e30)
            x = dot(k, q.trans(), None, PRECISION) * factor - top[None, :]
            p = tl.exp2(x)
            if PARTIAL == 0:
                at = first + rows
                ok = keys[:, None] <= at[None, :]
                if WINDOWED:
                    ok = ok & (at[None, :] - keys[:, None] < window)
                x, p = tl.where(ok, x, 0.0), tl.where(ok, p, 0.0)
            sums += p
            if ENTROPY:
                spread += p * x
            if i % steps == steps - 1:
                tl.store(MASS + (place * tiles + tile) * S + keys, tl.sum(sums, 1), mask=keys < S)
                sums = tl.zeros((KEYS, ROWS), tl.float32)
                if ENTROPY:
                    tl.store(SPREAD + (place * tiles + tile) * tl.num_programs(2) + block, tl.sum(spread))
                    spread = tl.zeros((KEYS, ROWS), tl.float32)
