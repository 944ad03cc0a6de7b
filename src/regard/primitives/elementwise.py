"""The vector recurrence `h_t = forget_t * h_{t-1} + inputs_t`, in plain torch, fast on any device.

Steps of many chunks are taken at once, so T tokens cost about `2 sqrt(T)` small operations, not T. A first pass
finds what every chunk hands on, a recurrence over the chunks gives the state each one starts from, a second
pass writes the states. Nothing is divided, so gates of 0 and 1 are as safe as others.
The gradient is the same recurrence run backwards, and the gradient of that one is this again.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError

Pair = tuple[Tensor, Tensor]


def recur(forget: Tensor, inputs: Tensor, *, initial: Tensor | None = None, reset: int | None = None) -> Pair:
    """`h_t = forget_t * h_{t-1} + inputs_t` along the last axis but one.

    Args:
        forget: `[..., T, D]`, any values (gates lie in 0..1).
        inputs: `[..., T, D]`, in forget's dtype.
        initial: `[..., D]`, the state before the first token; None: zero.
        reset: the state starts at zero at every token whose index is a multiple of it; None: never.

    Returns:
        h `[..., T, D]` in the dtype of `inputs`, and last `[..., D]`, the state after the last token, in float32
        (float64 for float64). Both are differentiable any number of times; bfloat16 and float16 are summed in float32.

    Raises:
        RegardError: shapes or dtypes disagree, `reset` is below 1 or comes with `initial`.

    Source: HGRN (2311.04823), equation 4, with the input already multiplied by its gate.
    """
    _check(forget, inputs, initial, reset)
    return _Recur.apply(forget, inputs, initial, reset, False)  # type: ignore[return-value]


def stepwise(forget: Tensor, inputs: Tensor, *, initial: Tensor | None = None, reset: int | None = None) -> Pair:
    """`recur` as a loop over tokens: the definition. Same call, same results, same errors."""
    _check(forget, inputs, initial, reset)
    state = _zeros(inputs) if initial is None else initial.to(_exact(inputs))
    states = []
    for t in range(inputs.shape[-2]):
        if reset is not None and t % reset == 0:
            state = torch.zeros_like(state)
        state = forget[..., t, :] * state + inputs[..., t, :]
        states.append(state)
    return (torch.stack(states, -2).to(inputs.dtype) if states else inputs), state


def _check(forget: Tensor, inputs: Tensor, initial: Tensor | None, reset: int | None) -> None:
    """Raise RegardError for arguments that do not belong together."""
    if inputs.dim() < 2 or forget.shape != inputs.shape:
        raise RegardError(
            f"forget and inputs must both be [..., T, D], got {list(forget.shape)} and {list(inputs.shape)}"
        )
    if not inputs.is_floating_point() or forget.dtype != inputs.dtype:
        raise RegardError(f"forget and inputs must share a float dtype, got {forget.dtype} and {inputs.dtype}")
    if reset is not None and reset < 1:
        raise RegardError(f"reset must be at least 1, got {reset}")
    if initial is None:
        return
    if reset is not None:
        raise RegardError(f"reset={reset} starts the first token at zero, so there can be no initial state")
    wanted = (*inputs.shape[:-2], inputs.shape[-1])
    if tuple(initial.shape) != wanted:
        raise RegardError(f"initial must be [..., D] = {list(wanted)}, got {list(initial.shape)}")


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _zeros(x: Tensor) -> Tensor:
    """A state of zeros for `x [..., T, D]`."""
    return x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=_exact(x))


class _Recur(torch.autograd.Function):
    """Both directions, each the other's gradient.

    Forwards: `h_t = f_t h_{t-1} + x_t` from `h_{-1} = initial`; last is `h_{T-1}`.
    Backwards: `h_t = f_{t+1} h_{t+1} + x_t`, where `initial` is added to `h_{T-1}`; last is `f_0 h_0`.
    """

    @staticmethod
    def forward(ctx: Any, forget, inputs, initial, reset, backwards):
        ctx.set_materialize_grads(False)
        h, last = (_backwards if backwards else _forwards)(forget, inputs, initial, reset)
        ctx.save_for_backward(forget, initial, h)
        ctx.reset, ctx.backwards = reset, backwards
        ctx.dtype = inputs.dtype
        return h, last

    @staticmethod
    def backward(ctx: Any, dh, dlast):
        forget, initial, h = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else dh
        grad, into = _Recur.apply(forget, dh, dlast, ctx.reset, not ctx.backwards)  # type: ignore[misc]
        dforget = dinitial = None
        if ctx.needs_input_grad[0]:
            before = _before(grad, dlast, ctx.reset) if ctx.backwards else _before(h, initial, ctx.reset)
            dforget = before * (h if ctx.backwards else grad)
        if initial is not None and ctx.needs_input_grad[2]:
            dinitial = into.to(initial.dtype)
        return dforget, grad, dinitial, None, None


def _before(h: Tensor, initial: Tensor | None, reset: int | None) -> Tensor:
    """`h_{t-1}` at t: `initial` at the first token, zero where the state was reset."""
    first = torch.zeros_like(h[..., :1, :]) if initial is None else initial[..., None, :].to(h.dtype)
    before = torch.cat([first, h], -2)[..., : h.shape[-2], :]
    if reset is None:
        return before
    starts = torch.arange(h.shape[-2], device=h.device) % reset == 0
    return before.masked_fill(starts[:, None], 0)


def _chunk(tokens: int) -> int:
    """How many steps are taken one after the other: about the square root, which makes the fewest operations."""
    return min(max(isqrt(tokens), 8), 64)


def _forwards(forget: Tensor, inputs: Tensor, initial: Tensor | None, reset: int | None) -> Pair:
    tokens = inputs.shape[-2]
    start = _zeros(inputs) if initial is None or reset is not None else initial.to(_exact(inputs))
    if tokens == 0:
        return inputs.clone(), start
    chunk = min(_chunk(tokens) if reset is None else reset, tokens)
    count = -(-tokens // chunk)
    state = start.new_zeros((*start.shape[:-1], count, start.shape[-1]))
    if reset is None:
        if count > 1:
            through, ends = torch.ones_like(state), state.clone()
            for j in range(chunk):
                f, x = forget[..., j::chunk, :], inputs[..., j::chunk, :]
                n = x.shape[-2]
                ends[..., :n, :].mul_(f).add_(x)
                through[..., :n, :].mul_(f)
            ends, _ = _forwards(through, ends, start, None)
            state[..., 1:, :] = ends[..., :-1, :]
        state[..., 0, :] = start
    h = torch.empty_like(inputs)
    last = start
    for j in range(chunk):
        f, x, out = (y[..., j::chunk, :] for y in (forget, inputs, h))
        state = torch.addcmul(x.to(state.dtype), f, state[..., : x.shape[-2], :])
        out.copy_(state)
        if j == (tokens - 1) % chunk:
            last = state[..., -1, :].clone()
    return h, last


def _backwards(forget: Tensor, inputs: Tensor, initial: Tensor | None, reset: int | None) -> Pair:
    tokens = inputs.shape[-2]
    start = _zeros(inputs) if initial is None else initial.to(_exact(inputs))
    if tokens == 0:
        return inputs.clone(), start
    chunk = min(_chunk(tokens) if reset is None else reset, tokens)
    count = -(-tokens // chunk)
    # What a chunk hands to the one before it, `f_t h_t`, stands in `state` while it is swept from its end.
    state = start.new_zeros((*start.shape[:-1], count, start.shape[-1]))
    if reset is None and count > 1:
        through, ends = torch.ones_like(state), state.clone()
        for j in reversed(range(chunk)):
            f, x = forget[..., j::chunk, :], inputs[..., j::chunk, :]
            n = x.shape[-2]
            ends[..., :n, :].add_(x).mul_(f)
            through[..., :n, :].mul_(f)
        ends, _ = _forwards(through.flip(-2), ends.flip(-2), start, None)
        state[..., :-1, :] = ends.flip(-2)[..., 1:, :]
    state[..., -1, :] = start
    h = torch.empty_like(inputs)
    for j in reversed(range(chunk)):
        f, x, out = (y[..., j::chunk, :] for y in (forget, inputs, h))
        here = state[..., : x.shape[-2], :]
        here.add_(x)
        out.copy_(here)
        here.mul_(f)
    return h, state[..., 0, :].clone() if reset is None else torch.zeros_like(start)
