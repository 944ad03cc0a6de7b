"""Run a kernel over a pattern block by block of queries, on only the keys the block can reach."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.core.pattern import Pattern
from regard.core.reach import FOR_EVER, Reach
from regard.core.two_sided import TwoSided, later

Part = tuple[Tensor, Tensor]
Kernel = Callable[..., Part]

# What a kernel builds for one block stays below this many elements (32 MiB as float32).
LIMIT = 2**23
# A banded block pays for `band + BLOCK` keys a query: small enough to waste little, large enough to feed a GEMM.
BLOCK = 128
# Above this many pairs, patterns of infinite reach also run in blocks, to skip the keys after each block.
WHOLE = 2**20
# Fewer keys than this share of all: gather them; else leave them masked where they are.
WORTH = 0.75


def sweep(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    aligned: bool,
    width: int | None = None,
    **options: object,
) -> Part:
    """`kernel(q, k, v, mask=..., bias=..., **options)` with the mask of `pattern` over positions.

    Peak memory is one block's mask. Where the reach of the pattern (the widest of its heads) is finite, a
    block computes on the keys within reach only: `T * (sink + recent + BLOCK)` scores instead of `T * S`.

    `pattern` None allows every key with a position >= 0, also later ones; `q_pos [1|B, T]`, `k_pos [1|B, S]`
    or `[1|B, Hk, S]`. `aligned` says that positions are `0..S-1` and the queries the last of them (then no
    position is read). `width` counts the elements the kernel builds for each pair of query and key; None:
    as many as the mask has.

    Returns:
        out `[B, H, T, Dv]`, lse `[B, H, T]`.
    """
    rows, keys = q.shape[2], k.shape[2]
    reach, causal = _widest(pattern), pattern is not None and pattern.cut
    if width is None:
        heads = max(k_pos.shape[1] if k_pos.dim() == 3 else 1, len(pattern.rules) if pattern else 1)
        width = heads * max(q_pos.shape[0], k_pos.shape[0])
    block = _block(rows, keys, width, reach)
    parts = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        at = q_pos[:, start:stop]
        if block >= rows and reach.recent is None:
            # One block over all keys is the call plain SDPA makes, and then equal to it to the bit.
            seen = None
        elif aligned and not causal:
            seen = None
        elif aligned and not reach.phases:
            seen = _span(reach, max(keys - rows + start, 0), max(keys - rows + stop, 0), keys)
        elif reach.bounded and reach.sink + (reach.recent or 0) + stop - start > WORTH * keys:
            seen = None
        else:
            seen = _reached(reach, at, k_pos, causal)
        some_k, some_v = _take(k, seen, 2), _take(v, seen, 2)
        mask = visible(pattern, at, _take(k_pos, seen, -1))
        some_bias = bias if bias is None else _take(_rows(bias, start, stop), seen, -1)
        parts.append(kernel(q[:, :, start:stop], some_k, some_v, mask=mask, bias=some_bias, **options))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _widest(pattern: Pattern | None) -> Reach:
    if pattern is None or not pattern.cut:
        return FOR_EVER
    first, *others = pattern.reach()
    for other in others:
        first = first | other
    return first


def _block(rows: int, keys: int, width: int, reach: Reach) -> int:
    """Queries a block."""
    most = rows if rows * keys <= WHOLE else 2 * BLOCK
    if reach.recent is not None:
        band = reach.sink + reach.recent
        most = max(BLOCK, min(512, band // 4))
        keys = min(keys, band + most) if reach.bounded else keys
    return max(1, min(most, LIMIT // (width * keys)))


def _span(reach: Reach, low: int, high: int, keys: int) -> list[slice] | None:
    """The keys that queries at positions `low..high-1` reach, as slices; None: all of them."""
    first = 0 if reach.recent is None else max(low - reach.recent + 1, 0)
    high = min(high, keys)
    sink = min(reach.sink, first, high)
    spans = [slice(0, sink)] * (sink > 0) + [slice(first, high)] * (high > first)
    if spans and spans[0].stop == first:
        spans = [slice(0, high)]
    if sum(s.stop - s.start for s in spans) == keys:
        return None
    # A kernel dies of zero keys; one that the mask closes is enough.
    return spans or [slice(0, 1)]


def _reached(reach: Reach, at: Tensor, k_pos: Tensor, causal: bool) -> Tensor | None:
    """Indices of the keys that some row and head reaches from positions `at`; None: (nearly) all of them."""
    shape = (-1,) + (1,) * (k_pos.dim() - 1)
    low, high = at.clamp(min=0).amin(1).view(shape), at.amax(1).view(shape)
    keep = k_pos >= 0
    if causal:
        keep = keep & (k_pos <= high)
    if reach.recent is not None:
        keep = keep & reach.needs(low, k_pos)
    index = keep.reshape(-1, keep.shape[-1]).any(0).nonzero()[:, 0]
    if len(index) > WORTH * k_pos.shape[-1]:
        return None
    return index if len(index) else index.new_zeros(1)


def _take(x: Tensor, seen: list[slice] | Tensor | None, dim: int) -> Tensor:
    """The keys `seen` of `x` along `dim`: a view where they are one run."""
    if seen is None or x.shape[dim] == 1:
        return x
    if isinstance(seen, Tensor):
        return x.index_select(dim, seen.to(x.device))
    runs = [x.narrow(dim, s.start, s.stop - s.start) for s in seen]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def _rows(bias: Tensor, start: int, stop: int) -> Tensor:
    return bias if bias.dim() < 2 or bias.shape[-2] == 1 else bias[..., start:stop, :]


def visible(pattern: Pattern | None, at: Tensor, k_pos: Tensor, two_sided: Sequence[TwoSided] = ()) -> Tensor:
    """`pattern.allow`, where None allows every real query every real key: bool `[1|B, 1|Hk, T, S]`.

    With spans `at` is `[B, T]`, and so is what is returned.
    """
    if pattern is None:
        k = (k_pos if k_pos.dim() == 3 else k_pos[:, None])[:, :, None]
        return (at[:, None, :, None] >= 0) & (k >= 0)
    seen = pattern.allow(at, k_pos)
    return seen | later(two_sided, at, k_pos) if two_sided else seen
