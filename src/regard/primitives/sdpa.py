"""Torch's fused attention kernels, with the lse that `scaled_dot_product_attention` throws away.

`_scaled_dot_product_flash_attention_for_cpu` on CPU; on CUDA, where nothing is masked, cuDNN's kernel (`_cudnn` says
when) or flash attention, else the memory-efficient one, which takes a mask but no grouped heads. None of them
differentiates the lse.
What the lse adds to the score gradient of a row is `P dlse`, so the kernels' own backward computes it when
its `rowsum(dout * out)` is lowered by `dlse`: it is called with `out - dlse / |dout|^2 dout` in place of out.
Rows whose `dout` vanishes take a second pass with the keys as values (`_lse_gradients`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDNN = 90501  # the first version of its backward that reads gradients laid out otherwise than the output
# cuDNN builds a plan for every new shape, 0.05 s each way (0.7 s for the first of its kind), and saves half the time of
# large calls. Training repeats its shapes, so what counts is where it becomes faster; a prompt may be the only one of
# its length, so that the layers of a model must earn the plan back in one pass.
LEAST_TRAINED = 2**29  # multiply-adds of a product, as B1 H32 T512 D128
LEAST_ONCE = 2**38  # B1 H32 T11,600 D128, where a layer saves 2 ms
ROWS = 128  # of a tile: for fewer queries flash attention splits the keys
Part = tuple[Tensor, Tensor]
Extra = tuple[Any, ...]
_TENSOR = object()  # stands where a tensor was; None is an answer of some kernels


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
    if _trained(q, k, v):
        return _Fused.apply(q, k, v, added, empty, square, scale)  # type: ignore[return-value]
    out, lse, _ = _forward(q, k, v, added, square, scale, False)
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
    trained = _trained(q, k, v, score, own)
    call = (q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], score, own, scale, trained)
    return _WithOwn.apply(*call)  # type: ignore[return-value]


def own_refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `with_own` cannot do this call, or None if it can."""
    if q.device.type == "cuda" and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        return "torch's kernel for float32 on CUDA has no grouped heads"
    return refuses(q, k, v)


class _WithOwn(torch.autograd.Function):
    """`with_own` where the kernel's keys are shifted already."""

    @staticmethod
    def forward(ctx: Any, q, k, v, score, own, scale, trained):
        out = torch.empty_like(own)
        out[:, :, :1] = own[:, :, :1]
        lse, extra = score[:, :, 1:], ()
        if q.shape[2]:
            before, lse, extra = causal(q, k, v, scale=scale, trained=trained)
            lse = torch.logaddexp(lse, score[:, :, 1:])
            weight = torch.exp(score[:, :, 1:] - lse)[..., None].to(own.dtype)
            torch.lerp(before, own[:, :, 1:], weight, out=out[:, :, 1:])
        tensors, ctx.extra = apart(extra)
        ctx.save_for_backward(q, k, v, score, own, out, lse, *tensors)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        q, k, v, score, own, out, lse, *tensors = ctx.saved_tensors
        rows = dout[:, :, 1:]
        down, dscore = dout.clone(), torch.zeros_like(score)
        if not q.shape[2]:
            return (*(torch.zeros_like(x) for x in (q, k, v)), dscore, down, None, None)
        weight = torch.exp(score[:, :, 1:] - lse)
        down[:, :, 1:].mul_(weight[..., None].to(down.dtype))
        share = ((own - out)[:, :, 1:] * rows).sum(-1, dtype=score.dtype)
        dscore[:, :, 1:] = weight * share
        extra = together(tensors, ctx.extra)
        grads = causal_gradients(rows, (q, k, v), out[:, :, 1:], lse, scale=ctx.scale, extra=extra)
        return (*grads, dscore, down, None, None)


def causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float, trained: bool) -> tuple[Tensor, Tensor, Extra]:
    """Row t over keys `j <= t`, for a caller that differentiates on its own; for calls that `own_refuses` takes.

    Args:
        q: `[B, H, T, D]`, T above 0.
        k: `[B, Hk, T, D]`.
        v: `[B, Hk, T, D]`.
        scale: of the scores.
        trained: whether `causal_gradients` will be called.

    Returns:
        out `[B, H, T, D]`, lse `[B, H, T]`, and what `causal_gradients` wants besides.
    """
    return _forward(q, k, v, None, True, scale, trained)


