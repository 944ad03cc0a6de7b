"""The forward kernel once more for Hopper, in Gluon, where Triton's own schedule leaves the tensor cores waiting.

Three groups of warps share a multiprocessor: one copies tiles, two each attend with half the rows of a tile. Each
multiplies the next scores while it weighs the last ones, and each makes its softmax while the other multiplies. One
program a multiprocessor walks over tiles, so that the copies for the next begin before the last is finished.
"""

from functools import lru_cache
from typing import Any

import torch
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

from regard.kernels.attention.arguments import like, lists, spread
from regard.primitives.block_list import BlockList

# Programs a multiprocessor: with more than one, those that come later take what is left.
WAVES = 2
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def work_of(tile, row_tiles, heads, GROUP: gl.constexpr):
    """Line of blocks, head, its key head and batch row: the last lines of a head first, as the longest often are."""
    line = row_tiles - 1 - tile % row_tiles
    head = (tile // row_tiles) % heads
    return line, head, head // GROUP, tile // row_tiles // heads


@gluon.jit
def list_of(batch, head, line, shared, lines, most, apart_b, apart_h):
    """Where the list of one line begins: offsets into counts and into entries."""
    spot = (batch.to(gl.int64) * apart_b + (head // shared) * apart_h) * lines + line
    return spot, spot * most


@gluon.jit
def copy(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    COUNT, INDEX, tiles, row_tiles, heads, shared, lines, most, apart_b, apart_h,
    N: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies queries, keys and values."""
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        line, head, kv, batch = work_of(tile, row_tiles, heads, GROUP)
        spot, first = list_of(batch, head, line, shared, lines, most, apart_b, apart_h)
        count = gl.maximum(gl.load(COUNT + spot), 1)
        block = gl.load(INDEX + first)
        mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, line * 128 + half * 64, 0], q_full.index(0), q_tiles.index(half)
            )
        for i in range(count):
            stage, phase = step % STAGES, (step // STAGES) & 1
            at = block * N
            block = gl.load(INDEX + first + gl.minimum(i + 1, count - 1))
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [batch, kv, at, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [batch, kv, at, 0], v_full.index(stage), v_tiles.index(stage))
            step += 1
        turn += 1  # noqa: SIM113 - a kernel has no enumerate


@gluon.jit
def bounds_of(part, row, BOUNDS, N: gl.constexpr):
    """First key each row sees of a block, and the one after the last, in one word."""
    return gl.load(BOUNDS + part.to(gl.int64) * 128 + row, mask=(row >= 0) & (part >= 0), other=N << 16)


@gluon.jit
def cut(scores, part, bound, row, BITS, N: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf where the bounds or the bits of `part` hide the keys of a block from rows `row`."""
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    low, high = bound & 0xFFFF, bound >> 16
    ok = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
    if BITS is not None:
        at = BITS + ((-2 - part).to(gl.int64) * 128 + row) * (N // 32)
        for word in gl.static_range(N // 32):
            bits = gl.load(at + word, mask=(row >= 0) & (part < -1), other=-1)
            seen = (bits[:, None] >> (columns[None, :] & 31)) & 1
            ok = ok & ((seen != 0) | (columns[None, :] // 32 != word))
    return gl.where(ok, scores, float("-inf"))


@gluon.jit
def online(
    scores, total, top, factor, PARTIAL: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr
):  # fmt: skip
    """Online softmax: weights of a tile as the next product takes them, the new sum and top, and what shrinks sums."""
    new = gl.maximum(top, gl.max(scores, 1) * factor)
    least = new
    if PARTIAL:
        least = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(scores * factor - least[:, None])
    shrink = gl.exp2(top - least)
    total = total * shrink + gl.sum(p, 1)
    return gl.convert_layout(p.to(DTYPE), OPERAND), total, new, shrink


@gluon.jit
def weigh(
    scores, total, top, factor, cap, part, bound, row, BITS,
    PARTIAL: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """`online`, of scores that are capped and cut first."""
    if cap is not None:
        scores = scores * (factor / LOG2E) / cap
        small = gl.exp2(-2.8853900817779268 * gl.abs(scores))
        tanh = (1 - small) / (1 + small)
        scores = gl.where(scores < 0, -tanh, tanh) * (cap * LOG2E)
        factor = 1.0
    if PARTIAL:
        scores = cut(scores, part, bound, row, BITS, N, LAYOUT)
    return online(scores, total, top, factor, PARTIAL, OPERAND, DTYPE)


@gluon.jit
def advance(
    step, state, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, factor, cap, part, row,
    BOUNDS, BITS, OWN: gl.constexpr, PARTIAL: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Scores of an entry, the output of the entry before, and while that runs the softmax of this one."""
    p, out, total, top = state
    now, before = step % STAGES, (step - 1) % STAGES
    bound = row
    if PARTIAL:
        bound = bounds_of(part, row, BOUNDS, N)
    mbarrier.wait(k_full.index(now), (step // STAGES) & 1)
    zero = gl.zeros([64, N], gl.float32, SCORES)
    scores = warpgroup_mma(q, k_tiles.index(now).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    out = warpgroup_mma(p, v_tiles.index(before), out, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(now), count=1)
    new_p, total, top, shrink = weigh(
        scores, total, top, factor, cap, part, bound, row, BITS, PARTIAL, N, SCORES, OPERAND, DTYPE
    )
    out, p = warpgroup_mma_wait(0, deps=[out, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))
    return new_p, out * shrink[:, None], total, top


@gluon.jit
def finish_rows(out, total, top, out_desc, LSE, o_tile, place, own, T, DTYPE: gl.constexpr, DIM: gl.constexpr):
    """Write the output of 64 rows at `place`, and their lse at `own`, behind `LSE`."""
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (top + gl.log2(total)) / LOG2E)
    gl.store(LSE + own, lse, mask=own < T)
    out = out / gl.convert_layout(total, gl.SliceLayout(1, out.type.layout))[:, None]
    tma.store_wait(0)
    gl.thread_barrier()
    o_tile._reinterpret(DTYPE, [64, DIM], FLAT).store(out.to(DTYPE))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_desc, place, o_tile)


@gluon.jit
def last_product(state, step, v_tiles, v_full, v_empty, STAGES: gl.constexpr):
    """The output once the weights of the last entry are in it, the sums and the tops."""
    p, out, total, top = state
    last = (step - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
    out = warpgroup_mma(p, v_tiles.index(last), out, is_async=True)
    out, p = warpgroup_mma_wait(0, deps=[out, p])
    mbarrier.arrive(v_empty.index(last), count=1)
    return out, total, top


@gluon.jit
def first_entry(
    step, q, k_tiles, k_full, k_empty, factor, cap, part, bound, row, BITS,
    N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
    OPERAND: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Weights of the first entry, which go into no output yet: what `advance` carries on."""
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    out = gl.zeros([64, DIM], gl.float32, OUT)
    mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
    zero = gl.zeros([64, N], gl.float32, SCORES)
    scores = warpgroup_mma(q, k_tiles.index(step % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(step % STAGES), count=1)
    p, total, top, _ = weigh(scores, total, top, factor, cap, part, bound, row, BITS, True, N, SCORES, OPERAND, DTYPE)
    return p, out, total, top


@gluon.jit
def attend_half(
    out_desc, LSE, q_tiles, k_tiles, v_tiles, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    FULL, COUNT, PART, BOUNDS, BITS, tiles, row_tiles, heads, shared, lines, most, apart_b, apart_h, factor, cap, T,
    OWN: gl.constexpr, N: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps that attend with 64 rows of every tile."""
    DTYPE: gl.constexpr = out_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, DIM], DTYPE)
    q = q_tiles.index(OWN)._reinterpret(DTYPE, [64, DIM], FLAT)
    k_tiles = k_tiles._reinterpret(DTYPE, [STAGES, N, DIM], WIDE)
    v_tiles = v_tiles._reinterpret(DTYPE, [STAGES, N, DIM], WIDE)
    row = OWN * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    step = 0
    line, head, _, batch = work_of(gl.program_id(0), row_tiles, heads, GROUP)
    spot, first = list_of(batch, head, line, shared, lines, most, apart_b, apart_h)
    full, count, part = gl.load(FULL + spot), gl.load(COUNT + spot), gl.load(PART + first)
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        # What is read of lists is asked for one entry ahead, or one tile, so that nothing waits for it.
        following = gl.load(PART + first + gl.minimum(gl.maximum(full, 1), most - 1))
        bound = bounds_of(gl.where(full > 0, -1, part), row, BOUNDS, N)
        # Rows that see nothing go through one block of which nothing is seen.
        part = gl.where((full > 0) | (count == 0), -1, part)
        bound = gl.where(count > 0, bound, 0)
        own, place = line * 128 + row, [batch, head, line * 128 + OWN * 64, 0]
        lse_at = (batch.to(gl.int64) * heads + head) * T
        whole, entries, list_now = full, count, first
        after = gl.minimum(tile + gl.num_programs(0), tiles - 1)
        line, head, _, batch = work_of(after, row_tiles, heads, GROUP)
        spot, first = list_of(batch, head, line, shared, lines, most, apart_b, apart_h)
        full, count, next_part = gl.load(FULL + spot), gl.load(COUNT + spot), gl.load(PART + first)
        mbarrier.wait(q_full.index(0), turn & 1)
        state = first_entry(
            step, q, k_tiles, k_full, k_empty, factor, cap, part, bound, row, BITS,
            N, DIM, STAGES, SCORES, OUT, OPERAND, DTYPE,
        )  # fmt: skip
        step += 1
        for _ in range(1, whole):
            state = advance(
                step, state, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, factor, cap, -1, row,
                BOUNDS, BITS, OWN, False, N, STAGES, SCORES, OPERAND, DTYPE,
            )  # fmt: skip
            step += 1
        for i in range(gl.maximum(whole, 1), entries):
            part, following = following, gl.load(PART + list_now + gl.minimum(i + 1, most - 1))
            state = advance(
                step, state, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, factor, cap, part, row,
                BOUNDS, BITS, OWN, True, N, STAGES, SCORES, OPERAND, DTYPE,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(0), count=1)
        out, total, top = last_product(state, step, v_tiles, v_full, v_empty, STAGES)
        finish_rows(out, total, top, out_desc, LSE + lse_at, o_tiles.index(OWN), place, own, T, DTYPE, DIM)
        part = next_part
        turn += 1  # noqa: SIM113 - a kernel has no enumerate
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "tiles", "row_tiles", "heads", "shared", "lines", "most", "apart_b", "apart_h", "T",
])  # fmt: skip
def attend_tiles(
    q_desc, k_desc, v_desc, out_desc, LSE, FULL, COUNT, INDEX, PART, BOUNDS, BITS,
    tiles, row_tiles, heads, shared, lines, most, apart_b, apart_h, factor, cap, T,
    N: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `forward.attend_rows`, for blocks of 128 rows in 16 bits. Grid: any number of programs, at most tiles."""
    DTYPE: gl.constexpr = out_desc.dtype
    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], q_desc.layout)
    o_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, DIM], k_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (attend_half, (
                out_desc, LSE, q_tiles, k_tiles, v_tiles, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                FULL, COUNT, PART, BOUNDS, BITS, tiles, row_tiles, heads, shared, lines, most, apart_b, apart_h,
                factor, cap, T, gl.constexpr(0), N, DIM, GROUP, STAGES,
            )),
            (attend_half, (
                out_desc, LSE, q_tiles, k_tiles, v_tiles, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                FULL, COUNT, PART, BOUNDS, BITS, tiles, row_tiles, heads, shared, lines, most, apart_b, apart_h,
                factor, cap, T, gl.constexpr(1), N, DIM, GROUP, STAGES,
            )),
            (copy, (
                q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                COUNT, INDEX, tiles, row_tiles, heads, shared, lines, most, apart_b, apart_h, N, DIM, GROUP, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def described(x: Tensor, *block: int) -> TensorDescriptor:
    """The tensor descriptor of x, in tiles of the last dimensions `block`."""
    shape, layout = _tile((1,) * (x.dim() - len(block)) + block, x.dtype)
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [*shape], layout)


@lru_cache
def _tile(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], Any]:
    """A tile and its layout in shared memory, which takes longer to find than to use."""
    return shape, gl.NVMMASharedLayout.get_default_for(list(shape), DTYPES[dtype])


@lru_cache
def cores(where: torch.device) -> int:
    """Multiprocessors; where there is no GPU, those of the one that is compiled for."""
    return torch.cuda.get_device_properties(where).multi_processor_count if where.type == "cuda" else 132


def programs(x: Tensor, tiles: int, waves: int = WAVES) -> int:
    """How many programs, `waves` a multiprocessor, walk over `tiles` tiles."""
    return min(tiles, waves * cores(x.device))


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """`block.forward` for 16 bits, D of 64 or 128, and blocks of 128 by 128 that the copy engine can read."""
    (B, H, T, D), Hk = q.shape, k.shape[1]
    out, lse = like(q), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    shared, lines, most, *apart = spread(blocks, H)
    tiles = lines * H * B
    arguments: list[Any] = [described(q, 64, D), described(k, 128, D), described(v, 128, D), described(out, 64, D)]
    attend_tiles[(programs(q, tiles),)](
        *arguments, lse, *lists(blocks), tiles, lines, H, shared, lines, most, *apart, scale * LOG2E.value, cap, T,
        N=128, DIM=D, GROUP=H // Hk, STAGES=2, num_warps=4,
    )  # fmt: skip
    return out, lse
