"""The gradients once more for Hopper, in Gluon, in one pass over the keys: five products a tile instead of seven.

Two groups of warps each hold dk and dv of half the keys of a block, a third copies tiles of rows. What both make of
the scores' gradient meets in shared memory, for one product that gives dq, half its channels a group; the copy engine
adds it to memory. In which order is left to the machine, so dq may differ in its last bits from run to run.

One program a multiprocessor takes blocks of keys by a counter, so that copies for the next begin before the last is
finished. Only the warp that copies reads the lists; by words in shared memory it tells the groups what they multiply.
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
from regard.kernels.attention.hopper import LOG2E, bounds_of, described, list_of, programs
from regard.primitives.block_list import BlockList

# How four warps hold scores of 64 keys by 64 rows; words and rows of numbers in shared memory.
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


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
def write(word, value):
    """What one warp tells the others, a word in shared memory."""
    word.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + value)


@gluon.jit
def read(word):
    """What `write` wrote, for four warps."""
    return gl.sum(word.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def copy_keys(
    tile, turn, column, head, batch, k_desc, v_desc, k_tiles, v_tiles, tile_words, k_full, k_empty, v_full, v_empty,
    FULL, COUNT, shared, lines, most, apart_b, apart_h, N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Copy keys and values of a tile, and say which it is and how many blocks of rows see it, whole and in all."""
    whole, entries = 0, 0
    for member in range(GROUP):
        spot, _ = list_of(batch, head * GROUP + member, column, shared, lines, most, apart_b, apart_h)
        whole += gl.load(FULL + spot)
        entries += gl.load(COUNT + spot)
    slot = turn & 1
    mbarrier.wait(k_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    write(tile_words.index(slot * 3), tile)
    write(tile_words.index(slot * 3 + 1), whole)
    write(tile_words.index(slot * 3 + 2), entries)
    mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, head, column * N, 0], k_full.index(slot), k_tiles.index(slot))
    mbarrier.wait(v_empty.index(0), (turn & 1) ^ 1)
    mbarrier.expect(v_full.index(0), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [batch, head, column * N, 0], v_full.index(0), v_tiles.index(0))


@gluon.jit
def copy_rows(
    step, query, line, block, part, batch, q_desc, dout_desc, rows_desc, q_tiles, dout_tiles, row_tiles, step_words,
    q_full, q_empty, dout_full, dout_empty,
):  # fmt: skip
    """Copy 128 rows of queries and slopes in two halves, and say where they lie and how they are cut."""
    for half in gl.static_range(2):
        at = block * 128 + half * 64
        mbarrier.wait(q_empty.index(half), (step & 1) ^ 1)
        write(step_words.index(half * 3), query)
        write(step_words.index(half * 3 + 1), at)
        write(step_words.index(half * 3 + 2), part)
        mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [batch, query, at, 0], q_full.index(half), q_tiles.index(half))
        tma.async_copy_global_to_shared(
            rows_desc, [line, block * 2 + half, 0], q_full.index(half), row_tiles.index(half)
        )  # fmt: skip
        mbarrier.wait(dout_empty.index(half), (step & 1) ^ 1)
        mbarrier.expect(dout_full.index(half), dout_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            dout_desc, [batch, query, at, 0], dout_full.index(half), dout_tiles.index(half)
        )  # fmt: skip