def causal_gradients(
    dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, *, scale: float, extra: Extra
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v of `causal`, whose part of the output may be smaller than the whole.

    `out` and `lse [B, H, T]` are of all that a row reads, here and elsewhere: with what the kernel found by itself they
    give the gradients of its own output; with those of a join that they went into, of their share of the join.
    """
    if extra:
        # Kernels may give an lse longer than the rows, or with one more axis.
        whole = extra[1].clone().flatten(2)
        whole[..., : lse.shape[-1]] = lse
        extra = (extra[0], whole.view_as(extra[1]), *extra[2:])
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    return _backward(dout, qkv, out, lse, None, True, scale, extra)


def apart(extra: Extra) -> tuple[list[Tensor], Extra]:
    """The tensors of `extra`, and the rest with marks in their places: autograd saves tensors apart."""
    return [x for x in extra if isinstance(x, Tensor)], tuple(_TENSOR if isinstance(x, Tensor) else x for x in extra)


def together(tensors: list[Tensor], extra: Extra) -> Extra:
    """`apart` undone."""
    left = iter(tensors)
    return tuple(next(left) if x is _TENSOR else x for x in extra)


def _trained(*tensors: Tensor) -> bool:
    """Whether gradients are wanted."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


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
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, square: bool, scale: float, trained: bool
) -> tuple[Tensor, Tensor, Extra]:
    """`(out, lse [B, H, T], what the kernel's backward wants besides)`; `trained`: that backward will come."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, square, attn_mask=added, scale=scale)
        return out, lse, ()
    if added is None and q.dtype != torch.float32:
        if _cudnn(q, k, square, trained):
            call = (None, True, 0.0, square, False)
            out, lse, *rest = aten._scaled_dot_product_cudnn_attention(q, k, v, *call, scale=scale)
            return out, lse.reshape(q.shape[:3]), ("cudnn", lse, *rest[:6])
        out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, square, False, scale=scale)
        return out, lse[..., : q.shape[2]], ("flash", lse, *rest[:6])
    out, lse, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, added, True, 0.0, square, scale=scale)
    return out, lse[..., : q.shape[2]], ("efficient", lse, *rest)


def _cudnn(q: Tensor, k: Tensor, square: bool, trained: bool) -> bool:
    """Whether cuDNN's kernel takes this call without a mask, and is worth its plan."""
    B, H, T, D = q.shape
    work = B * H * T * k.shape[2] * D // (1 + square)
    if T < ROWS or k.shape[2] < 2 or work < (LEAST_TRAINED if trained else LEAST_ONCE):
        return False
    if D > 128 or max(B, H) > 65535 or torch.are_deterministic_algorithms_enabled():
        return False
    # What torch asks before it prefers cuDNN itself.
    if q.device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    capable = torch.cuda.get_device_capability(q.device) in ((9, 0), (10, 0))
    return capable and (torch.backends.cudnn.version() or 0) >= CUDNN


def _laid_as(q: Tensor, x: Tensor) -> Tensor:
    """`x` laid out as cuDNN's output is for this q.

    Up to 2.11 torch finds a plan by the layouts of q, k, v alone: with another x a later call would read it wrongly.
    """
    wanted = torch.empty_like(q, device="meta").stride()
    return x if x.stride() == wanted else torch.empty_like(q).copy_(x)


def _backward(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    added: Tensor | None,
    square: bool,
    scale: float,
    extra: Extra,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    if not extra:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, square, attn_mask=added, scale=scale
        )
    kernel, lse, *rest = extra
    if kernel == "cudnn":
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        dout, out = _laid_as(q, dout), _laid_as(q, out)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, square, scale=scale
        )
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


class _Fused(torch.autograd.Function):
    """The kernels with gradients of both results."""

    @staticmethod
    def forward(ctx: Any, q, k, v, added, empty, square, scale):
        out, lse, extra = _forward(q, k, v, added, square, scale, True)
        ctx.set_materialize_grads(False)
        tensors, ctx.extra = apart(extra)
        ctx.save_for_backward(q, k, v, added, empty, out, lse, *tensors)
        ctx.square, ctx.scale = square, scale
        return _blank(out, lse, empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dlse):
        q, k, v, added, empty, out, lse, *tensors = ctx.saved_tensors
        extra = together(tensors, ctx.extra)
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
    mean, lse, extra = _forward(q, k, k, added, square, scale, True)
    weight = (dlse * scale)[..., None]
    through = (weight * q).to(q.dtype)
    _, _, dk = _backward(through, (q, k, k), mean, lse, added, square, scale, extra)
    return (weight * mean).to(q.dtype), dk


WHOLE = aten.scaled_dot_product_attention.default
# Where each kernel is told whether to compute it; None: it always does.
TOLD = {
    aten._scaled_dot_product_flash_attention.default: None,
    aten._scaled_dot_product_flash_attention_for_cpu.default: None,
    aten._scaled_dot_product_efficient_attention.default: 4,
    aten._scaled_dot_product_cudnn_attention.default: 4,
}


class Overheard(TorchDispatchMode):
    """Inside, `lse` is that of the last fused kernel that ran, `[B, H, T]` float32; None: none did.

    Outputs are what they would be without: the same kernels run on the same tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lse: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is WHOLE:  # seen under inference_mode, where nothing takes it apart before
            with self:
                return func.decompose(*args, **kwargs)
        place = TOLD.get(func)
        if place is not None:
            args = (*args[:place], True, *args[place + 1 :])
        out = func(*args, **kwargs)
        if func in TOLD:
            # Kernels may give more rows than there are, or one more axis.
            self._lse = out[1].flatten(2)[..., : args[0].shape[2]]
        return out

    def taken(self, heads: int, rows: int) -> Tensor | None:
        """What was overheard, if it is of `heads` query heads and `rows` rows."""
        fits = self._lse is not None and tuple(self._lse.shape[1:]) == (heads, rows)
        return self._lse if fits else None
