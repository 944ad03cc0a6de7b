"""SLA against full attention: milliseconds forward and backward, by semantics, in one run.

Checked first against the definition in float64 at 2,000 tokens, output and gradients. Full attention is torch's, by
FlashAttention-2 and by cuDNN. Sides take turns. On a CPU it runs with small sizes (`tokens=512 check=200`).
"""

import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases.state_step import clock, turns
from regard.core.errors import RegardError
from regard.ops.sparsity.sla import CARD, attend
from regard.search import facts

MOST = 0.03  # error of bfloat16, norm over norm
PEERS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
Call = Callable[[], Any]


def run(
    tokens: int = 32_760, heads: int = 12, width: int = 128, percent: int = 5, block: int = 64, rows: int = 64,
    check: int = 2000, repeats: int = 10, steps: int = 3,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """A row for every semantics and phase.

    Args:
        tokens: of the one row.
        heads: of queries, keys and values.
        width: of a head.
        percent: of key blocks that are critical.
        block: tokens of a block of keys.
        rows: tokens of a block of queries.
        check: tokens of the problem that is checked; 0: none.
        repeats: timings of each side, taking turns.
        steps: calls in one timing.

    Raises:
        RegardError: a result or a gradient is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    told = facts.machine(SimpleNamespace(device=device)) | {
        "tokens": tokens, "heads": heads, "width": width, "percent": percent, "block": [rows, block],
        "repeats": repeats, "steps": steps, "dtype": str(dtype),
    }  # fmt: skip
    call = {"critical": percent / 100, "rows": rows, "keys": block}
    errors = {s: errors_of(s, check, width, call, device, dtype) for s in semantics()} if check else {}
    given = drawn(heads, tokens, width, device, dtype)
    sides: dict[str, Callable[..., Tensor]] = {
        s: (lambda *x, s=s: attend(*x, semantics=s, **call)) for s in semantics()
    }
    if device.type == "cuda":
        sides |= {name: peer(kind) for name, kind in PEERS.items()}
    forward, both, memory = {}, {}, {}
    for name, side in sides.items():
        first = clock(lambda side=side: side(*given))
        forward[name], both[name] = (lambda side=side: quiet(side, given)), (lambda side=side: learn(side, given))
        first_backward = clock(both[name])
        memory[name] = (first, first_backward, peak(both[name], device))
    timed = {phase: turns(calls, "launch", steps, repeats) for phase, calls in (("forward", forward), ("both", both))}
    rows_made = []
    for name in semantics():
        for phase in ("forward", "backward"):
            ms = {side: found(timed, side, phase) for side in sides}
            rows_made.append(
                {"semantics": name, "phase": phase, "ms": ms[name]}
                | {f"{other} / ours": ms[other] / ms[name] for other in sides if other in PEERS}
                | {f"{other} ms": ms[other] for other in sides if other in PEERS}
                | {"first s": sum(memory[name][:2]), "peak MiB": memory[name][2], "errors": errors.get(name, {})}
            )
    return told | {"timings": timed}, rows_made


def semantics() -> tuple[str, ...]:
    return CARD.options["semantics"].choices


def found(timed: dict[str, dict[str, list[float]]], side: str, phase: str) -> float:
    """Milliseconds of a phase; the backward is both less the forward, pair by pair."""
    forward, both = (timed[p][side] for p in ("forward", "both"))
    values = forward if phase == "forward" else [b - f for b, f in zip(both, forward, strict=True)]
    return statistics.median(values) * 1e3


def drawn(heads: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of one row, W and b; q and k in runs of one direction, as images and clips have them."""
    make = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    centres = normal(1, heads, -(-tokens // 512), width).repeat_interleave(512, 2)[:, :, :tokens]
    tensors = [centres + normal(1, heads, tokens, width), centres + normal(1, heads, tokens, width)]
    tensors += [normal(1, heads, tokens, width), normal(width, width) / width, normal(width)]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def errors_of(
    name: str, tokens: int, width: int, call: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Errors of output and gradients against the definition in float64."""
    given = drawn(2, tokens, width, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    dout = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    wide = call | {"critical": max(call["critical"], 0.2)}
    results = []
    for tensors, backend in ((given, "auto"), (exact, "dense")):
        out = attend(*tensors, semantics=name, backend=backend, **wide)
        results.append((out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))))
    names = ("out", "dq", "dk", "dv", "dw", "db")
    errors = {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, *results, strict=True)}
    if not max(errors.values()) <= MOST:
        raise RegardError(f"semantics {name!r} errs by {errors}, more than {MOST}")
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
