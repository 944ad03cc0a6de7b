"""The sweep of the delta rule once more for Hopper, in Gluon: all 128 columns in one program.

As in hopper.py three groups of warps share a multiprocessor: one copies tiles, two each carry 64 columns of the state.
What the state says of keys and queries, what is corrected and what is written all stay in registers here, transposed
(columns by tokens), as the left side of the product that comes next; only the weights of a chunk go through shared
memory.
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
from regard.kernels.states.hopper import CHUNK, DIM, HALF
from regard.kernels.states.problem import Factors, Problem
from regard.kernels.states.sweep import TOKEN

# Chunks in flight.
STAGES = 2
# A state to which nothing new is written is looked at every so many chunks.
LOOK = gl.constexpr(4)


@gluon.jit
def part_of(SEGMENTS, item, heads):
    """Head, batch row, first token, end, and the first chunk."""
    row = SEGMENTS + item // heads * 4
    return item % heads, gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)


@gluon.jit
def copy(
    a_desc, b_desc, c_desc, entry_desc, solved_desc, a_tiles, b_tiles, c_tiles, entry_tiles, solved_tiles, full, empty,
    SEGMENTS, items, heads, GROUP_A: gl.constexpr, GROUP_B: gl.constexpr, GROUP_C: gl.constexpr,
):  # fmt: skip
    """The warp that copies chunks."""
    STAGES: gl.constexpr = b_tiles.shape[0]
    of_a: gl.constexpr = 0 if a_desc is None else a_desc.block_type.nbytes
    of_c: gl.constexpr = 0 if c_desc is None else 2 * c_desc.block_type.nbytes
    of_entry: gl.constexpr = 0 if entry_desc is None else entry_desc.block_type.nbytes
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, batch, start, end, first = part_of(SEGMENTS, item, heads)
        for i in range(gl.cdiv(end - start, CHUNK)):
            token, stage = start + i * CHUNK, step % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(arrived, b_desc.block_type.nbytes + solved_desc.block_type.nbytes + of_a + of_c + of_entry)
            if entry_desc is not None:
                tma.async_copy_global_to_shared(entry_desc, [batch, head, token, 0], arrived, entry_tiles.index(stage))
            tma.async_copy_global_to_shared(b_desc, [batch, head // GROUP_B, token, 0], arrived, b_tiles.index(stage))
            if a_desc is not None:
                tma.async_copy_global_to_shared(
                    a_desc, [batch, head // GROUP_A, token, 0], arrived, a_tiles.index(stage)
                )
            if c_desc is not None:
                for own in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        c_desc, [batch, head // GROUP_C, token, own * HALF], arrived, c_tiles.index(2 * stage + own)
                    )
            tma.async_copy_global_to_shared(solved_desc, [first + i, head, 0, 0], arrived, solved_tiles.index(stage))
            step += 1


@gluon.jit
def decays(G, sg_b, sg_h, batch, head, token, end, tokens, GROUP_G: gl.constexpr):
    """Logarithms (base 2) of the decay from the chunk's begin to each token, and to its end (see `along_chunks`)."""
    spot = G + batch.to(gl.int64) * sg_b + (head // GROUP_G) * sg_h + token
    last = gl.minimum(end - token, CHUNK) - 1
    return gl.load(spot + gl.minimum(tokens, last)), gl.load(spot + last)


@gluon.jit
def matrix(tiles, index, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """One of the tiles, without the dimensions of size 1."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], tiles.dtype)
    return tiles.index(index)._reinterpret(tiles.dtype, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def strengths(BETA, sw_b, sw_h, sw_t, batch, head, token, end, tokens):
    """Write strengths, kept off 0 as in `sweep.strengths`."""
    spot = BETA + batch.to(gl.int64) * sw_b + head * sw_h + (token + tokens).to(gl.int64) * sw_t
    return gl.maximum(gl.load(spot, mask=tokens < end - token, other=0.0).to(gl.float32), 1e-10)


@gluon.jit
def is_wide(WIDE, chunk, head, heads, BLOCKS: gl.constexpr):
    """Whether `factor.py` found a chunk wide, in any of its blocks of channels."""
    found = 0
    if WIDE is not None:
        for block in gl.static_range(BLOCKS):
            found += gl.load(WIDE + (chunk * heads + head) * BLOCKS + block)
    return found != 0


@gluon.jit
def begun(BEGIN, item, columns, dims, LAYOUT: gl.constexpr, HALF: gl.constexpr, DIM: gl.constexpr):
    """The state a segment begins with."""
    if BEGIN is None:
        return gl.zeros([HALF, DIM], gl.float32, LAYOUT)
    else:
        spot = BEGIN + item.to(gl.int64) * DIM * 2 * HALF
        return gl.load(spot + columns[:, None] + dims[None, :] * (2 * HALF)).to(gl.float32)


@gluon.jit
def weights(scores, SCORES, wide, chunk, head, heads):
    """Products of queries and keys, 0 where the key comes after the query; of wide chunks those of factor.py."""
    LAYOUT: gl.constexpr = scores.type.layout
    i, j = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT)), gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT))
    scores = gl.where(i[:, None] >= j[None, :], scores, 0.0)
    if wide:
        corner = SCORES + (chunk * heads + head).to(gl.int64) * CHUNK * CHUNK
        scores = gl.load(corner + i[:, None] * CHUNK + j[None, :]).to(gl.float32)
    return scores


@gluon.jit
def still(alive, S, i):
    """Whether anything is left of a state to which nothing new is written; what is 0 stays 0."""
    if i % LOOK == 0:
        alive = gl.max(gl.max((S != 0).to(gl.int32), 1), 0) != 0
    return alive


@gluon.jit
def written_by(
    S, a_tiles, b, c_tiles, entry_tiles, solved_tiles, p_tiles, stage, beta, H, SCORES, wide, chunk, head, heads,
    DECAY: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """What the chunk writes, and what its queries read of the state (0 without queries), columns by tokens."""
    DTYPE: gl.constexpr = b.dtype
    READ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, READ, 2)
    solved = matrix(solved_tiles, stage, CHUNK, CHUNK)
    key = b if entry_tiles is None else matrix(entry_tiles, stage, CHUNK, S.shape[1])
    zero = gl.zeros([HALF, CHUNK], gl.float32, READ)
    held = gl.convert_layout(S.to(DTYPE), LEFT)
    known = warpgroup_mma(held, key.permute((1, 0)), zero, use_acc=False, is_async=True)
    out = zero
    if a_tiles is None:
        known, held = warpgroup_mma_wait(0, deps=[known, held])
    else:
        a = matrix(a_tiles, stage, CHUNK, S.shape[1])
        scores = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
        out = warpgroup_mma(held, a.permute((1, 0)), zero, use_acc=False, is_async=True)
        known = warpgroup_mma_wait(2, deps=[known])
    if DECAY == 2:
        known *= gl.exp2(H)[None, :]
    if c_tiles is None:
        error = -known * beta[None, :]
    else:
        c = matrix(c_tiles, 2 * stage + OWN, CHUNK, HALF)
        error = (c.permute((1, 0)).load(READ).to(gl.float32) - known) * beta[None, :]
    error = gl.convert_layout(error.to(solved.dtype), LEFT)
    written = warpgroup_mma(error, solved.permute((1, 0)), zero, use_acc=False, is_async=True)
    if a_tiles is None:
        written, error = warpgroup_mma_wait(0, deps=[written, error])
    else:
        scores = warpgroup_mma_wait(2, deps=[scores])
        p_tiles.index(OWN).store(weights(scores, SCORES, wide, chunk, head, heads).to(DTYPE))
        fence_async_shared()
        gl.thread_barrier()
        written, error, out, held = warpgroup_mma_wait(0, deps=[written, error, out, held])
    return written, out


@gluon.jit
def add(S, written, out, b, p_tiles, H, total, wide, FACTORS, chunk, head, heads, dims, DECAY: gl.constexpr,
        OWN: gl.constexpr):  # fmt: skip
    """State and output with what was written, both in the making, and the left sides of the two products."""
    TURNED: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, written.type.layout, 2)
    DIM: gl.constexpr = S.shape[1]
    kept = written.to(b.dtype)
    late = kept
    if DECAY == 2:
        late = (kept.to(gl.float32) * gl.exp2(total - H)[None, :]).to(b.dtype)
        S *= gl.exp2(total)
    if DECAY == 3:  # noqa: SIM102 - of the two, only the first is known to the compiler
        if wide:
            S *= factors(FACTORS, chunk, head, heads, 1, dims, True, DIM)[None, :]
    turned = gl.convert_layout(late, TURNED)
    left = turned
    S = warpgroup_mma(turned, b, S, is_async=True)
    if p_tiles is not None:
        left = gl.convert_layout(kept, LEFT)
        out = warpgroup_mma(left, p_tiles.index(OWN).permute((1, 0)), out, is_async=True)
    return S, turned, out, left


@gluon.jit
def put(desc, tile, x, batch, head, token, OWN: gl.constexpr):
    """Begin to write `[columns, tokens]` to its rows; the tile is free again after the barrier of the next but one."""
    DTYPE: gl.constexpr = tile.dtype
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, HALF], DTYPE)
    tile._reinterpret(DTYPE, [CHUNK, HALF], NARROW).permute((1, 0)).store(x.to(DTYPE))
    fence_async_shared()
    tma.store_wait(0)
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [batch, head, token, OWN * HALF], tile)


@gluon.jit
def factors(FACTORS, chunk, head, heads, which: gl.constexpr, dims, ok, DIM: gl.constexpr):
    """One of the three rows of a chunk that factor.py left: what scales the state; 1 where `ok` is False."""
    spot = FACTORS + (chunk * heads + head).to(gl.int64) * 3 * DIM + which * DIM + dims
    return gl.load(spot, mask=(dims >= 0) & ok, other=1.0)


@gluon.jit
def through(
    S, a_tiles, b, c_tiles, entry_tiles, solved_tiles, p_tiles, e_tiles, error_desc, stage, step, beta, H, total,
    SCORES, FACTORS, wide, batch, token, chunk, head, heads, dims, DECAY: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """The state after a chunk, and the chunk's output over the scale."""
    written, out = written_by(
        S, a_tiles, b, c_tiles, entry_tiles, solved_tiles, p_tiles, stage, beta, H, SCORES, wide, chunk, head, heads,
        DECAY, OWN,
    )  # fmt: skip
    S, turned, out, left = add(
        S, written, out, b, p_tiles, H, total, wide, FACTORS, chunk, head, heads, dims, DECAY, OWN
    )
    if error_desc is not None:
        put(error_desc, e_tiles.index(2 * OWN + step % 2), written / beta[None, :], batch, head, token, OWN)
    if p_tiles is not None:
        S, turned, out, left = warpgroup_mma_wait(0, deps=[S, turned, out, left])
    else:
        S, turned = warpgroup_mma_wait(0, deps=[S, turned])
    return S, out


@gluon.jit
def carry_half(
    out_desc, error_desc, a_tiles, b_tiles, c_tiles, entry_tiles, solved_tiles, p_tiles, o_tiles, e_tiles, full, empty,
    G, FACTORS, WIDE, SCORES, BETA, BEGIN, END, SEGMENTS, sg_b, sg_h, sw_b, sw_h, sw_t, items, heads, scale,
    DECAY: gl.constexpr, GROUP_G: gl.constexpr, BLOCKS: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """The warps that carry 64 columns of the state."""
    STAGES: gl.constexpr = b_tiles.shape[0]
    DIM: gl.constexpr = b_tiles.shape[4]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    READ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    columns = OWN * HALF + gl.arange(0, HALF, gl.SliceLayout(1, STATE))
    dims, tokens = gl.arange(0, DIM, gl.SliceLayout(0, STATE)), gl.arange(0, CHUNK, gl.SliceLayout(0, READ))
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head, batch, start, end, first = part_of(SEGMENTS, item, heads)
        chunks = gl.cdiv(end - start, CHUNK)
        S = begun(BEGIN, item, columns, dims, STATE, HALF, DIM)
        if DECAY == 3:
            S *= factors(FACTORS, first, head, heads, 0, dims, chunks > 0, DIM)[None, :]
        alive = start >= 0
        for i in range(chunks):
            token, stage, chunk = start + i * CHUNK, step % STAGES, first + i
            beta = strengths(BETA, sw_b, sw_h, sw_t, batch, head, token, end, tokens)
            H, total = beta, 0.0
            if DECAY == 2:
                H, total = decays(G, sg_b, sg_h, batch, head, token, end, tokens, GROUP_G)
            wide = is_wide(WIDE, chunk, head, heads, BLOCKS)
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            b = matrix(b_tiles, stage, CHUNK, DIM)
            if c_tiles is None:
                alive = still(alive, S, i)
                if alive:
                    S, _ = through(
                        S, a_tiles, b, c_tiles, entry_tiles, solved_tiles, p_tiles, e_tiles, error_desc, stage, step,
                        beta, H, total, SCORES, FACTORS, wide, batch, token, chunk, head, heads, dims, DECAY, OWN,
                    )  # fmt: skip
            else:
                S, out = through(
                    S, a_tiles, b, c_tiles, entry_tiles, solved_tiles, p_tiles, e_tiles, error_desc, stage, step,
                    beta, H, total, SCORES, FACTORS, wide, batch, token, chunk, head, heads, dims, DECAY, OWN,
                )  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            if DECAY == 3:
                S *= factors(FACTORS, chunk, head, heads, 2, dims, True, DIM)[None, :]
                S *= factors(FACTORS, chunk + 1, head, heads, 0, dims, i + 1 < chunks, DIM)[None, :]
            if out_desc is not None:
                put(out_desc, o_tiles.index(2 * OWN + step % 2), out * scale, batch, head, token, OWN)
            step += 1
        if END is not None:
            spot = END + item.to(gl.int64) * DIM * 2 * HALF
            gl.store(spot + columns[:, None] + dims[None, :] * (2 * HALF), S)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "heads"])
def sweep_delta(
    a_desc, b_desc, c_desc, entry_desc, solved_desc, out_desc, error_desc, G, FACTORS, WIDE, SCORES, BETA, BEGIN, END,
    SEGMENTS, sg_b, sg_h, sw_b, sw_h, sw_t, items, heads, scale,
    DECAY: gl.constexpr, GROUP_A: gl.constexpr, GROUP_B: gl.constexpr, GROUP_C: gl.constexpr, GROUP_G: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `sweep.sweep` by the delta rule, for all segments; without c, of zeros. Grid: any number of programs.

    With outputs, channels must decay on their own.
    """
    DTYPE: gl.constexpr = b_desc.dtype
    DIM: gl.constexpr = b_desc.block_type.shape[3]
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, CHUNK], DTYPE)
    a_tiles, c_tiles, entry_tiles, p_tiles, o_tiles, e_tiles = None, None, None, None, None, None
    if out_desc is not None:
        a_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, CHUNK, DIM], a_desc.layout)
        p_tiles = gl.allocate_shared_memory(DTYPE, [2, CHUNK, CHUNK], SQUARE)
        o_tiles = gl.allocate_shared_memory(DTYPE, [4, 1, 1, CHUNK, HALF], out_desc.layout)
    if error_desc is not None:
        e_tiles = gl.allocate_shared_memory(DTYPE, [4, 1, 1, CHUNK, HALF], error_desc.layout)
    if c_desc is not None:
        c_tiles = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 1, 1, CHUNK, HALF], c_desc.layout)
    if entry_desc is not None:
        entry_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, CHUNK, DIM], entry_desc.layout)
    b_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, CHUNK, DIM], b_desc.layout)
    solved_tiles = gl.allocate_shared_memory(solved_desc.dtype, [STAGES, 1, 1, CHUNK, CHUNK], solved_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (carry_half, (
                out_desc, error_desc, a_tiles, b_tiles, c_tiles, entry_tiles, solved_tiles, p_tiles, o_tiles, e_tiles,
                full, empty, G, FACTORS, WIDE, SCORES, BETA, BEGIN, END, SEGMENTS, sg_b, sg_h, sw_b, sw_h, sw_t,
                items, heads, scale, DECAY, GROUP_G, BLOCKS, gl.constexpr(0),
            )),
            (carry_half, (
                out_desc, error_desc, a_tiles, b_tiles, c_tiles, entry_tiles, solved_tiles, p_tiles, o_tiles, e_tiles,
                full, empty, G, FACTORS, WIDE, SCORES, BETA, BEGIN, END, SEGMENTS, sg_b, sg_h, sw_b, sw_h, sw_t,
                items, heads, scale, DECAY, GROUP_G, BLOCKS, gl.constexpr(1),
            )),
            (copy, (
                a_desc, b_desc, c_desc, entry_desc, solved_desc, a_tiles, b_tiles, c_tiles, entry_tiles, solved_tiles,
                full, empty, SEGMENTS, items, heads, GROUP_A, GROUP_B, GROUP_C,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def sweep(
    p: Problem, f: Factors, b: Tensor, c: Tensor | None, rule: tuple[Tensor, Tensor, Tensor | None], *,
    a: Tensor | None, out: Tensor | None, scale: float, begin: Tensor | None, end: Tensor | None,
) -> None:  # fmt: skip
    """Launch `sweep_delta` over all segments; `rule`: (beta, triangle, error).

    Without `a` and `out` only states are carried; without `c` it is zeros.
    """
    beta, triangle, error = rule
    half = HALF.value
    group = lambda x: 1 if x is None else p.heads // x.shape[1]  # noqa: E731
    gone = p.along_chunks if p.kind == TOKEN else None
    sides = ((a, DIM), (b, DIM), (c, half), (f.entry, DIM), (triangle, p.chunk), (out, half), (error, half))
    ahead.launch(sweep_delta, (p.programs(),))(
        *[None if x is None else described(x, p.chunk, width) for x, width in sides],
        gone, f.scaling, f.wide, f.scores, beta, None if begin is None else begin.contiguous(), end, p.segments.table,
        *((0, 0) if gone is None else gone.stride()[:2]), *beta.stride(), p.segments.count * p.heads, p.heads, scale,
        DECAY=p.kind, GROUP_A=group(a), GROUP_B=group(b), GROUP_C=group(c),
        GROUP_G=group(gone), BLOCKS=p.blocks, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
