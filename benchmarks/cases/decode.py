"""Decoding one token: seconds and bytes a second of the kernel, torch's SDPA, FlexAttention and a plain copy.

Keys and values of one request, of many short and long ones, and of these in pages; every side is compared with the
definition in float64 first, and what errs is not timed. Then all sides take turns, replayed from a CUDA graph ("graph")
and launched from Python ("launch"). Calls go round several copies of the keys, so that none are in the GPU's cache.
On a CPU this runs only where Triton interprets (TRITON_INTERPRET=1), to show that it runs.
"""

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases.state_step import clock, graph, many
from regard.core.errors import RegardError
from regard.kernels.attention import decode as kernel
from regard.measure.seconds import spread
from regard.ops.decode import decode
from regard.search import facts

MOST = 1e-2  # what a bfloat16 result may err by, of its largest entry
COPIED = 2**28  # float32 numbers of the plain copy
HELD = 2**29  # bytes of keys and values that calls go round
Call = Callable[[int], Any]


def run(
    heads: int = 32, kv_heads: int = 8, width: int = 128, length: int = 32768, page: int = 256, steps: int = 8,
    repeats: int = 15, flex: int = 1, requests: int = 16,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """A row for every case, side and way of launching; one for a peer that cannot do a case, with what it says.

    Args:
        heads: query heads.
        kv_heads: heads of keys and values.
        width: of a head.
        length: keys of the single request and of each in the even batch; ragged requests have from a 32nd to four times
            as many.
        page: keys in a page.
        steps: calls in one timing.
        repeats: timings of each side, taking turns.
        flex: 0 leaves FlexAttention out, which has to be compiled.
        requests: of the ragged batches; the even one has half as many.

    Raises:
        RegardError: the kernel's result is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "kv_heads": kv_heads, "width": width, "length": length, "page": page, "steps": steps,
        "repeats": repeats, "requests": requests, "dtype": "bfloat16",
    }  # fmt: skip
    told["versions"] |= {"triton": importlib.metadata.version("triton")}
    ragged = [max(length * 2 ** (i % 8) // 32 - i, 1) for i in range(requests)]
    shape = (heads, kv_heads, width)
    rows = []
    with torch.no_grad():
        for name, lengths in [("one", [length]), ("even", [length] * (requests // 2)), ("ragged", ragged)]:
            rows += case(name, lengths, shape, 0, device, steps, repeats, bool(flex))
        rows += case("ragged pages", ragged, shape, page, device, steps, repeats, False)
    return told, rows


def case(
    name: str, lengths: list[int], shape: tuple[int, int, int], page: int, device: torch.device, steps: int,
    repeats: int, flex: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one case; `page` 0: contiguous keys, `[B, Hk, longest, D]`."""
    made = inputs(lengths, shape, page, device)
    sides = {"ours": ours(made)}
    if not page and len(set(lengths)) == 1:
        sides |= theirs(made, flex)
    found, refused = first(sides)
    errors = check(made, sides, found)
    into = torch.empty(COPIED if device.type == "cuda" else 1024, device=device)
    start = torch.empty_like(into)
    # A kernel: in a CUDA graph a plain copy goes to the slower copy engines.
    sides["copy"] = lambda i: torch.neg(start, out=into)
    moved = 4 * sum(lengths) * shape[1] * shape[2]
    rows = []
    for way in ("graph", "launch") if device.type == "cuda" else ("launch",):
        found = turns(sides, way, steps, repeats)
        floor = moved / (2 * into.nbytes / found["copy"].median)
        for side in sides:
            bytes_moved = 2 * into.nbytes if side == "copy" else moved
            rows.append({
                "case": name, "side": side, "way": way, "us": found[side].median * 1e6,
                "TB/s": bytes_moved / found[side].median / 1e12,
                "times floor": found[side].median / floor if side != "copy" else 1.0,
                "error": errors.get(side, 0.0), "bytes": bytes_moved, "says": "", "seconds": vars(found[side]),
            })  # fmt: skip
    without = dict.fromkeys(rows[0], "")
    return rows + [without | {"case": name, "side": side, "says": says} for side, says in refused.items()]


def inputs(lengths: list[int], shape: tuple[int, int, int], page: int, device: torch.device) -> dict[str, Any]:
    """Queries, and as many copies of keys and values as do not fit the cache; in pages where there are any."""
    H, Hk, D = shape
    torch.manual_seed(0)
    B, longest = len(lengths), max(lengths)
    made: dict[str, Any] = {"q": torch.randn(B, H, 1, D, device=device, dtype=torch.bfloat16)}
    made["lengths"] = torch.tensor(lengths, device=device)
    pool = (B, Hk, longest, D)
    if page:
        counts = [-(-length // page) for length in lengths]
        pool = (sum(counts), Hk, page, D)
        order = torch.randperm(sum(counts)).split(counts)
        table = torch.zeros(B, -(-longest // page), dtype=torch.long)
        for row, places in enumerate(order):
            table[row, : len(places)] = places
        made["pages"] = table.to(device)
    copies = max(1, HELD // (4 * math.prod(pool))) if device.type == "cuda" else 1
    make = lambda: torch.randn(2, *pool, device=device, dtype=torch.bfloat16)  # noqa: E731
    return made | {"keys": [make() for _ in range(copies)], "ragged": len(set(lengths)) > 1}


def ours(made: dict[str, Any]) -> Call:
    q, keys, options = made["q"], made["keys"], {"scale": made["q"].shape[-1] ** -0.5}
    if made["ragged"] or "pages" in made:
        options |= {"lengths": made["lengths"], "pages": made.get("pages")}
    return lambda i: kernel.decode(q, *keys[i % len(keys)], **options)


def theirs(made: dict[str, Any], flex: bool) -> dict[str, Call]:
    """What torch has for requests of one length."""
    q, keys = made["q"], made["keys"]
    if not q.is_cuda:
        return {"sdpa": lambda i: F.scaled_dot_product_attention(q, *keys[i % len(keys)], enable_gqa=True)}

    def fused(backend: SDPBackend) -> Call:
        def call(i: int) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, *keys[i % len(keys)], enable_gqa=True)

        return call

    sides = {"cudnn": fused(SDPBackend.CUDNN_ATTENTION), "flash": fused(SDPBackend.FLASH_ATTENTION)}
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        sides["flex"] = lambda i: compiled(q, *keys[i % len(keys)], enable_gqa=True)
    return sides


def first(sides: dict[str, Call]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each side gives, and what peers that cannot do this call say; they are left out of `sides`."""
    found, refused = {}, {}
    for side, call in list(sides.items()):
        try:
            found[side] = call(0)
        except Exception as error:  # whatever a peer raises is its answer
            if side == "ours":
                raise
            refused[side] = f"{type(error).__name__}: {error}".splitlines()[0]
            del sides[side]
    return found, refused


def check(made: dict[str, Any], sides: dict[str, Call], found: dict[str, Any]) -> dict[str, float]:
    """What each side errs by, of the largest entry; sides of others that err are left out of `sides`."""
    k, v = made["keys"][0]
    errors: dict[str, float] = {}
    outs = {side: out[0] if isinstance(out, tuple) else out for side, out in found.items()}
    # Request by request: in float64 the keys of all would take much memory.
    for b, length in enumerate(made["lengths"].tolist()):
        one = (slice(b, b + 1), slice(None), slice(length))
        keys, values = k, v
        if "pages" in made:
            table = made["pages"][b : b + 1, : -(-length // k.shape[2])]
            keys, values = (x[table].transpose(1, 2).flatten(2, 3)[:, :, :length] for x in (k, v))
        else:
            keys, values = k[one], v[one]
        out, _ = decode(made["q"][b : b + 1].double(), keys.double(), values.double(), check=False)
        for side, given in outs.items():
            errors[side] = max(errors.get(side, 0.0), ((given[b : b + 1] - out).abs().max() / out.abs().max()).item())
    for side, error in errors.items():
        if side == "ours" and not error <= MOST:
            raise RegardError(f"the kernel errs by {error:.1e} of the largest entry, more than {MOST}")
        if not error <= MOST:
            del sides[side]
    return errors


def turns(sides: dict[str, Call], way: str, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of one call of each side, `repeats` times, taking turns.

    Each first runs untimed: what comes after the copy finds the cache full of lines that have yet to be written back.
    """
    runs = {}
    for side, call in sides.items():
        places = iter(range(10**9))
        step = lambda call=call, places=places: call(next(places))  # noqa: E731
        runs[side] = graph(step, steps) if way == "graph" else many(step, steps)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for run in runs.values():
        clock(run)
    for _ in range(repeats):
        for side, run in runs.items():
            run()
            found[side].append(clock(run) / steps)
    return {side: spread(values) for side, values in found.items()}
