"""A RAT layer between its projections on a GPU, forward and backward: four kernels around torch's attention.

`summarize` reads what the first projection gives and writes the summaries of all tokens, the chunk ends, the rotated
queries and every token's score with its own summary; torch's fused attention reads the chunk ends; `finish` joins the
two and gates the output. `finish_gradients`, torch's backward and `summarize_gradients` are the way back. What torch's
operators would write and read again between those steps took more than a third of such a layer's time.

A program walks the tokens of one chunk, for all heads that share a query and a key, with the states of these heads in
registers: so nothing is handed from program to program, shared vectors are read once, and their gradients are summed
where they arise. Sums are float32. Loads do not run ahead of the loop: with 2, 3, 4 or 6 stages it was no faster.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels import device
from regard.primitives import sdpa
from regard.primitives.rotary import rotate, turns

LANES = 256  # numbers that a warp holds of every tensor


class Sizes(NamedTuple):
    """Of one call: rows, tokens, heads, groups of queries and keys, channels of a head, tokens a chunk."""

    B: int
    T: int
    H: int
    G: int
    D: int
    C: int

    @property
    def chunks(self) -> int:
        """Chunks, the last of them perhaps open."""
        return -(-self.T // self.C)

    @property
    def past(self) -> int:
        """Chunk ends that are read, and chunks that read any."""
        return self.chunks - 1

    def constants(self) -> dict[str, int]:
        """Of a launch."""
        ranks, wide = (1 << (n - 1).bit_length() for n in (self.H // self.G, self.D))
        warps = min(max(ranks * wide // LANES, 1), 8)
        sizes = {"HEADS": self.H, "GROUPS": self.G, "DIM": self.D, "RANKS": ranks, "WIDE": wide}
        return sizes | {"num_warps": warps}


def refuses(joined: Tensor, *, heads: int, groups: int) -> str | None:
    """Why `mix` cannot do this call, or None. Sizes are those of a RAT layer already."""
    if why := device.refuses(joined):
        return why
    if joined.dtype not in (torch.bfloat16, torch.float16):
        return f"the RAT kernels take bfloat16 and float16, got {joined.dtype}"
    if 0 in joined.shape:
        return f"there are no tokens in {list(joined.shape)}"
    if joined.shape[0] > 65535:
        return f"a launch has at most 65,535 rows, got {joined.shape[0]}"
    head = joined[:, :1, None, : _dim(joined, heads, groups)]
    return sdpa.own_refuses(head, head, head)


def _dim(joined: Tensor, heads: int, groups: int) -> int:
    """Channels of a head."""
    return joined.shape[-1] // (3 * heads + 2 * groups)


def mix(joined: Tensor, bias: Tensor, *, heads: int, groups: int, chunk: int, base: float | None) -> Tensor:
    """`sigmoid(z) * rat(q, k, v, sigmoid(g + bias))` for the columns z, v, g, q, k of `joined`, with no past.

    Nothing is checked: ask `refuses` first.

    Args:
        joined: `[B, T, 3 H D + 2 G D]`: z, v, g of every head, then q, k of every group; head h reads group `h % G`.
        bias: `[H D]`.
        heads: H.
        groups: G, dividing H.
        chunk: tokens a chunk, C.
        base: of the rotary positions, counted in chunks; None: none.

    Returns:
        `[B, T, H D]` in the dtype of `joined`, differentiable once.
    """
    return _Mix.apply(joined.contiguous(), bias.contiguous(), heads, groups, chunk, base)  # type: ignore[return-value]


class _Mix(torch.autograd.Function):
    """`mix`."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, bias: Tensor, heads: int, groups: int, chunk: int, base: float | None):
        size = Sizes(*joined.shape[:2], heads, groups, _dim(joined, heads, groups), chunk)
        cos, sin = _positions(size, base, joined)
        keys, values, q, ends, scores = _summarize(joined, bias, cos, sin, size)
        k, v = (x[:, None] for x in ends)
        if base is not None:
            k = rotate(k, _numbers(size, joined), base)
        if size.past:
            mean, lse, extra = sdpa.causal(q, k, v, scale=size.D**-0.5, trained=any(ctx.needs_input_grad))
        else:
            mean, lse, extra = torch.empty_like(q), torch.empty_like(scores), ()
        out, lse = _finish(joined, values, mean, lse, scores, size)
        tensors, ctx.extra = sdpa.apart(extra)
        ctx.save_for_backward(joined, bias, cos, sin, keys, values, q, k, v, scores, mean, lse, *tensors)
        ctx.size, ctx.base = size, base
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        joined, bias, cos, sin, keys, values, q, k, v, scores, mean, lse, *tensors = ctx.saved_tensors
        size: Sizes = ctx.size
        given = torch.empty_like(joined)
        dout, first, dscores = _finish_gradients(joined, values, mean, lse, scores, dy.contiguous(), q, given, size)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if size.past:
            extra = sdpa.together(tensors, ctx.extra)
            dq, dk, dv = sdpa.causal_gradients(dout, (q, k, v), mean, lse, scale=size.D**-0.5, extra=extra)
        if ctx.base is not None:
            dk = rotate(dk, -_numbers(size, joined), ctx.base)
        parts = (dq, dk.contiguous(), dv.contiguous(), dout, first, dscores)
        dbias = _summarize_gradients(joined, bias, cos, sin, keys, values, scores, lse, parts, given, size)
        return given, dbias.to(bias.dtype), None, None, None, None


