"""A vector that forgets and takes in, channel by channel (HGRN)."""

import torch
from torch import Tensor

from regard.core.card import Card
from regard.core.errors import RegardError, choose
from regard.ops.elementwise import BACKENDS, recur
from regard.ops.recurrence import check_bounds, check_packing, check_values
from regard.primitives.gates import bounded_decay, lower_bounds

__all__ = ["CARD", "gate", "lower_bounds", "scan"]

CARD = Card(
    title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
    arxiv="2311.04823",
    sheet=133,
    implements="The real-valued recurrence with tied input gates, and gates above a bound that rises with depth.",
    exact=False,
    saving="memory",
    departures=(
        "Forget gates are real numbers, as in flash-linear-attention; the paper also has complex ones.",
        "Projections, norm and output gate belong to the layer.",
    ),
    oracles=(
        "flash-linear-attention's naive_recurrent_hgrn",
        "bounds: none in layer 0, rising, below 1",
        "packed and padded sequences equal those on their own",
    ),
)


def scan(
    x: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + (1 - a_t) x_t` with `a_t = exp(decay_t)`, elementwise.

    Args:
        x: `[B, T, D]`.
        decay: log-decays `[B, T, D]`, at most 0, as `gate` makes them.
        initial_state: `[B, D]`, `[N, D]` where packed, float32 (float64 for float64); None: 0.
        cu_seqlens: integers `[N + 1]` from 0 to T, increasing: N sequences in one row (B = 1).
        mask: bool `[B, T]`, False at padding: it leaves the state alone, and its output is 0.
        check: whether the values of `decay` and `cu_seqlens` are looked at; None: on a CPU only.
        backend: "auto", "stepwise", "chunked" or "triton", as `ops.elementwise.recur` takes it.

    Returns:
        h `[B, T, D]` in x's dtype and the last state, shaped as `initial_state`, float32 (float64 for float64).

    Raises:
        RegardError: shapes or dtypes disagree, a log-decay is positive or NaN, `cu_seqlens` does not cut the text, or a
            named backend refuses.
    """
    choose("backend", backend, BACKENDS)
    check_packing(x.shape[0], x.shape[1], cu_seqlens, mask)
    _check(x, decay, initial_state, cu_seqlens)
    if mask is not None:
        x, decay = (y.masked_fill(~mask[..., None], 0) for y in (x, decay))
    if x.device.type == "cpu" if check is None else check:
        check_values(decay, None, 1.0)
        check_bounds(cu_seqlens, x.shape[1])
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    decay = decay.to(exact)
    forget, inputs = decay.exp(), -torch.expm1(decay) * x
    if cu_seqlens is None:
        h, last = recur(forget, inputs, initial=initial_state, backend=backend)
    else:
        starts = cu_seqlens[:-1].long()
        if initial_state is not None:
            inputs = inputs.index_add(1, starts, (forget[0, starts] * initial_state)[None])
        h, _ = recur(forget.index_fill(1, starts, 0), inputs, backend=backend)
        last = h[0, cu_seqlens[1:].long() - 1]
    if mask is not None:
        h = h.masked_fill(~mask[..., None], 0)
    return h.to(x.dtype), last


def gate(x: Tensor, lower: Tensor | None = None) -> Tensor:
    """Log-decays `log(lower + (1 - lower) sigmoid(x))`, at most 0; `lower` from `lower_bounds`, None: 0."""
    return bounded_decay(x, lower)


def _check(x: Tensor, decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if x.dim() != 3 or x.shape != decay.shape or not (x.is_floating_point() and decay.is_floating_point()):
        raise RegardError(
            f"x and decay must be float [B, T, D], got {list(x.shape)} {x.dtype} and {list(decay.shape)} {decay.dtype}"
        )
    if state is None:
        return
    shape = [x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, x.shape[2]]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    if list(state.shape) != shape or state.dtype != exact:
        raise RegardError(
            f"the state of {x.dtype} inputs must be {shape} {exact}, got {list(state.shape)} {state.dtype}"
        )
