"""Local Linear Attention: every query fits a ridge regression of values on keys, weighted by softmax, and reads it."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose
from regard.core.shapes import group_size
from regard.primitives.grid import packed
from regard.primitives.regression import Fit, blockwise, dense

CARD = Card(
    title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
    arxiv="2510.01450",
    sheet=86,
    implements="The operator: dense, and in blocks of queries with conjugate gradients; decoding from a full cache.",
    exact=False,
    saving="none",
    departures=(
        "The centred form: o = p v - Cov(v, k) (Cov(k) + ridge)^-1 (k mean - q), equal and better conditioned.",
        "Blocks of queries keep their softmax weights through the iterations instead of computing them anew in each.",
    ),
    oracles=(
        "the raw weights s of the paper in a loop; they add up to 1",
        "ridge to infinity: softmax attention; flat weights and ridge 0: least squares with intercept",
        "values linear in the keys: the linear map at the query, exactly",
        "blocks equal the dense form, gradients equal finite differences",
    ),
    options={
        "ridge": Option(
            kind="float",
            default=10.0,
            low=0.0,
            search=(0.1, 1.0, 10.0),
            doc="lambda, relative to the sum of the weights",
        ),
        "scale": Option(kind="float", default=None, optional=True, doc="of the scores; none: D ** -0.5"),
        "block": Option(default=None, optional=True, low=1, doc="size of the diagonal blocks that are solved; none: D"),
        "iterations": Option(default=32, low=1, doc="of conjugate gradients, at most"),
        "tolerance": Option(kind="float", default=1e-12, low=0.0, doc="squared residual, relative, that ends them"),
        "jacobi": Option(kind="bool", default=False, doc="divide residuals by the diagonal (a preconditioner)"),
    },
)
BACKENDS = ("auto", "dense", "blockwise")


class State(NamedTuple):
    """The cache: `keys [B, Hk, S, D]`, `values [B, Hk, S, Dv]`, and `mask [B, S]` bool, None where all is real."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float | Tensor = 10.0,
    scale: float | None = None,
    block: int | None = None,
    iterations: int = 32,
    tolerance: float = 1e-12,
    jacobi: bool = False,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """`o_i = sum_j s_ij v_j` over `j <= i`, with `s_i` what the ridge regression at query i makes of values.

    Args:
        q: `[B, H, T, D]`. bfloat16 and float16 are computed in float32.
        k: `[B, Hk, T, D]`, Hk dividing H.
        v: `[B, Hk, T, Dv]`.
        ridge: lambda, a number or one a query, `[B, T]` or `[B, H, T]`; 0 only where the keys seen span all directions.
        scale: of the scores; None: `D ** -0.5`.
        block: the matrix is cut to diagonal blocks of this size; None: it is whole.
        iterations: of conjugate gradients, at most.
        tolerance: squared residual, relative to the first, at which a query is done.
        jacobi: precondition with the diagonal.
        initial_state: the cache of an earlier call.
        cu_seqlens: `[N + 1]`, packed sequences, B = 1; padded to the longest, which is read from the device.
        mask: `[B, T]` bool, False: padding; its output is 0.
        check: read lambda, and whether conjugate gradients converged (None: on a CPU).
        backend: "dense" (a direct solve a query), "blockwise" (memory linear in T), "auto" (dense for single tokens).

    Returns:
        out `[B, H, T, Dv]` in q's dtype, and the cache. Warns, with their number, of queries that did not converge.

    Raises:
        RegardError: shapes disagree, `block` does not divide D, lambda is negative, or 0 where keys do not span.

    Source: 2510.01450; Yifei-Zuo/FlashLLA, `flashlla/ops/{naive,cg}.py`.
    """
    size = q.shape[-1]
    fit = Fit(size**-0.5 if scale is None else scale, size if block is None else block, iterations, tolerance, jacobi)
    _check(q, k, v, fit, mask, initial_state)
    choose("backend", backend, BACKENDS)
    check = q.device.type == "cpu" if check is None else check
    if cu_seqlens is None:
        return _run(q, k, v, ridge, fit, initial_state, mask, check, backend)
    if q.shape[0] != 1 or mask is not None or initial_state is not None or isinstance(ridge, Tensor):
        raise RegardError("packed sequences lie in one batch row, with no mask, no state and one ridge for all")
    rows = packed(cu_seqlens, q.shape[2])
    q, k, v = (rows.rows(x) for x in (q, k, v))
    out, state = _run(q, k, v, ridge, fit, None, rows.mask, check, backend)
    return rows.pack(out), state


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: float | Tensor,
    fit: Fit,
    past: State | None,
    mask: Tensor | None,
    check: bool,
    backend: str,
) -> tuple[Tensor, State]:
    state = _grown(k, v, mask, past)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = group_size(q, k)
    keys, values = (x.to(exact).repeat_interleave(group, 1) for x in (state.keys, state.values))
    ridges = _ridges(ridge, q, check).to(exact)
    if check:
        _check_span(ridges, keys, state.mask, q.shape[2], fit)
    call = (q.to(exact), keys, values, ridges, state.mask, fit)
    if backend == "dense" or (backend == "auto" and q.shape[2] == 1):
        out = dense(*call)
    else:
        out, failed = blockwise(*call)
        if check and int(failed):
            told = f"conjugate gradients did not converge in {fit.iterations} iterations"
            warnings.warn(f"{told} for {int(failed)} of {ridges.numel()} queries", stacklevel=3)
    out = out.to(q.dtype)
    return out if mask is None else out.masked_fill(~mask[:, None, :, None], 0), state


