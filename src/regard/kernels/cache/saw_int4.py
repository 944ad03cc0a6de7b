"""Attention straight from codes of 4 or 8 bits (SAW-INT4, `ops/cache/saw_int4.py`): one read, one write.

A vector is `code_i s + lo`, so no vector is ever decoded: `q . k = s (q . code) + lo sum(q)`, and over keys
`sum_j p_j v_j = sum_j (p_j s_j) code_j + sum_j p_j lo_j`. What meets the tensor cores are the codes, as bfloat16 that
hold `128 + code` exactly (`codes.py`). The offsets leave again as `lo - 128 s`, and as the sum of what the codes were
multiplied by, rounded as it was multiplied.

Keys stand in the rows of the matrix products, query rows in their columns, because 8 columns is the least that a tensor
core takes, and 16 rows. A code of 8 bits is two nibbles, the higher one worth 16. A word of four bytes is read once and
stays in its thread: the permutations below lay channels and keys out as the tensor cores hold them.

Bytes a key and value of 4 bits: `D + 16`. Work is divided by the stream-K list of `kernels/attention/intervals.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.core.shapes import power_of_two
from regard.core.store import Fields, Form, Part
from regard.kernels import device
from regard.kernels.attention import intervals
from regard.kernels.cache.codes import dot, of_two, of_word, reciprocal, step_and_lo, to_bfloat16
from regard.kernels.cache.turn import rotated, turned

WIDTHS = (64, 128, 256)
ROWS = 64  # query rows of a KV head: new tokens times the group
CORES = 132  # of the card that is compiled for where there is none


class Launch(NamedTuple):
    """How the read is run: keys in a tile, stages of loads, warps, programs on a multiprocessor, registers a thread."""

    tile: int
    stages: int
    warps: int
    programs: int
    registers: int


# By query rows of a KV head, up to. With one warp a program there is nothing to wait for but memory. A multiprocessor
# has four schedulers, and the fullest sets the time: so programs of one warp come in fours.
LAUNCHES = {
    8: Launch(64, 2, 1, 12, 168),
    16: Launch(32, 3, 1, 8, 255),
    32: Launch(64, 3, 4, 2, 255),
    64: Launch(64, 3, 4, 2, 255),
}
WIDE = Launch(32, 3, 1, 8, 255)  # for up to 8 rows, where vectors take more than 64 bytes


def refuses(q: Tensor, keys: Fields, values: Fields, key: Form | None, value: Form | None) -> str | None:
    """Why `read` cannot do this call, or None. Shapes are those of `read` already."""
    if why := device.refuses(q):
        return why
    if q.dtype != torch.bfloat16:
        return f"the kernel that reads codes takes bfloat16 queries, not {q.dtype}"
    rows = q.shape[2] * q.shape[1] // keys[0].shape[1]
    if rows > ROWS:
        return f"the kernel that reads codes takes up to {ROWS} query rows a KV head (T times the group), not {rows}"
    for name, fields, form in (("D", keys, key), ("Dv", values, value)):
        if why := _unfit(name, fields, form):
            return why
        if form is None and fields[0].dtype != q.dtype:
            return f"what is not in codes must be {q.dtype} as the queries are, not {fields[0].dtype}"
    if torch.is_grad_enabled() and q.requires_grad:
        return "the kernel that reads codes has no gradients"
    return None


def refuses_write(
    k: Tensor, v: Tensor, keys: Fields, values: Fields, key: Form | None, value: Form | None
) -> str | None:
    """Why `write` cannot do this call, or None."""
    if why := device.refuses(k):
        return why
    for name, x, fields, form in (("D", k, keys, key), ("Dv", v, values, value)):
        if why := _unfit(name, fields, form):
            return why
        if x.dtype == torch.float64 or (form is None and x.dtype != fields[0].dtype):
            return f"the kernel that writes codes takes 16- and 32-bit floats as they are stored, not {x.dtype}"
    return None


def _unfit(name: str, fields: Fields, form: Form | None) -> str | None:
    width = fields[0].shape[-1] * (2 if form is not None and form.bits == 4 else 1)
    if width not in WIDTHS:
        return f"the kernels of codes take {name} of {', '.join(map(str, WIDTHS))}, not {width}"
    for field in fields:
        if field.stride(-1) != 1 or any(stride % field.shape[-1] for stride in field.stride()[:-1]):
            return f"the kernels of codes need whole vectors next to each other; strides {field.stride()}"
        if field.stride(2) != field.shape[-1] or field.storage_offset() % field.shape[-1]:
            return f"the kernels of codes need the tokens of a head next to each other; strides {field.stride()}"
    return None


def read(
    q: Tensor,
    keys: Fields,
    values: Fields,
    *,
    key: Form | None,
    value: Form | None,
    scale: float,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    positions: Tensor | None = None,
    q_positions: Tensor | None = None,
    sink: int = 0,
    recent: int | None = None,
    causal: bool = True,
    workers: int | None = None,
    launch: Launch | None = None,
    part_of: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over keys and values in codes. Nothing is checked: ask `refuses` first.

    Args:
        q: `[B, H, T, D]` bfloat16, as the model makes them: they are rotated here.
        keys: codes and `(s, lo)` as `Form` says, or `(k [B, Hk, S, D],)`; with `pages`, pools `[P, Hk, page, *]`.
        values: as `keys`.
        key: bits and rotation of the keys; None: as they come.
        value: the same of the values; the output is rotated back.
        scale: of the scores.
        lengths: `[B]` int32 or int64, keys of each request, the new ones included; None: all there is room for.
        pages: `[B, n]` int32 or int64.
        positions: `[1|B, 1|Hk, S]` integers; negative: not a key. None: consecutive, the last query at `length - 1`.
        q_positions: `[1|B, T]`; given with `positions`.
        sink: with `recent`, positions below it are seen whatever their distance.
        recent: positions a query may look back, its own included; None: all.
        causal: whether no query sees what follows it.
        workers: programs; None: as many as run at once.
        launch: instead of the one of the table.
        part_of: which heads of `q` the keys are of, and where their answers go.

    Returns:
        out `[B, H, T, Dv]` in q's dtype, lse `[B, H, T]` float32.
    """
    group = q.shape[1] // keys[0].shape[1] if part_of is None else part_of.group
    rows = q.shape[2] * group
    chosen = launch or _launch(max(8, power_of_two(rows)), keys, values)
    room = keys[0].shape[2] * (1 if pages is None else pages.shape[1])
    tiles = q.shape[0] * keys[0].shape[1] * -(-max(room, 1) // chosen.tile)
    programs = min(workers or _workers(q.device, chosen), tiles)
    where = {"lengths": lengths, "pages": pages, "positions": positions, "q_positions": q_positions}
    see = {"sink": sink, "recent": recent, "causal": causal}
    return _run(q, keys, values, key, value, scale, programs, chosen, room, group, part_of, **where, **see)


def _run(
    q: Tensor, keys: Fields, values: Fields, key: Form | None, value: Form | None, scale: float,
    programs: int, chosen: Launch, room: int, group: int, part_of: Part | None, *,
    lengths: Tensor | None, pages: Tensor | None,
    positions: Tensor | None, q_positions: Tensor | None, sink: int, recent: int | None, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both launches of `read`."""
    B, H, T, D = q.shape
    Hk, rows = keys[0].shape[1], T * group
    Dv = values[0].shape[3] * (2 if value is not None and value.bits == 4 else 1)
    if part_of is None:
        out, lse, heads = q.new_empty(B, H, T, Dv), q.new_empty(B, H, T, dtype=torch.float32), None
    else:
        out, lse, heads = part_of.out, part_of.lse, part_of.heads
    # Along the line either the worker or the output changes from one piece to the next: their sum names a piece.
    part, stats = (q.new_empty(programs + B * Hk, rows, n, dtype=torch.float32) for n in (Dv, 2))
    _read_codes[(programs,)](
        q, *_words(keys, key), *_words(values, value), part, stats, lengths, pages, positions, q_positions,
        heads, B, Hk, room, T, scale, sink, recent, *_rows(keys), *_rows(values),
        0 if pages is None else pages.stride(0), *_shared(positions, 3), _shared(q_positions, 2)[0], *q.stride(),
        KEY=_bits(key), VALUE=_bits(value), TURN=_log(key), PAGE=None if pages is None else keys[0].shape[2],
        CUT=causal and (T > 1 or positions is not None), GROUP=group, D=D, DV=Dv,
        COLUMNS=max(8, power_of_two(rows)), TILE=chosen.tile,
        num_warps=chosen.warps, num_stages=chosen.stages, maxnreg=chosen.registers,
    )  # fmt: skip
    _merge[(B * Hk, rows)](
        out, lse, part, stats, lengths, heads, B, Hk, H // group, room, T, programs,
        GROUP=group, DV=Dv, TURN=_log(value), TILE=chosen.tile, num_warps=4,
    )  # fmt: skip
    return out, lse


def write(
    k: Tensor,
    v: Tensor,
    keys: Fields,
    values: Fields,
    *,
    key: Form | None,
    value: Form | None,
    start: int | Tensor = 0,
    pages: Tensor | None = None,
    heads: Tensor | None = None,
) -> None:
    """Rotate, quantise, pack and store `k [B, Hk, T, D]` and `v`, in one launch. Nothing is checked.

    Args:
        k: bfloat16, float16 or float32, any strides.
        v: as `k`.
        keys: where codes and `(s, lo)` go, as in `read`.
        values: the same of the values.
        key: bits and rotation of the keys; None: as they come.
        value: the same of the values.
        start: slot of the first new token, or `[B]` integers, one a request.
        pages: `[B, n]` int32 or int64: slot i of a request lies in page `pages[b, i // page]`.
        heads: `[n]` integers, the heads of `k` and `v` that `keys` and `values` hold; None: all.
    """
    (B, _, T, D), Hk = k.shape, keys[0].shape[1]
    several = isinstance(start, Tensor)
    tokens = min(16, power_of_two(T))
    _write_codes[(-(-T // tokens), B * Hk, 2)](
        k, v, *_pair(keys), *_pair(values), start if several else None, pages, heads,
        Hk, T, 0 if several else start, *_rows(keys), *_rows(values), 0 if pages is None else pages.stride(0),
        *k.stride(), *v.stride(), D=D, DV=v.shape[-1], TOKENS=tokens,
        KEY=_bits(key), VALUE=_bits(value),
        TURN_K=_log(key), TURN_V=_log(value), PAGE=None if pages is None else keys[0].shape[2],
        num_warps=1 if tokens == 1 else 4,
    )  # fmt: skip


def _launch(columns: int, keys: Fields, values: Fields) -> Launch:
    """The configuration for so many columns."""
    wide = max(fields[0].shape[-1] * fields[0].element_size() for fields in (keys, values)) > 64
    return WIDE if wide and columns == 8 else LAUNCHES[columns]


def _workers(where: torch.device, chosen: Launch) -> int:
    """Programs that run at once; a few where they are interpreted."""
    if where.type == "cpu":
        return 2
    cores = CORES if where.type == "meta" else torch.cuda.get_device_properties(where).multi_processor_count
    return cores * chosen.programs


def _bits(form: Form | None) -> int:
    return 16 if form is None else form.bits


def _log(form: Form | None) -> int:
    """Logarithm of the order of the rotation."""
    return 0 if form is None else form.order.bit_length() - 1


def _pair(fields: Fields) -> tuple[Tensor, Tensor | None]:
    return (fields[0], fields[1]) if len(fields) == 2 else (fields[0], None)


def _words(fields: Fields, form: Form | None) -> tuple[Tensor, Tensor | None]:
    """Codes as words of four bytes, and `(s, lo)` as one of eight."""
    return (fields[0], None) if form is None else (fields[0].view(torch.int32), fields[1].view(torch.int64)[..., 0])


def _rows(fields: Fields) -> tuple[int, int, int, int]:
    """How many vectors lie from one request to the next, and from one head to the next, in either field."""
    first, last = fields[0], fields[-1]
    one, other = first.shape[-1], last.shape[-1]
    return first.stride(0) // one, first.stride(1) // one, last.stride(0) // other, last.stride(1) // other


def _shared(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of positions by request, head and token: 0 where one serves all."""
    if x is None:
        return (0,) * dims
    x = x if x.dim() == dims else x[:, None]
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))


