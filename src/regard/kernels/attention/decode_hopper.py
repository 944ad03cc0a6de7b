"""Decoding few requests of one length on Hopper, in one launch; `decode.py` says what is computed and serves all else.

The first programs read: the readers of an output take tiles of its keys by a ticket, so that all end together. One warp
copies tiles, four attend with them, and what they found is stored as soon as it is known. The last programs, one a
query row, join: they look at the pieces of their row again and again until all have come. No reader waits for a joiner,
and programs begin in order, so all of this ends however few run at once.

Every word of a piece says by itself whether it has come: memory holds ones in all bits, which no float32 that is stored
has, and who has joined a piece puts the ones back. So nothing is fenced, counted or cleared between calls, and what
lies between the last key and the result is one store and one load. It takes memory that outlives a call: `workspace`.

Bytes: all keys and values once. FLOPs: `4 T H S D`, on rows padded to 64: a third of the card's at most.
"""

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

from regard.kernels import device
from regard.kernels.attention.arguments import fits
from regard.kernels.attention.hopper import LOG2E, cores, described, online

DIM = 128  # of keys and values
TILE = 64  # keys
STAGES = 6  # tiles of keys or values in flight; two programs fit on a multiprocessor: joiners run beside readers
ROWS = 16  # query rows of a KV head: new tokens times the group. The last tile and the one before hide keys from them
MOST = 16  # outputs: more of them fill the card without being split
READERS = 32  # of an output: more pieces take longer to join than they save
# Where the other kernel is no slower: keys that so few readers take long to read, and so many that joining is nothing.
FEW, LONG, ALL = 4, 4096, 2**20
PIECES = gl.constexpr(16)  # joined in one go
LINE = gl.constexpr(32)  # words between tickets of two outputs: a cache line
SPARE = 2  # workspaces made ahead, for graphs to come


def _waiting(count: int, pause: int = 32) -> tuple[str, str]:
    """PTX, and its constraints: load `count` words and as many pairs, until none has ones in all bits.

    Until the first pair has come it looks at that alone, every `pause` ns: more would take bandwidth from readers.
    """
    lines = ["{", ".reg .pred absent;", ".reg .b32 first;", f"LOOK: ld.relaxed.gpu.global.b32 first, [${4 * count}];"]
    lines += ["setp.eq.s32 absent, first, -1;", f"@absent nanosleep.u32 {pause};", "@absent bra LOOK;", "AGAIN:"]
    lines += [f"ld.relaxed.gpu.global.b32 ${i}, [${3 * count + i}];" for i in range(count)]
    for i in range(count, 2 * count):
        lines.append(f"ld.relaxed.gpu.global.v2.b32 {{${i}, ${count + i}}}, [${3 * count + i}];")
    lines.append("setp.eq.s32 absent, $0, -1;")
    lines += [f"setp.eq.or.s32 absent, ${i}, -1, absent;" for i in range(1, 3 * count)]
    return "\n".join([*lines, "@absent bra AGAIN;", "}"]), ",".join(["=&r"] * 3 * count + ["l"] * 2 * count)


WAITING, CONSTRAINTS = map(gl.constexpr, _waiting(PIECES.value))


@gluon.jit
def work_of(outputs, heads):
    """Batch row, KV head and output that this reader reads, and which of its readers it is."""
    output, own = gl.program_id(0) % outputs, gl.program_id(0) // outputs
    return output // heads, output % heads, output, own


@gluon.jit
def freed(empty, step):
    """Wait for the next stage to be free; which it is."""
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)
    return step % STAGES


