"""A gated recurrence whose keys are what its gates forget (HGRN-2)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.ops import recurrence
from regard.primitives.gates import bounded_decay, lower_bounds

__all__ = ["CARD", "gate", "lower_bounds", "scan"]

CARD = Card(
    title="HGRN2: Gated Linear RNNs with State Expansion",
    arxiv="2404.07904",
    sheet=133,
    implements="Diagonal decay with tied keys k = 1 - exp(decay), and gates above a bound that rises with depth.",
    exact=False,
    saving="memory",
    departures=("Scaled by D ** -0.5 as in flash-linear-attention; the norm that follows makes it immaterial.",),
    oracles=(
        "GLA with k = 1 - exp(decay)",
        "bounds: none in layer 0, rising, below 1",
        "a gate never falls below its bound",
    ),
    options={
        "scale": Option(kind="float", default=None, optional=True, doc="of the outputs; none: D ** -0.5"),
    },
)


def scan(
    q: Tensor,
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
    """`S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T`, `o_t = scale S_t^T q_t`, with `a_t = exp(decay_t)`.

    Args:
        q: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
        decay: log-decays `[B, Hk, T, D]`, at most 0, as `gate` makes them.
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
    k = -torch.expm1(decay)
    return recurrence.scan(
        q,
        k.to(q.dtype),
        v,
        decay=decay,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        mask=mask,
        check=check,
        backend=backend,
    )


def gate(x: Tensor, lower: Tensor | None = None) -> Tensor:
    """Log-decays `log(lower + (1 - lower) sigmoid(x))`, at most 0; `lower` from `lower_bounds`, None: 0."""
    return bounded_decay(x, lower)
