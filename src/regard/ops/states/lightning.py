"""Linear attention with a fixed decay a head (Lightning Attention-2)."""

from torch import Tensor

from regard.core.card import Card
from regard.core.errors import RegardError
from regard.ops import recurrence

CARD = Card(
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
    arxiv="2401.04658",
    sheet=8,
    implements="The decayed causal product without normaliser: quadratic, chunked and step forms, with gradients.",
    exact=False,
    saving="memory",
    departures=("Slopes are differentiable; the paper keeps them fixed.",),
    oracles=(
        "quadratic = chunked = stepwise in float64",
        "the gradient equals the paper's backward formulas",
        "features in parts: the outputs add up",
        "slope 0: linear attention without decay; infinite slope: (q_t . k_t) v_t",
        "flash-linear-attention's simple GLA with g = -slope",
    ),
    aliases=(
        "lightning_attention",
        "lightning2",
    ),
)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`o_t = sum_{j <= t} exp(-slope (t - j)) (q_t . k_j) v_j`, with no scale and no denominator.

    Args:
        q: `[B, Hk, T, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, H, T, Dv]`.
        slopes: `[H]`, at least 0; None: no decay.
        initial_state: `[B, H, D, Dv]`; None: 0.
        cu_seqlens: packed sequences.
        mask: bool `[B, T]`, False at padding.
        check: whether the values of `slopes` are looked at; None: on a CPU only.
        backend: as `regard.scan` takes it.

    Returns:
        out `[B, H, T, Dv]` and the last state `[B, H, D, Dv]` (`[N, H, D, Dv]` where packed), as `regard.scan` does,
        which also says what the other keywords mean.

    Raises:
        RegardError: slopes are not `[H]`, negative or NaN, or what `regard.scan` refuses.
    """
    if slopes is not None:
        _check(slopes, v, check)
    return recurrence.scan(
        q,
        k,
        v,
        decay=None if slopes is None else -slopes,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        mask=mask,
        check=check,
        backend=backend,
    )


def _check(slopes: Tensor, v: Tensor, check: bool | None) -> None:
    if slopes.shape != v.shape[1:2] or not slopes.is_floating_point():
        raise RegardError(f"slopes must be float [H] = {list(v.shape[1:2])}, got {list(slopes.shape)} {slopes.dtype}")
    look = slopes.device.type == "cpu" if check is None else check
    if look and not bool((slopes >= 0).all()):
        bad = slopes[~(slopes >= 0)]
        raise RegardError(f"slopes must be at least 0 (0 is no decay), got {bad[0].item():g}")