@triton.jit(do_not_specialize=[
    "batch", "heads", "room", "T", "sink", "recent", "k_row", "k_head", "ka_row", "ka_head", "v_row", "v_head",
    "va_row", "va_head", "pages_row", "at_row", "at_head", "at_key", "asked_row", "q_row", "q_head", "q_token",
    "q_channel",
])  # fmt: skip
def _read_codes(
    Q, K, KA, V, VA, PART, STATS, LENGTHS, PAGES, POSITIONS, ASKED, NAMED, batch, heads, room, T, scale, sink, recent,
    k_row, k_head, ka_row, ka_head, v_row, v_head, va_row, va_head, pages_row,
    at_row, at_head, at_key, asked_row, q_row, q_head, q_token, q_channel,
    KEY: tl.constexpr, VALUE: tl.constexpr, TURN: tl.constexpr, PAGE: tl.constexpr, CUT: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One worker: its interval of the line of tiles, output after output."""
    worker, workers = tl.program_id(0), tl.num_programs(0)
    whole = heads * intervals.before(LENGTHS, batch, room, TILE)
    place, stop = intervals.bound(worker, workers, whole), intervals.bound(worker + 1, workers, whole)
    column = tl.arange(0, COLUMNS)
    mine, count, scale = column < T * GROUP, T * GROUP, scale * 1.4426950408889634
    while place < stop:
        row, head, first, tiles = intervals.locate(LENGTHS, place, batch, room, heads, TILE)
        last = tl.minimum(tiles, first + stop - place)
        held = intervals.keys(LENGTHS, row, room)
        row, named = row.to(tl.int64), intervals.named(NAMED, head)
        spot = row * q_row + (named * GROUP + column % GROUP) * q_head + (column // GROUP) * q_token
        asked = column // GROUP
        if ASKED is not None:
            asked = tl.load(ASKED + row * asked_row + asked, mask=mine, other=-1)
        elif CUT or recent is not None:
            asked += held - T
        q0, q1, q2, q3, qsum = _queries(Q, spot, mine, q_channel, COLUMNS, D, KEY, TURN)
        m = tl.full((COLUMNS,), -float("inf"), tl.float32)
        # Sums over keys, of probabilities and of what is no code in the output: over each thread's own keys first.
        mass = tl.zeros((16, COLUMNS), tl.float32)
        rest = tl.zeros((16, COLUMNS), tl.float32)
        acc = tl.zeros((2 * DV if VALUE == 8 else DV, COLUMNS), tl.float32)
        for tile in range(first, last):
            begin, local = tile * TILE, tl.arange(0, TILE)
            here = local < held - begin
            s = _scores(K, KA, PAGES, row, head, begin, here, k_row, k_head, ka_row, ka_head, pages_row,
                        q0, q1, q2, q3, qsum, scale, D, KEY, PAGE, TILE)  # fmt: skip
            at = begin + local
            if POSITIONS is not None:
                at = tl.load(POSITIONS + row * at_row + head * at_head + at * at_key, mask=here, other=-1)
                here = at >= 0
            seen = here[:, None]
            if CUT:
                seen = seen & (at[:, None] <= asked[None, :]) & (asked >= 0)[None, :]
            if recent is not None:
                seen = seen & ((at < sink)[:, None] | (asked[None, :] - at[:, None] < recent))
            s = tl.where(seen, s, -float("inf"))
            top = tl.maximum(m, tl.max(s, 0))
            shift = tl.where(top == -float("inf"), 0.0, top)
            old = tl.exp2(m - shift)
            p = tl.exp2(s - shift[None, :])
            m = top
            mass = mass * old[None, :] + _folded(p, TILE, COLUMNS)
            acc, rest = _weighed(V, VA, PAGES, row, head, begin, held, v_row, v_head, va_row, va_head, pages_row,
                                 p, old, acc, rest, DV, VALUE, PAGE, TILE, COLUMNS)  # fmt: skip
        _keep(PART, STATS, (worker + row * heads + head) * count, column, mine, m, mass, rest, acc, DV, VALUE)
        place += last - first


@triton.jit
def _queries(Q, spot, mine, q_channel, COLUMNS: tl.constexpr, D: tl.constexpr, KEY: tl.constexpr, TURN: tl.constexpr):
    """Queries that begin at `spot [COLUMNS]`, rotated, and their sums.

    They are right sides of products with keys, `[channels, COLUMNS]`.

    Codes come as four matrices: of a word's bytes 0 and 2, low nibbles, then 1 and 3, then both again, high nibbles. In
    each, channels lie as `_scores` lays the words.
    """
    channel = tl.arange(0, 16)[:, None] + 16 * tl.arange(0, D // 16)[None, :]
    q = tl.load(Q + spot[None, None, :] + channel[:, :, None] * q_channel, mask=mine[None, None, :], other=0.0)
    q = to_bfloat16(turned(q, COLUMNS, D, TURN)) if TURN > 0 else q
    q = q.permute(2, 1, 0).reshape(COLUMNS, D)
    qsum = tl.sum(q.to(tl.float32), 1)
    if KEY == 4:
        q = q.reshape(COLUMNS, 2, 4, D // 64, 2, 2, 2).permute(3, 2, 4, 5, 0, 1, 6).reshape(D // 4, COLUMNS, 2, 2)
        even, odd = q.split()
        q0, q2 = even.split()
        q1, q3 = odd.split()
    elif KEY == 8:
        q = q.reshape(COLUMNS, 4, D // 32, 2, 2, 2).permute(2, 1, 3, 4, 0, 5).reshape(D // 2, COLUMNS, 2)
        q0, q1 = q.split()
        q2, q3 = (16 * q0.to(tl.float32)).to(q.dtype), (16 * q1.to(tl.float32)).to(q.dtype)
    else:
        q0 = tl.trans(q)
        q1, q2, q3 = q0, q0, q0
    return q0, q1, q2, q3, qsum


@triton.jit
def _scores(
    K, KA, PAGES, row, head, begin, here, k_row, k_head, ka_row, ka_head, pages_row, q0, q1, q2, q3, qsum, scale,
    D: tl.constexpr, KEY: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores `[TILE, COLUMNS]` of a tile of keys, times `scale`."""
    local = tl.arange(0, TILE)
    base, spot = _vectors(PAGES, row, head, begin, local, here, k_row, k_head, pages_row, PAGE)
    if KEY == 16:
        s = dot(_vector(K, base, spot, here, D, 0.0), q0) * scale
    else:
        W: tl.constexpr = D // 8 if KEY == 4 else D // 4
        words = _vector(K, base, spot, here, W, 0)
        base, spot = _vectors(PAGES, row, head, begin, local, here, ka_row, ka_head, pages_row, PAGE)
        affine = tl.load(KA + base + spot, mask=here, other=0)
        words = words.reshape(TILE, 4, W // 8, 2).permute(0, 2, 1, 3).reshape(TILE, W)
        a, b, c, d, e, f, g, h = of_word(words)
        s = dot(tl.join(a, b).reshape(TILE, 2 * W), q0)
        s += dot(tl.join(c, d).reshape(TILE, 2 * W), q1)
        s += dot(tl.join(e, f).reshape(TILE, 2 * W), q2)
        s += dot(tl.join(g, h).reshape(TILE, 2 * W), q3)
        OFFSET: tl.constexpr = 128.0 if KEY == 4 else 128.0 * 17
        step, lo = step_and_lo(affine)
        step *= scale
        s = s * step[:, None] + (lo * scale - OFFSET * step)[:, None] * qsum[None, :]
    return s


@triton.jit
def _weighed(
    V, VA, PAGES, row, head, begin, held, v_row, v_head, va_row, va_head, pages_row, p, old, acc, rest,
    DV: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`acc` of codes and `rest`, rescaled by `old`, with a tile of values weighed by `p [TILE, COLUMNS]`."""
    local = tl.arange(0, TILE)
    here = local < held - begin
    if VALUE == 16:
        base, spot = _vectors(PAGES, row, head, begin, local, here, v_row, v_head, pages_row, PAGE)
        v = _vector(V, base, spot, here, DV, 0.0)
        acc = acc * old[None, :] + dot(tl.trans(v), to_bfloat16(p))
    else:
        OFFSET: tl.constexpr = 128.0 if VALUE == 4 else 128.0 * 17
        base, spot = _vectors(PAGES, row, head, begin, local, here, va_row, va_head, pages_row, PAGE)
        affine = tl.load(VA + base + spot, mask=here, other=0)
        step, lo = step_and_lo(affine)
        weight = to_bfloat16(p * step[:, None])
        # What was rounded weighs all of `code + lo / step`: rounding that falls on codes alone falls on all channels
        # alike, and rotating back piles it up in one. A slot without a key has a step of 0.
        more = (lo * reciprocal(tl.maximum(step, 1e-30)) - OFFSET)[:, None] * weight.to(tl.float32)
        rest = rest * old[None, :] + _folded(more, TILE, COLUMNS)
        codes = _columns(
            _half(V, PAGES, row, head, begin, held, v_row, v_head, pages_row, 0, DV, VALUE, PAGE, TILE),
            _half(V, PAGES, row, head, begin, held, v_row, v_head, pages_row, 1, DV, VALUE, PAGE, TILE),
            acc.shape[0], TILE,
        )  # fmt: skip
        weight = weight.reshape(2, 2, TILE // 16, 4, COLUMNS).permute(2, 3, 1, 0, 4).reshape(TILE, COLUMNS)
        acc = acc * old[None, :] + dot(codes, weight)
    return acc, rest


@triton.jit
def _half(
    V, PAGES, row, head, begin, held, v_row, v_head, pages_row,
    HALF: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Words `[TILE / 2, W]` of half a tile of values. Neighbours in memory go to neighbouring threads."""
    W: tl.constexpr = DV // 8 if VALUE == 4 else DV // 4
    local = HALF * (TILE // 2) + tl.arange(0, TILE // 2)
    here = local < held - begin
    base, spot = _vectors(PAGES, row, head, begin, local, here, v_row, v_head, pages_row, PAGE)
    words = _vector(V, base, spot, here, W, 0)
    return words.reshape(2, TILE // 16, 4, W // 2, 2).permute(1, 2, 0, 4, 3).reshape(TILE // 2, W)


@triton.jit
def _columns(first, second, M: tl.constexpr, TILE: tl.constexpr):
    """Codes plus 128 as a left side `[M, TILE]`: rows by nibble, byte and word (see `_keep`), columns pairs of keys."""
    a, b, c, d, e, f, g, h, p, q, r, s, t, u, v, w = of_two(first, second)
    byte0 = tl.join(tl.join(a, b), tl.join(c, d))
    byte1 = tl.join(tl.join(e, f), tl.join(g, h))
    byte2 = tl.join(tl.join(p, q), tl.join(r, s))
    byte3 = tl.join(tl.join(t, u), tl.join(v, w))
    all_ = tl.join(tl.join(byte0, byte2), tl.join(byte1, byte3))
    return all_.permute(3, 4, 5, 1, 0, 2).reshape(M, TILE)


@triton.jit
def _keep(PART, STATS, spot, column, mine, m, mass, rest, acc, DV: tl.constexpr, VALUE: tl.constexpr):
    """Write a piece: its largest exponent, its sum and what its values sum to."""
    at = tl.arange(0, DV)
    if VALUE != 16:
        W: tl.constexpr = DV // 8 if VALUE == 4 else DV // 4
        if VALUE == 8:
            low, high = acc.reshape(2, DV, acc.shape[1]).permute(1, 2, 0).split()
            acc = low + 16 * high
        acc += tl.sum(rest, 0)[None, :]
        byte, word = at % (4 * W) // W, at % W
        at = at // (4 * W) * (4 * W) + 4 * (2 * (word % (W // 2)) + word // (W // 2)) + byte
    tl.store(STATS + (spot + column) * 2, m, mask=mine)
    tl.store(STATS + (spot + column) * 2 + 1, tl.sum(mass, 0), mask=mine)
    tl.store(PART + (spot + column)[None, :] * DV + at[:, None], acc, mask=mine[None, :])


@triton.jit(do_not_specialize=["batch", "heads", "total", "room", "T", "workers"])
def _merge(
    OUT, LSE, PART, STATS, LENGTHS, NAMED, batch, heads, total, room, T, workers,
    GROUP: tl.constexpr, DV: tl.constexpr, TURN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One query row of one output, joined from its pieces and rotated back. Without keys: 0 and -inf."""
    output, line, channels = tl.program_id(0), tl.program_id(1), tl.arange(0, DV)
    row, head = output // heads, output % heads
    whole = heads * intervals.before(LENGTHS, batch, room, TILE)
    tiles = intervals.counted(intervals.keys(LENGTHS, row, room), TILE)
    begun = heads * intervals.before(LENGTHS, row, room, TILE) + head * tiles
    low, high = intervals.reader(begun, workers, whole), intervals.reader(begun + tiles - 1, workers, whole)
    CHUNK: tl.constexpr = 16384 // DV
    m = tl.full((1,), -float("inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, DV), tl.float32)
    for begin in range(low, high + 1, CHUNK):
        worker = begin + tl.arange(0, CHUNK)
        spot = (worker + output).to(tl.int64) * (T * GROUP) + line
        here = worker <= high
        ms = tl.load(STATS + spot * 2, mask=here, other=-float("inf"))
        ls = tl.load(STATS + spot * 2 + 1, mask=here, other=0.0)
        pieces = tl.load(PART + spot[:, None] * DV + channels[None, :], mask=here[:, None], other=0.0)
        top = tl.maximum(m, tl.max(ms, 0))
        shift = tl.where(top == -float("inf"), 0.0, top)
        weights, old = tl.exp2(ms - shift), tl.exp2(m - shift)
        mass = mass * old + tl.sum(ls * weights, 0)
        acc = acc * old[:, None] + tl.sum(pieces * weights[:, None], 0)[None, :]
        m = top
    some = tl.where(mass == 0, 1.0, mass)
    head = intervals.named(NAMED, head)
    one, spot = tl.arange(0, 1), ((row * total + head) * GROUP + line % GROUP).to(tl.int64) * T + line // GROUP
    tl.store(LSE + spot + one, tl.where(mass == 0, -float("inf"), (m + tl.log2(some)) * 0.6931471805599453))
    out = rotated(acc / some[:, None], 1, DV, TURN)
    tl.store(OUT + (spot + one)[:, None] * DV + channels[None, :], out.to(OUT.dtype.element_ty))


@triton.jit(do_not_specialize=[
    "heads", "T", "start", "k_row", "k_head", "ka_row", "ka_head", "v_row", "v_head", "va_row", "va_head",
    "pages_row", "xk_row", "xk_head", "xk_token", "xk_channel", "xv_row", "xv_head", "xv_token", "xv_channel",
])  # fmt: skip
def _write_codes(
    XK, XV, K, KA, V, VA, STARTS, PAGES, NAMED, heads, T, start,
    k_row, k_head, ka_row, ka_head, v_row, v_head, va_row, va_head, pages_row,
    xk_row, xk_head, xk_token, xk_channel, xv_row, xv_head, xv_token, xv_channel,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    TURN_K: tl.constexpr, TURN_V: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one head, keys or values."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, head, here = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads, token < T
    if STARTS is not None:
        start = tl.load(STARTS + row).to(tl.int32)
    named = intervals.named(NAMED, head)
    if tl.program_id(2) == 0:
        x = XK + row * xk_row + named * xk_head + token.to(tl.int64)[:, None] * xk_token
        x = tl.load(x + tl.arange(0, D)[None, :] * xk_channel, mask=here[:, None], other=0.0)
        _stored(x, K, KA, PAGES, row, head, start, token, here, k_row, k_head, ka_row, ka_head, pages_row,
                D, TOKENS, KEY, TURN_K, PAGE)  # fmt: skip
    else:
        x = XV + row * xv_row + named * xv_head + token.to(tl.int64)[:, None] * xv_token
        x = tl.load(x + tl.arange(0, DV)[None, :] * xv_channel, mask=here[:, None], other=0.0)
        _stored(x, V, VA, PAGES, row, head, start, token, here, v_row, v_head, va_row, va_head, pages_row,
                DV, TOKENS, VALUE, TURN_V, PAGE)  # fmt: skip


@triton.jit
def _stored(
    x, CODES, AFFINE, PAGES, row, head, start, token, here, by_row, by_head, affine_row, affine_head, pages_row,
    D: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, TURN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Quantise vectors `[TOKENS, D]` and store them, operation for operation as `ops/cache/saw_int4.py` does."""
    base, spot = _vectors(PAGES, row, head, start, token, here, by_row, by_head, pages_row, PAGE)
    if BITS == 16:
        tl.store(CODES + base * D + (spot * D)[:, None] + tl.arange(0, D)[None, :], x, mask=here[:, None])
    else:
        LEVELS: tl.constexpr = 2.0**BITS - 1
        # Summed in float64, as there: the float32 that comes out does not depend on the order of the sum.
        z = rotated(x.to(tl.float64), TOKENS, D, TURN).to(tl.float32) if TURN > 0 else x.to(tl.float32)
        # Minimum and maximum pass NaN over; this does not, nor infinity.
        unfit = tl.sum(z * 0.0, 1)
        lo = tl.min(z, 1) + unfit
        step = tl.div_rn(tl.maximum(tl.max(z, 1) - lo, 1e-8), tl.full((TOKENS,), LEVELS, tl.float32)) + unfit
        codes = (tl.div_rn(z - lo[:, None], tl.broadcast_to(step[:, None], (TOKENS, D))) + 0.5).to(tl.int32)
        if BITS == 4:
            low, high = codes.reshape(TOKENS, 2, D // 2).permute(0, 2, 1).split()
            codes = low + 16 * high
        W: tl.constexpr = D // 2 if BITS == 4 else D
        tl.store(
            CODES + base * W + (spot * W)[:, None] + tl.arange(0, W)[None, :], codes.to(tl.uint8), mask=here[:, None]
        )
        base, spot = _vectors(PAGES, row, head, start, token, here, affine_row, affine_head, pages_row, PAGE)
        tl.store(AFFINE + (base + spot) * 2, step, mask=here)
        tl.store(AFFINE + (base + spot) * 2 + 1, lo, mask=here)


@triton.jit
def _vectors(PAGES, row, head, begin, local, here, by_row, by_head, pages_row, PAGE: tl.constexpr):
    """Which vectors of a field are those of slots `begin + local`: one number for all of them, and the rest."""
    if PAGE is None:
        # What changes from tile to tile is the same for all threads; the rest of an address never changes.
        return row * by_row + head * by_head + begin, local
    else:
        page = tl.load(PAGES + row * pages_row + (begin + local) // PAGE, mask=here, other=0).to(tl.int64)
        return (head * by_head).to(tl.int64), page * by_row + (begin + local) % PAGE


@triton.jit
def _vector(X, base, spot, here, D: tl.constexpr, other: tl.constexpr):
    """Vectors `[n, D]` of a field."""
    return tl.load(X + base * D + (spot * D)[:, None] + tl.arange(0, D)[None, :], mask=here[:, None], other=other)


@triton.jit
def _folded(x, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over keys `[TILE, COLUMNS]` down to 16, all inside a thread."""
    return tl.sum(x.reshape(TILE // 16, 16, COLUMNS), 0)
