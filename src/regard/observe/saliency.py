"""How much each attention weight matters for the next token: `|A dL/dA|` of every head [112], at any length."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.intercept import intercept
from regard.adapters.seam import Call, open_free
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.shapes import group_size
from regard.observe.inputs import prepared
from regard.observe.reader import overheard
from regard.ops.totals import edges
from regard.primitives.sweep import LIMIT, visible


@dataclass(frozen=True, eq=False)
class Saliency:
    """What the loss of one token depends on; float32 (float64 for float64) on the model's device.

    Args:
        maps: `[L, B, H, R, C]`: `|A dL/dA|`, sum over a tile's keys, mean over its rows.
        rows: `[L, B, H, T]`: `sum_j A dL/dA`, signed: how the loss changes as a row's whole output grows.
        loss: `[B]`: `-log p(target)` at the last row.
        target: `[B]` token ids.
        row_edges: `[R + 1]` arrivals.
        key_edges: `[C + 1]` arrivals.
    """

    maps: Tensor
    rows: Tensor
    loss: Tensor
    target: Tensor
    row_edges: Tensor
    key_edges: Tensor


def saliency(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], *, target: Tensor | int | None = None, size: int = 128
) -> Saliency:
    """Saliency of every head for the token after the prompt: one forward and one backward; no weight gets a gradient.

    Args:
        model: any model `regard.attach` takes, with its language-model head, not attached; it is not changed.
        inputs: ids `[B, T]`, or what a processor made, padded on the left.
        target: token id, or `[B]` of them; None: the most likely ones.
        size: tiles a side, at most.

    Raises:
        RegardError: inference mode is on, the prompt is padded on the right, a target outside the vocabulary, a model
            without logits, NaN, or what attention beyond `record`'s raises.
    """
    if torch.is_inference_mode_enabled():
        raise RegardError("saliency needs gradients, which torch.inference_mode forbids; use torch.no_grad or nothing")
    if size < 1:
        raise RegardError(f"size must be at least 1, got {size}")
    decoder, _ = open_free(model)
    given, real = prepared(model, inputs)
    if not bool(real[:, -1].all()):
        raise RegardError(f"row {int((~real[:, -1]).nonzero()[0])} ends in padding; pad prompts on the left")
    calls: list[tuple[Call, Tensor, Tensor]] = []

    def run(call: Call) -> Tensor:
        out, lse = overheard(call, decoder.windows[call.seat.layer], real)
        calls.append((call, out, lse.detach()))
        return out.transpose(1, 2)

    called: Any = model
    with torch.enable_grad(), intercept(model, run), _rooted(decoder.blocks[0]):
        out = called(**given)
        if getattr(out, "logits", None) is None:
            raise RegardError(f"{type(model).__name__} gives no logits; take the model with its language-model head")
        logs = out.logits[:, -1].float().log_softmax(-1)
        chosen = _target(target, logs)
        loss = -logs.gather(1, chosen[:, None])[:, 0]
        grads = torch.autograd.grad(loss.sum(), [out for _, out, _ in calls])
    if bool(torch.isnan(loss).any()):
        raise RegardError(f"the loss of row {int(torch.isnan(loss).nonzero()[0])} is NaN")
    ends = edges(real.shape[1], size)
    maps, rows = [], []
    for (call, out, lse), grad in zip(calls, grads, strict=True):
        maps.append(_layer(call, lse, grad, real, decoder.windows[call.seat.layer], ends))
        rows.append((out.detach() * grad).float().sum(-1).transpose(1, 2))
    count = torch.nn.functional.pad(real.long().cumsum(1), (1, 0))[:, ends.to(real.device)].diff(dim=1).clamp(min=1)
    return Saliency(torch.stack(maps) / count[:, None, :, None], torch.stack(rows), loss.detach(), chosen, ends, ends)


@torch.no_grad()
def _layer(call: Call, lse: Tensor, grad: Tensor, real: Tensor, window: int | None, ends: Tensor) -> Tensor:
    arrivals = torch.where(real, torch.arange(real.shape[1], device=real.device), -1)
    pattern = Pattern.causal() if window is None else Pattern.window(window)
    return tiled(
        call.query, call.key, call.value, lse, grad.transpose(1, 2), row_edges=ends, key_edges=ends, pattern=pattern,
        q_positions=arrivals, k_positions=arrivals, scale=call.scale, softcap=call.softcap,
    )  # fmt: skip


@contextmanager
def _rooted(block: nn.Module) -> Iterator[None]:
    """Gradients begin where the hidden states enter `block`: nothing is kept below, and weights may be frozen."""

    def root(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    hook = block.register_forward_pre_hook(root, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _target(target: Tensor | int | None, logs: Tensor) -> Tensor:
    if target is None:
        return logs.argmax(-1)
    chosen = torch.as_tensor(target, device=logs.device).expand(len(logs)).long()
    wrong = (chosen < 0) | (chosen >= logs.shape[1])
    if bool(wrong.any()):
        raise RegardError(f"target {int(chosen[wrong][0])} is not in a vocabulary of {logs.shape[1]}")
    return chosen


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    row_edges: Tensor,
    key_edges: Tensor,
    pattern: Pattern | None,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`|A dL/dA|` summed over tiles of rows and keys; rows are computed in blocks, differentiable.

    The gradient of a loss in a probability is `dout_i . v_j`, so `A dL/dA` at (i, j) is `p_ij (dout_i . v_j)`: what an
    all-ones gate on A would get, without the gate.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`.
        v: `[B, Hk, S, Dv]`.
        lse: `[B, H, T]`; -inf: an empty row, which gives nothing.
        dout: `[B, H, T, Dv]`, the gradient of the loss in the output.
        row_edges: `[R + 1]` ascending from 0 to T.
        key_edges: `[C + 1]` ascending from 0 to S.
        pattern: who sees whom; None: all real keys.
        q_positions: `[1|B, T]`; negative ones are rows that do not count.
        k_positions: `[1|B, S]`.
        scale: of the scores.
        softcap: of the scores.

    Returns:
        `[B, H, R, C]`, float32 (float64 for float64).

    Raises:
        RegardError: lse or dout do not belong to q and v.
    """
    if lse.shape != q.shape[:3] or dout.shape != (*q.shape[:3], v.shape[3]):
        raise RegardError(
            f"lse must be {list(q.shape[:3])} and dout {[*q.shape[:3], v.shape[3]]}, got {list(lse.shape)} and "
            f"{list(dout.shape)}"
        )
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, group = k.shape[1], group_size(q, k)
    known = lse.masked_fill(lse == -torch.inf, 0).to(exact).unflatten(1, (heads, group))
    rows, grads = (x.to(exact).unflatten(1, (heads, group)) for x in (q, dout))
    keys, values = (x.to(exact)[:, :, None].mT for x in (k, v))
    tile, column = (_numbers(ends, q.device) for ends in (row_edges, key_edges))
    found = known.new_zeros(*known.shape[:3], len(row_edges) - 1, len(key_edges) - 1)
    block = max(1, LIMIT // (lse[:, :, 0].numel() * k.shape[2]))
    for part in (slice(start, start + block) for start in range(0, q.shape[2], block)):
        scores = _capped(rows[:, :, :, part] @ keys * scale, softcap) - known[:, :, :, part, None]
        mask = visible(pattern, q_positions[:, part], k_positions)[:, :, None]
        salient = (torch.exp(scores.masked_fill(~mask, -torch.inf)) * (grads[:, :, :, part] @ values)).abs()
        pooled = salient.new_zeros(*salient.shape[:4], len(key_edges) - 1).index_add(4, column, salient)
        found = found.index_add(3, tile[part], pooled)
    return found.flatten(1, 2)


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _numbers(ends: Tensor, device: torch.device) -> Tensor:
    """The tile of each thing between `ends`."""
    return torch.arange(len(ends) - 1).repeat_interleave(ends.diff()).to(device)