@gluon.jit
def copy(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles,
    tile_words, step_words, k_full, k_empty, v_full, v_empty, q_full, q_empty, dout_full, dout_empty,
    FULL, COUNT, INDEX, PART, COUNTER, tiles, columns, heads, shared, lines, most, apart_b, apart_h,
    N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that takes tiles of keys until there are no more, and copies what they need: whole blocks come first."""
    step, turn = 0, 0
    tile = gl.atomic_add(COUNTER, 1, sem="relaxed")
    while tile < tiles:
        column, head, batch = work_of(tile, tiles, columns, heads)
        copy_keys(
            tile, turn, column, head, batch, k_desc, v_desc, k_tiles, v_tiles, tile_words,
            k_full, k_empty, v_full, v_empty, FULL, COUNT, shared, lines, most, apart_b, apart_h, N, GROUP,
        )  # fmt: skip
        for kind in range(2):
            for member in range(GROUP):
                query = head * GROUP + member
                spot, first = list_of(batch, query, column, shared, lines, most, apart_b, apart_h)
                full, count = gl.load(FULL + spot), gl.load(COUNT + spot)
                begin, end = gl.where(kind == 0, 0, full), gl.where(kind == 0, full, count)
                block = gl.load(INDEX + first + begin, mask=begin < end, other=0)
                for i in range(begin, end):
                    following = gl.load(INDEX + first + gl.minimum(i + 1, count - 1))
                    copy_rows(
                        step, query, batch * heads * GROUP + query, block, gl.load(PART + first + i), batch,
                        q_desc, dout_desc, rows_desc, q_tiles, dout_tiles, row_tiles, step_words,
                        q_full, q_empty, dout_full, dout_empty,
                    )  # fmt: skip
                    block = following
                    step += 1
        turn += 1
        tile = gl.atomic_add(COUNTER, 1, sem="relaxed")
    mbarrier.wait(k_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    write(tile_words.index((turn & 1) * 3), -1)
    mbarrier.arrive(k_full.index(turn & 1), count=1)


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
def free():
    """Wait until the copy engine has read all that this group gave it."""
    tma.store_wait(0)
    gl.thread_barrier()


@gluon.jit
def send(value, way, descriptor, place, ADD: gl.constexpr):
    """Write or add a matrix to memory at `place`, by way of shared memory that is `free`."""
    SHAPE: gl.constexpr = value.shape
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, value.dtype)
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
def anew(step):
    """Zero, in a way no compiler sees through.

    Added to an index it makes an address anew where it is used. Known before the loop, addresses of all products are
    kept over it, and do not fit the registers.
    """
    return step >> 31


@gluon.jit
def multiply_rows(step, slot, q_tiles, k_tiles, q_full, HALF: gl.constexpr, OWN: gl.constexpr):
    """Scores `[keys, rows]` of 64 rows, under way."""
    stage = HALF + anew(step)
    mbarrier.wait(q_full.index(stage), (step >> 1) & 1)
    return warpgroup_mma(
        k_tiles.index(slot + anew(step)).slice(OWN * 64, 64, dim=0), q_tiles.index(stage).permute((1, 0)),
        gl.zeros([64, 64], gl.float32, SCORES), use_acc=False, is_async=True,
    )  # fmt: skip


@gluon.jit
def slopes_of(
    scores, dv, step, stage, v_tiles, dout_tiles, row_tiles, step_words, dout_full, factor, cap, BOUNDS, BITS,
    HALF: gl.constexpr, OWN: gl.constexpr, PARTIAL: gl.constexpr, N: gl.constexpr, OPERAND: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """The gradient of scores that are under way, and dv, under way as well."""
    ALONG: gl.constexpr = gl.SliceLayout(0, SCORES)
    rows = HALF * 64 + gl.arange(0, 64, layout=ALONG)
    columns = OWN * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    part, bound = -1, rows
    if PARTIAL:
        part = read(step_words.index(stage * 3 + 2))
        bound = bounds_of(part, rows, BOUNDS, N)
    dout, v = dout_tiles.index(stage), v_tiles.index(anew(step)).slice(OWN * 64, 64, dim=0)
    mbarrier.wait(dout_full.index(stage), (step >> 1) & 1)
    zero = gl.zeros([64, 64], gl.float32, SCORES)
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
    return ds.to(DTYPE), dv


@gluon.jit
def advance(
    step, dk, dv, slot, batch, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles, dq_desc,
    step_words, q_full, q_empty, dout_full, dout_empty, ds_full, factor, cap, BOUNDS, BITS,
    OWN: gl.constexpr, PARTIAL: gl.constexpr, N: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """What 128 rows give to dk and dv, and half the channels of what they get as dq."""
    DTYPE: gl.constexpr = k_tiles.dtype
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    scores = multiply_rows(step, slot, q_tiles, k_tiles, q_full, 0, OWN)
    for half in gl.static_range(2):
        stage = half + anew(step)
        ds, dv = slopes_of(
            scores, dv, step, stage, v_tiles, dout_tiles, row_tiles, step_words, dout_full, factor, cap, BOUNDS, BITS,
            half, OWN, PARTIAL, N, OPERAND, DTYPE,
        )  # fmt: skip
        # The other group is done with these, or the slopes of this step would not have been copied yet.
        both, k = ds_tiles.index(stage), k_tiles.index(slot + anew(step))
        both.slice(OWN * 64, 64, dim=0).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(stage), count=1)
        mbarrier.wait(ds_full.index(stage), (step >> 1) & 1)
        dq = warpgroup_mma(
            both.permute((1, 0)), k.slice(OWN * (DIM // 2), DIM // 2, dim=1),
            gl.zeros([64, DIM // 2], gl.float32, PART), use_acc=False, is_async=True,
        )  # fmt: skip
        dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q_tiles.index(stage), dk, is_async=True)
        query, at = read(step_words.index(stage * 3)), read(step_words.index(stage * 3 + 1))
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
        free()
        mbarrier.arrive(dout_empty.index(stage), count=1)
        send(dq, dq_tiles.index(OWN), dq_desc, [batch, query, at, OWN * (DIM // 2)], True)
        if half == 0:
            # Begun while dk is under way; over the end of a loop the compiler would let no two run together.
            scores = multiply_rows(step + 1, slot, q_tiles, k_tiles, q_full, 1, OWN)
            dk = warpgroup_mma_wait(1, deps=[dk])
        else:
            dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(q_empty.index(stage), count=1)
        step += 1
    return dk, dv


@gluon.jit
def gradients_of_half(
    dq_desc, dk_desc, dv_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
    tile_words, step_words, k_full, k_empty, v_full, v_empty, q_full, q_empty, dout_full, dout_empty, ds_full,
    BOUNDS, BITS, tiles, columns, heads, scale, factor, cap,
    OWN: gl.constexpr, N: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """The warps that hold dk and dv of 64 keys of every tile."""
    DTYPE: gl.constexpr = dk_desc.dtype
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], DTYPE)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, 64, DIM], DTYPE)
    q_tiles = q_tiles._reinterpret(DTYPE, [2, 64, DIM], FLAT)
    dout_tiles = dout_tiles._reinterpret(DTYPE, [2, 64, DIM], FLAT)
    k_tiles = k_tiles._reinterpret(DTYPE, [2, N, DIM], FLAT)
    v_tiles = v_tiles._reinterpret(DTYPE, [1, N, DIM], FLAT)
    row_tiles = row_tiles._reinterpret(gl.float32, [4, 64], LINE)
    step, turn = 0, 0
    mbarrier.wait(k_full.index(0), 0)
    tile = read(tile_words.index(0))
    while tile >= 0:
        slot = turn & 1
        whole, entries = read(tile_words.index(slot * 3 + 1)), read(tile_words.index(slot * 3 + 2))
        column, head, batch = work_of(tile, tiles, columns, heads)
        dk = gl.zeros([64, DIM], gl.float32, SUMS)
        dv = gl.zeros([64, DIM], gl.float32, SUMS)
        mbarrier.wait(v_full.index(0), turn & 1)
        for _ in range(whole):
            dk, dv = advance(
                step, dk, dv, slot, batch, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
                dq_desc, step_words, q_full, q_empty, dout_full, dout_empty, ds_full, factor, cap, BOUNDS, BITS,
                OWN, False, N, DIM,
            )  # fmt: skip
            step += 2
        for _ in range(whole, entries):
            dk, dv = advance(
                step, dk, dv, slot, batch, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
                dq_desc, step_words, q_full, q_empty, dout_full, dout_empty, ds_full, factor, cap, BOUNDS, BITS,
                OWN, True, N, DIM,
            )  # fmt: skip
            step += 2
        mbarrier.arrive(v_empty.index(0), count=1)
        mbarrier.arrive(k_empty.index(slot), count=1)
        # The memory of dq's last tile serves both results on their way out.
        way = dq_tiles.index(OWN)._reinterpret(DTYPE, [1, 1, 64, DIM], TILE)
        free()
        send(dv.to(DTYPE), way, dv_desc, [batch, head, column * N + OWN * 64, 0], False)
        free()
        send((dk * scale).to(DTYPE), way, dk_desc, [batch, head, column * N + OWN * 64, 0], False)
        turn += 1
        mbarrier.wait(k_full.index(turn & 1), (turn >> 1) & 1)
        tile = read(tile_words.index((turn & 1) * 3))
    tma.store_wait(0)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """So many barriers, each for so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit(do_not_specialize=["tiles", "columns", "heads", "shared", "lines", "most", "apart_b", "apart_h"])
def gradients(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, dq_desc, dk_desc, dv_desc, FULL, COUNT, INDEX, PART, BOUNDS, BITS,
    COUNTER, tiles, columns, heads, shared, lines, most, apart_b, apart_h, scale, factor, cap,
    N: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """As `backward.column_gradients`, for blocks of 128 by 128 in 16 bits.

    Grid: any number of programs. They take tiles from COUNTER, which holds 0.
    """
    DTYPE: gl.constexpr = dk_desc.dtype
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 64], DTYPE)
    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, N, DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [1, 1, 1, N, DIM], k_desc.layout)
    row_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 128], rows_desc.layout)
    ds_tiles = gl.allocate_shared_memory(DTYPE, [2, N, 64], DS)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, DIM // 2], dq_desc.layout)
    tile_words = gl.allocate_shared_memory(gl.int32, [6, 1], LINE)
    step_words = gl.allocate_shared_memory(gl.int32, [6, 1], LINE)
    k_full, v_full, q_full, dout_full = barriers(2, 1), barriers(1, 1), barriers(2, 1), barriers(2, 1)
    k_empty, v_empty, q_empty, dout_empty = barriers(2, 2), barriers(1, 2), barriers(2, 2), barriers(2, 2)
    ds_full = barriers(2, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (gradients_of_half, (
                dq_desc, dk_desc, dv_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
                tile_words, step_words, k_full, k_empty, v_full, v_empty, q_full, q_empty, dout_full, dout_empty,
                ds_full, BOUNDS, BITS, tiles, columns, heads, scale, factor, cap, gl.constexpr(0), N, DIM,
            )),
            (gradients_of_half, (
                dq_desc, dk_desc, dv_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles, ds_tiles, dq_tiles,
                tile_words, step_words, k_full, k_empty, v_full, v_empty, q_full, q_empty, dout_full, dout_empty,
                ds_full, BOUNDS, BITS, tiles, columns, heads, scale, factor, cap, gl.constexpr(1), N, DIM,
            )),
            (copy, (
                q_desc, k_desc, v_desc, dout_desc, rows_desc, q_tiles, k_tiles, v_tiles, dout_tiles, row_tiles,
                tile_words, step_words, k_full, k_empty, v_full, v_empty, q_full, q_empty, dout_full, dout_empty,
                FULL, COUNT, INDEX, PART, COUNTER, tiles, columns, heads, shared, lines, most, apart_b, apart_h,
                N, GROUP,
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
    # The counter lies behind the sums, to be cleared with them.
    cleared = torch.zeros(q.numel() + 1, dtype=torch.float32, device=q.device)
    sums, counter = cleared[:-1].view(B, H, T, D), cleared[-1:].view(torch.int32)
    dk, dv, turned = like(k), like(v), blocks.turned()
    shared, columns, most, *apart = spread(turned, H)
    count = columns * Hk * B
    arguments: list[Any] = [
        described(q, 64, D), described(k, 128, D), described(v, 128, D), described(dout, 64, D), described(rows, 128),
        described(sums, 64, D // 2), described(dk, 64, D), described(dv, 64, D),
    ]  # fmt: skip
    gradients[(programs(q, count, 1),)](
        *arguments, *lists(turned), counter, count, columns, Hk, shared, columns, most, *apart,
        scale, scale * LOG2E.value, cap, N=128, DIM=D, GROUP=H // Hk, num_warps=4,
    )  # fmt: skip
    dq = like(q)
    finish[(tiles, H, B)](sums, dq, three(dq), T, scale, DIM=D, ROWS=64, num_warps=8)
    return dq, dk, dv
