"""The delta rule with a forget gate a head (Gated DeltaNet)."""

import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.ops import recurrence

CARD = Card(
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    arxiv="2412.06464",
    sheet=133,
    implements="The gated delta rule, chunked, as a loop and as steps, and the gate -exp(a) softplus(x + bias).",
    exact=False,
    saving="memory",
    departures=("Short convolutions, the unit norm of q and k, and the output norm belong to the layer.",),
    oracles=(
        "flash-linear-attention's naive_recurrent_gated_delta_rule",
        "transformers' torch_chunk_gated_delta_rule",
        "decay 0: DeltaNet",
    ),
    aliases=(
        "gated_deltanet",
        "gdn",
    ),
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
    """`S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T`, `o_t = scale S_t^T q_t`, `a_t = exp(decay_t)`.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
        decay: log-decays `[B, H, T]`, at most 0, as `gate` makes them.
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


def gate(x: Tensor, a: Tensor, bias: Tensor) -> Tensor:
    """Log-decays `-exp(a) softplus(x + bias)`, at most 0, of `x [B, H, T]` with `a [H]` and `bias [H]`."""
    return -a.exp()[:, None] * F.softplus(x + bias[:, None])
