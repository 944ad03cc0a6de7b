"""Torch's fused attention kernels, with the lse that `scaled_dot_product_attention` throws away.

`_scaled_dot_product_flash_attention_for_cpu` on CPU; on CUDA flash attention where nothing is masked, else
the memory-efficient kernel, which takes a mask but no grouped heads. None of them differentiates the lse.
What the lse adds to the score gradient of a row is `P dlse`, so the kernels' own backward computes it when
its `rowsum(dout * out)` is lowered by `dlse`: it is called with `out - dlse / |dout|^2 dout` in place of out.
Rows whose `dout` vanishes take a second pass with the keys as values (`_lse_gradients`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
Part = tuple[Tensor, Tensor]


def refuses(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, softcap: float | None = None) -> str | None:
    """Why torch's fused kernels cannot do this call exactly, or None if they can."""
    if 0 in (*q.shape, k.shape[2]):
        return "there are no queries or no keys, and torch's fused kernels need both"
    if softcap is not None:
        return "torch's fused kernels have no softcap"
    if v.shape[3] != q.shape[3]:
        return f"torch's fused kernels need Dv = D, got {v.shape[3]} and {q.shape[3]}"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "torch's fused kernels give a bias no gradient"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.device.type == "cpu":
        fit = q.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return None if fit else f"the CPU kernel does not take {q.dtype}"
    if q.device.type != "cuda":
        return f"no kernel that returns an lse is known for device {q.device.type}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels do not take {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"the CUDA kernels need a head dimension of 8, 16, ..., 256, got {q.shape[3]}"
    return None


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    square: bool = False,
) -> Part:
    """`reference` through a fused kernel; only for calls that `refuses` does not refuse and with S, T > 0.

    `square` says that `T == S` and the mask is the causal triangle; `mask` and `bias` are None then.

    Returns:
        out `[B, H, T, D]`, equal to the bit to `scaled_dot_product_attention`'s under the same mask, and
        lse `[B, H, T]`; both differentiable once.
    """
    assert softcap is None
    assert mask is None or not square
    # Called below SDPA, the kernels read any last dimension as contiguous.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    added, empty = _additive(q, k, mask, bias)
    if q.device.type == "cuda" and (added is not None or q.dtype == torch.float32) and q.shape[1] != k.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Fused.apply(q, k, v, added, empty, square, scale)  # type: ignore[return-value]
    out, lse, _ = _forward(q, k, v, added, square, scale)
    return _blank(out, lse, empty)


def with_own(q: Tensor, k: Tensor, v: Tensor, score: Tensor, own: Tensor, *, scale: float) -> Tensor:
    """Attention of row t over keys `j < t` and over one entry that is the row's alone, without a mask.

    The same as joining `fused` over the keys and the entry by their log-sum-exp, but the gradient takes one
    backward of the kernel: given the output and the log-sum-exp of the whole, it differentiates its part of it.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, T, D]`; the last key is seen by no row.
        v: `[B, Hk, T, D]`.
        score: `[B, H, T]`, scaled, in float32 (float64 for float64): of the row's own entry.
        own: `[B, H, T, D]`, its value.
        scale: of the other scores.

    Returns:
        `[B, H, T, D]`, differentiable once, laid out as `own` is.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _WithOwn.apply(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], score, own, scale)  # type: ignore[return-value]


def own_refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `with_own` cannot do this call, or None if it can."""
    if q.device.type == "cuda" and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        return "torch's kernel for float32 on CUDA has no grouped heads"
    return refuses(q, k, v)


class _WithOwn(torch.autograd.Function):
    """`with_own` where the kernel's keys are shifted already."""

    @staticmethod
    def forward(ctx: Any, q, k, v, score, own, scale):
        out = torch.empty_like(own)
        out[:, :, :1] = own[:, :, :1]
        lse, extra = score[:, :, 1:], ()
        if q.shape[2]:
            before, lse, extra = _forward(q, k, v, None, True, scale)
            lse = torch.logaddexp(lse, score[:, :, 1:])
            weight = torch.exp(score[:, :, 1:] - lse)[..., None].to(own.dtype)
            torch.lerp(before, own[:, :, 1:], weight, out=out[:, :, 1:])
        tensors = [x for x in extra if isinstance(x, Tensor)]
        ctx.extra = tuple(_TENSOR if isinstance(x, Tensor) else x for x in extra)
        ctx.save_for_backward(q, k, v, score, own, out, lse, *tensors)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        q, k, v, score, own, out, lse, *tensors = ctx.saved_tensors
        left = iter(tensors)
        extra = tuple(next(left) if x is _TENSOR else x for x in ctx.extra)
        rows = dout[:, :, 1:]
        down, dscore = dout.clone(), torch.zeros_like(score)
        if not q.shape[2]:
            return (*(torch.zeros_like(x) for x in (q, k, v)), dscore, down, None)
        weight = torch.exp(score[:, :, 1:] - lse)
        down[:, :, 1:].mul_(weight[..., None].to(down.dtype))
        share = ((own - out)[:, :, 1:] * rows).sum(-1, dtype=score.dtype)
        dscore[:, :, 1:] = weight * share
        if extra:
            # Kernels may give an lse longer than the rows.
            whole = extra[1].clone()
            whole[..., : lse.shape[-1]] = lse
            extra = (extra[0], whole, *extra[2:])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        grads = _backward(rows, (q, k, v), out[:, :, 1:], lse, None, True, ctx.scale, extra)
        return (*grads, dscore, down, None)


