"""Attention over windows on grids, in tiles and in raster order, against torch's fused attention over all pairs.

Each row says what share of blocks is read, and what share needs no mask. Rows drawn from every problem are checked
against float64 before anything is timed; what errs is not timed.
`permuted` is the whole call from tokens to tokens, with the way into tiles and back.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.core.pattern import Pattern
from regard.measure.seconds import spread
from regard.ops.attention import attend
from regard.ops.masks import inward, neighbourhood
from regard.primitives.block_list import build
from regard.search import facts

MOST = 0.02  # relative error in the norm, of bfloat16 results
SIZE = (128, 128)
Grid = tuple[int, ...]


def run(
    frames: int = 30, rows: int = 48, columns: int = 80, line: int = 32_768, image: int = 128, heads: int = 24,
    width: int = 128, repeats: int = 7,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """A row for each problem: a line, an image, a video with and without strides, and an inward window.

    Args:
        frames: of the video, kernel three fifths of it.
        rows: of the video, kernel half of it.
        columns: of the video, kernel three tenths of it.
        line: tokens of the line, kernel a sixteenth.
        image: side of the image, kernel a tenth.
        heads: of all problems.
        width: of a head.
        repeats: timings of each side, taking turns.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = facts.machine(torch.empty(0, device=device)) | {"heads": heads, "width": width, "dtype": "bfloat16"}
    video, kernel = (frames, rows, columns), (frames * 3 // 5, rows // 2, columns * 3 // 10)
    near, side = max(image // 10 | 1, 3), (image, image)
    stride = tuple(map(min, (16, 8, 8), kernel))
    plan: list[tuple[str, Grid, Grid, Callable[[Grid | None], Pattern]]] = [
        ("line", (line,), (min(128, line),), lambda box: neighbourhood.pattern((line,), line // 16, box=box)),
        ("image", side, (8, 16), lambda box: neighbourhood.pattern(side, near, box=box)),
        ("video", video, (2, 8, 8), lambda box: neighbourhood.pattern(video, kernel, box=box)),
        ("video, strided", video, (2, 8, 8), lambda box: neighbourhood.pattern(video, kernel, stride=stride, box=box)),
        ("inward", video, (2, 8, 8), lambda box: inward.pattern(video, kernel[1:], box=box)),
    ]
    made = [measured(*problem, heads, width, repeats, device) for problem in plan]
    return told | {"kernel": kernel, "stride": stride, "most": MOST}, made


def measured(
    name: str, grid: Grid, box: Grid, over: Callable[[Grid | None], Pattern], heads: int, width: int, repeats: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Check one problem, then time it in tiles, in raster order, and over all pairs."""
    torch.manual_seed(0)
    tokens = math.prod(grid)
    q, k, v = torch.randn(3, 1, heads, tokens, width, device=device, dtype=torch.bfloat16).unbind(0)
    order, inverse = (x.to(device) for x in neighbourhood.tiles(grid, box))
    held, flat, tiled = order.clamp(min=0), over(None), over(box)
    boxed = [x[:, :, held] for x in (q, k, v)]
    # A named backend never falls back.
    backend = "block" if device.type == "cuda" else "auto"
    sides: dict[str, Callable[[], Tensor]] = {
        "tiles": lambda: attend(*boxed, pattern=tiled, backend=backend)[0],
        "permuted": lambda: attend(*(x[:, :, held] for x in (q, k, v)), pattern=tiled, backend=backend)[0][
            :, :, inverse
        ],
        "raster": lambda: attend(q, k, v, pattern=flat, backend=backend)[0],
        "dense": lambda: scaled_dot_product_attention(q, k, v),
    }
    told: dict[str, Any] = {"problem": name, "grid": "x".join(map(str, grid)), "backend": backend}
    for side, pattern, slots in (("tiles", tiled, len(order)), ("raster", flat, tokens)):
        began = time.perf_counter()
        blocks = build(pattern, slots, slots, SIZE, device=device)
        pairs = blocks.blocks[0] * blocks.blocks[1]
        told |= {f"{side} list s": time.perf_counter() - began, f"{side} read": int(blocks.count.sum()) / pairs}
        told |= {f"{side} whole": int(blocks.full.sum()) / pairs}
    told["error"] = max(error(sides[side](), q, k, v, flat) for side in ("permuted", "raster"))
    if not told["error"] <= MOST:
        return told | {"says": "errs"}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side, call in sides.items():
            took = clock(call, device)
            times[side] += [took] if turn else []
    found = {side: spread(values) for side, values in times.items()}
    ratios = {
        f"dense / {side}": spread([a / b for a, b in zip(times["dense"], times[side], strict=True)]).median
        for side in ("tiles", "permuted", "raster")
    }
    return told | {f"{side} ms": f.median for side, f in found.items()} | ratios | {"says": "", "timings": times}


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, count: int = 64) -> float:
    """Relative error in the norm of drawn rows of the first head, against float64 of the definition."""
    tokens = q.shape[2]
    rows = torch.randint(0, tokens, (count,), generator=torch.Generator().manual_seed(1)).to(q.device)
    seen = pattern.allow(rows[None], torch.arange(tokens, device=q.device)[None])[0, 0]
    scores = (q[0, 0, rows].double() @ k[0, 0].double().T * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    exact = scores.softmax(-1) @ v[0, 0].double()
    return ((out[0, 0, rows].double() - exact).norm() / exact.norm()).item()


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, with all its work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1e3
