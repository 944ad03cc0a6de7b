"""What is compiled without a GPU: functions that call the kernels' public functions, as a user would.

Tensors hold nothing (device `meta`), sizes are those that matter. Every kernel must be launched by one of them.
"""

from typing import Any
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


def scan_on_hopper() -> None:
    from regard.kernels import device
    from regard.kernels.states.scan import scan

    decay = _empty(16, dtype=torch.float32)
    with patch.object(device, "capability", lambda tensor: (9, 0)):
        # A long text of few heads is cut into segments.
        scan(*(_empty(1, 2, 131072, 128, dtype=torch.float16) for _ in range(3)), decay=decay[:2])
        q, k, v = (_empty(64, 16, 2048, 128).requires_grad_() for _ in range(3))
        state = _empty(64, 16, 128, 128, dtype=torch.float32)
        out, _ = scan(q, k, v, decay=decay, initial_state=state)
        out.backward(torch.empty_like(out))


def delta_on_hopper() -> None:
    from regard.kernels import device
    from regard.kernels.states.scan import scan

    with patch.object(device, "capability", lambda place: (9, 0)):
        # A long text of few heads is cut into segments.
        for B, H, T, gates in ((64, 16, 2048, 4), (1, 2, 131072, 4), (1, 2, 131072, 3), (1, 2, 131072, 0)):
            q, k, v = (_empty(B, H, T, 128).requires_grad_(B > 1) for _ in range(3))
            decay = _empty(*(B, H, T, 128)[:gates], dtype=torch.float32) if gates else None
            scan(q, k, v, decay=decay, beta=_empty(B, H, T, dtype=torch.float32), delta=True)


def rat() -> None:
    from regard.kernels.states.rat import mix

    half = torch.bfloat16
    for H, G, D, dtype, base in [(16, 2, 128, half, 10000.0), (16, 2, 128, torch.float16, None),
                                 (32, 1, 64, half, 10000.0), (3, 3, 80, half, 10000.0)]:  # fmt: skip
        joined = _empty(1, 100_003, (3 * H + 2 * G) * D, dtype=dtype).requires_grad_()
        bias = _empty(H * D, dtype=dtype).requires_grad_()
        y = mix(joined, bias, heads=H, groups=G, chunk=16, base=base)
        y.backward(torch.empty_like(y))


def decode() -> None:
    from regard.core.store import Part
    from regard.kernels.attention.decode import decode

    def ints(*shape: int) -> Tensor:
        return _empty(*shape, dtype=torch.int64)

    B, S, T = 16, 32768, 1
    for H, Hk, D, dtype in [(32, 8, 128, torch.bfloat16), (32, 8, 64, torch.float16), (8, 4, 256, torch.bfloat16),
                            (32, 8, 128, torch.float32)]:  # fmt: skip
        q, k = _empty(B, H, T, D, dtype=dtype), _empty(B, Hk, S, D, dtype=dtype)
        decode(q, k, k, scale=0.1)
        decode(q, k, k, scale=0.1, positions=ints(B, S), q_positions=ints(B, T), sink=4, recent=256)
        pool, pages = _empty(64 * B, Hk, 256, D, dtype=dtype), ints(B, 64)
        decode(q, pool, pool, scale=0.1, lengths=ints(B), pages=pages)
    q, k = _empty(B, 32, 4, 128), _empty(B, 2, S, 128)
    decode(q, k, k, scale=0.1, lengths=ints(B))
    q, k = _empty(1, 32, 1, 128), _empty(1, 4, S, 128)
    part = Part(ints(4), 4, _empty(*q.shape), _empty(1, 32, 1, dtype=torch.float32))
    decode(q, k, k, scale=0.1, lengths=ints(1), part_of=part)


def decode_on_hopper() -> None:
    from regard.kernels import device
    from regard.kernels.attention.decode import decode

    with patch.object(device, "capability", lambda place: (9, 0)):
        for T, H, dtype in [(1, 32, torch.bfloat16), (4, 32, torch.bfloat16), (1, 8, torch.float16)]:
            q, keys = _empty(1, H, T, 128, dtype=dtype), _empty(1, 8, 32768, 128, dtype=dtype)
            decode(q, keys, keys, scale=0.1)


