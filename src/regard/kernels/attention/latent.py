"""Absorbed decoding over a latent store ([087], definition): every head reads the same latents, once.

A token holds `c_j` of `r` numbers and a rotary key `kappa_j` of `e`. Head h of a query has `u_h` and `rho_h` for them:

    s_hj = scale (u_h . c_j + rho_h . kappa_j),   out_h = sum_j softmax_j(s_hj) c_j.

A tile of latents lies in shared memory and is key and value at once. Rows are the heads of all queries of a request;
a program holds `ROWS` of them, with their sums in registers (64 x 512 in float32 is half of what there is), and walks
over the key tiles of its share. Shares of one request are joined by their log-sum-exps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from regard.core.shapes import power_of_two
from regard.kernels import device
from regard.kernels.states.sweep import INTERPRETED

TYPES = (torch.bfloat16, torch.float16)
STEP = 16  # sizes are multiples of it: rows of 16 bytes for the copy engine, and of the matrix instruction
WIDEST = 512  # of a latent: sums of 64 rows fill half of the registers
ROWS, KEYS = 64, 64
PROGRAMS = 132  # multiprocessors of a large card: shared memory leaves room for one program on each
OVERHEAD = 4.0  # what a share costs besides its tiles, in tiles: its queries, its sums written and read again
SHAPE_APART = (512, 64)
LOG2E = 1.4426950408889634


def refuses(
    q: Tensor, latent: Tensor, *, rank: int, lengths: Tensor | None = None, starts: Tensor | None = None
) -> str | None:
    """Why `decode` cannot do this call, or None. Shapes are those of `decode`, but that `q` may not be absorbed yet."""
    if why := device.refuses(q):
        return why
    if device.capability(q.device) < (9, 0):
        return "the kernel of latent attention needs the copy engine of compute capability 9.0"
    return shape_refuses(q, latent, rank=rank)


def shape_refuses(q: Tensor, latent: Tensor, *, rank: int) -> str | None:
    """As `refuses`, but for the device."""
    if q.dtype not in TYPES or latent.dtype != q.dtype:
        return f"the kernel of latent attention takes bfloat16 or float16, not {q.dtype} over {latent.dtype}"
    rope = latent.shape[-1] - rank
    if rank % STEP or rope % STEP or not STEP <= rank <= WIDEST or not STEP <= rope <= 128:
        return (
            f"the kernel of latent attention takes {STEP} to {WIDEST} + {STEP} to 128 numbers a token, in multiples "
            f"of {STEP}, not {rank} + {rope}"
        )
    if latent.stride(-1) != 1 or any(stride % 8 for stride in latent.stride()[:2]) or latent.data_ptr() % 16:
        return f"the kernel of latent attention reads tokens in whole rows of 16 bytes; strides are {latent.stride()}"
    return None


def shares(programs: int, tiles: int) -> int:
    """Into how many shares the keys of every request are cut, so that the last wave of programs is done soonest."""
    best, least = 1, float("inf")
    for count in range(1, max(1, min(tiles, 4 * PROGRAMS // max(programs, 1))) + 1):
        waves = -(-programs * count // PROGRAMS)
        cost = waves * (-(-tiles // count) + OVERHEAD) + (OVERHEAD if count > 1 else 0.0)
        if cost < least:
            best, least = count, cost
    return best


def decode(
    q: Tensor,
    latent: Tensor,
    *,
    rank: int,
    scale: float,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last `T` tokens over latents. Nothing is checked: ask `refuses` first.

    Args:
        q: `[B, H, T, r + e]`, any strides; `u` before `rho`.
        latent: `[B, S, r + e]`, the last dimension contiguous; `c` before `kappa`.
        rank: r.
        scale: of the scores.
        lengths: `[B]` int32, tokens of each row that count, 1 to S; None: all S. Query t of T sees the first
            `lengths - T + 1 + t`. What lies beyond is not read.
        starts: `[B]` int32, the first token of each row that counts (left padding); None: 0.

    Returns:
        out `[B, H, T, r]` in the dtype of q, lse `[B, H, T]` float32.
    """
    B, H, T, _ = q.shape
    S = latent.shape[1]
    rows = H * T
    blocks = -(-rows // ROWS)
    count = shares(B * blocks, -(-S // KEYS))
    q = q.contiguous()
    out = q.new_empty(B, H, T, rank)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    part = out if count == 1 else q.new_empty(count, B, H, T, rank, dtype=torch.float32)
    part_lse = lse if count == 1 else q.new_empty(count, B, H, T, dtype=torch.float32)
    call = (part, part_lse, lengths, starts, scale * LOG2E, B, S)
    if apart(q, latent, rank):
        _launch_apart(q, latent, rank, count, call)
    else:
        _launch(q, latent, rank, count, call)
    if count > 1:
        block_r = power_of_two(rank)
        _latent_join[(B * rows,)](part, part_lse, out, lse, B * rows, count, R=rank, BLOCK_R=block_r, num_warps=4)
    return out, lse


def apart(q: Tensor, latent: Tensor, rank: int) -> bool:
    """Whether the kernel whose warps do one thing each takes this call: the shape of DeepSeek, on Hopper alone."""
    rows = latent.stride(0) % latent.stride(1) == 0
    return (rank, q.shape[-1] - rank) == SHAPE_APART and rows and device.capability(q.device) == (9, 0)


def _launch_apart(q: Tensor, latent: Tensor, rank: int, count: int, call: tuple[Any, ...]) -> None:
    from regard.kernels.attention import latent_hopper

    B, H, T, width = q.shape
    rows, stride = H * T, latent.stride(0) // latent.stride(1)
    # One list of tokens: request b begins at row `b * stride`.
    tokens = latent.as_strided(((B - 1) * stride + latent.shape[1], width), (latent.stride(1), 1))
    flat = q.view(B * rows, width)
    blocks = -(-rows // ROWS)
    made = [
        latent_hopper.descriptor(flat, 0, rank, ROWS, rank),
        latent_hopper.descriptor(flat, rank, width, ROWS, width - rank),
        latent_hopper.descriptor(tokens, 0, rank, KEYS, rank // 2),
        latent_hopper.descriptor(tokens, rank, width, KEYS, width - rank),
    ]
    part, part_lse, lengths, starts, scale, B, S = call
    latent_hopper.latent_apart[(blocks * B * count,)](
        *made, part, part_lse, lengths, starts, scale, B, S, stride, rows, T, count, blocks,
        num_warps=4,
    )  # fmt: skip


def _launch(q: Tensor, latent: Tensor, rank: int, count: int, call: tuple[Any, ...]) -> None:
    B, H, T, width = q.shape
    blocks = -(-H * T // ROWS)
    block_r, block_e = power_of_two(rank), power_of_two(width - rank)
    content = TensorDescriptor.from_tensor(latent[..., :rank], [1, KEYS, block_r])
    rotary = TensorDescriptor.from_tensor(latent[..., rank:], [1, KEYS, block_e])
    _latent[(blocks * B * count,)](
        q, content, rotary, *call, H * T, T, count, blocks,
        R=rank, E=width - rank, BLOCK_R=block_r, BLOCK_E=block_e, ROWS=ROWS, KEYS=KEYS, num_warps=8, num_stages=2,
    )  # fmt: skip


@triton.jit
def _product(a, b, more):
    """`a @ b + more`, accumulated in float32."""
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), more, input_precision="ieee")
    else:
        product = tl.dot(a, b, more)
    return product


@triton.jit
def _tile(c, kappa, content, rotary, held, top, total, sums, scale, keys, first, last, MASKED: tl.constexpr):
    """One tile of latents `c`, `kappa` more in the running sums; `first <= keys < last` says who is seen."""
    scores = _product(rotary, kappa.T, None)
    scores = _product(content, c.T, scores)
    if MASKED:
        seen = (keys[None, :] >= first) & (keys[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    weights = tl.exp2(scores * scale - base[:, None])
    kept = tl.exp2(top - base)
    sums = sums * kept[:, None]
    total = total * kept + tl.sum(weights, 1)
    sums = _product(weights.to(c.dtype), held, sums)
    return new, total, sums


@triton.jit(do_not_specialize=["B", "S", "rows", "T", "count", "blocks"])
def _latent(
    q, content_of, rotary_of, out, lse, lengths, starts, scale, B, S, rows, T, count, blocks,
    R: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of one request over one share of its keys. Neighbours read the same keys."""
    program = tl.program_id(0)
    block, b, share = program % blocks, (program // blocks) % B, program // (blocks * B)
    at = block * ROWS + tl.arange(0, ROWS)
    real = at < rows
    channels, turned = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    here = (b.to(tl.int64) * rows + at) * (R + E)
    content = tl.load(q + here[:, None] + channels[None, :], mask=real[:, None] & (channels < R)[None, :], other=0.0)
    rotary = tl.load(q + here[:, None] + R + turned[None, :], mask=real[:, None] & (turned < E)[None, :], other=0.0)

    length = S if lengths is None else tl.load(lengths + b)
    first = 0 if starts is None else tl.load(starts + b)
    last = length - T + 1 + at % T  # one more than the last key of each row
    tiles = tl.cdiv(length, KEYS)
    low = first // KEYS
    each = tl.cdiv(tiles - low, count)
    low = low + share * each
    high = tl.minimum(low + each, tiles)
    # Tiles that every row sees whole; the others are few, and masked.
    whole_low = tl.maximum(low, tl.cdiv(first, KEYS))
    whole_high = tl.maximum(tl.minimum(high, (length - T + 1) // KEYS), whole_low)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_R], tl.float32)
    keys = tl.arange(0, KEYS)
    for tile in range(whole_low, whole_high):
        c = content_of.load([b, tile * KEYS, 0]).reshape(KEYS, BLOCK_R)
        kappa = rotary_of.load([b, tile * KEYS, 0]).reshape(KEYS, BLOCK_E)
        top, total, sums = _tile(c, kappa, content, rotary, c, top, total, sums, scale, keys, first, last, False)
    before = tl.minimum(whole_low, high) - low
    for number in tl.range(0, before + tl.maximum(high - whole_high, 0), num_stages=1):
        tile = tl.where(number < before, low + number, whole_high + number - before)
        c = content_of.load([b, tile * KEYS, 0]).reshape(KEYS, BLOCK_R)
        kappa = rotary_of.load([b, tile * KEYS, 0]).reshape(KEYS, BLOCK_E)
        # A weight of 0 does not undo what was never written there.
        held = tl.where((tile * KEYS + keys < length)[:, None], c, 0.0)
        top, total, sums = _tile(
            c, kappa, content, rotary, held, top, total, sums, scale, tile * KEYS + keys, first, last, True
        )

    some = total > 0
    sums = sums / tl.where(some, total, 1.0)[:, None]
    row = share.to(tl.int64) * B * rows + b.to(tl.int64) * rows + at
    where = row[:, None] * R + channels[None, :]
    tl.store(out + where, sums.to(out.dtype.element_ty), mask=real[:, None] & (channels < R)[None, :])
    natural = (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    tl.store(lse + row, tl.where(some, natural, float("-inf")), mask=real)


@triton.jit(do_not_specialize=["rows", "count"])
def _latent_join(part, part_lse, out, lse, rows, count, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """One program: one row, its shares joined."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_R)
    top, total = -float("inf"), 0.0
    sums = tl.zeros([BLOCK_R], tl.float32)
    for share in range(count):
        at = share.to(tl.int64) * rows + row
        own = tl.load(part_lse + at)
        new = tl.maximum(top, own)
        base = tl.where(new == float("-inf"), 0.0, new)
        weight, kept = tl.exp(own - base), tl.exp(top - base)
        found = tl.load(part + at * R + channels, mask=channels < R, other=0.0)
        sums, total, top = sums * kept + found * weight, total * kept + weight, new
    some = total > 0
    sums = sums / tl.where(some, total, 1.0)
    tl.store(out + row * R + channels, sums.to(out.dtype.element_ty), mask=channels < R)
    tl.store(lse + row, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")))
