"""The half of attention that two-sided spans add: what queries see ahead of themselves, joined with the rest.

Read backwards, a span is causal: its last token sees nothing ahead, the one before it one key, and so on. So this half
is `attend` of the span's queries but the last over its keys but the first, both in reverse: square, without a mask.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.two_sided import TwoSided
from regard.primitives.merge import merge

Part = tuple[Tensor, Tensor]
Index = slice | Tensor


class Piece(NamedTuple):
    """Queries and keys of one batch row that are attended together.

    `places` holds their positions, read backwards; None: queries and keys are all of one run, in order.
    """

    row: int
    queries: Index
    keys: Index
    places: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, at: Index) -> Tensor:
        """Its part of `x [B, H, n, ...]`, `[1, H, m, ...]`."""
        return x[self.row : self.row + 1, :, at]


def joined(
    run: Callable[..., Part],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    behind: Part,
    spans: Sequence[TwoSided],
    bias: Tensor | None,
    *,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
) -> Part:
    """`behind`, what attention of `q` under a causal-cut pattern gave, with what `spans` let queries see ahead.

    `run` is `attend` without a pattern, with scale and soft cap; the others are as `attend` was given them.

    Raises:
        RegardError: `run` refuses.
    """
    if q_positions is None and k_positions is None:
        groups = _aligned(q.shape[2], k.shape[2], spans)
    else:
        groups = ([piece] for piece in _placed(*_positions(q, k, q_positions, k_positions), spans))
    out, lse = (part.clone() for part in behind)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    for group in groups:
        given = [torch.cat([piece.of(x, piece.queries) for piece in group]) for x in (q, *behind)]
        given += [torch.cat([piece.of(x, piece.keys) for piece in group]) for x in (k, v)]
        queries, known, known_lse, keys, values = given
        added = None if bias is None else torch.cat([_cut(bias, piece) for piece in group])
        if (places := group[0].places) is None:
            added = added if added is None else added.flip(2, 3)
            found = run(*(x.flip(2) for x in (queries, keys, values)), bias=added)
            ahead = (found[0].flip(2), found[1].flip(2))
        else:
            ahead = run(queries, keys, values, bias=added, q_positions=places[0], k_positions=places[1])
        both = merge([(known, known_lse), ahead])
        for i, piece in enumerate(group):
            for x, new in zip((out, lse), both, strict=True):
                x[piece.row, :, piece.queries] = new[i]
    return out, lse


def _aligned(rows: int, keys: int, spans: Sequence[TwoSided]) -> Iterator[list[Piece]]:
    """Of the last `rows` of `keys` positions: spans of one length together, as images mostly are."""
    first, together = keys - rows, {}
    for row, start, stop in spans:
        start = max(start, first)
        if stop - start > 1:
            piece = Piece(row, slice(start - first, stop - 1 - first), slice(start + 1, stop))
            together.setdefault(stop - start, []).append(piece)
    yield from together.values()


def _placed(q_pos: Tensor, k_pos: Tensor, spans: Sequence[TwoSided]) -> Iterator[Piece]:
    """Of positions `[1|B, T]` and `[1|B, S]` or `[1|B, Hk, S]`, in any order and with any of them missing."""
    for row, start, stop in spans:
        q, k = q_pos[row % len(q_pos)], k_pos[row % len(k_pos)]
        seen = (k > start) & (k < stop)
        queries = ((q >= start) & (q < stop - 1)).nonzero()[:, 0]
        keys = seen.reshape(-1, seen.shape[-1]).any(0).nonzero()[:, 0]
        if len(queries) and len(keys):
            backwards = torch.where(seen, stop - 1 - k, -1)[..., keys]
            yield Piece(row, queries, keys, (stop - 2 - q[None, queries], backwards[None]))


def _positions(q: Tensor, k: Tensor, q_positions: Tensor | None, k_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Those given, or right-aligned ones."""
    rows, keys = q.shape[2], k.shape[2]
    q_pos = torch.arange(keys - rows, keys, device=q.device)[None] if q_positions is None else q_positions
    return q_pos, torch.arange(keys, device=q.device)[None] if k_positions is None else k_positions


def _cut(bias: Tensor, piece: Piece) -> Tensor:
    """The part of `bias [1|B, 1|H, 1|T, 1|S]` that `piece` needs, of one row; what queries or keys share stays so."""
    bias = bias if bias.shape[0] == 1 else bias[piece.row : piece.row + 1]
    bias = bias if bias.shape[2] == 1 else bias[:, :, piece.queries]
    return bias if bias.shape[3] == 1 else bias[..., piece.keys]
