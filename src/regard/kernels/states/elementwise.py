"""The vector recurrence `h_t = forget_t * h_{t-1} + inputs_t` on a GPU, and its gradients.

A program is one warp, which walks the tokens of some channels one by one: an associative scan of tiles would spend more
time on exchange between threads than memory takes. Loads run several tokens ahead. Where too few programs would walk
whole rows, a row is cut into segments: a first launch finds what each segment does to the state it starts from, a
second one begins every segment with the state that all earlier ones leave. With `reset`, segments begin where states
do, and one launch is enough.

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
CHANNELS = 128  # of a program
AHEAD = 8  # tokens whose loads are in flight
PROGRAMS = 2112  # sixteen for each multiprocessor of a large card
SHORTEST = 64  # tokens of a segment; the loads of the first ones are waited for
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
            CHANNELS=width, AHEAD=AHEAD, num_warps=1,
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
        return reset * -(-max(SHORTEST, -(-T // (2 * wanted))) // reset)
    # A second reading costs two thirds more, so that a row is cut only where most of the card would wait.
    return max(SHORTEST, -(-T // min(wanted, SEGMENTS))) if wanted > 2 else T


@triton.jit
def _walk(
    forget, inputs, h, initial, last, states, began, dforget, through, ends,
    heads, T, D, length, segments, reset,
    forget_row, forget_head, forget_token, forget_channel,
    inputs_row, inputs_head, inputs_token, inputs_channel,
    initial_row, initial_head, initial_channel,
    began_row, began_head, began_channel,
    RESET: tl.constexpr, BACKWARDS: tl.constexpr, SUMMARY: tl.constexpr, CARRIED: tl.constexpr,
    CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
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

    first = (high - 1 if BACKWARDS else low).to(tl.int64)
    onward = -1 if BACKWARDS else 1
    # Backwards, a state comes from the token after it, through the gate of that token.
    gates_at = forget + row * forget_row + head * forget_head + channels * forget_channel
    gates_at += (first + 1 if BACKWARDS else first) * forget_token
    values_at = inputs + row * inputs_row + head * inputs_head + channels * inputs_channel + first * inputs_token
    at = which * T * D + first * D + channels  # in contiguous tensors

    state = tl.zeros((CHANNELS,), tl.float32)
    product = tl.full((CHANNELS,), 1.0, tl.float32)
    if initial is not None and not SUMMARY:
        given = initial + row * initial_row + head * initial_head + channels * initial_channel
        state = tl.load(given, mask=wide & (CARRIED or segment == 0), other=0.0).to(tl.float32)
    if CARRIED and not SUMMARY:
        kept = which * (segments - 1) * D + channels
        for past in tl.range(0, segment, num_stages=AHEAD):
            gates = tl.load(through + kept + past * D, mask=wide, other=0.0)
            state = gates * state + tl.load(ends + kept + past * D, mask=wide, other=0.0)

    since = first.to(tl.int32) % reset if RESET else 0  # tokens since the state was reset
    for walked in tl.range(0, high - low, num_stages=AHEAD):
        values = tl.load(values_at, mask=wide, other=0.0).to(tl.float32)
        if BACKWARDS:
            within = (walked > 0) | (high < T)
            gates = tl.load(gates_at, mask=wide & within, other=0.0).to(tl.float32)
            gates = tl.where(within, gates, 1.0)
            if RESET:
                gates = tl.where(within & (since == reset - 1), 0.0, gates)
        else:
            gates = tl.load(gates_at, mask=wide, other=0.0).to(tl.float32)
            if RESET:
                gates = tl.where(since == 0, 0.0, gates)
        state = gates * state + values
        if SUMMARY:
            product *= gates
        else:
            tl.store(h + at, state.to(h.dtype.element_ty), mask=wide)
        if BACKWARDS and not SUMMARY:
            # Where a state begins its gate does nothing; what the gate of the first token did is written at the end.
            goes = since > 0 if RESET else (low > 0) | (walked < high - low - 1)
            before = tl.load(states + at - D, mask=wide & goes, other=0.0).to(tl.float32)
            written = wide & goes if began is not None else wide
            tl.store(dforget + at, (state * before).to(dforget.dtype.element_ty), mask=written)
        gates_at += onward * forget_token
        values_at += onward * inputs_token
        at += onward * D
        if RESET:
            since += onward
            since = tl.where(since == reset, 0, since)
            since = tl.where(since < 0, reset - 1, since)

    if SUMMARY:
        kept = which * (segments - 1) * D + segment * D + channels
        tl.store(through + kept, product, mask=wide)
        tl.store(ends + kept, state, mask=wide)
    elif segment == segments - 1:
        tl.store(last + which * D + channels, state, mask=wide)
        if began is not None:
            given = began + row * began_row + head * began_head + channels * began_channel
            before = tl.load(given, mask=wide, other=0.0).to(tl.float32)
            tl.store(dforget + which * T * D + channels, (state * before).to(dforget.dtype.element_ty), mask=wide)
