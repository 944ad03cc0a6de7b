"""SLA against full attention: milliseconds forward and backward, by size of the blocks and semantics, in one run.

Checked first against the definition in float64 at 2,000 tokens, output and gradients. Full attention is torch's, by
FlashAttention-2 and by cuDNN. Sides take turns, each launched behind a pause, so that the device alone is timed. On a
CPU it runs with small sizes (`tokens=512 check=512 percent=40`).
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases.patterns import clock, turns
from regard.core.errors import RegardError
from regard.ops.sparsity.sla import CARD, attend
from regard.search import facts

MOST = 0.03  # error of bfloat16, norm over norm
PEERS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
Call = Callable[[], Any]
AHEAD = 16_000_000  # cycles of the pause, 8 ms on an H200: a backward is some sixty launches


def run(
    tokens: int = 32_760, heads: int = 12, width: int = 128, percent: int = 5, block: int = 0, check: int = 2000,
    repeats: int = 10,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """A row for every size, semantics and phase.

    Args:
        tokens: of the one row.
        heads: of queries, keys and values.
        width: of a head.
        percent: of key blocks that are critical.
        block: tokens of a block of queries and of one of keys; 0: both of the paper's sizes, 64 and 128.
        check: tokens of the problem that is checked; 0: none.
        repeats: timings of each side, taking turns.

    Raises:
        RegardError: a result or a gradient is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = [block] if block else [64, 128]
    told = facts.machine(SimpleNamespace(device=device)) | {
        "tokens": tokens, "heads": heads, "width": width, "percent": percent, "blocks": blocks,
        "repeats": repeats, "dtype": str(dtype),
    }  # fmt: skip
    settings = {
        (size, name): {"semantics": name, "critical": percent / 100, "rows": size, "keys": size}
        for size in blocks
        for name in semantics()
    }
    errors = {key: errors_of(call, check, width, device, dtype) if check else {} for key, call in settings.items()}
    given = drawn(heads, tokens, width, device, dtype)
    sides: dict[Any, Callable[..., Tensor]] = {
        key: (lambda *x, call=call: attend(*x, **call)) for key, call in settings.items()
    }
    if device.type == "cuda":
        sides |= {name: peer(kind) for name, kind in PEERS.items()}
    forward, both, memory = {}, {}, {}
    for key, side in sides.items():
        forward[key], both[key] = (lambda side=side: quiet(side, given)), (lambda side=side: learn(side, given))
        first = clock(forward[key]) + clock(both[key])
        memory[key] = (first / 1e3, peak(both[key], device))
    timed = {phase: turns(calls, repeats, AHEAD) for phase, calls in (("forward", forward), ("both", both))}
    rows_made = []
    for key in settings:
        for phase in ("forward", "backward"):
            ms = {side: found(timed, side, phase) for side in sides}
            rows_made.append(
                {"block": key[0], "semantics": key[1], "phase": phase, "ms": ms[key]}
                | {f"{other} / ours": ms[other] / ms[key] for other in sides if other in PEERS}
                | {f"{other} ms": ms[other] for other in sides if other in PEERS}
                | {"first s": memory[key][0], "peak MiB": memory[key][1], "errors": errors[key]}
            )
    spreads = {phase: {str(side): asdict(x) for side, x in by.items()} for phase, by in timed.items()}
    return told | {"timings in ms": spreads}, rows_made


def semantics() -> tuple[str, ...]:
    return CARD.options["semantics"].choices


def found(timed: dict[str, dict[Any, Any]], side: Any, phase: str) -> float:
    """Milliseconds of a phase; the backward is both less the forward, pair by pair."""
    forward, both = (timed[p][side].values for p in ("forward", "both"))
    values = forward if phase == "forward" else [b - f for b, f in zip(both, forward, strict=True)]
    return statistics.median(values)


def drawn(heads: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of one row, W and b; q and k in runs of one direction, as images and clips have them."""
    make = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    centres = normal(1, heads, -(-tokens // 512), width).repeat_interleave(512, 2)[:, :, :tokens]
    tensors = [centres + normal(1, heads, tokens, width), centres + normal(1, heads, tokens, width)]
    tensors += [normal(1, heads, tokens, width), normal(width, width) / width, normal(width)]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def errors_of(
    call: dict[str, Any], tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Errors of output and gradients against the definition in float64."""
    given = drawn(2, tokens, width, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    dout = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    wide = call | {"critical": max(call["critical"], 0.2)}
    results = []
    for tensors, backend in ((given, "auto"), (exact, "dense")):
        out = attend(*tensors, backend=backend, **wide)
        results.append((out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))))
    names = ("out", "dq", "dk", "dv", "dw", "db")
    errors = {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, *results, strict=True)}
    if not max(errors.values()) <= MOST:
        raise RegardError(f"SLA with {call} errs by {errors}, more than {MOST}")
    return errors


def peer(kind: SDPBackend) -> Callable[..., Tensor]:
    def whole(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return whole


def quiet(side: Callable[..., Tensor], given: list[Tensor]) -> None:
    with torch.no_grad():
        side(*given)


def learn(side: Callable[..., Tensor], given: list[Tensor]) -> None:
    out = side(*given)
    torch.autograd.grad(out, given, out.detach(), allow_unused=True)


def peak(call: Call, device: torch.device) -> float:
    """MiB at most, beyond what is there before."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
