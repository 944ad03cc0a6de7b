"""Attention over patterns, forward and backward, against torch's fused attention and FlexAttention on the same blocks.

Every problem is checked against float64 before it is timed, on rows and keys drawn from it: out, lse and all
gradients; what errs too much is not timed. All sides take turns. dense: causal attention without a pattern, by cuDNN
and by FlashAttention-2 as torch has it. FlexAttention gets the block list itself, as its BlockMask.
"""

import gc
import importlib.metadata
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard.core.pattern import Pattern
from regard.kernels.attention.block import attend
from regard.measure.seconds import spread
from regard.primitives.block_list import BlockList, build
from regard.search import facts

SIZE = (128, 128)
# Dense bfloat16 and copying on one H200 (docs/log.md): what the floor is made of.
RATE, BANDWIDTH = 800e12, 4.27e12
HEAD_START = 4_000_000  # cycles: 2 ms on an H200
MOST = 0.02  # relative error in the norm, of bfloat16 results and gradients
COLUMNS = (
    "pattern", "tokens", "phase", "share of pairs", "ours ms", "mad", "flex ms", "cudnn ms", "flash ms", "flex / ours",
    "cudnn / ours", "flash / ours", "TFLOP/s", "floor ms", "first s", "flex first s", "lists s", "peak MiB",
    "flex peak MiB", "error", "says",
)  # fmt: skip
Call = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """One pattern at one length: the list, and the same rule elementwise for FlexAttention's cut blocks."""

    name: str
    blocks: BlockList
    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    seconds: float


