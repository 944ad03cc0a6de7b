"""What is compiled without a GPU: functions that call the kernels' public functions, as a user would.

Tensors hold nothing (device `meta`), sizes are those that matter. Every kernel must be launched by one of them.
"""

from typing import Any

import torch
from torch import Tensor


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step() -> None:
    from regard.kernels.states.step import step

    for B, D, dtype in [(1, 128, torch.bfloat16), (64, 64, torch.bfloat16), (64, 128, torch.bfloat16),
                        (64, 256, torch.bfloat16), (64, 100, torch.bfloat16), (64, 128, torch.float32)]:  # fmt: skip
        H = 16
        vector, scalar = _empty(B, H, 1, D, dtype=dtype), _empty(B, H, 1, dtype=torch.float32)
        state = _empty(B, H, D, D, dtype=torch.float32)
        gates = [None, _empty(H, dtype=torch.float32), scalar, _empty(B, H, 1, D, dtype=torch.float32)]
        for decay in gates:
            for delta in (False, True):
                step(vector, vector, vector, state, decay=decay, beta=scalar if delta else None, delta=delta)


def elementwise() -> None:
    from regard.kernels.states.elementwise import recur

    for dtype in (torch.bfloat16, torch.float32):
        for shape, reset in [((64, 16, 2048, 128), None), ((1, 1, 131072, 1024), None), ((1, 1, 131072, 2048), 16),
                             ((1, 1, 1, 1), 1)]:  # fmt: skip
            forget, inputs = (_empty(*shape, dtype=dtype).requires_grad_() for _ in range(2))
            initial = None if reset else _empty(*shape[:2], shape[3], dtype=torch.float32).requires_grad_()
            h, last = recur(forget, inputs, initial=initial, reset=reset)
            torch.autograd.backward([h, last], [torch.empty_like(h), torch.empty_like(last)])


def scan() -> None:
    from regard.kernels.states.scan import scan

    long, wide, half = (1, 2, 131072), (64, 16, 2048), torch.bfloat16  # a long text is cut into segments
    # Every kernel with every kind of decay, size, and way to cut, but not in every combination: a minute is enough.
    for (B, H, T), D, dtype, kind, delta in [(wide, 128, half, 4, True), (wide, 128, half, 0, False),
                                             (wide, 256, half, 4, False), (wide, 64, torch.float32, 1, True),
                                             (long, 128, half, 3, True), (long, 64, half, 3, False)]:  # fmt: skip
        q, k, v = (_empty(B, T, H, D, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
        gates = {0: None, 1: (H,), 3: (B, H, T), 4: (B, H, T, D)}[kind]
        decay = None if gates is None else _empty(*gates, dtype=torch.float32).requires_grad_()
        beta = _empty(B, H, T, dtype=torch.float32).requires_grad_() if delta else None
        state = _empty(B, H, D, D, dtype=torch.float32).requires_grad_()
        out, last = scan(q, k, v, decay=decay, beta=beta, delta=delta, initial_state=state)
        torch.autograd.backward([out, last], [torch.empty_like(out), torch.empty_like(last)])


def _blocks(T: int, S: int, bits: bool) -> Any:
    from regard.primitives.block_list import BlockList

    def made(lines: int, by_key: bool) -> BlockList:
        numbers = [_empty(*shape, dtype=torch.int32) for shape in ((1, 1, lines), (1, 1, lines), (1, 1, lines, 9))]
        cuts = _empty(2, 128, 2, dtype=torch.int16), _empty(int(bits), 128, 4, dtype=torch.int32)
        return BlockList((128, 128), T, S, *numbers, numbers[2], *cuts, by_key=by_key)

    blocks = made(-(-T // 128), False)
    blocks.__dict__["_turned"] = made(-(-S // 128), True)  # made by sorting, which needs numbers
    return blocks


def _attend(B: int, H: int, Hk: int, T: int, S: int, D: int, dtype: torch.dtype, bits: bool, cap: float | None) -> None:
    from regard.kernels.attention.block import attend

    q, k, v = (_empty(B, *shape, D, dtype=dtype).requires_grad_() for shape in ((H, T), (Hk, S), (Hk, S)))
    out = attend(q, k, v, _blocks(T, S, bits), scale=0.1, softcap=cap)
    torch.autograd.backward(out, [torch.empty_like(x) for x in out])


def attend_blocks() -> None:
    half = torch.bfloat16
    for D, dtype, bits, cap in [(128, half, False, None), (64, half, False, None), (128, half, True, None),
                                (256, half, False, None), (64, torch.float32, True, 5.0)]:  # fmt: skip
        _attend(1, 8, 2, 16384, 16384, D, dtype, bits, cap)


def attend_blocks_on_hopper() -> None:
    from regard.kernels.attention import hopper, hopper_backward

    half = torch.bfloat16
    for D, bits, cap in [(128, False, None), (64, False, None), (128, True, 5.0)]:
        q, k, v = (_empty(1, heads, 16384, D, dtype=half) for heads in (8, 2, 2))
        blocks = _blocks(16384, 16384, bits)
        out, lse = hopper.forward(q, k, v, blocks, 0.1, cap)
        hopper_backward.backward(q, k, v, out, lse, out, None, blocks, 0.1, cap)


def attend_lengths() -> None:
    for B, T, S in [(1, 16384, 16384), (1, 16384 + 1, 512), (3, 100, 7), (1, 1, 1), (16, 16, 16)]:
        _attend(B, 8, 2, T, S, 64, torch.bfloat16, False, None)
