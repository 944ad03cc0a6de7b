"""What each key is given by all rows together: sums over queries, where attention sums over keys."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.shapes import group_size
from regard.core.two_sided import TwoSided
from regard.primitives.sweep import LIMIT, visible

# Queries a block: enough to feed a GEMM, few enough that keys after the block are mostly left out.
BLOCK = 256


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    pattern: Pattern | None,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    softcap: float | None = None,
    two_sided: Sequence[TwoSided] = (),
) -> Tensor:
    """`sum_i exp(s_ij - lse_i)` over the rows i that see key j: the probability that a key gets, summed over rows.

    Computed in blocks of queries, on the keys that some row of the block sees; differentiable.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`.
        lse: `[B, H, T]` log-sum-exp of the scores, as `attend` returns it; -inf: an empty row, which gives nothing.
        pattern: who sees whom; None: all real keys.
        q_positions: `[1|B, T]`; negative ones are rows that do not count.
        k_positions: `[1|B, S]` or `[1|B, Hk, S]`.
        scale: of the scores.
        softcap: of the scores.
        two_sided: spans that see later tokens too; `q_positions` are `[B, T]` then.

    Returns:
        `[B, H, S]`, float32 (float64 for float64).

    Raises:
        RegardError: `lse` is not `[B, H, T]`, or the head counts do not divide.
    """
    edges = torch.tensor([0, q.shape[2]])
    call = {"pattern": pattern, "q_positions": q_positions, "k_positions": k_positions, "scale": scale}
    return tile_mass(q, k, lse, edges=edges, softcap=softcap, two_sided=two_sided, **call)[0][:, :, 0]


def tile_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    edges: Tensor,
    pattern: Pattern | None,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    softcap: float | None = None,
    two_sided: Sequence[TwoSided] = (),
) -> tuple[Tensor, Tensor]:
    """`column_mass` of every tile of rows, and the entropy of its rows; rows are computed in blocks, differentiable.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`.
        lse: `[B, H, T]`, as `column_mass` takes it.
        edges: `[R + 1]` ascending from 0 to T; tile r holds rows `edges[r]` to `edges[r + 1] - 1`.
        pattern: who sees whom; None: all real keys.
        q_positions: `[1|B, T]`; negative ones are rows that do not count.
        k_positions: `[1|B, S]` or `[1|B, Hk, S]`.
        scale: of the scores.
        softcap: of the scores.
        two_sided: as `column_mass` takes them.

    Returns:
        `[B, H, R, S]`: probabilities that the keys get, summed over the tile's rows; `[B, H, R]`: `-sum p log p` of
        the tile's rows, summed, in nats. Both float32 (float64 for float64).

    Raises:
        RegardError: `lse` is not `[B, H, T]`, or the head counts do not divide.
    """
    if lse.shape != q.shape[:3]:
        raise RegardError(f"lse must be [B, H, T] = {list(q.shape[:3])}, got {list(lse.shape)}")
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, kv_heads, group, tiles = q.shape[0], k.shape[1], group_size(q, k), len(edges) - 1
    # A row that sees nothing has no lse; its entries are masked all the same.
    known = lse.masked_fill(lse == -torch.inf, 0).to(exact).unflatten(1, (kv_heads, group))
    grouped = q.to(exact).unflatten(1, (kv_heads, group))
    tile = torch.searchsorted(edges[1:].contiguous(), torch.arange(q.shape[2]), right=True).to(q.device)
    mass = torch.zeros(batch, kv_heads, group, tiles, k.shape[2], dtype=exact, device=q.device)
    entropy = mass.new_zeros(mass.shape[:4])
    for rows, mask in _blocks(pattern, q_positions, k_positions, two_sided, q.shape[0] * q.shape[1]):
        seen = mask.flatten(0, 2).any(0).nonzero()[:, 0]
        some = k.index_select(2, seen).to(exact)
        scores = torch.einsum("bhgtd,bhsd->bhgts", grouped[:, :, :, rows], some) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        open_ = mask.index_select(3, seen)[:, :, None]
        logs = (scores - known[:, :, :, rows, None]).masked_fill(~open_, -torch.inf)
        part = torch.exp(logs)
        mine = tile[rows]
        entropy = entropy.index_add(3, mine, -(part * logs.masked_fill(~open_, 0)).sum(-1))
        first, last = int(mine[0]), int(mine[-1]) + 1
        pooled = part.new_zeros(*part.shape[:3], last - first, part.shape[4]).index_add(3, mine - first, part)
        mass[:, :, :, first:last] = mass[:, :, :, first:last].index_add(4, seen, pooled)
    return mass.flatten(1, 2), entropy.flatten(1, 2)


def column_rows(
    pattern: Pattern | None, q_positions: Tensor, k_positions: Tensor, two_sided: Sequence[TwoSided] = ()
) -> Tensor:
    """How many rows see each key: `[1|B, 1|Hk, S]` int64, for positions and spans as `column_mass` takes them."""
    heads = max(k_positions.shape[1] if k_positions.dim() == 3 else 1, (pattern and pattern.heads) or 1)
    batch = max(q_positions.shape[0], k_positions.shape[0])
    counted = torch.zeros(batch, heads, k_positions.shape[-1], dtype=torch.long, device=k_positions.device)
    for _, mask in _blocks(pattern, q_positions, k_positions, two_sided, batch * heads):
        counted = counted + mask.sum(2)
    return counted


def _blocks(
    pattern: Pattern | None, q_positions: Tensor, k_positions: Tensor, two_sided: Sequence[TwoSided], width: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows in blocks with the mask `[1|B, 1|Hk, t, S]` of each, so that `width * t * S` stays below the limit."""
    rows, keys = q_positions.shape[1], max(k_positions.shape[-1], 1)
    block = max(1, min(BLOCK, LIMIT // (width * keys)))
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        yield part, visible(pattern, q_positions[:, part], k_positions, two_sided)
