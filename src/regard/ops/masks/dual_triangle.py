"""Half of the channels look back, half look ahead, with a softmax each (Dual Triangle Attention)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.errors import choose as one_of
from regard.core.pattern import Pattern
from regard.core.shapes import group_size
from regard.ops.attention import attend as exact

CARD = Card(
    title="Dual Triangle Attention: Effective Bidirectional Attention Without Positional Embeddings",
    arxiv=None,
    sheet=30,
    implements="Both triangles of every head, split by channel; split by head as the public code does.",
    exact=False,
    saving="compute",
    departures=("Rotary positions are the caller's: see `attend`.",),
    oracles=(
        "each half equals torch's attention with a lower or an upper triangle",
        "the sequence reversed and the halves swapped: the output reversed",
        "torch's flex_attention with the same masks",
        "tokens permuted: full attention permutes its output, this one does not",
    ),
    options={
        "by": Option(
            kind="str",
            default="channel",
            choices=("channel", "head"),
            doc="channel: the first half of every head looks back, the other ahead; head: the first heads look back "
            "with both halves, as the public code has it",
        ),
        "scale": Option(kind="float", default=None, optional=True, doc="of the scores; none: (D / 2) ** -0.5"),
    },
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    by: str = "channel",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Bidirectional attention whose two sub-heads see `j <= i` and `j >= i`; each sees the token itself.

    Rotary positions that turn neighbouring channels together can be applied before; those that turn channel c with
    c + D / 2 (`primitives.rotary`) must be applied to each half alone, since the two would part here.

    Args:
        q: `[B, H, T, D]`, D even.
        k: `[B, Hk, T, D]`.
        v: `[B, Hk, T, Dv]`, Dv even.
        mask: bool `[B, T]`, False at padding, which is not seen and whose rows are empty; None: there is none.
        by: how sub-heads share the triangles.
        scale: of the scores; None: `(D / 2) ** -0.5`.
        backend: as `regard.attend` takes it.

    Returns:
        out `[B, H, T, Dv]` and lse `[B, H, 2, T]`, one of each half.

    Raises:
        RegardError: an odd number of channels, queries and keys of different lengths, a mask of another shape, an
            unknown `by`, or what `regard.attend` refuses.
    """
    if by not in ("channel", "head"):
        one_of("choice of 'by'", by, ("channel", "head"))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[-1] % 2:
            raise RegardError(f"{name} must be [B, heads, T, an even number of channels], got {list(x.shape)}")
    if q.shape[2] != k.shape[2]:
        raise RegardError(f"dual triangles need as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool):
        raise RegardError(f"mask must be bool [{q.shape[0]}, {q.shape[2]}], got {mask.dtype} {list(mask.shape)}")
    H, T = q.shape[1:3]
    if by == "head":
        # The triangle changes between heads that may share keys.
        k, v = (x.repeat_interleave(group_size(q, k), dim=1) for x in (k, v))
    down = k.shape[1]
    pattern = Pattern.stack_heads([Pattern.causal()] * down + [ahead()] * down)
    at = None if mask is None else torch.arange(T, device=q.device).where(mask, -1)
    parts = [split(x, by) for x in (q, k, v)]
    out, lse = exact(*parts, pattern=pattern, scale=scale, q_positions=at, k_positions=at, backend=backend)
    return join(out, by), join(lse[..., None], by).view(q.shape[0], H, T, 2).transpose(2, 3)


def ahead() -> Pattern:
    """The upper triangle, `p_k >= p_q`: a two-sided Pattern."""
    return Pattern.predicate(_later, causal=False, cover=_cover)


def split(x: Tensor, by: str = "channel") -> Tensor:
    """Heads `[B, H, T, D]` as sub-heads `[B, 2 H, T, D / 2]`: first those that look back, then the others."""
    halves = x.unflatten(-1, (2, -1)).movedim(-2, 1 if by == "channel" else 2)
    return halves.flatten(1, 2)


def join(x: Tensor, by: str = "channel") -> Tensor:
    """`split` undone."""
    H = x.shape[1] // 2
    halves = x.unflatten(1, (2, H) if by == "channel" else (H, 2))
    return halves.movedim(1 if by == "channel" else 2, -2).flatten(-2)


def _later(q: Tensor, k: Tensor, head: Tensor) -> Tensor:
    return k >= q


def _cover(q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> tuple[Tensor, Tensor]:
    return k_high >= q_low, k_low >= q_high
