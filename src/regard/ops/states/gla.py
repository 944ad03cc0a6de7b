"""Gated linear attention: every key channel forgets at its own rate (GLA)."""

import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.ops import recurrence

CARD = Card(
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    arxiv="2312.06635",
    sheet=133,
    implements="The recurrence with a diagonal decay, and the gate logsigmoid(x) / 16.",
    exact=False,
    saving="memory",
    departures=("The low-rank map to the gate, head norm and output gate belong to the layer.",),
    oracles=(
        "flash-linear-attention's naive_recurrent_gla",
        "equal channels: the decay of a whole token",
    ),
    aliases=("gated_linear_attention",),
    options={
        "scale": Option(kind="float", default=None, optional=True, doc="of the outputs; none: D ** -0.5"),
    },
)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(exp(decay_t)) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
        decay: log-decays `[B, H or Hk, T, D]`, at most 0, as `gate` makes them.
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
        decay=decay,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        mask=mask,
        check=check,
        backend=backend,
    )


def gate(x: Tensor, *, divisor: float = 16.0) -> Tensor:
    """Log-decays `logsigmoid(x) / divisor`, elementwise and at most 0: gates stay near 1 at the start of training."""
    return F.logsigmoid(x) / divisor
