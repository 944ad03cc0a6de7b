"""Chunks of keys: where they begin, how they score, and a budget of keys filled chunk by chunk.

Keys stand in ranks `0..S-1`; `edges [1|B, C + 1]` are the ranks at which `C` chunks begin, ascending, and where the
last one ends. A query block reads ranks `low <= r < high` of chunks and, always, its own keys `high <= r < stop`.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad


def peaks(score: Tensor, allowed: Tensor, count: Tensor, half: int) -> Tensor:
    """Greedy 1-D non-maximum suppression: the best of `allowed`, no two within `half`, at most `count` of them.

    Args:
        score: `[B, T]`; of equal ones the earlier is the better.
        allowed: `[B, T]` bool.
        count: `[B]`.
        half: how far a peak silences others on either side.

    Returns:
        bool `[B, T]`.
    """
    if not score.shape[1]:
        return allowed
    best = score.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    value = (score.shape[1] - best.argsort(1)).float().masked_fill(~allowed, 0)
    alive, kept = value, torch.zeros_like(allowed)
    # Every round keeps all that no better one can silence any more: greedy order, many at a time.
    while bool((alive > 0).any()):
        kept = kept | ((alive > 0) & (alive == widest(alive, half)))
        alive = alive.masked_fill(widest(kept.float(), half) > 0, 0)
    ranks = value.masked_fill(~kept, 0).argsort(dim=1, descending=True, stable=True).argsort(1)
    return kept & (ranks < count[:, None])


def widest(x: Tensor, half: int) -> Tensor:
    """The largest of `x [B, T]` within `half` on either side."""
    return max_pool1d(x[:, None], 2 * half + 1, 1, half)[:, 0]


def chunk_scores(queries: Tensor, keys: Tensor, edges: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`sqrt(length) * (query . mean key)` of every chunk, cut to the ranks `low..high-1` that a block reads.

    Args:
        queries: `[B, N, D]`, one a block.
        keys: `[B, S, D]`.
        edges: `[1|B, C + 1]`.
        low: `[1|B, N]`.
        high: `[1|B, N]`.

    Returns:
        `[B, N, C]`, -inf where nothing of a chunk is left.
    """
    prefix = pad(keys.cumsum(1), (0, 0, 1, 0))
    before = queries @ _rows(prefix, edges).mT
    ends = [(queries * _rows(prefix, at)).sum(-1, keepdim=True) for at in (low, high)]
    edge, low, high = edges[:, None], low[..., None], high[..., None]
    before = torch.where(edge <= low, ends[0], torch.where(edge >= high, ends[1], before))
    length = torch.minimum(torch.maximum(edge, low), high).diff(dim=-1)
    return (before.diff(dim=-1) / length.clamp(min=1).sqrt()).masked_fill(length <= 0, -torch.inf)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index [1|B, n]` of `x [B, S, D]`."""
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.take_along_dim(index[..., None], 1)


def fill(
    scores: Tensor,
    edges: Tensor,
    low: Tensor,
    high: Tensor,
    stop: Tensor,
    *,
    budget: int,
    first: int,
    last: int,
    sink: int = 0,
    apart: int = 0,
) -> Tensor:
    """Which ranks each block reads: forced ones, then chunks by score until `budget` keys are read.

    Forced are the first `sink` ranks, those missing to `first` from `low` on, and the last `last` before `stop`.
    The last chunk may be read in part, from its beginning. Equal scores: the earlier chunk.

    Args:
        scores: `[B, N, C]`.
        edges: `[1|B, C + 1]`.
        low: `[1|B, N]`.
        high: `[1|B, N]`.
        stop: `[1|B, N]`; a block's own keys are `high..stop-1`, at most `last` of them.
        budget: keys a block, all counted.
        first: forced at the beginning of what the block reads.
        last: forced at its end.
        sink: ranks that are read however far behind `low` they lie.
        apart: a block's own keys, left out of the lists where they are read apart; 0: the lists hold them.

    Returns:
        `[B, N, budget - apart]` int64 ascending ranks, -1 where fewer are read.
    """
    lead = low.clamp(max=sink)
    begin = torch.minimum(low + (first - lead).clamp(min=0), high)
    tail = torch.minimum(torch.maximum(stop - last, begin), high)
    at = torch.minimum(torch.maximum(edges[:, None], begin[..., None]), tail[..., None])
    length, start = at.diff(dim=-1).expand_as(scores), at[..., :-1].expand_as(scores)
    left = (budget - lead - (begin - low) - (stop - tail)).clamp(min=0)[..., None]
    order = scores.masked_fill(length == 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sizes = length.gather(-1, order)
    taken = torch.minimum((left - (sizes.cumsum(-1) - sizes)).clamp(min=0), sizes)
    taken = torch.zeros_like(taken).scatter(-1, order, taken)
    ends = [x[..., None].expand(*scores.shape[:2], 1) for x in (lead, begin - low, stop - tail - apart)]
    begins = [x[..., None].expand(*scores.shape[:2], 1) for x in (torch.zeros_like(low), low, tail)]
    sizes, starts = torch.cat([*ends[:2], taken, ends[2]], -1), torch.cat([*begins[:2], start, begins[2]], -1)
    total = sizes.cumsum(-1)
    width = budget + max(sink - first, 0) - apart
    slots = torch.arange(width, device=scores.device).expand(*scores.shape[:2], -1).contiguous()
    run = torch.searchsorted(total, slots, right=True).clamp(max=sizes.shape[-1] - 1)
    ranks = slots + (starts - (total - sizes)).gather(-1, run)
    return ranks.masked_fill(slots >= total[..., -1:], -1)