def _numbers(size: Sizes, like: Tensor) -> Tensor:
    """Of the chunks whose ends are read, `[1, past]`."""
    return torch.arange(size.past, device=like.device)[None]


def _positions(size: Sizes, base: float | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines of all chunks, `[chunks, D / 2]` in float32."""
    if base is None:
        return None, None
    cos, sin = turns(torch.arange(size.chunks, device=like.device), size.D, base)
    return cos, sin


def _summarize(
    joined: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, size: Sizes
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Summaries `[B, T, H, D]`, queries `[B H, C, past, D]`, ends `[B H, past, D]`, own scores `[B H, C, past]`."""
    B, T, H, G, D, C = size
    keys, values = (joined.new_empty(B, T, H, D) for _ in range(2))
    # A token's chunk, then its place: so a program writes one block of memory.
    q = joined.new_empty(B * H, size.past, C, D).transpose(1, 2)
    ends = joined.new_empty(B * H, size.past, D), joined.new_empty(B * H, size.past, D)
    scores = joined.new_empty(B * H, C, size.past, dtype=torch.float32)
    summarize[(size.chunks * G, B)](
        joined, bias, cos, sin, keys, values, q, *ends, scores, T, size.past, C, D**-0.5, **size.constants()
    )
    return keys, values, q, ends, scores


def _finish(
    joined: Tensor, values: Tensor, mean: Tensor, lse: Tensor, scores: Tensor, size: Sizes
) -> tuple[Tensor, Tensor]:
    """The gated output `[B, T, H D]` and the joined lse `[B H, C, past]`; `mean` becomes the joined output."""
    B, T, H, G, D, C = size
    out, total = joined.new_empty(B, T, H * D), torch.empty_like(scores)
    finish[(size.chunks * G, B)](
        joined, values, mean, lse.contiguous(), scores, out, total, T, size.past, C, mean.stride(), **size.constants()
    )
    return out, total


def _finish_gradients(
    joined: Tensor,
    values: Tensor,
    mean: Tensor,
    lse: Tensor,
    scores: Tensor,
    dy: Tensor,
    q: Tensor,
    given: Tensor,
    size: Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the joined output, `[B H, C, past, D]` and `[B, H, C, D]` of the first chunk, and of own scores.

    The columns z of `given` are filled.
    """
    B, T, H, G, D, C = size
    dout, first = torch.empty_like(q), joined.new_empty(B, H, C, D)
    dscores = torch.empty_like(scores)
    finish_gradients[(size.chunks * G, B)](
        joined, values, mean, lse, scores, dy, given, dout, first, dscores, T, size.past, C, mean.stride(),
        **size.constants(),
    )  # fmt: skip
    return dout, first, dscores


def _summarize_gradients(
    joined: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    lse: Tensor,
    parts: tuple[Tensor, ...],
    given: Tensor,
    size: Sizes,
) -> Tensor:
    """The gradient of the bias in float32; all columns of `given` but z are filled."""
    B, T, H, G, D, C = size
    # One row a chunk, summed by torch in an order that does not change.
    dbias = joined.new_empty(B * size.chunks, H * D, dtype=torch.float32)
    summarize_gradients[(size.chunks * G, B)](
        joined, bias, cos, sin, keys, values, scores, lse, *parts, given, dbias, T, size.past, C, D**-0.5,
        parts[0].stride(), **size.constants(),
    )  # fmt: skip
    return dbias.sum(0)


@triton.jit(do_not_specialize=["T", "past", "C"])
def summarize(
    joined, bias, cos, sin, keys, values, queries, key_ends, value_ends, scores, T, past, C, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Summaries, ends, queries and own scores of one chunk, for the heads of one group."""
    chunk, group, row = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDE)
    heads, column, here = _heads(group, d, HEADS, GROUPS, DIM, RANKS)
    near, across = d < DIM, (d + DIM // 2) % DIM
    shift = _read(bias + column, here)
    even, odd = _angles(cos, sin, chunk, d, DIM)
    key, value = tl.zeros((RANKS, WIDE), tl.float32), tl.zeros((RANKS, WIDE), tl.float32)
    place = row * HEADS + heads
    for at in tl.range(0, C, num_stages=1):
        t = chunk * C + at
        live = t < T
        token = row * T + t
        tokens = joined + token * (3 * HEADS + 2 * GROUPS) * DIM
        shared = tokens + (3 * HEADS + group) * DIM
        gate = tl.sigmoid(_read(tokens + 2 * HEADS * DIM + column, here & live) + shift)
        new_value = _read(tokens + HEADS * DIM + column, here & live)
        query = _read(shared + d, near & live)
        new_key = _read(shared + GROUPS * DIM + d, near & live)
        key = gate * key + (1 - gate) * new_key[None, :]
        value = gate * value + (1 - gate) * new_value
        tl.store(keys + token * HEADS * DIM + column, key.to(keys.dtype.element_ty), mask=here & live)
        tl.store(values + token * HEADS * DIM + column, value.to(values.dtype.element_ty), mask=here & live)
        score = tl.sum(key * query[None, :], 1) * scale
        tl.store(scores + (place * C + at) * past + chunk - 1, score, mask=(heads < HEADS) & (chunk > 0))
        if cos is not None:
            query = query * even + _read(shared + across, near & live) * odd
        to = queries + ((place * past + chunk - 1) * C + at)[:, None] * DIM + d[None, :]
        tl.store(to, tl.broadcast_to(query[None, :], (RANKS, WIDE)).to(queries.dtype.element_ty), here & (chunk > 0))
    to = (place * past + chunk)[:, None] * DIM + d[None, :]
    tl.store(key_ends + to, key.to(key_ends.dtype.element_ty), mask=here & (chunk < past))
    tl.store(value_ends + to, value.to(value_ends.dtype.element_ty), mask=here & (chunk < past))


@triton.jit(do_not_specialize=["T", "past", "C"])
def finish(
    joined, values, mean, lse, scores, out, total, T, past, C, strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The attention of one chunk's tokens joined with their own summaries, and gated."""
    chunk, group, row = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDE)
    heads, column, here = _heads(group, d, HEADS, GROUPS, DIM, RANKS)
    place = row * HEADS + heads
    read, reads = here & (chunk > 0), (heads < HEADS) & (chunk > 0)
    for at in tl.range(0, C, num_stages=1):
        t = chunk * C + at
        live = t < T
        token = row * T + t
        own = _read(values + token * HEADS * DIM + column, here & live)
        z = _read(joined + token * (3 * HEADS + 2 * GROUPS) * DIM + column, here & live)
        from_ends = mean + (place * strides[0] + at * strides[1] + (chunk - 1) * strides[2])[:, None] + d[None, :]
        scored = (place * C + at) * past + chunk - 1
        score, other = _read(scores + scored, reads), _read(lse + scored, reads)
        most = tl.maximum(score, other)
        both = most + tl.log(tl.exp(score - most) + tl.exp(other - most))
        before = _read(from_ends, read)
        after = before + tl.where(chunk > 0, tl.exp(score - both), 1.0)[:, None] * (own - before)
        tl.store(total + scored, both, mask=reads)
        tl.store(from_ends, after.to(mean.dtype.element_ty), mask=read)
        gated = after * tl.sigmoid(z)
        tl.store(out + token * HEADS * DIM + column, gated.to(out.dtype.element_ty), mask=here & live)


@triton.jit(do_not_specialize=["T", "past", "C"])
def finish_gradients(
    joined, values, mean, lse, scores, dy, given, dout, first, dscores, T, past, C, strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What `finish` makes of a gradient; `mean` and `lse` are the joined ones."""
    chunk, group, row = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDE)
    heads, column, here = _heads(group, d, HEADS, GROUPS, DIM, RANKS)
    place = row * HEADS + heads
    read, reads = here & (chunk > 0), (heads < HEADS) & (chunk > 0)
    for at in tl.range(0, C, num_stages=1):
        t = chunk * C + at
        live = t < T
        token = row * T + t
        wide = token * (3 * HEADS + 2 * GROUPS) * DIM + column
        own = _read(values + token * HEADS * DIM + column, here & live)
        change = _read(dy + token * HEADS * DIM + column, here & live)
        gate = tl.sigmoid(_read(joined + wide, here & live))
        from_ends = (place * strides[0] + at * strides[1] + (chunk - 1) * strides[2])[:, None] + d[None, :]
        whole = tl.where(chunk > 0, _read(mean + from_ends, read & live), own)
        scored = (place * C + at) * past + chunk - 1
        weight = tl.exp(_read(scores + scored, reads) - _read(lse + scored, reads))
        dz = change * whole * gate * (1 - gate)
        tl.store(given + wide, dz.to(given.dtype.element_ty), mask=here & live)
        change *= gate
        to = ((place * past + chunk - 1) * C + at)[:, None] * DIM + d[None, :]
        tl.store(dout + to, change.to(dout.dtype.element_ty), mask=read)
        to = (place * C + at)[:, None] * DIM + d[None, :]
        tl.store(first + to, change.to(first.dtype.element_ty), mask=here & (chunk == 0))
        tl.store(dscores + scored, weight * tl.sum((own - whole) * change, 1), mask=reads)


@triton.jit(do_not_specialize=["T", "past", "C"])
def summarize_gradients(
    joined, bias, cos, sin, keys, values, scores, lse, dqueries, dkey_ends, dvalue_ends, dout, first, dscores,
    given, dbias, T, past, C, scale, strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What `summarize` makes of its gradients: the tokens of a chunk are walked from the last to the first."""
    chunk, group, row = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDE)
    heads, column, here = _heads(group, d, HEADS, GROUPS, DIM, RANKS)
    near, shift = d < DIM, _read(bias + column, here)
    even, odd = _angles(cos, sin, chunk, d, DIM)
    place = row * HEADS + heads
    read, reads = here & (chunk > 0), (heads < HEADS) & (chunk > 0)
    ends, kept = (place * past + chunk)[:, None] * DIM, here & (chunk < past)
    dkey, dvalue = _read(dkey_ends + ends + d[None, :], kept), _read(dvalue_ends + ends + d[None, :], kept)
    dshift = tl.zeros((RANKS, WIDE), tl.float32)
    for walked in tl.range(0, C, num_stages=1):
        at = C - 1 - walked
        t = chunk * C + at
        live = t < T
        token = row * T + t
        wide = token * (3 * HEADS + 2 * GROUPS) * DIM
        shared = wide + (3 * HEADS + group) * DIM
        scored = (place * C + at) * past + chunk - 1
        dscore = _read(dscores + scored, reads) * scale
        weight = tl.exp(_read(scores + scored, reads) - _read(lse + scored, reads))
        from_ends = ((place * past + chunk - 1) * C + at)[:, None] * DIM + d[None, :]
        alone = (place * C + at)[:, None] * DIM + d[None, :]
        change = _read(dout + from_ends, read) + _read(first + alone, here & (chunk == 0))
        query = _read(joined + shared + d, near & live)
        new_key = _read(joined + shared + GROUPS * DIM + d, near & live)
        new_value = _read(joined + wide + HEADS * DIM + column, here & live)
        gate = tl.sigmoid(_read(joined + wide + 2 * HEADS * DIM + column, here & live) + shift)
        summary = token * HEADS * DIM + column
        key = _read(keys + summary, read & live)
        key_before = _read(keys + summary - HEADS * DIM, here & live & (at > 0))
        value_before = _read(values + summary - HEADS * DIM, here & live & (at > 0))
        dkey += dscore[:, None] * query[None, :]
        dvalue += weight[:, None] * change
        dtype = given.dtype.element_ty
        dgate = dkey * (key_before - new_key[None, :]) + dvalue * (value_before - new_value)
        dgate *= gate * (1 - gate)
        dshift += dgate
        tl.store(given + wide + 2 * HEADS * DIM + column, dgate.to(dtype), mask=here & live)
        tl.store(given + wide + HEADS * DIM + column, ((1 - gate) * dvalue).to(dtype), mask=here & live)
        dnew = tl.sum((1 - gate) * dkey, 0)
        tl.store(given + shared + GROUPS * DIM + d, dnew.to(dtype), mask=near & live)
        at_queries = dqueries + (place * strides[0] + at * strides[1] + (chunk - 1) * strides[2])[:, None]
        dquery = _turned_back(at_queries, d, even, odd, read & live, DIM, cos is not None)
        dquery = tl.sum(dquery + dscore[:, None] * key, 0)
        tl.store(given + shared + d, dquery.to(dtype), mask=near & live)
        dkey *= gate
        dvalue *= gate
    tl.store(dbias + (row * (past + 1) + chunk) * HEADS * DIM + column, dshift, mask=here)


@triton.jit
def _heads(group, d, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, RANKS: tl.constexpr):
    """The heads of a group, the columns of their channels d in a row of all heads, and which of these there are."""
    heads = tl.arange(0, RANKS) * GROUPS + group
    return heads, heads[:, None] * DIM + d[None, :], (heads < HEADS)[:, None] & (d < DIM)[None, :]


@triton.jit
def _angles(cos, sin, chunk, d, DIM: tl.constexpr):
    """By a chunk's positions a channel becomes `even` of itself and `odd` of the one half a head away."""
    even, odd = d * 0.0 + 1.0, d * 0.0
    if cos is not None:
        at = chunk * (DIM // 2) + d % (DIM // 2)
        even, odd = _read(cos + at, d < DIM), _read(sin + at, d < DIM)
        odd = tl.where(d < DIM // 2, -odd, odd)
    return even, odd


@triton.jit
def _turned_back(rows, d, even, odd, mask, DIM: tl.constexpr, TURNED: tl.constexpr):
    """Channels d of `rows [n, 1]`, which were turned by positions, without them."""
    x = _read(rows + d[None, :], mask)
    if TURNED:
        x = x * even[None, :] - _read(rows + ((d + DIM // 2) % DIM)[None, :], mask) * odd[None, :]
    return x


@triton.jit
def _read(at, mask):
    """In float32, 0 where there is nothing."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)
