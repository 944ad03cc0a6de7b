"""Making block lists: seconds and memory, by rows and turned, after a check against the definition on a short text."""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.ops.masks import s2
from regard.primitives import block_list
from regard.search import facts

SHORT = 700


def patterns(length: int, device: str) -> dict[str, Pattern]:
    """Patterns of 8 KV heads over `length` positions."""
    official = {"block": 64, "local": 16, "stride": 8, "offset": 0, "homogeneous": False, "dense_heads": 0}
    blocks = -(-length // 64)
    table = torch.rand(8, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.1
    return {
        "window 1024 + sink 64": Pattern.window(1024) | Pattern.sink(64),
        "s2": s2.allow(Where(0, 1, 32, 8, 128), holes="refuse", **official),
        "random 10 % of blocks of 64": Pattern.blocks(table.to(device), 64),
        "documents of 3000": Pattern.document(torch.arange(length, device=device) // 3000),
        "causal": Pattern.causal(),
        "|i - j| < 1000 with a cover": Pattern.predicate(near, causal=False, cover=near_cover),
        "i - j < 5000, opaque": Pattern.predicate(lambda q, k, head: q - k < 5000),
    }


def near(q: torch.Tensor, k: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return (q - k).abs() < 1000


def near_cover(q_low, q_high, k_low, k_high):
    some = (q_low - k_high < 1000) & (k_low - q_high < 1000)
    return some, (q_high - k_low < 1000) & (k_high - q_low < 1000)


def run(
    length: int = 131072, opaque_length: int = 32768, side: int = 128, repeats: int = 3
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`side` rows and keys a block; the predicate without a cover is asked about every pair, so it gets less text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, pattern in patterns(SHORT, device).items():
        made = block_list.build(pattern, SHORT, SHORT, (side, side), device=device)
        wanted = pattern.to_dense(SHORT).to(device)
        for one in (made, made.turned()):
            assert torch.equal(one.to_dense()[0], wanted), f"{name} errs"
    rows = []
    for name, pattern in patterns(length, device).items():
        tokens = opaque_length if "opaque" in name else length
        at = torch.arange(tokens, device=device)[None]
        # Positions as tensors: lists of numbers of positions are kept.
        made, seconds, peak = timed(lambda p=pattern, at=at: block_list.build(p, at, at, (side, side)), repeats)
        fresh = [block_list.build(pattern, at, at, (side, side)) for _ in range(repeats)]
        _, turned_seconds, turned_peak = timed(lambda fresh=fresh: fresh.pop().turned(), repeats)
        row = {"pattern": name, "tokens": tokens, "density": made.density, "milliseconds": seconds * 1e3}
        row |= {"peak MB": peak / 1e6, "turned milliseconds": turned_seconds * 1e3, "turned peak MB": turned_peak / 1e6}
        rows.append(row | {"list MB": made.nbytes / 1e6, "cuts": len(made.bounds) + len(made.bits)})
    return facts.machine(SimpleNamespace(device=torch.device(device))) | {"side": side}, rows


def timed(make: Callable[[], Any], repeats: int) -> tuple[Any, float, int]:
    """What was made, the median time, and the memory taken beyond what was held (0 on a CPU, which does not tell)."""
    took, made, peak = [], None, 0
    for _ in range(repeats):
        made = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        start = time.perf_counter()
        made = make()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - held
        took.append(time.perf_counter() - start)
    return made, statistics.median(took), peak