def run(
    tokens: int = 16_384,
    long: int = 131_072,
    heads: int = 32,
    kv_heads: int = 32,
    width: int = 128,
    repeats: int = 7,
    flex: int = 1,
    only: int = -1,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows for causal, window with sink and random blocks at `tokens`, then longer ones up to `long`.

    Args:
        tokens: of the short problems.
        long: of the longest; random blocks go to half of it, S2 is at `long` alone.
        heads: query heads.
        kv_heads: key heads.
        width: of a head.
        repeats: timings of each side, taking turns.
        flex: 1 to time FlexAttention beside, compiled (not where it would need a mask of all pairs).
        only: number of the one problem to run, -1 for all.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "kv heads": kv_heads, "width": width, "repeats": repeats, "dtype": "bfloat16",
        "most": MOST, "rate": RATE, "bandwidth": BANDWIDTH,
    }  # fmt: skip
    told["versions"]["triton"] = importlib.metadata.version("triton")
    plan = [
        (causal, tokens), (window, tokens), (scattered, tokens), (window, long // 2), (window, long),
        (scattered, long // 2), (s2, long),
    ]  # fmt: skip
    made: list[dict[str, Any]] = []
    for number, (kind, length) in enumerate(plan):
        if only in (-1, number):
            problem = kind(length, kv_heads, device)
            print(problem.name, length, flush=True)
            made += measured(problem, heads, kv_heads, width, repeats, bool(flex), device)
            gc.collect()
    return told, made


def listed(name: str, pattern: Pattern, length: int, rule: Any, device: torch.device) -> Problem:
    began = time.perf_counter()
    blocks = build(pattern, length, length, SIZE, device=device)
    blocks.turned()
    settle()
    return Problem(name, blocks, rule, time.perf_counter() - began)


def causal(length: int, heads: int, device: torch.device) -> Problem:
    return listed("causal", Pattern.causal(), length, lambda b, h, i, j: j <= i, device)


def window(length: int, heads: int, device: torch.device) -> Problem:
    pattern = Pattern.window(1024) | Pattern.sink(64)
    rule = lambda b, h, i, j: (j <= i) & ((i - j < 1024) | (j < 64))  # noqa: E731
    return listed("window 1024 + sink 64", pattern, length, rule, device)


def scattered(length: int, heads: int, device: torch.device) -> Problem:
    """A tenth of all blocks, drawn for each key head and line on its own."""
    generator = torch.Generator(device).manual_seed(0)
    lines = -(-length // SIZE[0])
    chosen = torch.rand(heads, lines, lines, generator=generator, device=device).topk(max(lines // 10, 1), -1).indices
    table = torch.zeros(heads, lines, lines, dtype=torch.bool, device=device).scatter_(2, chosen, True)
    pattern = Pattern.blocks(table, SIZE[0], causal=False)
    return listed("a tenth of blocks", pattern, length, lambda b, h, i, j: j >= 0, device)


def s2(length: int, heads: int, device: torch.device) -> Problem:
    """S2-Attention: the last 8 blocks of 128, and every 16th before them, another for each head."""
    near = Pattern.window(8, SIZE[0])
    pattern = Pattern.stack_heads([near | Pattern.phases(SIZE[0], 16, {-head % 16}) for head in range(heads)])

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        m, n = i // 128, j // 128
        return (j <= i) & ((m - n < 8) | ((n + h) % 16 == 0))

    return listed("s2 of 8 + every 16th", pattern, length, rule, device)


def measured(
    problem: Problem, heads: int, kv_heads: int, width: int, repeats: int, flex: bool, device: torch.device
) -> list[dict[str, Any]]:
    """Check, then time all sides; a row for each phase."""
    blocks, length = problem.blocks, problem.blocks.rows
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, n, length, width, device=device, dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    sides: dict[str, Callable[..., Any]] = {"ours": lambda *x: attend(*x, blocks, scale=width**-0.5)}
    if flex:
        sides["flex"] = flexible(problem, heads, kv_heads, width)
    sides |= {"cudnn": dense(SDPBackend.CUDNN_ATTENTION), "flash": dense(SDPBackend.FLASH_ATTENTION)}
    first, peak, says, phases = {}, {}, {}, {"forward": {}, "backward": {}}
    wrong: dict[str, float] = {}
    for side, call in sides.items():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        try:
            reset()
            began = time.perf_counter()
            out, lse = call(*leaves) if side == "ours" else (call(*leaves), None)
            slopes = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            settle()
            first[side], peak[side] = time.perf_counter() - began, allocated()
        except Exception as error:  # whatever a peer raises is its answer
            says[side] = f"{side}: {type(error).__name__}: {str(error)[:200]}"
            continue
        if side == "ours":
            wrong = errors(problem, q, k, v, dout, out, lse, slopes, width**-0.5)
            if not all(error <= MOST for error in wrong.values()):
                says[side] = "ours errs: " + ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
                break
        del slopes
        phases["forward"][side] = lambda call=call: silent(call, q, k, v)
        phases["backward"][side] = lambda out=out, leaves=leaves: torch.autograd.grad(
            out, leaves, dout, retain_graph=True
        )
    share = seen(blocks) / length**2
    told = {
        "pattern": problem.name, "tokens": length, "share of pairs": share, "first s": first.get("ours", ""),
        "flex first s": first.get("flex", ""), "lists s": problem.seconds, "peak MiB": peak.get("ours", ""),
        "flex peak MiB": peak.get("flex", ""), "error": max(wrong.values(), default=math.nan), "errors": wrong,
        "says": "; ".join(says.values()),
    }  # fmt: skip
    rows = []
    for phase, products, tensors in (("forward", 2, 4), ("backward", 5, 8)):
        timed = {} if "ours" in says else turns(phases[phase], repeats)
        work = 2 * products * share * length**2 * heads * width
        floor = max(work / RATE, tensors * q.nbytes / BANDWIDTH) * 1e3
        rows.append(row(told | {"phase": phase, "floor ms": floor} | figures(timed, work)))
    return rows


def flexible(problem: Problem, heads: int, kv_heads: int, width: int) -> Callable[..., Tensor]:
    """FlexAttention, compiled, over the same blocks and with the rule itself inside the cut ones."""
    from torch import _dynamo
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    _dynamo.reset()  # else it gives up compiling after some problems, and builds a mask of all pairs
    made = problem.blocks.to_block_mask(heads if problem.blocks.count.shape[1] > 1 else None)
    lean = BlockMask.from_kv_blocks(
        made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices, BLOCK_SIZE=SIZE,
        mask_mod=problem.rule, seq_lengths=(problem.blocks.rows, problem.blocks.keys),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=lean, scale=width**-0.5, enable_gqa=heads != kv_heads)


def dense(backend: SDPBackend) -> Callable[..., Tensor]:
    """Causal attention as one of torch's fused kernels does it."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return call


def seen(blocks: BlockList) -> float:
    """Pairs that are seen, mean over heads."""
    per_part = torch.cat(
        [
            (blocks.bounds[..., 1].long() - blocks.bounds[..., 0]).sum(-1),
            torch.stack([(blocks.bits >> j) & 1 for j in range(32)]).sum((0, 2, 3)),
        ]
    )
    lead, _, _, part = blocks.entries()
    place = torch.where(part >= 0, part, len(blocks.bounds) - 2 - part).clamp(0, max(len(per_part) - 1, 0)).long()
    known = per_part[place] if len(per_part) else torch.zeros_like(lead)
    pairs = torch.where(part == -1, SIZE[0] * SIZE[1], known).sum()
    return pairs.item() / blocks.count.shape[1]


def errors(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor,
    slopes: tuple[Tensor, ...], scale: float, count: int = 64,
) -> dict[str, float]:  # fmt: skip
    """Relative errors in the norm, in the last head, of drawn rows and of drawn keys.

    Sums over keys take lse and delta of all rows from the call itself, whose own errors drawn rows show.
    """
    group, head = q.shape[1] // k.shape[1], q.shape[1] - 1
    T, device = q.shape[2], q.device
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, T, (count,), generator=generator).to(device)
    keys = torch.randint(0, T, (count,), generator=generator).to(device)
    key, value = k[0, -1].double(), v[0, -1].double()
    table = allowed(problem, rows, None)
    scores = (q[0, head, rows].double() @ key.T * scale).masked_fill(~table, -torch.inf)
    top = scores.logsumexp(-1)
    p = (scores - top[:, None]).exp().nan_to_num(0)
    exact = p @ value
    delta = (exact * dout[0, head, rows].double()).sum(-1, keepdim=True)
    ds = p * (dout[0, head, rows].double() @ value.T - delta)
    found = {
        "out": error(out[0, head, rows], exact), "lse": error(lse[0, head, rows].clamp(min=-1e9), top.clamp(min=-1e9)),
        "dq": error(slopes[0][0, head, rows], ds @ key * scale),
    }  # fmt: skip
    dk, dv = (torch.zeros(count, q.shape[3], dtype=torch.float64, device=device) for _ in range(2))
    table = allowed(problem, None, keys)
    for one in range(head + 1 - group, head + 1):
        scores = (q[0, one].double() @ key[keys].T * scale).masked_fill(~table, -torch.inf)
        p = (scores - lse[0, one].double()[:, None]).exp().nan_to_num(0)
        slope = dout[0, one].double()
        delta = (out[0, one].double() * slope).sum(-1, keepdim=True)
        dv += p.T @ slope
        dk += (p * (slope @ value[keys].T - delta)).T @ q[0, one].double() * scale
    return found | {"dk": error(slopes[1][0, -1, keys], dk), "dv": error(slopes[2][0, -1, keys], dv)}


def allowed(problem: Problem, rows: Tensor | None, keys: Tensor | None) -> Tensor:
    """Who sees whom in the last head, `[rows, keys]`, None for all: the rule inside the blocks of the list."""
    blocks = problem.blocks
    device, T = blocks.count.device, blocks.rows
    i = torch.arange(T, device=device) if rows is None else rows
    j = torch.arange(T, device=device) if keys is None else keys
    lead, row, column, _ = blocks.entries()
    last = lead == blocks.count.shape[1] - 1
    table = torch.zeros(blocks.blocks, dtype=torch.bool, device=device)
    table[row[last], column[last]] = True
    head = torch.tensor(blocks.count.shape[1] - 1, device=device)
    inside = problem.rule(head, head, i[:, None], j[None, :])
    return inside & table[(i // SIZE[0])[:, None], (j // SIZE[1])[None, :]]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def silent(call: Callable[..., Any], *inputs: Tensor) -> Any:
    with torch.no_grad():
        return call(*inputs)


def figures(timed: dict[str, Any], work: float) -> dict[str, Any]:
    """Columns of one phase; `timed`: milliseconds by side."""
    if not timed:
        return {}
    ours = timed["ours"]
    made: dict[str, Any] = {
        "ours ms": ours.median, "mad": ours.mad, "TFLOP/s": work / ours.median / 1e9,
        "timings": {side: asdict(found) for side, found in timed.items()},
    }  # fmt: skip
    for side, found in timed.items():
        if side != "ours":
            paired = spread([b / a for a, b in zip(ours.values, found.values, strict=True)])
            made |= {f"{side} ms": found.median, f"{side} / ours": paired.median}
    return made


def row(told: dict[str, Any]) -> dict[str, Any]:
    """All columns, in order; nothing where there is no figure."""
    return {name: told.get(name, "") for name in COLUMNS} | {key: x for key, x in told.items() if key not in COLUMNS}


def turns(calls: dict[str, Call], repeats: int, ahead: int = HEAD_START) -> dict[str, Any]:
    """Milliseconds of each side, spread over the repeats, sides taking turns."""
    found: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        clock(call, ahead)
    for _ in range(repeats):
        for side, call in calls.items():
            found[side].append(clock(call, ahead))
    return {side: spread(values) for side, values in found.items()}


def clock(call: Call, ahead: int = HEAD_START) -> float:
    """Milliseconds that the device works on a call; what the host needs to launch it is hidden, for all sides alike."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # While this many cycles pass, the host launches what follows.
    torch.cuda._sleep(ahead)
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended)


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated() -> float:
    """Most memory held since `reset`, inputs included, in MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
