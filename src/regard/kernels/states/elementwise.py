"""The vector recurrence `h_t = forget_t * h_{t-1} + inputs_t` on a GPU, and its gradients.

A program is one warp, which walks the tokens of some channels one by one: an associative scan of tiles would spend more
time on exchange between threads than memory takes. Loads run several tokens ahead. Where too few programs would walk
whole rows, a row is cut into segments: a first launch finds what each segment does to the state it starts from, a
second one begins every segment with the state that all earlier ones leave. With `reset`, segments begin where states
do, and one launch is enough.

The gradient is the same recurrence run backwards, `g_t = forget_{t+1} * g_{t+1} + dh_t`: `dinputs = g`,
`dforget_t = g_t * h_{t-1}`. So one kernel serves both directions.
"""

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
    """Why `recur` cannot do this call, or None. Shapes are those of `recur` already."""
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
    columns = -(-D // width)
    rows = B * H * columns
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
            H, columns, T, D, length, segments, reset or 0,
            forget.stride(), inputs.stride(), _strides(initial), _strides(began),
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
    heads, columns, T, D, length, segments, reset,
    forget_strides, inputs_strides, initial_strides, began_strides,
    RESET: tl.constexpr, BACKWARDS: tl.constexpr, SUMMARY: tl.constexpr, CARRIED: tl.constexpr,
    CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one segment; segments and tokens are counted in the order they are walked in."""
    program, segment = tl.program_id(0), tl.program_id(1)
    which = (program // columns).to(tl.int64)
    row, head = which // heads, which % heads
    channels = program % columns * CHANNELS + tl.arange(0, CHANNELS)
    wide = channels < D
    low = (segments - 1 - segment if BACKWARDS else segment) * length
    high = tl.minimum(low + length, T)
    first = (high - 1 if BACKWARDS else low).to(tl.int64)
    onward = -1 if BACKWARDS else 1
    # Backwards, a state comes from the token after it, through the gate of that token.
    gated = first + 1 if BACKWARDS else first
    gates_at = _place(forget, row, head, channels, forget_strides) + gated * forget_strides[2]
    values_at = _place(inputs, row, head, channels, inputs_strides) + first * inputs_strides[2]
    at = which * T * D + first * D + channels  # in contiguous tensors
    kept = which * (segments - 1) * D + channels
    product = tl.full((CHANNELS,), 1.0, tl.float32)
    state = tl.zeros((CHANNELS,), tl.float32)
    if initial is not None and not SUMMARY:
        state = _read(_place(initial, row, head, channels, initial_strides), wide & (CARRIED or segment == 0))
    if CARRIED and not SUMMARY:
        state = _after(state, through + kept, ends + kept, segment, D, wide, AHEAD)

    since = gated.to(tl.int32) % reset if RESET else 0  # tokens from the last reset to the one whose gate is read
    for walked in tl.range(0, high - low, num_stages=AHEAD):
        values = _read(values_at, wide)
        # Nothing follows the last token: what is given with it counts whole.
        within = (walked > 0) | (high < T) if BACKWARDS else walked >= 0
        gates = _read(gates_at, wide & within)
        gates = tl.where(within, tl.where(since == 0, 0.0, gates) if RESET else gates, 1.0)
        state = gates * state + values
        if SUMMARY:
            product *= gates
        else:
            tl.store(h + at, state.to(h.dtype.element_ty), mask=wide)
        if BACKWARDS and not SUMMARY:
            # Where a state begins its gate does nothing; what the gate of the first token did is written at the end.
            goes = since != 1 % reset if RESET else (low > 0) | (walked < high - low - 1)
            changed = state * _read(states + at - D, wide & goes)
            written = wide & goes if began is not None else wide
            tl.store(dforget + at, changed.to(dforget.dtype.element_ty), mask=written)
        gates_at += onward * forget_strides[2]
        values_at += onward * inputs_strides[2]
        at += onward * D
        since = _turn(since + onward, reset) if RESET else since
    if SUMMARY:
        tl.store(through + kept + segment * D, product, mask=wide)
        tl.store(ends + kept + segment * D, state, mask=wide)
    elif segment == segments - 1:
        tl.store(last + which * D + channels, state, mask=wide)
        if began is not None:
            changed = state * _read(_place(began, row, head, channels, began_strides), wide)
            tl.store(dforget + which * T * D + channels, changed.to(dforget.dtype.element_ty), mask=wide)


@triton.jit
def _read(at, mask):
    """A vector in float32."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(tensor, row, head, channels, strides):
    """Where a row begins."""
    return tensor + row * strides[0] + head * strides[1] + channels * strides[-1]


@triton.jit
def _after(state, through, ends, segments, D, wide, AHEAD: tl.constexpr):
    """What the first `segments` segments make of `state`."""
    for past in tl.range(0, segments, num_stages=AHEAD):
        gates = tl.load(through + past * D, mask=wide, other=0.0)
        state = gates * state + tl.load(ends + past * D, mask=wide, other=0.0)
    return state


@triton.jit
def _turn(count, reset):
    """`count` modulo `reset` where it is one too many or too few: cheaper than a division for every token."""
    return tl.where(count == reset, 0, tl.where(count < 0, reset - 1, count))
