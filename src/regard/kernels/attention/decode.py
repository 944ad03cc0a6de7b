"""Few queries over many keys: split over the keys by the work list of LeanAttention, each key and value read once.

All query rows of a KV head (its group of heads, times the new tokens) are the rows of one tile. A worker walks its
interval of the line of key tiles; where an output ends in it, it writes what it found. A second launch joins the pieces
of outputs that several workers read. Nothing is read back and no size depends on the lengths, so a CUDA graph may be
replayed while they grow. Few requests of one length that see all their keys go to `decode_hopper.py` where it can run.

Bytes: all keys and values once. FLOPs: `4 T H S D`, on rows padded to 16: a tenth of the card's at most.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.core.shapes import power_of_two
from regard.core.store import Part
from regard.kernels import device
from regard.kernels.attention import intervals
from regard.kernels.attention.arguments import on_gluon

TYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 64  # query rows of a KV head: new tokens times the group
WIDEST = 256
PIECES = tl.constexpr(64)  # of an output, joined in one go
CORES = 132  # of the card that is compiled for where there is none


class Launch(NamedTuple):
    """How the kernel is run: keys in a tile, stages of loads, warps, programs on a multiprocessor."""

    tile: int
    stages: int
    warps: int
    programs: int


# By bytes of a key and its value together, rounded up to a power of two.
LAUNCHES = {
    256: Launch(128, 3, 4, 2),
    512: Launch(64, 3, 4, 2),
    1024: Launch(32, 3, 4, 2),
    2048: Launch(16, 3, 4, 2),
}


def launch(k: Tensor, v: Tensor) -> Launch:
    """The configuration for these keys and values."""
    size = k.element_size() * (power_of_two(k.shape[-1]) + power_of_two(v.shape[-1]))
    return LAUNCHES[max(power_of_two(size), min(LAUNCHES))]


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `decode` cannot do this call, or None. Shapes are those of `decode` already."""
    if why := device.refuses(q):
        return why
    if not q.dtype == k.dtype == v.dtype or q.dtype not in TYPES:
        found = f"{q.dtype}, {k.dtype}, {v.dtype}"
        return f"the decoding kernel takes bfloat16, float16 and float32, all the same; not {found}"
    for name, size in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if size % 16 or not 16 <= size <= WIDEST:
            return f"the decoding kernel takes {name} of 16, 32, ..., {WIDEST}, not {size}"
    rows = q.shape[2] * q.shape[1] // k.shape[1]
    if rows > ROWS:
        return f"the decoding kernel takes up to {ROWS} query rows a KV head (T times the group), not {rows}"
    for name, x in (("k", k), ("v", v)):
        if x.stride(-1) != 1:
            return f"the decoding kernel needs the last dimension of {name} to be contiguous; strides {x.stride()}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "the decoding kernel has no gradients"
    return None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    positions: Tensor | None = None,
    q_positions: Tensor | None = None,
    sink: int = 0,
    recent: int | None = None,
    causal: bool = True,
    softcap: float | None = None,
    workers: int | None = None,
    part_of: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as `ops/decode.py` defines it, argument by argument; nothing is checked, ask `refuses` first.

    `workers` programs have an equal share of the tiles each; None: as many as run at once, or a few less.
    """
    B, H, T, D = q.shape
    Hk, Dv = k.shape[1], v.shape[3]
    plain = all(x is None for x in (lengths, pages, positions, q_positions, recent, softcap, workers, part_of))
    if plain and not sink and (found := _at_once(q, k, v, scale, causal)):
        return found
    chosen = launch(k, v)
    room = k.shape[2] if pages is None else pages.shape[1] * k.shape[2]
    programs = workers or _workers(
        B * Hk * -(-room // chosen.tile), _cores(k.device) * chosen.programs, lengths is None
    )
    group, block_v = H // Hk if part_of is None else part_of.group, power_of_two(Dv)
    if part_of is None:
        out, lse = q.new_empty(B, H, T, Dv), q.new_empty(B, H, T, dtype=torch.float32)
    else:
        out, lse = part_of.out, part_of.lse
    heads = None if part_of is None else part_of.heads
    # What is left unfinished at either end of a worker's interval, then its peaks and masses.
    part = torch.empty(programs * 2 * T * group * (Dv + 2), dtype=torch.float32, device=q.device)
    at = (0, 0, 0) if positions is None else _strides(positions if positions.dim() == 3 else positions[:, None])
    scattered = pages is not None and k.shape[2] % chosen.tile != 0
    _decode[(programs,)](
        q, k, v, out, lse, part, lengths, pages, positions, q_positions, heads,
        B, Hk, H // group, room, T, scale, softcap, sink, recent,
        0 if pages is None else pages.stride(0), *at, 0 if q_positions is None else _strides(q_positions)[0],
        q.stride(), k.stride(), v.stride(),
        GROUP=group, D=D, DV=Dv, BLOCK_D=power_of_two(D), BLOCK_V=block_v, ROWS=max(16, power_of_two(T * group)),
        TILE=chosen.tile, PAGE=None if pages is None else k.shape[2],
        CUT=causal and (T > 1 or positions is not None or q_positions is not None),
        # Small pages take two loads one after the other, and a stage for each.
        num_warps=chosen.warps, num_stages=2 * chosen.stages - 1 if scattered else chosen.stages,
    )  # fmt: skip
    if programs > 1:
        _merge[(B * Hk, T * group)](
            out, lse, part, lengths, heads, B, Hk, H // group, room, T, programs,
            GROUP=group, DV=Dv, BLOCK_V=block_v, TILE=chosen.tile, num_warps=4,
        )  # fmt: skip
    return out, lse


def _at_once(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor] | None:
    """By the kernel for Hopper, which needs no second launch; None: it does not do this call."""
    if not on_gluon(q.device):
        return None
    from regard.kernels.attention import decode_hopper

    if not decode_hopper.takes(q, k, v) or (space := decode_hopper.workspace(q.device)) is None:
        return None
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    decode_hopper.decode(q, k, v, out, lse, space, scale, causal)
    return out, lse


def _workers(tiles: int, most: int, known: bool) -> int:
    """Programs for a line of `tiles`, at most `most`; `known`: none of them can be empty.

    No more than it takes: 256 with 16 tiles each end sooner than 264, of which some have 15 and some read two outputs.
    """
    return -(-tiles // -(-tiles // most)) if known and tiles else most


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides by which rows and heads are found: 0 where one serves all."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))


@functools.cache
def _cores(where: torch.device) -> int:
    if where.type != "cuda":
        return CORES if where.type == "meta" else 4
    return torch.cuda.get_device_properties(where).multi_processor_count


# Triton's interpreter multiplies bfloat16 as if it were integers; its values are exact in float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# What changes from call to call and must not compile anew.
CHANGING = [
    "batch", "heads", "total", "room", "T", "sink", "recent", "pages_row", "at_row", "at_head", "at_key", "asked_row",
]  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def _decode(
    Q, K, V, OUT, LSE, PART, LENGTHS, PAGES, POSITIONS, ASKED, NAMED,
    batch, heads, total, room, T, scale, softcap, sink, recent, pages_row, at_row, at_head, at_key, asked_row,
    sq, sk, sv,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One worker: its interval of the line, output after output."""
    worker, workers = tl.program_id(0), tl.num_programs(0)
    whole = heads * intervals.before(LENGTHS, batch, room, TILE)
    place, stop = intervals.bound(worker, workers, whole), intervals.bound(worker + 1, workers, whole)
    rows, width, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query, mine, count = rows // GROUP, rows < T * GROUP, T * GROUP
    while place < stop:
        row, head, first, tiles = intervals.locate(LENGTHS, place, batch, room, heads, TILE)
        last, held = tl.minimum(tiles, first + stop - place), intervals.keys(LENGTHS, row, room)
        named = intervals.named(NAMED, head)
        spot = row.to(tl.int64) * sq[0] + (named * GROUP + rows % GROUP) * sq[1] + query * sq[2]
        q = tl.load(Q + spot[:, None] + width[None, :] * sq[3], mask=mine[:, None] & (width < D)[None, :], other=0.0)
        asked = query  # full attention does not place its queries among the keys
        if ASKED is not None:
            asked = tl.load(ASKED + row * asked_row + query, mask=mine, other=-1)
        elif CUT or recent is not None:
            asked += held - T
        peak = tl.full((ROWS,), -float("inf"), tl.float32)
        mass, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, BLOCK_V), tl.float32)
        if PAGE is not None:
            # A tile within a page needs one entry of the table, read while the tile before it is.
            ENTRIES, newest = PAGES + row.to(tl.int64) * pages_row, tl.maximum(held, 1) - 1
            ahead = tl.load(ENTRIES + first * TILE // PAGE, mask=held > 0, other=0)
        for tile in range(first, last):
            at = tile * TILE + tl.arange(0, TILE)
            inside = at < held
            page, slot = row, at
            if PAGE is not None:
                page, slot = ahead, at % PAGE
                if PAGE % TILE == 0:
                    ahead = tl.load(ENTRIES + tl.minimum((tile + 1) * TILE, newest) // PAGE)
                else:
                    page = tl.load(ENTRIES + at // PAGE, mask=inside, other=0)
            k_at = K + page.to(tl.int64) * sk[0] + head * sk[1] + slot.to(tl.int64) * sk[2]
            v_at = V + page.to(tl.int64) * sv[0] + head * sv[1] + slot.to(tl.int64) * sv[2]
            k = tl.load(k_at[None, :] + width[:, None], mask=inside[None, :] & (width < D)[:, None], other=0.0)
            s = _capped(_product(q, k) * scale, softcap) * 1.4426950408889634
            if POSITIONS is not None:
                at = tl.load(POSITIONS + row * at_row + head * at_head + at * at_key, mask=inside, other=-1)
            s = tl.where(_seen(asked, at, inside, sink, recent, CUT), s, -float("inf"))
            top = tl.maximum(peak, tl.max(s, 1))
            shift = tl.where(top == -float("inf"), 0.0, top)
            p = tl.exp2(s - shift[:, None])
            old = tl.exp2(peak - shift)
            mass = mass * old + tl.sum(p, 1)
            peak = top
            v = tl.load(v_at[:, None] + columns[None, :], mask=inside[:, None] & (columns < DV)[None, :], other=0.0)
            acc = acc * old[:, None] + _product(p.to(v.dtype), v)
        if last - first == tiles:
            _finish(OUT, LSE, rows, row, named, total, T, peak, mass, acc, GROUP, DV, BLOCK_V)
        else:
            _keep(PART, workers, worker * 2 + (first == 0).to(tl.int32), rows, count, peak, mass, acc, DV, BLOCK_V)
        place += last - first


@triton.jit
def _product(a, b):
    """`a @ b`, summed in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _capped(s, softcap):
    """`softcap * tanh(s / softcap)`, or `s` itself."""
    if softcap is not None:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
    return s


@triton.jit
def _seen(asked, at, inside, sink, recent, CUT: tl.constexpr):
    """Which of the keys at positions `at` the rows at positions `asked` see."""
    seen = (inside & (at >= 0))[None, :] & (asked >= 0)[:, None]
    if CUT:
        seen = seen & (at[None, :] <= asked[:, None])
    if recent is not None:
        seen = seen & ((at < sink)[None, :] | (asked[:, None] - at[None, :] < recent))
    return seen


@triton.jit(do_not_specialize=["batch", "heads", "total", "room", "T", "workers"])
def _merge(
    OUT, LSE, PART, LENGTHS, NAMED, batch, heads, total, room, T, workers,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One query row of one output, joined from its pieces; outputs that one worker read are written already."""
    row, head, line = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    whole = heads * intervals.before(LENGTHS, batch, room, TILE)
    tiles = intervals.counted(intervals.keys(LENGTHS, row, room), TILE)
    begun = heads * intervals.before(LENGTHS, row, room, TILE) + head * tiles
    low, high = intervals.reader(begun, workers, whole), intervals.reader(begun + tiles - 1, workers, whole)
    if low < high:
        count, columns = T * GROUP, tl.arange(0, BLOCK_V)
        STATS = PART + workers.to(tl.int64) * 2 * count * DV
        peak, mass = -float("inf"), 0.0
        acc = tl.zeros((BLOCK_V,), tl.float32)
        for first in range(low, high + 1, PIECES):
            worker = first + tl.arange(0, PIECES)
            spot = (worker * 2 + (worker == low).to(tl.int32)).to(tl.int64) * count + line
            here = worker <= high
            peaks = tl.load(STATS + spot * 2, mask=here, other=-float("inf"))
            masses = tl.load(STATS + spot * 2 + 1, mask=here, other=0.0)
            inside = here[:, None] & (columns < DV)[None, :]
            pieces = tl.load(PART + spot[:, None] * DV + columns[None, :], mask=inside, other=0.0)
            top = tl.maximum(peak, tl.max(peaks, 0))
            shift = tl.where(top == -float("inf"), 0.0, top)
            weights, old = tl.exp2(peaks - shift), tl.exp2(peak - shift)
            mass = mass * old + tl.sum(masses * weights, 0)
            acc = acc * old + tl.sum(pieces * weights[:, None], 0)
            peak = top
        one, named = tl.zeros((1,), tl.float32), intervals.named(NAMED, head)
        _finish(OUT, LSE, line + tl.arange(0, 1), row, named, total, T, peak + one, mass + one, acc[None, :],
                GROUP, DV, BLOCK_V)  # fmt: skip


@triton.jit
def _finish(
    OUT, LSE, rows, row, head, heads, T, peak, mass, acc, GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Write rows of an output; `peak` is the largest exponent of two. Without keys: 0 and -inf."""
    columns, mine = tl.arange(0, BLOCK_V), rows < T * GROUP
    here = ((row * heads + head) * GROUP + rows % GROUP).to(tl.int64) * T + rows // GROUP
    some = tl.where(mass == 0, 1.0, mass)
    tl.store(LSE + here, tl.where(mass == 0, -float("inf"), (peak + tl.log2(some)) * 0.6931471805599453), mask=mine)
    spot = here[:, None] * DV + columns[None, :]
    tl.store(OUT + spot, (acc / some[:, None]).to(OUT.dtype.element_ty), mask=mine[:, None] & (columns < DV)[None, :])


@triton.jit
def _keep(PART, workers, place, rows, count, peak, mass, acc, DV: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write a piece. Each worker has two places of `count` rows: one for the end of an output, one for a beginning."""
    columns, mine = tl.arange(0, BLOCK_V), rows < count
    STATS = PART + workers.to(tl.int64) * 2 * count * DV
    spot = place.to(tl.int64) * count + rows
    tl.store(STATS + spot * 2, peak, mask=mine)
    tl.store(STATS + spot * 2 + 1, mass, mask=mine)
    tl.store(PART + spot[:, None] * DV + columns[None, :], acc, mask=mine[:, None] & (columns < DV)[None, :])