@gluon.jit
def copy(
    k_desc, v_desc, TICKETS, held, more, full, empty, tiles, outputs, heads, split,
    TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that takes tickets and copies tiles, the last one of the keys first; `more` says that one is coming."""
    WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if gl.program_id(0) < outputs * split:
        batch, head, output, ticket = work_of(outputs, heads)
        step = 0
        while ticket < tiles:
            place = [batch, head, (tiles - 1 - ticket) * TILE, 0]
            stage = freed(empty, step)
            more.index(stage).store(gl.full([1], 1, gl.int32, WARP))
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, place, full.index(stage), held.index(stage))
            stage = freed(empty, step + 1)
            mbarrier.expect(full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, place, full.index(stage), held.index(stage))
            step += 2
            ticket += split
            if step >= STAGES:  # the first ones need no ticket, and so no wait for it
                ticket = (STAGES + 1) // 2 * split + 1 + gl.atomic_add(TICKETS + output * LINE, 1, sem="relaxed")
        stage = freed(empty, step)
        more.index(stage).store(gl.full([1], 0, gl.int32, WARP))
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def come(full, step):
    """Wait for what is copied to a stage; which it is."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return step % STAGES


@gluon.jit
def add_tile(
    q, held, full, empty, step, total, top, out, factor, seen, PARTIAL: gl.constexpr, SCORES: gl.constexpr,
    OPERAND: gl.constexpr,
):  # fmt: skip
    """Online softmax with a tile whose keys have come; PARTIAL: row r sees its first `seen[r]` keys."""
    STAGES: gl.constexpr = held.shape[0]
    TILE: gl.constexpr = held.shape[1]
    stage = step % STAGES
    zero = gl.zeros([64, TILE], gl.float32, SCORES)
    scores = warpgroup_mma(q, held.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(empty.index(stage), count=1)
    if PARTIAL:
        columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(columns[None, :] < seen[:, None], scores, float("-inf"))
    p, total, new, shrink = online(scores, total, top, factor, PARTIAL, OPERAND, held.dtype)
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    stage = come(full, step + 1)
    out = warpgroup_mma(p, held.index(stage), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    mbarrier.arrive(empty.index(stage), count=1)
    return total, new, out


@gluon.jit
def another(full, more, step):
    """Whether one more tile comes; if so, its keys have."""
    stage = come(full, step)
    return gl.max(more.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0) > 0


@gluon.jit
def present(x):
    """The bits of x, of which not all are ones."""
    bits = x.to(gl.int32, bitcast=True)
    return gl.where(bits == -1, 0x7FFFFFFF, bits)


@gluon.jit
def read_tiles(
    Q, PARTS, STATS, held, more, full, empty, tiles, outputs, heads, split, S, T, factor, sq,
    TILE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """The warps that attend with the tiles of a reader and store what they found, a piece of each of their rows."""
    DTYPE: gl.constexpr = held.dtype
    DIM: gl.constexpr = held.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, DIM], DTYPE)
    batch, head, output, own = work_of(outputs, heads)
    held = held._reinterpret(DTYPE, [STAGES, TILE, DIM], FLAT)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, QUERIES))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, QUERIES))
    spot = batch.to(gl.int64) * sq[0] + (head * GROUP + row % GROUP) * sq[1] + (row // GROUP) * sq[2]
    q = gl.load(Q + spot[:, None] + dims[None, :] * sq[3], mask=(row < T * GROUP)[:, None], other=0.0)
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    out = gl.zeros([64, DIM], gl.float32, OUT)
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    # Only the last two tiles hide keys, and they are the first of a reader: there are two readers where there are two.
    seen = S - (tiles - 1 - own) * TILE + gl.zeros_like(line)
    if CUT:
        seen += 1 - T + line // GROUP
    come(full, 0)
    total, top, out = add_tile(q, held, full, empty, 0, total, top, out, factor, seen, True, SCORES, OPERAND)
    step = 2
    while another(full, more, step):
        total, top, out = add_tile(q, held, full, empty, step, total, top, out, factor, seen, False, SCORES, OPERAND)
        step += 2
    piece, count = (output * split + own) * T * GROUP, T * GROUP
    gl.store(STATS + (piece + line) * 2, present(top), mask=line < count)
    gl.store(STATS + (piece + line) * 2 + 1, present(total), mask=line < count)
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, OUT))
    gl.store(PARTS + (piece + line)[:, None] * DIM + columns[None, :], present(out), mask=(line < count)[:, None])