def _additive(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The kernels' float mask `[1|B, 1|H, T, S]`, and which rows are empty (`[1|B, 1|H, T]`, None: none is).

    Empty rows are opened in the float mask: what kernels make of a row of -inf differs, `_blank` does not.
    """
    if mask is None and bias is None:
        return None, None
    if bias is None:
        assert mask is not None
        # Reading the mask is free on CPU only: on CUDA it would wait for the device.
        if q.device.type == "cpu" and bool(mask.all()):
            return None, None
        empty = ~mask.any(-1)
        if q.device.type == "cpu" and not empty.any():
            empty = None
        else:
            mask = mask | empty[..., None]
        if mask.shape[1] > 1:
            group = q.shape[1] // mask.shape[1]
            mask = mask.repeat_interleave(group, 1)
            empty = None if empty is None else empty.repeat_interleave(group, 1)
        return _aligned(torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf), q, k), empty
    bias = bias.detach().reshape((1,) * (4 - bias.dim()) + bias.shape).to(q.dtype)
    bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    if mask is not None:
        grown = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1) if mask.shape[1] > 1 else mask
        bias = torch.where(grown, bias, -torch.inf)
    empty = bias.amax(-1) == -torch.inf
    return _aligned(bias.masked_fill(empty[..., None], 0), q, k), empty


def _aligned(added: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """On CUDA the kernel wants `[B, H, T, S]` whose rows start at multiples of 16 bytes."""
    if q.device.type != "cuda":
        return added
    keys = k.shape[2]
    padded = torch.nn.functional.pad(added, (0, -keys % 8))[..., :keys]
    return padded.expand(q.shape[0], q.shape[1], -1, -1)


def _blank(out: Tensor, lse: Tensor, empty: Tensor | None) -> Part:
    if empty is None:
        return out, lse
    return out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, square: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """`(out, lse [B, H, T], what the kernel's backward wants besides)`."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, square, attn_mask=added, scale=scale)
        return out, lse, ()
    if added is None and q.dtype != torch.float32:
        out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, square, False, scale=scale)
        return out, lse[..., : q.shape[2]], ("flash", lse, *rest[:6])
    out, lse, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, added, True, 0.0, square, scale=scale)
    return out, lse[..., : q.shape[2]], ("efficient", lse, *rest)


def _backward(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    added: Tensor | None,
    square: bool,
    scale: float,
    extra: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    if not extra:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, square, attn_mask=added, scale=scale
        )
    kernel, lse, *rest = extra
    if kernel == "flash":
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, square, seed, offset, scale=scale
        )
    if added is None:
        # The schema demands a tensor here; a row of zeros seen by all rows costs nothing.
        zeros = q.new_zeros(1, 1, 1, k.shape[2] + -k.shape[2] % 8)[..., : k.shape[2]]
        added = zeros.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    seed, offset = rest
    return aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, added, out, lse, seed, offset, 0.0, [True, True, True, False], square, scale=scale
    )[:3]


# Stands where a tensor was: autograd saves those apart, and None is an answer of some kernels.
_TENSOR = object()


class _Fused(torch.autograd.Function):
    """The kernels with gradients of both results."""

    @staticmethod
    def forward(ctx: Any, q, k, v, added, empty, square, scale):
        out, lse, extra = _forward(q, k, v, added, square, scale)
        ctx.set_materialize_grads(False)
        tensors = [x for x in extra if isinstance(x, Tensor)]
        ctx.extra = tuple(_TENSOR if isinstance(x, Tensor) else x for x in extra)
        ctx.save_for_backward(q, k, v, added, empty, out, lse, *tensors)
        ctx.square, ctx.scale = square, scale
        return _blank(out, lse, empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dlse):
        q, k, v, added, empty, out, lse, *tensors = ctx.saved_tensors
        left = iter(tensors)
        extra = tuple(next(left) if x is _TENSOR else x for x in ctx.extra)
        dout = torch.zeros_like(out) if dout is None else dout
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        if empty is not None:
            dout = dout.masked_fill(empty[..., None], 0)
            dlse = None if dlse is None else dlse.masked_fill(empty, 0)
        rest = None
        stand_in = out
        if dlse is not None:
            stand_in, rest = _fold(out, dout, dlse)
        call = (added, ctx.square, ctx.scale)
        dq, dk, dv = _backward(dout, (q, k, v), stand_in, lse, *call, extra)
        if rest is not None and bool(rest.any()):
            more_q, more_k = _lse_gradients(q, k, rest, *call)
            dq, dk = dq + more_q, dk + more_k
        return dq, dk, dv, None, None, None, None


def _fold(out: Tensor, dout: Tensor, dlse: Tensor) -> Part:
    """What stands in for `out` so that the kernel adds `dlse`, and the `dlse` of rows where nothing can."""
    exact = dout.to(dlse.dtype)
    shift = dlse / exact.square().sum(-1)
    folded = (out.to(dlse.dtype) - shift[..., None] * exact).to(out.dtype)
    good = torch.isfinite(folded).all(-1)
    # The memory-efficient kernel reads it with the strides that its own out has.
    stand_in = torch.empty_like(out).copy_(torch.where(good[..., None], folded, out))
    return stand_in, dlse.masked_fill(good, 0)


def _lse_gradients(q: Tensor, k: Tensor, dlse: Tensor, added: Tensor | None, square: bool, scale: float) -> Part:
    """`dlse` through the lse alone: `dq = dlse * scale * P k`, `dk = scale * P^T (dlse * q)`, both fused."""
    mean, lse, extra = _forward(q, k, k, added, square, scale)
    weight = (dlse * scale)[..., None]
    through = (weight * q).to(q.dtype)
    _, _, dk = _backward(through, (q, k, k), mean, lse, added, square, scale, extra)
    return (weight * mean).to(q.dtype), dk
