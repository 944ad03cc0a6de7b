"""Absorbed decoding of 64 rows on Hopper by warps that do one thing each; `latent.py` says what is computed.

Four warps compute scores and weights, eight hold the sums (64 x 512 in float32) and bring in the next tile, so that
the matrix units work on the sums of one tile while the weights of the next are made. Shared memory holds the queries
and two tiles; a tile is replaced as soon as its sums are done.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def descriptor(x: Tensor, rows: int, rank: int) -> tuple[Any, Any]:
    """How `x [n, r + e]` is brought in by `rows` at a time: the first `rank` columns, and the others."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    content, rotary = x[:, :rank], x[:, rank:]
    made = (TensorDescriptor.from_tensor(part, [rows, part.shape[1]], layout) for part in (content, rotary))
    return next(made), next(made)


@gluon.jit
def _place(number, low, before, whole_low, whole, whole_high):
    """The tile that is read as the `number`-th: whole ones first."""
    late = number - whole
    masked = gl.where(late < before, low + late, whole_high + late - before)
    return gl.where(number < whole, whole_low + number, masked)


@gluon.jit
def _fetch(content_of, rotary_of, c, kappa, full, row, pred):
    """Bring the tile that begins at `row` into shared memory."""
    mbarrier.expect(full, content_of.block_type.nbytes + rotary_of.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(content_of, [row, 0], full, c, pred=pred)
    tma.async_copy_global_to_shared(rotary_of, [row, 0], full, kappa, pred=pred)


@gluon.jit
def _one_weight(
    number, tile, q_content, q_rotary, c, kappa, weights, kept_of, full, ready, done,
    top, total, scale, length, first, last, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of one tile, their weights left in shared memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    side = number % 2
    own_c, own_kappa = c.index(side), kappa.index(side)
    mbarrier.wait(full.index(side), (number // 2) & 1)
    if MASKED:
        _clear(own_c, own_kappa, length - tile * KEYS)
    scores = gl.zeros([ROWS, KEYS], gl.float32, layout)
    scores = warpgroup_mma(q_rotary, own_kappa.permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma(q_content, own_c.permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if MASKED:
        keys = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        seen = (keys[None, :] >= first) & (keys[None, :] < last[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new = gl.maximum(top, gl.max(scores, 1) * scale)
    base = gl.where(new == float("-inf"), 0.0, new) if MASKED else new
    made = gl.exp2(scores * scale - base[:, None])
    kept = gl.exp2(top - base)
    total = total * kept + gl.sum(made, 1)
    mbarrier.wait(done, (number - 1) & 1, pred=number > 0)
    weights.store(made.to(weights.dtype))
    kept_of.store(kept)
    fence_async_shared()
    mbarrier.arrive(ready, count=1)
    return new, total


@gluon.jit
def _clear(c, kappa, count):
    """Set the tokens of a tile from `count` on to 0: a weight of 0 does not undo what was never written there."""
    if count < c.shape[0]:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        here = gl.arange(0, c.shape[0], gl.SliceLayout(1, layout))
        for part in gl.static_range(c.shape[1] // 64):
            piece = c.slice(part * 64, 64, dim=1)
            piece.store(gl.where((here < count)[:, None], piece.load(layout), 0.0))
        kappa.store(gl.where((here < count)[:, None], kappa.load(layout), 0.0))
        fence_async_shared()


@gluon.jit
def _weigh(
    q_content, q_rotary, c, kappa, weights, kept_of, queries, full, ready, done,
    lse, row0, rows, at0, low, before, whole_low, whole, whole_high, count, scale, length, first, seen, T,
):  # fmt: skip
    """Four warps: scores and weights of every tile, and at last the log-sum-exps."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROWS: gl.constexpr = weights.shape[0]
    at = at0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    last = seen + at % T
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    mbarrier.wait(queries, 0)
    for number in range(whole):
        top, total = _one_weight(
            number, whole_low + number, q_content, q_rotary, c, kappa, weights, kept_of, full, ready, done,
            top, total, scale, length, first, last, False,
        )  # fmt: skip
    for number in range(whole, count):
        top, total = _one_weight(
            number, _place(number, low, before, whole_low, whole, whole_high), q_content, q_rotary, c, kappa, weights,
            kept_of, full, ready, done, top, total, scale, length, first, last, True,
        )  # fmt: skip
    some = total > 0
    natural = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    gl.store(lse + row0 + at, natural, mask=at < rows)
    mbarrier.wait(done, (count - 1) & 1, pred=count > 0)
    kept_of.store(gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0))
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _gather(
    c, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
    out, row0, rows, at0, low, before, whole_low, whole, whole_high, count, key0,
):  # fmt: skip
    """Eight warps: the sums of every tile, and the next one but one brought into its place."""
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    RANK: gl.constexpr = c.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2 if RANK < 512 else 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    sums = gl.zeros([ROWS, RANK], gl.float32, layout)
    for number in range(count):
        side = number % 2
        mbarrier.wait(ready, number & 1)
        sums = sums * kept_of.load(row)[:, None]
        sums = warpgroup_mma(weights, c.index(side), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(done, count=1)
        tile = _place(number + 2, low, before, whole_low, whole, whole_high)
        _fetch(content_of, rotary_of, c.index(side), kappa.index(side), full.index(side), key0 + tile * KEYS,
               number + 2 < count)  # fmt: skip
    mbarrier.wait(ready, count & 1)
    sums = sums * kept_of.load(row)[:, None]
    at = at0 + gl.arange(0, ROWS, row)
    channels = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    where = (row0 + at)[:, None] * RANK + channels[None, :]
    gl.store(out + where, sums.to(out.dtype.element_ty), mask=(at < rows)[:, None])


@gluon.jit(do_not_specialize=["B", "S", "stride", "rows", "T", "count", "blocks"])
def run(
    queries_of, turned_of, content_of, rotary_of, out, lse, lengths, starts, scale,
    B, S, stride, rows, T, count, blocks,
):  # fmt: skip
    """One program: 64 rows of one request over one share of its keys."""
    ROWS: gl.constexpr = queries_of.block_type.shape[0]
    KEYS: gl.constexpr = content_of.block_type.shape[0]
    dtype: gl.constexpr = queries_of.dtype
    program = gl.program_id(0)
    block, b, share = program % blocks, (program // blocks) % B, program // (blocks * B)
    length = S
    if lengths is not None:
        length = gl.load(lengths + b)
    first = 0
    if starts is not None:
        first = gl.load(starts + b)
    tiles = gl.cdiv(length, KEYS)
    begin = first // KEYS
    each = gl.cdiv(tiles - begin, count)
    low = begin + share * each
    high = gl.minimum(low + each, tiles)
    seen = length - T + 1
    whole_low = gl.maximum(low, gl.cdiv(first, KEYS))
    whole_high = gl.maximum(gl.minimum(high, seen // KEYS), whole_low)
    before = gl.maximum(gl.minimum(whole_low, high) - low, 0)
    whole = whole_high - whole_low
    number = whole + before + gl.maximum(high - whole_high, 0)

    q_content = gl.allocate_shared_memory(dtype, queries_of.block_type.shape, queries_of.layout)
    q_rotary = gl.allocate_shared_memory(dtype, turned_of.block_type.shape, turned_of.layout)
    c = gl.allocate_shared_memory(dtype, [2] + content_of.block_type.shape, content_of.layout)
    kappa = gl.allocate_shared_memory(dtype, [2] + rotary_of.block_type.shape, rotary_of.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(dtype, [ROWS, KEYS], flat)
    kept_of = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(queries, count=1)
    mbarrier.init(ready, count=1)
    mbarrier.init(done, count=1)
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(full.index(1), count=1)
    fence_async_shared()

    at0 = block * ROWS
    mbarrier.expect(queries, queries_of.block_type.nbytes + turned_of.block_type.nbytes)
    tma.async_copy_global_to_shared(queries_of, [b * rows + at0, 0], queries, q_content)
    tma.async_copy_global_to_shared(turned_of, [b * rows + at0, 0], queries, q_rotary)
    key0 = b * stride
    for side in gl.static_range(2):
        tile = _place(side, low, before, whole_low, whole, whole_high)
        _fetch(content_of, rotary_of, c.index(side), kappa.index(side), full.index(side), key0 + tile * KEYS,
               side < number)  # fmt: skip

    row0 = (share * B + b).to(gl.int64) * rows
    gl.warp_specialize(
        [
            (_gather, (c, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
                       out, row0, rows, at0, low, before, whole_low, whole, whole_high, number, key0)),
            (_weigh, (q_content, q_rotary, c, kappa, weights, kept_of, queries, full, ready, done,
                      lse, row0, rows, at0, low, before, whole_low, whole, whole_high, number, scale, length, first,
                      seen, T)),
        ],
        [4],
        [120],
    )  # fmt: skip
