"""Local Linear Attention: regression on streams whose map changes, and its seconds by length.

Streams: `segments` of `length` keys around centres of their own, values by a linear map of the segment, a little noise;
queries are new points of the segment. The error is against the map at the query. Every method has its best setting
on streams of other seeds, chosen beforehand.
"""

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.states.lla import scan
from regard.search import facts

SCALES, RIDGES = (0.125, 0.25, 0.5, 1.0), (0.01, 0.1, 1.0, 10.0)
NEVER = 1e8  # a ridge so large that no slope is left: softmax attention
METHODS = {
    "local": [{"scale": scale, "ridge": ridge} for scale in SCALES for ridge in RIDGES],
    "softmax": [{"scale": scale, "ridge": NEVER} for scale in SCALES],
    "ridge": [{"scale": 0.0, "ridge": ridge} for ridge in RIDGES],
}


def run(
    seeds: int = 5, segments: int = 4, length: int = 64, size: int = 16, longest: int = 4096
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row a seed with the error of each method; what lengths up to `longest` cost stands in the facts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"segments": segments, "length": length, "size": size}
    told = facts.machine(SimpleNamespace(device=device)) | shape | {"seeds": seeds}
    tuning = [stream(1000 + seed, **shape) for seed in range(seeds)]
    chosen = {name: min(options, key=lambda o: sum(error(s, o) for s in tuning)) for name, options in METHODS.items()}
    rows = []
    for seed in range(seeds):
        found = {name: error(stream(seed, **shape), options) for name, options in chosen.items()}
        rows.append({"what": f"seed {seed}", **found, "options": chosen})
    lengths = [512 << i for i in range(20) if 512 << i <= longest]
    return told | {"costs": [cost(tokens, device) for tokens in lengths]}, rows


def stream(seed: int, segments: int, length: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and what is asked for, `[1, 1, segments * length, size]`."""
    g = torch.Generator().manual_seed(seed)
    centres = 6 * torch.randn(segments, 1, size, generator=g) / size**0.5
    maps = torch.randn(segments, size, size, generator=g) / size**0.5
    keys, queries = (centres + torch.randn(segments, length, size, generator=g) for _ in range(2))
    values = keys @ maps + 0.05 * torch.randn(segments, length, size, generator=g)
    queries, keys, values, wanted = (x.reshape(1, 1, -1, size) for x in (queries, keys, values, queries @ maps))
    return queries, keys, values, wanted


def error(data: tuple[Tensor, Tensor, Tensor, Tensor], options: dict[str, float]) -> float:
    """Mean square of what is read against what is asked for."""
    queries, keys, values, wanted = data
    out, _ = scan(queries, keys, values, backend="dense", scale=options["scale"], ridge=options["ridge"])
    return float((out - wanted).square().mean())


def cost(tokens: int, device: torch.device, heads: int = 4, size: int = 64) -> dict[str, Any]:
    """Seconds of a forward and a backward in blocks, beside SDPA; up to 1,024 tokens also the distance from dense."""
    torch.manual_seed(0)
    call = [torch.randn(1, heads, tokens, size, device=device).requires_grad_() for _ in range(3)]
    seconds = {}
    for name, attention in (("lla", lambda q, k, v: scan(q, k, v, backend="blockwise")[0]), ("sdpa", plain)):
        for _ in range(2):  # the first one warms up
            before = clock(device)
            out = attention(*call)
            middle = clock(device)
            out.sum().backward()
            seconds[name] = (middle - before, clock(device) - middle)
    row: dict[str, Any] = {"tokens": tokens, "forward s": seconds["lla"][0], "backward s": seconds["lla"][1]}
    row |= {"over sdpa": sum(seconds["lla"]) / sum(seconds["sdpa"])}
    if tokens <= 1024:
        with torch.no_grad():
            gap = scan(*call, backend="dense")[0] - scan(*call, backend="blockwise")[0]
        row["from dense"] = float(gap.abs().max())
    return row


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def clock(device: torch.device) -> float:
    """Now, with all work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
