"""The sweep once more for Hopper, in Gluon, where heads decay at one rate: all 128 columns in one program.

Three groups of warps share a multiprocessor: one copies tiles, two each carry 64 columns of the state, transposed and
in registers. Both read the same queries and keys, which so leave the second-level cache once, where `sweep.py` with 64
columns a program reads them twice. One program a multiprocessor walks over segments, so that the copies for the next
begin before the last is finished. Names are those of `sweep.py`, where `H` is explained.
"""

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

from regard.kernels import ahead
from regard.kernels.attention.hopper import described
from regard.kernels.states.problem import Problem

CHUNK = gl.constexpr(64)
DIM = 128  # of queries and keys, and of values
HALF = gl.constexpr(64)
# Chunks in flight: with outputs, and where only the state is carried.
STAGES, STAGES_OF_STATES = 2, 6


@gluon.jit
def part_of(SEGMENTS, G, item, heads, FADED: gl.constexpr):
    """Head, batch row, first token, end, decay (to base 2), first chunk to sweep and number of chunks.

    FADED: the first chunks, whose weight in the last state is 0 in float32, are not swept.
    """
    row, head = SEGMENTS + item // heads * 4, item % heads
    start, end = gl.load(row + 1), gl.load(row + 2)
    chunks = gl.cdiv(end - start, CHUNK)
    first, rate = 0, 0.0
    if G is not None:
        # No smaller than what float32 can tell from 0.
        rate = gl.maximum(gl.load(G + head).to(gl.float32) * 1.4426950408889634, -173.0)
        if FADED:
            kept = 173.0 / CHUNK / gl.maximum(-rate, 1e-30) + 2
            first = chunks - gl.minimum(kept, chunks.to(gl.float32)).to(gl.int32)
    return head, gl.load(row), start, end, rate, first, chunks


@gluon.jit
def token_of(start, chunks, i, REVERSE: gl.constexpr):
    """The first token of the `i`-th chunk on the way."""
    if REVERSE:
        i = chunks - 1 - i
    return start + i * CHUNK


