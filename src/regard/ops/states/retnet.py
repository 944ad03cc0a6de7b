"""Retention: linear attention whose decays are fixed numbers near 1 (RetNet)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.ops import recurrence

CARD = Card(
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    arxiv="2307.08621",
    sheet=133,
    implements="Retention with the decays 1 - 2^(-5 - h), in its parallel, chunked and recurrent forms.",
    exact=False,
    saving="memory",
    departures=("Rotary positions, head norm and gate belong to the layer.",),
    oracles=(
        "flash-linear-attention's naive_retention",
        "decays 31/32, 63/64, ... head by head",
    ),
    aliases=("retention",),
    options={
        "scale": Option(kind="float", default=None, optional=True, doc="of the outputs; none: D ** -0.5"),
    },
)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`o_t = scale sum_{j <= t} gamma_h^(t - j) (q_t . k_j) v_j` with the decays of `decays`.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
        scale: of the outputs; None: `D ** -0.5`.
        initial_state: `[B, H, D, Dv]`; None: 0.
        cu_seqlens: packed sequences.
        mask: bool `[B, T]`, False at padding.
        check: as `regard.scan` takes it.
        backend: as `regard.scan` takes it.

    Returns:
        out `[B, H, T, Dv]` and the last state `[B, H, D, Dv]` (`[N, H, D, Dv]` where packed), as `regard.scan` does,
        which also says what the other keywords mean.

    Raises:
        RegardError: what `regard.scan` refuses.
    """
    return recurrence.scan(
        q,
        k,
        v,
        decay=decays(v.shape[1], v.device).to(torch.promote_types(v.dtype, torch.float32)),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        mask=mask,
        check=check,
        backend=backend,
    )


def decays(heads: int, device: torch.device | None = None) -> Tensor:
    """`log(1 - 2^(-5 - h))`, h = 0..H-1: float64 `[H]`."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, dtype=torch.float64, device=device)))
