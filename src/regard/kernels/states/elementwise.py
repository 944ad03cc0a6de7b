"""The vector recurrence `h_t = forget_t * h_{t-1} + inputs_t` on a GPU, and its gradients.

A program walks the tokens of a few channels, a tile of tokens at a time; inside a tile the recurrence is an associative
scan of pairs (product of gates, state). Where too few programs would walk whole rows, a row is cut into segments: a
first launch finds what each segment does to the state it starts from, a second one begins every segment with the state
that all earlier ones leave. With `reset`, segments begin where states do, and one launch is enough.

The gradient is the same recurrence run backwards, `g_t = forget_{t+1} * g_{t+1} + dh_t`: `dinputs = g`,
`dforget_t = g_t * h_{t-1}`. So one kernel serves both directions.
"""

# A launch takes options that its kernel's signature lacks.
# pyright: reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.kernels import device

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, CHANNELS, WARPS = 32, 64, 4  # of a tile: 16 elements a thread of each tensor
PROGRAMS = 1056  # eight for each multiprocessor of a large card
SEGMENTS = 128  # at most: every one of them reads what all earlier ones do

Pair = tuple[Tensor, Tensor]


def refuses(forget: Tensor, inputs: Tensor, *, initial: Tensor | None = None, reset: int | None = None) -> str | None:
    """Why `recur` cannot take these tensors, or None. Shapes are those of `recur` already."""
    if why := device.refuses(inputs):
        return why
    for name, tensor in {"forget": forget, "inputs": inputs, "initial": initial}.items():
        if tensor is not None and tensor.dtype not in TYPES:
            return f"the vector kernel takes float32, bfloat16 and float16; {name} is {tensor.dtype}"
    return None


def recur(forget: Tensor, inputs: Tensor, *, initial: Tensor | None = None, reset: int | None = None) -> Pair:
    """`h_t = forget_t * h_{t-1} + inputs_t` along the last axis but one. Nothing is checked: ask `refuses` first.

    Args:
        forget: `[..., T, D]`, any strides.
        inputs: `[..., T, D]`, any strides.
        initial: `[..., D]`, the state before the first token; None: zero.
        reset: the state starts at zero at every token whose index is a multiple of it; None: never. Not with `initial`.

    Returns:
        h `[..., T, D]` in the dtype of `inputs`, and last `[..., D]`, the state after the last token, in float32.
        Sums are float32. Both are differentiable once.
    """
    lead = inputs.shape[:-2]
    h, last = _Recur.apply(_four(forget), _four(inputs), None if initial is None else _three(initial), reset)
    return h.reshape(*lead, *h.shape[2:]), last.reshape(*lead, last.shape[-1])


def _four(x: Tensor) -> Tensor:
    """`[..., T, D]` with two leading axes; a view where there are no more than two."""
    return x[(None,) * (4 - x.dim())] if x.dim() <= 4 else x.flatten(0, -4)


def _three(x: Tensor) -> Tensor:
    """`[..., D]` as `_four` does."""
    return x[(None,) * (3 - x.dim())] if x.dim() <= 3 else x.flatten(0, -3)


class _Recur(torch.autograd.Function):
    """The recurrence over `[B, H, T, D]`."""

    @staticmethod
    def forward(ctx: Any, forget: Tensor, inputs: Tensor, initial: Tensor | None, reset: int | None) -> Pair:
        h = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        last = _run(forget, inputs, initial, reset, h)
        ctx.save_for_backward(forget, initial, h)
        ctx.reset = reset
        ctx.set_materialize_grads(False)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> Any:
        forget, initial, h = ctx.saved_tensors
        if dh is None and dlast is None:
            return None, None, None, None
        dh = torch.zeros_like(h) if dh is None else dh
        dinputs = torch.empty_like(h)
        dforget = torch.empty_like(forget, memory_format=torch.contiguous_format)
        first = _run(forget, dh, dlast, ctx.reset, dinputs, (h, initial, dforget))
        dinitial = None if initial is None else (forget[:, :, 0] * first).to(initial.dtype)
        return dforget, dinputs, dinitial, None


