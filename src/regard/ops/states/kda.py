"""The delta rule with a forget gate for every key channel (Kimi Delta Attention)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.ops import recurrence

CARD = Card(
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    arxiv="2510.26692",
    sheet=89,
    implements="The delta rule with diagonal decay, chunked, as a loop and as steps, and both released gates.",
    exact=False,
    saving="memory",
    departures=(
        "Short convolutions, the unit norm of q and k, and the output norm belong to the layer.",
        "Chunks are joined two by two through their borders instead of dividing by accumulated decays.",
    ),
    oracles=(
        "flash-linear-attention's naive_recurrent_kda and naive_chunk_kda",
        "equal channels: the gated delta rule; decay 0: the delta rule",
        "beta 1, unit keys: the state answers a key with its value",
        "beta 0: pure decay",
        "a transition has spectral norm at most 1",
    ),
    aliases=("kimi_delta_attention",),
    options={
        "scale": Option(kind="float", default=None, optional=True, doc="of the outputs; none: D ** -0.5"),
        "negative_eigenvalues": Option(
            kind="bool",
            default=False,
            doc="allow a write strength up to 2, which may turn what a key reads into its opposite",
        ),
    },
)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    negative_eigenvalues: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`S_t = (I - beta_t k_t k_t^T) diag(exp(decay_t)) S_{t-1} + beta_t k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
        decay: log-decays `[B, H or Hk, T, D]`, at most 0, as `gate` makes them.
        beta: write strengths `[B, H, T]` in 0..1.
        scale: of the outputs; None: `D ** -0.5`.
        negative_eigenvalues: allow beta up to 2 instead of 1.
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
        beta=beta,
        delta=True,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        beta_max=2.0 if negative_eigenvalues else 1.0,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        mask=mask,
        check=check,
        backend=backend,
    )


def gate(x: Tensor, a: Tensor, bias: Tensor, *, bound: float | None = None) -> Tensor:
    """Log-decays of every key channel, at most 0.

    Args:
        x: `[B, H, T, D]`.
        a: `[H]`; the rate is its exponential.
        bias: `[H, D]`.
        bound: None: `-exp(a) softplus(x + bias)`; a negative number (the released safe gate: -5):
            `bound * sigmoid(exp(a) (x + bias))`, which never falls below it.

    Raises:
        RegardError: a bound that is not negative.
    """
    rate, x = a.exp()[:, None, None], x + bias[:, None]
    if bound is None:
        return -rate * F.softplus(x)
    if bound >= 0:
        raise RegardError(f"the bound of a log-decay must be negative, got {bound}; the released gate has -5")
    return bound * torch.sigmoid(rate * x)
