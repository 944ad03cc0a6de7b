"""The gradients once more for Hopper, in Gluon, in one pass over the keys: five products a tile instead of seven.

Two groups of warps each hold dk and dv of half the keys of a block, a third copies tiles of rows. What both make of
the scores' gradient meets in shared memory, for one product that gives dq, half its channels a group; the copy engine
adds it to memory. In which order is left to the machine, so dq may differ in its last bits from run to run.
"""

from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from regard.kernels.attention.arguments import like, lists, spread, three
from regard.kernels.attention.backward import finish, prepare
from regard.kernels.attention.hopper import LOG2E, bounds_of, described, list_of
from regard.primitives.block_list import BlockList


@builtin
def add_shared_to_global(descriptor, coordinates, tile, _semantic: Any = None):
    """As `tma.async_copy_shared_to_global`, but adds. Gluon has no word for it in Triton 3.6; its builder has."""
    at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, at, tile.handle)


@gluon.jit
def work_of(tile, tiles, columns, heads):
    """Block of keys, key head and batch row.

    The first keys come first, of all heads: as sinks every row sees them, and begun late they would end last.
    """
    lists = tiles // columns
    rest = tile - lists
    first = tile < lists
    column = gl.where(first, 0, 1 + rest % gl.maximum(columns - 1, 1))
    which = gl.where(first, tile, rest // gl.maximum(columns - 1, 1))
    return column, which % heads, which // heads


@gluon.jit
def copy(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles,
    kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, COUNT, INDEX,
    tiles, columns, heads, shared, lines, most, apart_b, apart_h,
    N: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies keys and values of a tile, then tiles of 64 rows."""
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column, head, batch = work_of(tile, tiles, columns, heads)
        mbarrier.wait(kv_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(kv_full.index(0), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [batch, head, column * N, 0], kv_full.index(0), k_tiles.index(0))
        tma.async_copy_global_to_shared(v_desc, [batch, head, column * N, 0], kv_full.index(0), v_tiles.index(0))
        for member in range(GROUP):
            query = head * GROUP + member
            spot, first = list_of(batch, query, column, shared, lines, most, apart_b, apart_h)
            count = gl.load(COUNT + spot)
            block = gl.load(INDEX + first)
            for i in range(count):
                following = gl.load(INDEX + first + gl.minimum(i + 1, count - 1))
                for half in gl.static_range(2):
                    stage, phase = step % STAGES, (step // STAGES) & 1
                    at = block * 128 + half * 64
                    mbarrier.wait(q_empty.index(stage), phase ^ 1)
                    mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, query, at, 0], q_full.index(stage), q_tiles.index(stage)
                    )
                    tma.async_copy_global_to_shared(
                        rows_desc, [batch * heads * GROUP + query, block * 2 + half, 0], q_full.index(stage),
                        row_tiles.index(stage),
                    )  # fmt: skip
                    mbarrier.wait(dout_empty.index(stage), phase ^ 1)
                    mbarrier.expect(dout_full.index(stage), dout_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        dout_desc, [batch, query, at, 0], dout_full.index(stage), dout_tiles.index(stage)
                    )
                    step += 1
                block = following
        turn += 1  # noqa: SIM113 - a kernel has no enumerate


@gluon.jit
def cut(scores, part, bound, rows, columns, BITS, N: gl.constexpr):
    """-inf where rows do not see keys; scores are `[keys, rows]`."""
    low, high = bound & 0xFFFF, bound >> 16
    ok = (columns[:, None] >= low[None, :]) & (columns[:, None] < high[None, :])
    if BITS is not None:
        at = BITS + ((-2 - part).to(gl.int64) * 128 + rows) * (N // 32)
        for word in gl.static_range(N // 32):
            bits = gl.load(at + word, mask=(rows >= 0) & (part < -1), other=-1)
            seen = (bits[None, :] >> (columns[:, None] & 31)) & 1
            ok = ok & ((seen != 0) | (columns[:, None] // 32 != word))
    return gl.where(ok, scores, float("-inf"))


@gluon.jit
def send(value, way, descriptor, place, ADD: gl.constexpr):
    """Write or add a matrix to memory at `place`, by way of shared memory."""
    SHAPE: gl.constexpr = value.shape
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, value.dtype)
    tma.store_wait(0)
    gl.thread_barrier()
    way._reinterpret(value.dtype, SHAPE, FLAT).store(value)
    fence_async_shared()
    gl.thread_barrier()
    if ADD:
        add_shared_to_global(descriptor, place, way)
    else:
        tma.async_copy_shared_to_global(descriptor, place, way)


@gluon.jit
def probabilities(
    scores, top, factor, cap, part, bound, rows, columns, BITS, PARTIAL: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """`(p, what the cap does to a slope)` of scores `[keys, rows]`."""
    inner = 1.0
    if cap is not None:
        scores = scores * (factor / LOG2E) / cap
        small = gl.exp2(-2.8853900817779268 * gl.abs(scores))
        tanh = (1 - small) / (1 + small)
        tanh = gl.where(scores < 0, -tanh, tanh)
        scores, inner, factor = tanh * (cap * LOG2E), 1 - tanh * tanh, 1.0
    if PARTIAL:
        scores = cut(scores, part, bound, rows, columns, BITS, N)
    return gl.exp2(scores * factor - top[None, :]), inner


@gluon.jit
def advance(
    half, step, part, dk, dv, q_tiles, k, k_all, v, dout_tiles, row_tiles, ds_tiles, dq_tiles, dq_desc,
    q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty, batch, query, at, factor, cap, BOUNDS, BITS,
    OWN: gl.constexpr, PARTIAL: gl.constexpr, N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """What 64 rows give to dk and dv, and half the channels of what they get as dq."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ALONG: gl.constexpr = gl.SliceLayout(0, SCORES)
    stage, phase = step % STAGES, (step // STAGES) & 1
    rows = half * 64 + gl.arange(0, 64, layout=ALONG)
    columns = OWN * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    bound = rows
    if PARTIAL:
        bound = bounds_of(part, rows, BOUNDS, N)
    q, dout = q_tiles.index(stage), dout_tiles.index(stage)
    zero = gl.zeros([64, 64], gl.float32, SCORES)
    mbarrier.wait(q_full.index(stage), phase)
    scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(stage), phase)
    dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    top = row_tiles.index(stage * 2).load(ALONG)
    scores = warpgroup_mma_wait(1, deps=[scores])
    p, inner = probabilities(scores, top, factor, cap, part, bound, rows, columns, BITS, PARTIAL, N)
    dv = warpgroup_mma(gl.convert_layout(p.to(DTYPE), OPERAND), dout, dv, is_async=True)
    delta = row_tiles.index(stage * 2 + 1).load(ALONG)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - delta[None, :])
    if cap is not None:
        ds = ds * inner
    ds = ds.to(DTYPE)
    slot = step & 1
    mbarrier.wait(ds_empty.index(slot), ((step >> 1) & 1) ^ 1)
    ds_tiles.index(slot).slice(OWN * 64, 64, dim=0).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(slot), count=1)
    mbarrier.wait(ds_full.index(slot), (step >> 1) & 1)
    nothing = gl.zeros([64, DIM // 2], gl.float32, PART)
    dq = warpgroup_mma(
        ds_tiles.index(slot).permute((1, 0)), k_all.slice(OWN * (DIM // 2), DIM // 2, dim=1), nothing, use_acc=False,
        is_async=True,
    )  # fmt: skip
    dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
    dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
    mbarrier.arrive(dout_empty.index(stage), count=1)
    mbarrier.arrive(ds_empty.index(slot), count=1)
    send(dq, dq_tiles.index(OWN), dq_desc, [batch, query, at + half * 64, OWN * (DIM // 2)], True)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def gradients_of_half(
    dq_desc, dk_desc, dv_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
    kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty,
    FULL, COUNT, INDEX, PART, BOUNDS, BITS, tiles, columns, heads, shared, lines, most, apart_b, apart_h,
    scale, factor, cap,
    OWN: gl.constexpr, N: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps that hold dk and dv of 64 keys of every tile."""
    DTYPE: gl.constexpr = dk_desc.dtype
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    q_tiles = q_tiles._reinterpret(DTYPE, [STAGES, 64, DIM], FLAT)
    dout_tiles = dout_tiles._reinterpret(DTYPE, [STAGES, 64, DIM], FLAT)
    k_all = k_tiles._reinterpret(DTYPE, [N, DIM], FLAT)
    k = k_all.slice(OWN * 64, 64, dim=0)
    v = v_tiles._reinterpret(DTYPE, [N, DIM], FLAT).slice(OWN * 64, 64, dim=0)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row_tiles = row_tiles._reinterpret(gl.float32, [STAGES * 2, 64], LINE)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column, head, batch = work_of(tile, tiles, columns, heads)
        dk = gl.zeros([64, DIM], gl.float32, SUMS)
        dv = gl.zeros([64, DIM], gl.float32, SUMS)
        mbarrier.wait(kv_full.index(0), turn & 1)
        for member in range(GROUP):
            query = head * GROUP + member
            spot, first = list_of(batch, query, column, shared, lines, most, apart_b, apart_h)
            full, count = gl.load(FULL + spot), gl.load(COUNT + spot)
            block = gl.load(INDEX + first)
            for i in range(2 * full):
                at = block * 128
                block = gl.load(INDEX + first + gl.minimum((i + 1) // 2, count - 1))
                dk, dv = advance(
                    i % 2, step, -1, dk, dv, q_tiles, k, k_all, v, dout_tiles, row_tiles, ds_tiles, dq_tiles, dq_desc,
                    q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty, batch, query, at, factor, cap,
                    BOUNDS, BITS, OWN, False, N, DIM, STAGES, DTYPE,
                )  # fmt: skip
                step += 1
            for i in range(2 * full, 2 * count):
                at = block * 128
                part = gl.load(PART + first + i // 2)
                block = gl.load(INDEX + first + gl.minimum((i + 1) // 2, count - 1))
                dk, dv = advance(
                    i % 2, step, part, dk, dv, q_tiles, k, k_all, v, dout_tiles, row_tiles, ds_tiles, dq_tiles, dq_desc,
                    q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty, batch, query, at, factor, cap,
                    BOUNDS, BITS, OWN, True, N, DIM, STAGES, DTYPE,
                )  # fmt: skip
                step += 1
        mbarrier.arrive(kv_empty.index(0), count=1)
        # The memory of dq's last tile serves both results on their way out.
        TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, 64, DIM], DTYPE)
        way = dq_tiles.index(OWN)._reinterpret(DTYPE, [1, 1, 64, DIM], TILE)
        place = [batch, head, column * N + OWN * 64, 0]
        send(dv.to(DTYPE), way, dv_desc, place, False)
        send((dk * scale).to(DTYPE), way, dk_desc, place, False)
        turn += 1  # noqa: SIM113 - a kernel has no enumerate
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "columns", "heads", "shared", "lines", "most", "apart_b", "apart_h"])
def gradients(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, dq_desc, dk_desc, dv_desc, FULL, COUNT, INDEX, PART, BOUNDS, BITS,
    tiles, columns, heads, shared, lines, most, apart_b, apart_h, scale, factor, cap,
    N: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `backward.column_gradients`, for blocks of 128 by 128 in 16 bits.

    Grid: any number of programs, at most tiles.
    """
    DTYPE: gl.constexpr = dk_desc.dtype
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, DIM], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [1, 1, 1, N, DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [1, 1, 1, N, DIM], k_desc.layout)
    row_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, 128], rows_desc.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 64], DTYPE)
    ds_tiles = gl.allocate_shared_memory(DTYPE, [2, N, 64], DS)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, DIM // 2], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dout_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_empty.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (gradients_of_half, (
                dq_desc, dk_desc, dv_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
                kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty,
                FULL, COUNT, INDEX, PART, BOUNDS, BITS, tiles, columns, heads, shared, lines, most, apart_b, apart_h,
                scale, factor, cap, gl.constexpr(0), N, DIM, GROUP, STAGES,
            )),
            (gradients_of_half, (
                dq_desc, dk_desc, dv_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
                kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty,
                FULL, COUNT, INDEX, PART, BOUNDS, BITS, tiles, columns, heads, shared, lines, most, apart_b, apart_h,
                scale, factor, cap, gl.constexpr(1), N, DIM, GROUP, STAGES,
            )),
            (copy, (
                q_desc, k_desc, v_desc, dout_desc, rows_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles,
                kv_full, kv_empty, q_full, q_empty, dout_full, dout_empty, COUNT, INDEX,
                tiles, columns, heads, shared, lines, most, apart_b, apart_h, N, GROUP, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    blocks: BlockList, scale: float, cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`block.backward` for what `hopper.forward` takes."""
    (B, H, T, D), Hk = q.shape, k.shape[1]
    tiles = -(-T // 128) * 2
    # Of every 64 rows, lse and delta: one copy brings both.
    rows = torch.empty(B * H, tiles, 128, dtype=torch.float32, device=q.device)
    prepare[(tiles, H, B)](
        out, dout, lse, dlse, rows, rows, three(out), three(dout), T, tiles * 64,
        DIM=D, ROWS=64, PACKED=True, num_warps=8,
    )  # fmt: skip
    sums = torch.zeros(B, H, T, D, dtype=torch.float32, device=q.device)
    dk, dv, turned = like(k), like(v), blocks.turned()
    shared, columns, most, *apart = spread(turned, H)
    count = columns * Hk * B
    arguments: list[Any] = [
        described(q, 64, D), described(k, 128, D), described(v, 128, D), described(dout, 64, D), described(rows, 128),
        described(sums, 64, D // 2), described(dk, 64, D), described(dv, 64, D),
    ]  # fmt: skip
    gradients[(count,)](
        *arguments, *lists(turned), count, columns, Hk, shared, columns, most, *apart,
        scale, scale * LOG2E.value, cap, N=128, DIM=D, GROUP=H // Hk, STAGES=2, num_warps=4,
    )  # fmt: skip
    dq = like(q)
    finish[(tiles, H, B)](sums, dq, three(dq), T, scale, DIM=D, ROWS=64, num_warps=8)
    return dq, dk, dv