def latent() -> None:
    from regard.kernels import device
    from regard.kernels.attention.latent import decode

    for (B, H, S, r, e), on in [((64, 128, 8192, 512, 64), (9, 0)), ((1, 128, 32768, 512, 64), (10, 0)),
                                ((1, 16, 4096, 256, 32), (9, 0))]:  # fmt: skip
        starts = _empty(B, dtype=torch.int32)
        with patch.object(device, "capability", lambda tensor, on=on: on):
            decode(_empty(B, H, 1, r + e), _empty(B, S, r + e), rank=r, scale=0.1, lengths=starts, starts=starts)


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


def saw_int4() -> None:
    from regard.core.store import Form, Part
    from regard.kernels.cache.saw_int4 import read, write

    def made(form: Form | None, B: int, S: int, D: int) -> tuple[Tensor, ...]:
        if form is None:
            return (_empty(B, 8, S, D),)
        return _empty(B, 8, S, D * form.bits // 8, dtype=torch.uint8), _empty(B, 8, S, 2, dtype=torch.float32)

    four, eight, plain = Form(4, 64), Form(8, 64), Form(4, 1)
    for D, T, key, value in [(128, 1, Form(4, 128), plain), (64, 1, four, plain), (128, 1, plain, plain),
                             (128, 4, Form(4, 128), plain), (64, 8, plain, plain), (64, 16, plain, plain),
                             (256, 1, plain, plain),
                             (128, 1, eight, eight), (128, 1, None, four), (128, 1, plain, None)]:  # fmt: skip
        fields = made(key, 8, 32768, D), made(value, 8, 32768, D)
        read(_empty(8, 32, T, D), *fields, key=key, value=value, scale=0.1)
        write(*(_empty(8, 8, T, D) for _ in range(2)), *fields, key=key, value=value, start=100)
    fields = made(four, 100, 64, 64), made(plain, 100, 64, 64)
    table, long = _empty(8, 512, dtype=torch.int32), _empty(1, 32768, dtype=torch.int64)
    read(_empty(8, 32, 1, 64), *fields, key=four, value=plain, scale=0.1, pages=table, lengths=table[:, 0])
    fields = made(four, 8, 32768, 64), made(plain, 8, 32768, 64)
    where = {"positions": long, "q_positions": long[:, :1], "sink": 4, "recent": 100}
    read(_empty(8, 32, 1, 64), *fields, key=four, value=plain, scale=0.1, **where)
    write(*(_empty(8, 8, 1000, 64) for _ in range(2)), *fields, key=four, value=plain)
    q, k, some = _empty(1, 64, 1, 128), _empty(1, 16, 1, 128), _empty(8, dtype=torch.int64)
    part = Part(some, 4, _empty(*q.shape), _empty(1, 64, 1, dtype=torch.float32))
    for key, value in ((Form(4, 128), plain), (None, None)):
        fields = made(key, 1, 32768, 128), made(value, 1, 32768, 128)
        write(k, k, *fields, key=key, value=value, start=some[:1], heads=some)
        if key is not None:
            read(q, *fields, key=key, value=value, scale=0.1, lengths=some[:1], part_of=part)


def sla() -> None:
    from regard.kernels.sparsity.sla import linear

    for D, dtype in [(128, torch.bfloat16), (64, torch.float16), (128, torch.float32)]:
        q = _empty(1, 12, 32_760, D, dtype=dtype)
        linear(q, q, q, _empty(D, D, dtype=dtype), q, _empty(D, dtype=dtype), features="softmax", floor=1e-5)


def totals() -> None:
    from regard.kernels.attention.totals import totals

    for D, dtype, window, entropy in [(64, torch.bfloat16, None, True), (64, torch.bfloat16, None, False),
                                      (128, torch.bfloat16, 4096, True), (64, torch.float32, None, True)]:  # fmt: skip
        q, k = _empty(1, 32, 32768, D, dtype=dtype), _empty(1, 8, 32768, D, dtype=dtype)
        lse = _empty(1, 32, 32768, dtype=torch.float32)
        real = _empty(1, 32768, dtype=torch.bool)
        totals(q, k, lse, real=real, tiles=128, scale=D**-0.5, window=window, entropy=entropy)