def _grown(k: Tensor, v: Tensor, mask: Tensor | None, past: State | None) -> State:
    """The cache with these tokens in it."""
    if past is None:
        return State(k, v, mask)
    if mask is not None or past.mask is not None:
        whole = torch.ones(k.shape[0], max(k.shape[2], past.keys.shape[2]), dtype=torch.bool, device=k.device)
        before = whole[:, : past.keys.shape[2]] if past.mask is None else past.mask
        mask = torch.cat([before, whole[:, : k.shape[2]] if mask is None else mask], 1)
    return State(torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2), mask)


def _ridges(ridge: float | Tensor, q: Tensor, check: bool) -> Tensor:
    """Lambda of every query, `[B, H, T, 1]`."""
    B, H, T, _ = q.shape
    if isinstance(ridge, Tensor):
        if tuple(ridge.shape) not in ((B, T), (B, H, T)):
            raise RegardError(f"ridge must be a number, [{B}, {T}] or [{B}, {H}, {T}], got {list(ridge.shape)}")
        least = float(ridge.min()) if check else 0.0
        ridges = ridge[:, None] if ridge.dim() == 2 else ridge
    else:
        least, ridges = ridge, torch.full((1, 1, 1), float(ridge), device=q.device, dtype=torch.float64)
    if not least >= 0:
        raise RegardError(f"ridge must be at least 0, got {least}")
    return ridges[..., None].expand(B, H, T, 1)


def _check_span(ridges: Tensor, keys: Tensor, mask: Tensor | None, tokens: int, fit: Fit) -> None:
    """Raise RegardError where lambda is 0 and the keys seen do not span all directions."""
    past = keys.shape[2] - tokens
    none = ridges[..., 0] == 0
    if mask is not None:
        none = none & mask[:, None, past:]
    for row, head in none.any(-1).nonzero().tolist():
        # Later queries see more keys: the first one decides.
        query = int(none[row, head].to(torch.int8).argmax())
        seen = keys[row, head, : past + query + 1]
        seen = seen if mask is None else seen[mask[row, : len(seen)]]
        ranks = [int(torch.linalg.matrix_rank(part - part.mean(0))) for part in seen.split(fit.block, -1)]
        if min(ranks) < fit.block:
            raise RegardError(
                f"ridge is 0 at query {query} (row {row}, head {head}), whose {len(seen)} keys span {min(ranks)} of "
                f"{fit.block} directions: the regression has no one answer; pass a ridge above 0 there"
            )


def _check(q: Tensor, k: Tensor, v: Tensor, fit: Fit, mask: Tensor | None, past: State | None) -> None:
    """Raise RegardError for arguments that do not belong together."""
    shapes = [list(x.shape) for x in (q, k, v)]
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3] or k.shape[2] == 0:
        raise RegardError(f"q must be [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv], T above 0, got {shapes}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise RegardError(f"q and k must agree in all but their heads, got {shapes[:2]}")
    group_size(q, k)
    if fit.block < 1 or q.shape[3] % fit.block:
        raise RegardError(f"block must divide the head dimension {q.shape[3]}, got {fit.block}")
    if fit.iterations < 1 or not fit.tolerance >= 0:
        raise RegardError(
            f"iterations must be at least 1 and tolerance at least 0, got {fit.iterations}, {fit.tolerance}"
        )
    if mask is not None and (mask.shape != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool):
        raise RegardError(f"mask must be bool [B, T], got {list(mask.shape)} {mask.dtype}")
    if past is not None and (past.keys.shape[0], past.keys.shape[1], past.keys.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise RegardError(f"the cache holds keys {list(past.keys.shape)}, these are {shapes[1]}")