@gluon.jit
def join_pieces(OUT, LSE, PARTS, STATS, TICKETS, job, split, T, DIM: gl.constexpr, GROUP: gl.constexpr):
    """Join the pieces of one query row as they come, a column a thread, and leave ones in their place."""
    ALL: gl.constexpr = gl.BlockedLayout([PIECES, 1], [1, 32], [1, 4], [0, 1])
    own = gl.arange(0, PIECES, layout=gl.SliceLayout(1, ALL))
    columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, ALL))
    output, row = job // (T * GROUP), job % (T * GROUP)
    nothing = gl.full([PIECES, DIM], -1, gl.int32, ALL)
    peak = gl.full([DIM], float("-inf"), gl.float32, gl.SliceLayout(0, ALL))
    total, out = gl.zeros_like(peak), gl.zeros_like(peak)
    for first in range(0, split, PIECES):
        # What is one too many is the last piece again, with no weight.
        piece = (output * split + gl.minimum(first + own, split - 1)) * T * GROUP + row
        parts = PARTS + piece[:, None] * DIM + columns[None, :]
        stats = STATS + piece[:, None] * 2 + gl.zeros_like(columns)[None, :]
        found, tops, totals = gl.inline_asm_elementwise(
            WAITING, CONSTRAINTS, [parts.to(gl.int64, bitcast=True), stats.to(gl.int64, bitcast=True)],
            dtype=(gl.int32, gl.int32, gl.int32), is_pure=False, pack=PIECES,
        )  # fmt: skip
        tops = gl.where((first + own < split)[:, None], tops.to(gl.float32, bitcast=True), float("-inf"))
        new = gl.maximum(peak, gl.max(tops, 0))
        least = gl.where(new == float("-inf"), 0.0, new)
        weights, shrink = gl.exp2(tops - least[None, :]), gl.exp2(peak - least)
        total = total * shrink + gl.sum(totals.to(gl.float32, bitcast=True) * weights, 0)
        out = out * shrink + gl.sum(found.to(gl.float32, bitcast=True) * weights, 0)
        peak = new
        gl.store(parts, nothing)
        gl.thread_barrier()  # all threads have read the stats
        gl.store(stats + (columns % 2)[None, :], nothing, mask=(columns < 2)[None, :])
    some = gl.where(total == 0.0, 1.0, total)
    place = (output * GROUP + row % GROUP) * T + row // GROUP
    gl.store(OUT + place * DIM + columns, (out / some).to(OUT.dtype.element_ty))
    lse = gl.where(total == 0.0, float("-inf"), (peak + gl.log2(some)) / LOG2E)
    gl.store(LSE + place + gl.zeros_like(columns), lse, mask=columns == 0)
    # All readers have taken their last ticket, since they stored their pieces after it.
    again = gl.full([DIM], -1, gl.int32, gl.SliceLayout(0, ALL))
    gl.store(TICKETS + output * LINE + gl.zeros_like(columns), again, mask=(columns == 0) & (row == 0))


