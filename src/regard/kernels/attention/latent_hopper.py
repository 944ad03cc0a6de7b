"""Absorbed decoding of 64 rows on Hopper by warps that do one thing each; `latent.py` says what is computed.

Four warps make scores and weights; two times four hold the sums over one half of the columns each (64 x 256 in
float32) and bring in the next tile but one. So the matrix units work on the sums of one tile while the weights of the
next are made. Shared memory holds the queries and two tiles; a half is replaced as soon as its sums are done.

It is written in Gluon, Triton's lower level, because the compiler's own pipeline asks for the next tile only when all
work on this one is queued. Gluon has no interpreter: what runs on a CPU is `latent.py`.
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

HELD = gl.constexpr(128)  # columns of the queries that stay in registers, beside the rotary ones
LAG = gl.constexpr(8.0)  # how far, as a power of two, weights may exceed 1 before the sums are scaled anew


def descriptor(x: Tensor, first: int, last: int, rows: int, width: int) -> Any:
    """How columns `first` to `last` of `x [n, r + e]` are brought in, `rows` by `width` at a time."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(x[:, first:last], [rows, width], layout)


@gluon.jit
def _plan(length, first, T, share, count, KEYS: gl.constexpr):
    """Which tiles a program reads: those that every row sees whole, and the masked ones before and after them.

    Returns `(low, before, whole_low, whole, whole_high, number)`: the first tile; how many masked ones it and those
    behind it are; the first whole one; how many whole ones; the tile behind them; how many in all.
    """
    tiles = gl.cdiv(length, KEYS)
    begin = first // KEYS
    each = gl.cdiv(tiles - begin, count)
    low = begin + share * each
    high = gl.minimum(low + each, tiles)
    whole_low = gl.maximum(low, gl.cdiv(first, KEYS))
    whole_high = gl.maximum(gl.minimum(high, (length - T + 1) // KEYS), whole_low)
    before = gl.maximum(gl.minimum(whole_low, high) - low, 0)
    whole = whole_high - whole_low
    return low, before, whole_low, whole, whole_high, whole + before + gl.maximum(high - whole_high, 0)


@gluon.jit
def _place(number, plan):
    """The tile that is read as the `number`-th: whole ones first."""
    low, before, whole_low, whole, whole_high, _ = plan
    late = number - whole
    masked = gl.where(late < before, low + late, whole_high + late - before)
    return gl.where(number < whole, whole_low + number, masked)


@gluon.jit
def _one_weight(
    number, tile, q_content, q_rotary, q_held, left, right, kappa, weights, kept_of, full, ready, done,
    top, total, scale, length, first, last, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of one tile, their weights left in shared memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    side = number % 2
    HALF: gl.constexpr = left.shape[2]
    landed = (number // 2) & 1
    own_kappa, own_left, own_right = kappa.index(side), left.index(side), right.index(side)
    mbarrier.wait(full.index(side), landed)
    if MASKED:
        mbarrier.wait(full.index(2 + side), landed)
        _clear(own_kappa, length - tile * KEYS)
        _clear(own_left, length - tile * KEYS)
        _clear(own_right, length - tile * KEYS)
        fence_async_shared()
    scores = gl.zeros([ROWS, KEYS], gl.float32, layout)
    scores = warpgroup_mma(q_rotary, own_kappa.permute((1, 0)), scores, use_acc=False, is_async=True)
    some = own_left.slice(0, HELD, dim=1).permute((1, 0))
    scores = warpgroup_mma(q_held, some, scores, is_async=True)
    rest = own_left.slice(HELD, HALF - HELD, dim=1).permute((1, 0))
    scores = warpgroup_mma(q_content.slice(HELD, HALF - HELD, dim=1), rest, scores, is_async=True)
    if not MASKED:
        mbarrier.wait(full.index(2 + side), landed)
    scores = warpgroup_mma(q_content.slice(HALF, HALF, dim=1), own_right.permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if MASKED:
        keys = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        seen = (keys[None, :] >= first) & (keys[None, :] < last[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    most = gl.max(scores, 1) * scale
    # The base may lag behind the maximum by a factor that 16 bits hold: sums are seldom scaled.
    new = gl.where(most > top + LAG, most, top)
    base = gl.where(new == float("-inf"), 0.0, new) if MASKED else new
    made = gl.exp2(scores * scale - base[:, None])
    kept = gl.exp2(top - base)
    mbarrier.wait(done, (number - 1) & 1, pred=number > 0)
    weights.store(made.to(weights.dtype))
    kept_of.store(kept)
    fence_async_shared()
    mbarrier.arrive(ready, count=1)
    total = total * kept + gl.sum(made, 1)
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
    lse, row0, rows, at0, plan, scale, length, first, T,
):  # fmt: skip
    """Four warps: scores and weights of every tile, and at last the log-sum-exps."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROWS: gl.constexpr = weights.shape[0]
    at = at0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    last = length - T + 1 + at % T  # one more than the last key of each row
    whole_low, whole, count = plan[2], plan[3], plan[5]
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    mbarrier.wait(queries, 0)
    # Products that read both sides from shared memory are bound by it.
    q_held = q_content.slice(0, HELD, dim=1).load(gl.DotOperandLayout(0, layout, 2))
    q_rotary = q_rotary.load(gl.DotOperandLayout(0, layout, 2))
    for number in range(whole):
        top, total = _one_weight(
            number, whole_low + number, q_content, q_rotary, q_held, left, right, kappa, weights, kept_of, full, ready,
            done, top, total, scale, length, first, last, False,
        )  # fmt: skip
    for number in range(whole, count):
        top, total = _one_weight(
            number, _place(number, plan), q_content, q_rotary, q_held, left, right, kappa,
            weights, kept_of, full, ready, done, top, total, scale, length, first, last, True,
        )  # fmt: skip
    some = total > 0
    natural = gl.where(some, (top + gl.log2(gl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    gl.store(lse + row0 + at, natural, mask=at < rows)
    mbarrier.wait(done, (count - 1) & 1, pred=count > 0)
    kept_of.store(gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0))
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _gather(
    HALF: gl.constexpr, part, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
    out, row0, rows, at0, plan, key0,
):  # fmt: skip
    """Four warps: the sums of every tile over one half of the columns, whose place the next but one then takes."""
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    WIDTH: gl.constexpr = part.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    row: gl.constexpr = gl.SliceLayout(1, layout)
    count = plan[5]
    for number in gl.static_range(2):
        tile = key0 + KEYS * _place(number, plan)
        _expect(HALF, full, content_of, rotary_of, number, number < count)
        _fetch(HALF, part, kappa, full, content_of, rotary_of, number, tile, number < count)
    sums = gl.zeros([ROWS, WIDTH], gl.float32, layout)
    for number in range(count):
        side = number % 2
        tile = key0 + KEYS * _place(number + 2, plan)
        mbarrier.wait(ready, number & 1)
        kept = kept_of.load(row)
        if gl.min(kept, 0) < 1.0:
            sums = sums * kept[:, None]
        sums = warpgroup_mma(weights, part.index(side), sums, is_async=True)
        _expect(HALF, full, content_of, rotary_of, side, number + 2 < count)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        _fetch(HALF, part, kappa, full, content_of, rotary_of, side, tile, number + 2 < count)
        mbarrier.arrive(done, count=1)
    mbarrier.wait(ready, count & 1)
    sums = sums * kept_of.load(row)[:, None]
    at = at0 + gl.arange(0, ROWS, row)
    channels = HALF * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    where = (row0 + at)[:, None] * (2 * WIDTH) + channels[None, :]
    gl.store(out + where, sums.to(out.dtype.element_ty), mask=(at < rows)[:, None])


@gluon.jit
def _expect(HALF: gl.constexpr, full, content_of, rotary_of, side, pred):
    """Say how many bytes `_fetch` will bring."""
    more: gl.constexpr = 0 if HALF else rotary_of.block_type.nbytes
    mbarrier.expect(full.index(2 * HALF + side), content_of.block_type.nbytes + more, pred=pred)


@gluon.jit
def _fetch(HALF: gl.constexpr, part, kappa, full, content_of, rotary_of, side, row, pred):
    """Bring one half of the columns of a tile into shared memory; with the first half, the rotary keys."""
    landed = full.index(2 * HALF + side)
    if HALF == 0:
        tma.async_copy_global_to_shared(rotary_of, [row, 0], landed, kappa.index(side), pred)
    tma.async_copy_global_to_shared(content_of, [row, HALF * part.shape[2]], landed, part.index(side), pred)


@gluon.jit(do_not_specialize=["B", "S", "stride", "rows", "T", "count", "blocks"])
def latent_apart(
    queries_of, turned_of, content_of, rotary_of, out, lse, lengths, starts, scale,
    B, S, stride, rows, T, count, blocks,
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
    plan = _plan(length, first, T, share, count, KEYS)

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
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())  # left and rotary, right; two sides
    mbarrier.init(queries, count=1)
    mbarrier.init(ready, count=1)
    mbarrier.init(done, count=2)
    for bar in gl.static_range(4):
        mbarrier.init(full.index(bar), count=1)
    fence_async_shared()
    at0 = block * ROWS
    mbarrier.expect(queries, queries_of.block_type.nbytes + turned_of.block_type.nbytes)
    tma.async_copy_global_to_shared(turned_of, [b * rows + at0, 0], queries, q_rotary)
    tma.async_copy_global_to_shared(queries_of, [b * rows + at0, 0], queries, q_content)
    row0 = (share * B + b).to(gl.int64) * rows
    gl.warp_specialize(
        [
            (_gather, (0, left, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
                       out, row0, rows, at0, plan, b * stride)),
            (_gather, (1, right, kappa, weights, kept_of, full, ready, done, content_of, rotary_of,
                       out, row0, rows, at0, plan, b * stride)),
            (_weigh, (q_content, q_rotary, left, right, kappa, weights, kept_of, queries, full, ready, done,
                      lse, row0, rows, at0, plan, scale, length, first, T)),
        ],
        [4, 4],
        [168, 168],
    )  # fmt: skip
