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


def descriptor(x: Tensor, first: int, last: int, rows: int, width: int) -> Any:
    """How columns `first` to `last` of `x [n, r + e]` are brought in, `rows` by `width` at a time."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(x[:, first:last], [rows, width], layout)


@gluon.jit
def _place(number, low, before, whole_low, whole, whole_high):
    """The tile that is read as the `number`-th: whole ones first."""
    late = number - whole
    masked = gl.where(late < before, low + late, whole_high + late - before)
    return gl.where(number < whole, whole_low + number, masked)


@gluon.jit
def _one_weight(
    number, tile, q_content, q_rotary, left, right, kappa, weights, kept_of, full, ready, done,
    top, total, scale, length, first, last, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of one tile, their weights left in shared memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    side = number % 2
    HALF: gl.constexpr = left.shape[2]
    landed = (number // 2) & 1
    own_kappa, own_left, own_right = kappa.index(side), left.index(side), right.index(side)
    mbarrier.wait(full.index(side), landed)
    if MASKED:
        mbarrier.wait(full.index(2 + side), landed)
        mbarrier.wait(full.index(4 + side), landed)
        _clear(own_kappa, length - tile * KEYS)
        _clear(own_left, length - tile * KEYS)
        _clear(own_right, length - tile * KEYS)
        fence_async_shared()
    scores = gl.zeros([ROWS, KEYS], gl.float32, layout)
    scores = warpgroup_mma(q_rotary, own_kappa.permute((1, 0)), scores, use_acc=False, is_async=True)
    if not MASKED:
        mbarrier.wait(full.index(2 + side), landed)
    scores = warpgroup_mma(q_content.slice(0, HALF, dim=1), own_left.permute((1, 0)), scores, is_async=True)
    if not MASKED:
        mbarrier.wait(full.index(4 + side), landed)
    scores = warpgroup_mma(q_content.slice(HALF, HALF, dim=1), own_right.permute((1, 0)), scores, is_async=True)
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
def _clear(part, count):
    """Set the tokens of a tile from `count` on to 0: a weight of 0 does not undo what was never written there."""
    if count < part.shape[0]:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        here = gl.arange(0, part.shape[0], gl.SliceLayout(1, layout))
        for number in gl.static_range(part.shape[1] // 64):
            piece = part.slice(number * 64, 64, dim=1)
            piece.store(gl.where((here < count)[:, None], piece.load(layout), 0.0))


@gluon.jit
def _weigh(
    q_content, q_rotary, left, right, kappa, weights, kept_of, queries, full, ready, done,
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
            number, whole_low + number, q_content, q_rotary, left, right, kappa, weights, kept_of, full, ready, done,
            top, total, scale, length, first, last, False,
        )  # fmt: skip
    for number in range(whole, count):
        top, total = _one_weight(
            number, _place(number, low, before, whole_low, whole, whole_high), q_content, q_rotary, left, right, kappa,
            weights, kept_of, full, ready, done, top, total, scale, length, first, last, True,
        )  # fmt: skip
    some = total > 0
    natural = gl.where(some, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    gl.store(lse + row0 + at, natural, mask=at < rows)
    mbarrier.wait(done, (count - 1) & 1, pred=count > 0)
    kept_of.store(gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0))
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _gather(
    left, right, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
    out, row0, rows, at0, low, before, whole_low, whole, whole_high, count, key0,
):  # fmt: skip
    """Eight warps: the sums of every tile; each part of it makes room for that of the tile after the next at once."""
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    HALF: gl.constexpr = left.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HALF // 2, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    for number in gl.static_range(2):
        tile = key0 + KEYS * _place(number, low, before, whole_low, whole, whole_high)
        _expect(rotary_of, content_of, full, number, number < count)
        tma.async_copy_global_to_shared(rotary_of, [tile, 0], full.index(number), kappa.index(number), number < count)
        tma.async_copy_global_to_shared(content_of, [tile, 0], full.index(2 + number), left.index(number), number < count)
        tma.async_copy_global_to_shared(content_of, [tile, HALF], full.index(4 + number), right.index(number), number < count)
    sums = gl.zeros([ROWS, HALF], gl.float32, layout)
    more = gl.zeros([ROWS, HALF], gl.float32, layout)
    for number in range(count):
        side = number % 2
        own_left, own_right = left.index(side), right.index(side)
        tile = key0 + KEYS * _place(number + 2, low, before, whole_low, whole, whole_high)
        goes_on = number + 2 < count
        mbarrier.wait(ready, number & 1)
        kept = kept_of.load(row)[:, None]
        sums = warpgroup_mma(weights, own_left, sums * kept, is_async=True)
        more = warpgroup_mma(weights, own_right, more * kept, is_async=True)
        _expect(rotary_of, content_of, full, side, goes_on)
        tma.async_copy_global_to_shared(rotary_of, [tile, 0], full.index(side), kappa.index(side), goes_on)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        tma.async_copy_global_to_shared(content_of, [tile, 0], full.index(2 + side), own_left, goes_on)
        more = warpgroup_mma_wait(0, deps=(more,))
        mbarrier.arrive(done, count=1)
        tma.async_copy_global_to_shared(content_of, [tile, HALF], full.index(4 + side), own_right, goes_on)
    mbarrier.wait(ready, count & 1)
    kept = kept_of.load(row)[:, None]
    at = at0 + gl.arange(0, ROWS, row)
    channels = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    where = (row0 + at)[:, None] * (2 * HALF) + channels[None, :]
    gl.store(out + where, (sums * kept).to(out.dtype.element_ty), mask=(at < rows)[:, None])
    gl.store(out + where + HALF, (more * kept).to(out.dtype.element_ty), mask=(at < rows)[:, None])


@gluon.jit
def _expect(rotary_of, content_of, full, side, pred):
    """Say how many bytes of the parts of a tile will come."""
    mbarrier.expect(full.index(side), rotary_of.block_type.nbytes, pred=pred)
    mbarrier.expect(full.index(2 + side), content_of.block_type.nbytes, pred=pred)
    mbarrier.expect(full.index(4 + side), content_of.block_type.nbytes, pred=pred)


@gluon.jit(do_not_specialize=["B", "S", "stride", "rows", "T", "count", "blocks"])
def run(
    queries_of, turned_of, content_of, rotary_of, out, lse, lengths, starts, scale,
    B, S, stride, rows, T, count, blocks, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: 64 rows of one request over one share of its keys."""
    ROWS: gl.constexpr = queries_of.block_type.shape[0]
    KEYS: gl.constexpr = content_of.block_type.shape[0]
    HALF: gl.constexpr = content_of.block_type.shape[1]
    ROPE: gl.constexpr = turned_of.block_type.shape[1]
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
    left = gl.allocate_shared_memory(dtype, [2, KEYS, HALF], content_of.layout)
    right = gl.allocate_shared_memory(dtype, [2, KEYS, HALF], content_of.layout)
    kappa = gl.allocate_shared_memory(dtype, [2, KEYS, ROPE], rotary_of.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(dtype, [ROWS, KEYS], flat)
    kept_of = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())  # rotary, left, right; two sides
    mbarrier.init(queries, count=1)
    mbarrier.init(ready, count=1)
    mbarrier.init(done, count=1)
    for bar in gl.static_range(6):
        mbarrier.init(full.index(bar), count=1)
    fence_async_shared()
    at0 = block * ROWS
    mbarrier.expect(queries, queries_of.block_type.nbytes + turned_of.block_type.nbytes)
    tma.async_copy_global_to_shared(turned_of, [b * rows + at0, 0], queries, q_rotary)
    tma.async_copy_global_to_shared(queries_of, [b * rows + at0, 0], queries, q_content)
    row0 = (share * B + b).to(gl.int64) * rows
    gl.warp_specialize(
        [
            (_gather, (left, right, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
                       out, row0, rows, at0, low, before, whole_low, whole, whole_high, number, b * stride)),
            (_weigh, (q_content, q_rotary, left, right, kappa, weights, kept_of, queries, full, ready, done,
                      lse, row0, rows, at0, low, before, whole_low, whole, whole_high, number, scale, length, first,
                      seen, T)),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