@gluon.jit
def read_or_join(
    Q, OUT, LSE, TICKETS, held, more, full, empty, tiles, outputs, heads, split, S, T, factor, sq,
    TILE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, CUT: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """What the four warps of a program do."""
    DIM: gl.constexpr = held.shape[4]
    PARTS = TICKETS + MOST * LINE
    STATS = PARTS + outputs * split * T * GROUP * DIM
    job = gl.program_id(0) - outputs * split
    if job < 0:
        read_tiles(
            Q, PARTS, STATS, held, more, full, empty, tiles, outputs, heads, split, S, T, factor, sq,
            TILE, STAGES, GROUP, CUT,
        )  # fmt: skip
    else:
        join_pieces(OUT, LSE, PARTS, STATS, TICKETS, job, split, T, DIM, GROUP)


@gluon.jit(do_not_specialize=["tiles", "outputs", "heads", "split", "S", "T"])
def attend_once(
    k_desc, v_desc, Q, OUT, LSE, TICKETS, tiles, outputs, heads, split, S, T, factor, sq,
    TILE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, CUT: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """Grid: `outputs * split` readers, at most `tiles` of an output, and a joiner for each query row."""
    shape: gl.constexpr = [STAGES, 1, 1, TILE, k_desc.block_type.shape[3]]
    held = gl.allocate_shared_memory(k_desc.dtype, shape, k_desc.layout)  # keys and values in turn
    more = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (read_or_join, (
                Q, OUT, LSE, TICKETS, held, more, full, empty, tiles, outputs, heads, split, S, T, factor,
                sq, TILE, STAGES, GROUP, CUT, MOST,
            )),
            (copy, (
                k_desc, v_desc, TICKETS, held, more, full, empty, tiles, outputs, heads, split,
                TILE, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


_made: dict[tuple[torch.device, int, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}


def workspace(where: torch.device) -> Tensor | None:
    """Tickets and pieces of calls that follow each other on the current stream, int32, all ones between calls.

    One for every stream, and for every stream of a graph that is being captured, as graphs may be replayed while other
    work runs. A graph gets one that was filled before: it cannot wait for that, and to do it itself would cost it time.
    All are kept for good. None: there is none left for this graph; calls outside of captures make them.
    """
    if where.type != "cuda":
        return _filled(where)
    stream = torch.cuda.current_stream(where).cuda_stream
    graph = device.captured_graph(stream) if device.capturing(where) else 0
    spare, key = _spare.setdefault(where, []), (where, stream, graph)
    if key not in _made:
        if graph and not spare:
            return None
        _made[key] = spare.pop() if graph else _filled(where)
    if not graph and len(spare) < SPARE and not torch.cuda.get_sync_debug_mode():
        spare += [_filled(where) for _ in range(SPARE - len(spare))]
        torch.cuda.current_stream(where).synchronize()  # a graph may run on any stream
    return _made[key]


def _filled(where: torch.device) -> Tensor:
    words = MOST * LINE.value + cores(where) * ROWS * (DIM + 2)
    return torch.full((words,), -1, dtype=torch.int32, device=where)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `decode` does this call of `decode.py`, which sees all keys but for the causal cut."""
    (B, H, T, D), (Hk, S) = q.shape, k.shape[1:3]
    return (
        q.dtype != torch.float32
        and D == v.shape[3] == DIM
        and B * Hk <= min(MOST, cores(q.device) // 2)
        and T * H // Hk <= ROWS
        and 0 < S * B * Hk <= ALL
        and (S <= LONG or B * Hk >= FEW)
        and fits(k)
        and fits(v)
    )


def decode(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, space: Tensor, scale: float, causal: bool
) -> None:
    """Fill `out` and `lse`, which are contiguous; `space` is this stream's `workspace`."""
    (B, H, T, _), (Hk, S) = q.shape, k.shape[1:3]
    tiles = -(-S // TILE)
    # A reader a multiprocessor: one each already waits for memory alone.
    split = min(cores(q.device) // (B * Hk), READERS, tiles)
    descriptors: list[Any] = [described(k, TILE, DIM), described(v, TILE, DIM)]
    attend_once[(B * Hk * split + B * H * T,)](
        *descriptors, q, out, lse, space, tiles, B * Hk, Hk, split, S, T, scale * LOG2E.value, q.stride(),
        TILE=TILE, STAGES=STAGES, GROUP=H // Hk, CUT=causal and T > 1, MOST=MOST, num_warps=4, maxnreg=128,
    )  # fmt: skip
