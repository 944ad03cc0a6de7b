"""Attention that reads a ridge regression of values on keys, fitted anew for every query with its softmax weights.

With `p` the causal softmax weights, `m = p k` and `r = (Cov_p(k) + ridge)^-1 (m - q)`, the result is
`sum_j p_j (1 - (k_j - m) . r) v_j`. Where the matrix is cut to diagonal blocks, the paper cuts
`Cov_p(k) + (m - q)(m - q)^T + ridge`, so `r` is put together from the blocks by Sherman and Morrison's formula.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.primitives.conjugate import conjugate

ROWS = 64  # queries at a time: their weights over all keys are as large as 64 channels of the keys


class Fit(NamedTuple):
    """How regressions are fitted: `scale` of the scores, size of diagonal `block`s, and of conjugate gradients
    the most `iterations`, the `tolerance` of squared residuals, and whether the diagonal preconditions (`jacobi`).
    """

    scale: float
    block: int
    iterations: int = 32
    tolerance: float = 1e-12
    jacobi: bool = False


def dense(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, mask: Tensor | None, fit: Fit) -> Tensor:
    """All queries at once, each by a direct solve: the definition, in memory `T S + T D^2`.

    Args:
        q: `[B, H, T, D]`, the last T positions.
        k: `[B, H, S, D]`.
        v: `[B, H, S, Dv]`.
        ridge: `[B, H, T, 1]`.
        mask: bool `[B, S]`, keys that may be seen; every query sees its own. None: all.
        fit: `scale` and `block` are read.

    Returns:
        `[B, H, T, Dv]`, differentiable any number of times.
    """
    p = weights(q, k, mask, k.shape[2] - q.shape[2], fit)
    mean = p @ k
    solved = []
    for part in _parts(k, fit):
        squares = (part(k)[..., :, None] * part(k)[..., None, :]).flatten(-2)
        covariance = (p @ squares).unflatten(-1, (fit.block, fit.block)) - part(mean)[..., :, None] * part(mean)[
            ..., None, :
        ]
        matrix = covariance + ridge[..., None] * torch.eye(fit.block, dtype=k.dtype, device=k.device)
        solved.append(torch.linalg.solve(matrix, part(mean - q)))
    return read(p, k, v, mean, mean - q, torch.cat(solved, -1), fit)


def blockwise(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, mask: Tensor | None, fit: Fit) -> tuple[Tensor, Tensor]:
    """`dense` in memory `(T + S) D + ROWS S`, by conjugate gradients; the gradient solves once more.

    Returns:
        out `[B, H, T, Dv]`, differentiable once, and how many solutions did not converge, a tensor without dimensions.
    """
    return _Blockwise.apply(q, k, v, ridge, mask, fit)  # type: ignore[return-value]


def _parts(x: Tensor, fit: Fit) -> list[Any]:
    """Views of the last axis, one a diagonal block."""
    return [lambda x, at=at: x[..., at : at + fit.block] for at in range(0, x.shape[-1], fit.block)]


def weights(q: Tensor, k: Tensor, mask: Tensor | None, first: int, fit: Fit) -> Tensor:
    """Softmax weights of queries at positions `first`, `first + 1`, ..., `[B, H, rows, S]`."""
    at = first + torch.arange(q.shape[2], device=q.device)[:, None]
    places = torch.arange(k.shape[2], device=q.device)
    allowed = places <= at
    if mask is not None:
        # A row of padding would see nothing, and its softmax be NaN.
        allowed = (allowed & mask[:, None, None, : k.shape[2]]) | (places == at)
    scores = fit.scale * (q @ k.transpose(-1, -2))
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


def _covary(p: Tensor, k: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """`Cov_p(k) x`."""
    return (p * (x @ k.transpose(-1, -2) - (mean * x).sum(-1, keepdim=True))) @ k


def read(p: Tensor, k: Tensor, v: Tensor, mean: Tensor, shift: Tensor, r: Tensor, fit: Fit) -> Tensor:
    """What regressions with slopes `r [B, H, T, D]` say at their queries; `shift` is `mean - q`, `p [B, H, T, S]`."""
    if fit.block < r.shape[-1]:
        blocks = (-1, fit.block)
        grown = (shift * r).unflatten(-1, blocks).sum(-1, keepdim=True)
        left = 1 - (grown / (1 + grown)).sum(-2)
        left = left.masked_fill(left == 0, 1e-12)
        r = (r.unflatten(-1, blocks) / (1 + grown)).flatten(-2) / left
    tilt = r @ k.transpose(-1, -2) - (mean * r).sum(-1, keepdim=True)
    return (p * (1 - tilt)) @ v


def _solve(p: Tensor, k: Tensor, mean: Tensor, ridge: Tensor, right: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    """`(Cov_p(k) + ridge)^-1 right` by diagonal blocks, and the number of queries that did not converge."""
    solved, done = [], None
    for part in _parts(k, fit):
        keys, centre = part(k), part(mean)

        def apply(x: Tensor, keys: Tensor = keys, centre: Tensor = centre) -> Tensor:
            return _covary(p, keys, centre, x) + ridge * x

        diagonal = p @ keys.square() - centre.square() + ridge if fit.jacobi else None
        options = {"iterations": fit.iterations, "tolerance": fit.tolerance}
        x, converged = conjugate(apply, part(right), diagonal=diagonal, **options)
        solved.append(x)
        done = converged if done is None else done & converged
    assert done is not None
    return torch.cat(solved, -1), (~done).sum()


class _Blockwise(torch.autograd.Function):
    """Blocks of queries; the gradient of a solution follows from the equation that it solves."""

    @staticmethod
    def forward(ctx: Any, q, k, v, ridge, mask, fit):
        past = k.shape[2] - q.shape[2]
        outs, solutions, failed = [], [], torch.zeros((), dtype=torch.int64, device=q.device)
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            some_q, some_ridge = q[:, :, rows], ridge[:, :, rows]
            end = past + start + some_q.shape[2]
            keys, values = k[:, :, :end], v[:, :, :end]
            p = weights(some_q, keys, mask, past + start, fit)
            mean = p @ keys
            r, count = _solve(p, keys, mean, some_ridge, mean - some_q, fit)
            outs.append(read(p, keys, values, mean, mean - some_q, r, fit))
            solutions.append(r)
            failed += count
        ctx.save_for_backward(q, k, v, ridge, mask, torch.cat(solutions, 2))
        ctx.fit = fit
        ctx.mark_non_differentiable(failed)
        return torch.cat(outs, 2), failed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, _):
        q, k, v, ridge, mask, solutions = ctx.saved_tensors
        fit, past = ctx.fit, k.shape[2] - q.shape[2]
        grads = [torch.zeros_like(x) for x in (q, k, v, ridge)]
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, min(start + ROWS, q.shape[2]))
            end = slice(0, past + rows.stop)
            taken = (rows, end, end, rows)
            with torch.enable_grad():
                leaves = [x[:, :, t].detach().requires_grad_() for x, t in zip((q, k, v, ridge), taken, strict=True)]
                some_q, keys, values, some_ridge = leaves
                r = solutions[:, :, rows].detach().requires_grad_()
                p = weights(some_q, keys, mask, past + start, fit)
                mean = p @ keys
                out = read(p, keys, values, mean, mean - some_q, r, fit)
                into = torch.autograd.grad(out, r, dout[:, :, rows], retain_graph=True)[0]
                # From (Cov + ridge) r = mean - q: what changes its sides changes r by the inverse of the difference.
                known = r.detach()
                parts = [_covary(p, part(keys), part(mean), part(known)) for part in _parts(keys, fit)]
                gap = mean - some_q - torch.cat(parts, -1) - some_ridge * known
                with torch.no_grad():
                    back, _ = _solve(p, keys, mean, some_ridge, into, fit)
                found = torch.autograd.grad((out, gap), leaves, (dout[:, :, rows], back))
            for grad, new, t in zip(grads, found, taken, strict=True):
                grad[:, :, t] += new
        return (*grads, None, None)