@gluon.jit
def copy(
    a_desc, b_desc, c_desc, a_tiles, b_tiles, c_tiles, full, empty, G, SEGMENTS, items, heads, REVERSE: gl.constexpr,
    GROUP_A: gl.constexpr, GROUP_B: gl.constexpr, GROUP_C: gl.constexpr,
):  # fmt: skip
    """The warp that copies chunks."""
    STAGES: gl.constexpr = b_tiles.shape[0]
    of_a: gl.constexpr = 0 if a_desc is None else a_desc.block_type.nbytes
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, batch, start, _, _, first, chunks = part_of(SEGMENTS, G, item, heads, a_desc is None)
        for i in range(first, chunks):
            token, stage = token_of(start, chunks, i, REVERSE), step % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(arrived, of_a + b_desc.block_type.nbytes + 2 * c_desc.block_type.nbytes)
            if a_desc is not None:
                tma.async_copy_global_to_shared(
                    a_desc, [batch, head // GROUP_A, token, 0], arrived, a_tiles.index(stage)
                )
            tma.async_copy_global_to_shared(b_desc, [batch, head // GROUP_B, token, 0], arrived, b_tiles.index(stage))
            for own in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    c_desc, [batch, head // GROUP_C, token, own * HALF], arrived, c_tiles.index(2 * stage + own)
                )
            step += 1


@gluon.jit
def gone(index, steps, REVERSE: gl.constexpr):
    """How often what enters a chunk of `steps` tokens has decayed where token `index` reads it."""
    times = gl.maximum(steps - 1 - index, 0) if REVERSE else gl.minimum(index + 1, steps)
    return times.to(gl.float32)


@gluon.jit
def add(S, b, c, rate, steps, REVERSE: gl.constexpr):
    """The transposed state after a chunk, still in the making from the values that come second."""
    TURNED: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    total = steps.to(gl.float32) * rate
    H = gone(gl.arange(0, CHUNK, gl.SliceLayout(0, TURNED)), steps, REVERSE) * rate
    turned = (c.permute((1, 0)).load(TURNED).to(gl.float32) * gl.exp2(total - H)[None, :]).to(b.dtype)
    return warpgroup_mma(turned, b, S * gl.exp2(total), is_async=True), turned


@gluon.jit
def read_and_add(S, held, a, b, c, rate, steps, REVERSE: gl.constexpr):
    """The state after a chunk, and its output, still in the making from the weights that come third."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    zero = gl.zeros([CHUNK, CHUNK], gl.float32, OUT)
    scores = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    out = warpgroup_mma(a, held.permute((1, 0)), zero, use_acc=False, is_async=True)
    i, j = gl.arange(0, CHUNK, gl.SliceLayout(1, OUT)), gl.arange(0, CHUNK, gl.SliceLayout(0, OUT))
    H_i, H_j = gone(i, steps, REVERSE) * rate, gone(j, steps, REVERSE) * rate
    before = i[:, None] <= j[None, :] if REVERSE else i[:, None] >= j[None, :]
    weight = gl.where(before, gl.exp2(gl.minimum(H_i[:, None] - H_j[None, :], 0.0)), 0.0)
    S, turned = add(S, b, c, rate, steps, REVERSE)
    scores, out = warpgroup_mma_wait(1, deps=[scores, out])
    p = gl.convert_layout((scores * weight).to(b.dtype), gl.DotOperandLayout(0, OUT, 2))
    out = warpgroup_mma(p, c, out * gl.exp2(H_i)[:, None], is_async=True)
    S, turned = warpgroup_mma_wait(1, deps=[S, turned])
    return S, out, p


@gluon.jit
def carry_half(
    out_desc, a_tiles, b_tiles, c_tiles, o_tiles, held_tiles, full, empty, G, BEGIN, END, TOTAL, SEGMENTS,
    items, heads, scale, TURNED: gl.constexpr, REVERSE: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """The warps that carry 64 columns of the state."""
    DTYPE: gl.constexpr = b_tiles.dtype
    STAGES: gl.constexpr = b_tiles.shape[0]
    DIM: gl.constexpr = b_tiles.shape[4]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, DIM], DTYPE)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, HALF], DTYPE)
    columns = OWN * HALF + gl.arange(0, HALF, gl.SliceLayout(1, STATE))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, STATE))
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, batch, start, end, rate, first, chunks = part_of(SEGMENTS, G, item, heads, out_desc is None)
        S = gl.zeros([HALF, DIM], gl.float32, STATE)
        if BEGIN is not None:
            spot = BEGIN + item.to(gl.int64) * DIM * 2 * HALF
            if TURNED:
                S = gl.load(spot + columns[:, None] * DIM + dims[None, :]).to(gl.float32)
            else:
                S = gl.load(spot + columns[:, None] + dims[None, :] * (2 * HALF)).to(gl.float32)
        if out_desc is not None:
            held_tiles.index(OWN).store(S.to(DTYPE))
            fence_async_shared()
            gl.thread_barrier()
        for i in range(first, chunks):
            token, stage = token_of(start, chunks, i, REVERSE), step % STAGES
            b = b_tiles.index(stage)._reinterpret(DTYPE, [CHUNK, DIM], WIDE)
            c = c_tiles.index(2 * stage + OWN)._reinterpret(DTYPE, [CHUNK, HALF], NARROW)
            steps = gl.minimum(end - token, CHUNK)
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            if out_desc is None:
                S, turned = add(S, b, c, rate, steps, REVERSE)
                S, turned = warpgroup_mma_wait(0, deps=[S, turned])
                mbarrier.arrive(empty.index(stage), count=1)
            else:
                a, held = a_tiles.index(stage)._reinterpret(DTYPE, [CHUNK, DIM], WIDE), held_tiles.index(OWN)
                S, out, p = read_and_add(S, held, a, b, c, rate, steps, REVERSE)
                held.store(S.to(DTYPE))
                out, p = warpgroup_mma_wait(0, deps=[out, p])
                mbarrier.arrive(empty.index(stage), count=1)
                # Two tiles take turns: the copy from this one ended before the last barrier.
                o_tile = o_tiles.index(2 * OWN + step % 2)
                o_tile._reinterpret(DTYPE, [CHUNK, HALF], NARROW).store((out * scale).to(DTYPE))
                fence_async_shared()
                tma.store_wait(0)
                gl.thread_barrier()
                tma.async_copy_shared_to_global(out_desc, [batch, head, token, OWN * HALF], o_tile)
            step += 1
        if END is not None:
            spot = END + item.to(gl.int64) * DIM * 2 * HALF
            gl.store(spot + columns[:, None] + dims[None, :] * (2 * HALF), S)
        if TOTAL is not None:
            gl.store(TOTAL + item * DIM + dims, gl.zeros_like(dims) + (end - start).to(gl.float32) * rate)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "heads"])
def sweep_halves(
    a_desc, b_desc, c_desc, out_desc, G, BEGIN, END, TOTAL, SEGMENTS, items, heads, scale,
    TURNED: gl.constexpr, REVERSE: gl.constexpr, GROUP_A: gl.constexpr, GROUP_B: gl.constexpr, GROUP_C: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `sweep.sweep` with one decay a head (G None: none), for all segments. Grid: any number of programs."""
    DTYPE: gl.constexpr = b_desc.dtype
    DIM: gl.constexpr = b_desc.block_type.shape[3]
    a_tiles, o_tiles, held_tiles = None, None, None
    if out_desc is not None:
        HELD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, DIM], DTYPE)
        a_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, CHUNK, DIM], a_desc.layout)
        o_tiles = gl.allocate_shared_memory(DTYPE, [4, 1, 1, CHUNK, HALF], out_desc.layout)
        held_tiles = gl.allocate_shared_memory(DTYPE, [2, HALF, DIM], HELD)
    b_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, CHUNK, DIM], b_desc.layout)
    c_tiles = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, 1, CHUNK, HALF], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (carry_half, (
                out_desc, a_tiles, b_tiles, c_tiles, o_tiles, held_tiles, full, empty, G, BEGIN, END, TOTAL,
                SEGMENTS, items, heads, scale, TURNED, REVERSE, gl.constexpr(0),
            )),
            (carry_half, (
                out_desc, a_tiles, b_tiles, c_tiles, o_tiles, held_tiles, full, empty, G, BEGIN, END, TOTAL,
                SEGMENTS, items, heads, scale, TURNED, REVERSE, gl.constexpr(1),
            )),
            (copy, (
                a_desc, b_desc, c_desc, a_tiles, b_tiles, c_tiles, full, empty, G, SEGMENTS, items, heads, REVERSE,
                GROUP_A, GROUP_B, GROUP_C,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def sweep(
    p: Problem, b: Tensor, c: Tensor, *, a: Tensor | None, out: Tensor | None,
    scale: float, begin: Tensor | None, end: Tensor | None, total: Tensor | None, reverse: bool,
) -> None:  # fmt: skip
    """Launch `sweep_halves` over all segments; without `a` and `out` only states are carried."""
    half = HALF.value
    turned = begin is not None and begin.mT.is_contiguous()
    begin = begin if begin is None or turned else begin.contiguous()
    groups = [1 if x is None else p.heads // x.shape[1] for x in (a, b, c)]
    sides = ((a, DIM), (b, DIM), (c, half), (out, half))
    ahead.launch(sweep_halves, (p.programs(),))(
        *[None if x is None else described(x, p.chunk, width) for x, width in sides],
        p.decay, begin, end, total, p.segments.table, p.segments.count * p.heads, p.heads, scale,
        turned, reverse, *groups, STAGES=STAGES_OF_STATES if out is None else STAGES, num_warps=4,
    )  # fmt: skip
