"""Probabilities summed over rows, where attention sums over keys: what tiles of rows give to every key.

The log-sum-exp of the rows is known, so one product of queries and keys is all there is to do. A program keeps a
block of keys and goes through the rows that see it; what a thread holds of a row adds up in it, and threads are joined
once a tile. Nothing is added to memory, so that every run gives the same bits.
"""

from functools import lru_cache

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
# Keys of a program, rows of a step, warps, stages; float32 apart. Measured in docs/log.md.
LAUNCH = (128, 64, 4, 3)
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
    q: Tensor, k: Tensor, lse: Tensor, *, tiles: int, real: Tensor, scale: float, first: int = 0,
    window: int | None = None, entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`sum exp(s_ij - lse_i)` over the rows i of a tile, and `-sum p log p` of its rows; causal, without gradients.

    Row i stands at arrival `first + i` and sees keys up to its own, the last `window` of them (None: all). Tile r holds
    rows `r * T // tiles` to `(r + 1) * T // tiles - 1`. For calls that `refuses` does not refuse.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`, `S >= first + T`.
        lse: `[B, H, T]` float32; -inf: a row that gives nothing.
        tiles: 1 to T.
        real: `[B, S]` bool; False: a key that is not seen.
        scale: of the scores.
        first: arrival of the first row.
        window: keys that a row sees at most.
        entropy: whether it is wanted.

    Returns:
        `[B, H, tiles, S]` and `[B, H, tiles]` (or None), float32.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    KEYS, ROWS, warps, stages = EXACT if q.dtype == torch.float32 else LAUNCH
    blocks, (plan, rows) = -(-S // KEYS), steps(T, tiles, ROWS, q.device)
    top = torch.where(lse == -torch.inf, FAR, lse.float() * LOG2E.value)
    top = torch.nn.functional.pad(top, (0, 1), value=FAR)[:, :, rows]
    mass = torch.zeros(B, H, tiles, S, dtype=torch.float32, device=q.device)
    spread = torch.zeros(B, H, tiles, blocks, dtype=torch.float32, device=q.device) if entropy else None
    total_rows[(H, B, blocks)](
        q, k, top, real.to(torch.int8).contiguous(), plan, mass, spread, three(q), three(k), tiles, len(plan) // tiles,
        T, S, first, window or 0, scale * LOG2E.value, DIM=D, KEYS=KEYS, ROWS=ROWS, GROUP=group_size(q, k),
        WINDOWED=window is not None, ENTROPY=entropy, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return mass, None if spread is None else spread.sum(-1) / -LOG2E.value


@lru_cache(maxsize=16)
def steps(length: int, tiles: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Steps of `rows` rows, as many for each tile, and the rows of all steps.

    A table, because divisions cost a program as much as the products of a step do.

    Returns:
        `[n, 2]` int32: first row, and the tile in its last step (where its sums are stored), else -1; `[n * rows]`
        int64: every row once, `length` where a step has none.
    """
    ends = torch.arange(tiles + 1) * length // tiles
    each = -(-int(ends.diff().max()) // rows)
    starts = ends[:-1, None] + rows * torch.arange(each)
    tile = torch.full_like(starts, -1)
    tile[:, -1] = torch.arange(tiles)
    every = starts[..., None] + torch.arange(rows)
    every = torch.where(every < ends[1:, None, None], every, length).flatten()
    return torch.stack((starts, tile), -1).flatten(0, 1).to(device, torch.int32), every.to(device)


@triton.jit
def along(x, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Sums of `[KEYS, ROWS]` to `[KEYS, 4]` that no thread needs another for: 4 neighbours hold a row of a product."""
    return tl.sum(tl.sum(x.reshape((KEYS, ROWS // 8, 4, 2)), 3), 1)


@triton.jit(do_not_specialize=["tiles", "steps_each", "T", "S", "first", "window"])
def total_rows(
    Q, K, TOP, REAL, STEPS, MASS, SPREAD, strides_q, strides_k, tiles, steps_each, T, S, first, window, factor,
    DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, WINDOWED: tl.constexpr,
    ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one query head. Grid: query heads, batch rows, blocks of keys; those most seen come first.

    `STEPS`: see `steps`, `steps_each` of them a tile. `TOP`: lse to base 2, in the order of the steps. `factor`: the
    scale, to base 2. `SPREAD`: sums of p log2 p `[B, H, tiles, blocks]`.
    """
    head, batch, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    inside, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    keys = block * KEYS + tl.arange(0, KEYS)
    place = batch * tl.num_programs(0) + head
    Q += batch * strides_q[0] + head.to(tl.int64) * strides_q[1]
    K += batch * strides_k[0] + (head // GROUP).to(tl.int64) * strides_k[1]
    TOP += place * tiles * steps_each * ROWS
    k = tl.load(K + keys.to(tl.int64)[:, None] * strides_k[2] + dims[None, :], mask=(keys < S)[:, None], other=0.0)
    real = tl.load(REAL + batch * S + keys, mask=keys < S, other=0) != 0
    # Rows `begin` to `end - 1` see some key of the block; those before `cut` not all of them.
    begin, cut, end = tl.maximum(block * KEYS - first, 0), block * KEYS + KEYS - 1 - first, T
    if WINDOWED:
        end = tl.minimum(T, cut + window)
    wide = tl.cast(tiles, tl.int64)
    low = (tl.where(begin < end, (begin + 1) * wide - 1, 0) // T * steps_each).to(tl.int32)
    high = (tl.where(begin < end, end * wide - 1 + T, 0) // T * steps_each).to(tl.int32)
    middle = tl.minimum(high, ((cut * wide - 1 + T) // T * steps_each).to(tl.int32))
    middle = high if WINDOWED else tl.maximum(low, middle)
    sums, spread = tl.zeros((KEYS, 4), tl.float32), tl.zeros((KEYS, 4), tl.float32)
    for PARTIAL in tl.static_range(2):
        for i in tl.range(low if PARTIAL == 0 else middle, middle if PARTIAL == 0 else high):
            start, tile = tl.load(STEPS + 2 * i), tl.load(STEPS + 2 * i + 1)
            spots = Q + start.to(tl.int64) * strides_q[2] + inside[:, None] * strides_q[2] + dims[None, :]
            q = tl.load(spots, mask=(start + inside < T)[:, None], other=0.0)
            top = tl.load(TOP + i * ROWS + inside)
            x = dot(k, q.trans(), None, PRECISION) * factor - top[None, :]
            p = tl.exp2(x)
            if PARTIAL == 0:
                at = first + start + inside
                seen = keys[:, None] <= at[None, :]
                if WINDOWED:
                    seen = seen & (at[None, :] - keys[:, None] < window)
                x, p = tl.where(seen, x, 0.0), tl.where(seen, p, 0.0)
            sums += along(p, KEYS, ROWS)
            if ENTROPY:
                spread += along(p * x, KEYS, ROWS)
            if tile >= 0:
                given = tl.where(real, tl.sum(sums, 1), 0.0)
                tl.store(MASS + (place * tiles + tile) * S + keys, given, mask=keys < S)
                sums = tl.zeros((KEYS, 4), tl.float32)
                if ENTROPY:
                    mine = tl.sum(tl.where(real, tl.sum(spread, 1), 0.0))
                    tl.store(SPREAD + (place * tiles + tile) * tl.num_programs(2) + block, mine)
                    spread = tl.zeros((KEYS, 4), tl.float32)
