"""What is compiled without a GPU: functions that call the kernels' public functions, as a user would.

Tensors hold nothing (device `meta`), sizes are those that matter. Every kernel must be launched by one of them.
"""

from unittest.mock import patch

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


def latent() -> None:
    from regard.kernels import device
    from regard.kernels.attention.latent import decode

    for (B, H, S, r, e), on in [((64, 128, 8192, 512, 64), (9, 0)), ((1, 128, 32768, 512, 64), (10, 0)),
                                ((1, 16, 4096, 256, 32), (9, 0))]:  # fmt: skip
        starts = _empty(B, dtype=torch.int32)
        with patch.object(device, "capability", lambda tensor, on=on: on):
            decode(_empty(B, H, 1, r + e), _empty(B, S, r + e), rank=r, scale=0.1, lengths=starts, starts=starts)
