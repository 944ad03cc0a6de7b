"""Decoding by a work list: the key tiles of all outputs in one line, cut into equal pieces (LeanAttention)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.shapes import group_size
from regard.primitives.merge import merge
from regard.primitives.reference import reference
from regard.primitives.work_list import plan

CARD = Card(
    title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
    arxiv="2405.10480",
    sheet=17,
    implements="The key tiles of all requests divided equally over workers (stream-K), and the join of what they find.",
    exact=True,
    saving="none",
    departures=(
        "Query heads that share keys are rows of one output, so keys are read once for all of them.",
        "Outputs lie request by request, then head by head; the public code has heads outermost.",
        "Pieces are joined by a second launch, not by the worker that holds the first of them.",
        "The grid is not made smaller where there are few tiles: it is fixed, so that CUDA graphs can be replayed.",
        "A request without keys takes a tile, and gets output 0 and lse -inf.",
        "In plain torch; `regard.ops.decode` runs the same work list on a GPU.",
    ),
    oracles=(
        "torch's attention, for any number of workers, any tile and ragged lengths; gradients too",
        "one worker is the sequential online softmax, as many as tiles is flash-decoding",
        "every tile is read once, loads differ by at most one, no fixed split has a smaller makespan",
        "no output has more pieces than the paper's bound",
    ),
    aliases=("leanattention", "stream_k"),
    options={
        "tile": Option(default=64, low=1, doc="keys in a tile"),
        "workers": Option(default=132, low=1, doc="equal pieces into which all tiles are divided"),
        "scale": Option(kind="float", default=None, optional=True, doc="of the scores; none: D ** -0.5"),
    },
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    tile: int = 64,
    workers: int = 132,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last `T` tokens of every request, worker by worker; the lengths are read.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`.
        v: `[B, Hk, S, Dv]`.
        lengths: `[B]` int32 or int64, keys of each request, its last `T` the new ones; None: `S`.
        tile: keys in a tile.
        workers: equal pieces into which all tiles are divided.
        scale: of the scores; None: `D ** -0.5`.

    Returns:
        out `[B, H, T, Dv]` in q's dtype, lse `[B, H, T]` float32 (float64 for float64), differentiable.

    Raises:
        RegardError: head counts or lengths disagree, or `tile` or `workers` below 1.
    """
    group, S, T = group_size(q, k), k.shape[2], q.shape[2]
    work = plan([S] * q.shape[0] if lengths is None else lengths, k.shape[1], tile, workers)
    held = work.lengths.tolist()
    if len(held) != q.shape[0] or max(held) > S:
        raise RegardError(f"lengths must be {q.shape[0]} numbers up to {S}, got {held}")
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for piece in work.pieces():
        b, h = piece.request, piece.head
        start, stop = piece.start * tile, min(piece.stop * tile, held[b])
        at = torch.arange(start, stop, device=q.device)
        asked = torch.arange(held[b] - T, held[b], device=q.device)[:, None]
        rows, keys = slice(h * group, (h + 1) * group), (slice(b, b + 1), slice(h, h + 1), slice(start, stop))
        seen = (at <= asked)[None, None]
        found = reference(q[b : b + 1, rows], k[keys], v[keys], mask=seen, scale=scale or q.shape[-1] ** -0.5)
        parts.setdefault((b, h), []).append(found)
    joined = [merge(found) for found in parts.values()]
    out, lse = (torch.cat(found, 1).unflatten(1, q.shape[:2]).squeeze(0) for found in zip(*joined, strict=True))
    return out, lse