def _run(
    forget: Tensor,
    inputs: Tensor,
    initial: Tensor | None,
    reset: int | None,
    h: Tensor,
    backwards: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    """Fill `h`, and return the state after the last token `[B, H, D]` in float32.

    `backwards` holds the states of the forward recurrence, what they began with, and the gradient of the gates, which
    is filled; tokens are then walked from the last to the first.
    """
    B, H, T, D = inputs.shape
    last = torch.zeros(B, H, D, dtype=torch.float32, device=inputs.device)
    if inputs.numel() == 0:
        return last if initial is None else last.copy_(initial)
    width = min(CHANNELS, 1 << (D - 1).bit_length())
    rows = B * H * -(-D // width)
    length = _segment(T, rows, reset)
    segments = -(-T // length)
    states, began, dforget = (None, None, None) if backwards is None else backwards
    carried = segments > 1 and reset is None
    through = ends = None
    if carried:
        through, ends = last.new_empty(2, B, H, segments - 1, D)

    def launch(count: int, summary: bool) -> None:
        _walk[(rows, count)](
            forget, inputs, h, initial, last, states, began, dforget, through, ends,
            H, T, D, length, segments, reset or 0,
            *forget.stride(), *inputs.stride(), *_strides(initial), *_strides(began),
            RESET=reset is not None, BACKWARDS=backwards is not None, SUMMARY=summary, CARRIED=carried,
            TOKENS=TOKENS, CHANNELS=width, num_warps=WARPS,
        )  # fmt: skip

    if carried:
        launch(segments - 1, True)
    launch(segments, False)
    return last


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _segment(T: int, rows: int, reset: int | None) -> int:
    """Tokens that one program walks, for so many programs a segment."""
    wanted = max(1, PROGRAMS // rows)
    if reset is not None:
        # Every program stands for itself, so that a few more of them even out the work.
        least = max(TOKENS, -(-T // (2 * wanted)))
        return reset * -(-least // reset)
    # A second reading costs half as much again, so that a row is cut only where most of the card would wait.
    segments = min(wanted, SEGMENTS, -(-T // (8 * TOKENS))) if wanted > 2 else 1
    return TOKENS * -(-T // (segments * TOKENS))


@triton.jit
def _after(first_gate, first_state, gate, state):
    """Two steps as one: the state they leave is `gate * state before + state`."""
    return first_gate * gate, gate * first_state + state


@triton.jit
def _last(tile, TOKENS: tl.constexpr):
    """The last row of a tile."""
    return tl.sum(tl.where(tl.arange(0, TOKENS)[:, None] == TOKENS - 1, tile, 0.0), 0)


@triton.jit
def _walk(
    forget, inputs, h, initial, last, states, began, dforget, through, ends,
    heads, T, D, length, segments, reset,
    forget_row, forget_head, forget_token, forget_channel,
    inputs_row, inputs_head, inputs_token, inputs_channel,
    initial_row, initial_head, initial_channel,
    began_row, began_head, began_channel,
    RESET: tl.constexpr, BACKWARDS: tl.constexpr, SUMMARY: tl.constexpr, CARRIED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one segment; segments and tokens are counted in the order they are walked in."""
    columns = (D + CHANNELS - 1) // CHANNELS
    which = (tl.program_id(0) // columns).to(tl.int64)
    row, head = which // heads, which % heads
    channels = tl.program_id(0) % columns * CHANNELS + tl.arange(0, CHANNELS)
    wide = channels < D
    segment = tl.program_id(1)
    low = (segments - 1 - segment if BACKWARDS else segment) * length
    high = tl.minimum(low + length, T)
    lines = tl.arange(0, TOKENS)

    forget += row * forget_row + head * forget_head + channels[None, :] * forget_channel
    inputs += row * inputs_row + head * inputs_head + channels[None, :] * inputs_channel
    whole = which * T * D + channels[None, :]  # this row of a contiguous tensor
    kept = which * (segments - 1) * D + channels[None, :]

    state = tl.zeros((CHANNELS,), tl.float32)
    product = tl.full((CHANNELS,), 1.0, tl.float32)
    if initial is not None and not SUMMARY:
        given = initial + row * initial_row + head * initial_head + channels * initial_channel
        state = tl.load(given, mask=wide & (CARRIED or segment == 0), other=0.0).to(tl.float32)
    if CARRIED and not SUMMARY:
        for begin in range(0, segment, TOKENS):
            past = begin + lines
            known = (past < segment)[:, None] & wide[None, :]
            gates = tl.load(through + kept + past[:, None] * D, mask=known, other=1.0)
            ended = tl.load(ends + kept + past[:, None] * D, mask=known, other=0.0)
            gates, ended = tl.associative_scan((gates, ended), 0, _after)
            state = _last(gates, TOKENS) * state + _last(ended, TOKENS)

    for begin in range(0, high - low, TOKENS):
        token = high - 1 - begin - lines if BACKWARDS else low + begin + lines
        here = ((token >= low) & (token < high))[:, None] & wide[None, :]
        at = token.to(tl.int64)[:, None]
        # Backwards, a state comes from the token after it, through the gate of that token.
        gated = token + 1 if BACKWARDS else token
        real = here & (gated < T)[:, None]
        through_gate = forget + gated.to(tl.int64)[:, None] * forget_token
        gates = tl.load(through_gate, mask=real, other=1.0).to(tl.float32)
        values = tl.load(inputs + at * inputs_token, mask=here, other=0.0).to(tl.float32)
        if BACKWARDS and not SUMMARY:
            seen = here & (token > 0)[:, None]
            if RESET:
                seen &= (token % reset != 0)[:, None]
            before = tl.load(states + whole + (at - 1) * D, mask=seen, other=0.0).to(tl.float32)
        if RESET:
            gates = tl.where(real & (gated % reset == 0)[:, None], 0.0, gates)

        gates, values = tl.associative_scan((gates, values), 0, _after)
        if SUMMARY:
            product *= _last(gates, TOKENS)
        else:
            values += gates * state[None, :]
            tl.store(h + whole + at * D, values.to(h.dtype.element_ty), mask=here)
            if BACKWARDS:
                if began is not None:
                    given = began + row * began_row + head * began_head + channels * began_channel
                    start = tl.load(given, mask=wide, other=0.0).to(tl.float32)
                    before = tl.where((token == 0)[:, None], start[None, :], before)
                tl.store(dforget + whole + at * D, (values * before).to(dforget.dtype.element_ty), mask=here)
        state = _last(gates, TOKENS) * state + _last(values, TOKENS) if SUMMARY else _last(values, TOKENS)

    if SUMMARY:
        at = which * (segments - 1) * D + segment * D + channels
        tl.store(through + at, product, mask=wide)
        tl.store(ends + at, state, mask=wide)
    elif segment == segments - 1:
        tl.store(last + which * D + channels, state, mask=wide)
