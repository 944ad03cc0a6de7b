"""The delta rule: a key replaces what the state answers to it (DeltaNet)."""

from torch import Tensor

from regard.core.card import Card, Option
from regard.ops import recurrence

CARD = Card(
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    arxiv="2406.06484",
    sheet=133,
    implements="The delta rule in its chunked form (one triangular system a chunk), as a loop, and as steps.",
    exact=False,
    saving="memory",
    departures=("Short convolutions, the unit norm of q and k, and the output norm belong to the layer.",),
    oracles=(
        "flash-linear-attention's delta_rule_recurrence",
        "beta 1 and unit keys: the state answers a key with its value",
        "orthonormal keys: linear attention",
    ),
    aliases=("deltanet",),
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
    """`S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = scale S_t^T q_t`.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
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
