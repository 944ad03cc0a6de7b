"""Decoding over latents (MLA): seconds of the kernel against its floor, torch on the same latents, and expanded keys.

The floor is the larger of the bytes at the speed of a copy and the products at the speed of a matrix product, both
measured in the same run. Peers: two products and a softmax of torch over the latents (absorbed, as the kernel), and
torch's SDPA over expanded keys and values, which lie ready (what a cache of them would hold). All sides are first
compared with float64 on some requests. "whole" is the layer's attention: queries absorbed and values projected too.
On a CPU this runs only where Triton interprets (TRITON_INTERPRET=1), to show that it runs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cases.state_step import Call, error, turns, version
from regard.core.errors import RegardError
from regard.kernels.attention import latent as kernel
from regard.measure.seconds import spread
from regard.ops import latent as ops
from regard.search import facts

SHAPES = ((64, 8192), (16, 8192), (1, 32768), (128, 8192))  # rows and tokens
CONTENT, VALUE = 128, 128  # of a head, expanded
MOST = 1e-2  # what a 16-bit result may err by, of its largest entry
MOST_BYTES = 60 * 2**30  # of expanded keys and values


def run(
    batch: int = 0,
    tokens: int = 0,
    heads: int = 128,
    rank: int = 512,
    rope: int = 64,
    steps: int = 10,
    repeats: int = 15,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every shape (`batch=0`: all of `SHAPES`).

    Args:
        batch: rows.
        tokens: held of each row.
        heads: of queries.
        rank: of a latent.
        rope: of the rotary key.
        steps: in one timing.
        repeats: timings of each side, taking turns.

    Raises:
        RegardError: a result is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "rank": rank, "rope": rope, "content": CONTENT, "value": VALUE, "dtype": str(dtype),
        "steps": steps, "repeats": repeats,
    }  # fmt: skip
    told["versions"] |= {"triton": version("triton")}
    with torch.no_grad():
        told |= ceilings(device, dtype, steps, repeats)
        shapes = [(batch, tokens)] if batch else SHAPES
        rows = [compare(B, S, heads, rank, rope, device, dtype, steps, repeats, told) for B, S in shapes]
    return told, rows


def ceilings(device: torch.device, dtype: torch.dtype, steps: int, repeats: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a matrix product."""
    size, wide = (2**29, 8192) if device.type == "cuda" else (2**16, 64)
    x, into = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
    a = torch.randn(wide, wide, device=device).to(dtype)
    way = "graph" if device.type == "cuda" else "launch"
    # A kernel: in a CUDA graph a plain copy goes to the slower copy engines.
    timed = turns({"copy": lambda: torch.neg(x, out=into), "product": lambda: a @ a}, way, steps, repeats)
    copy, product = (spread(timed[side]).median for side in ("copy", "product"))
    return {"copy TB/s": 2 * x.nbytes / copy / 1e12, "product TFLOP/s": 2 * wide**3 / product / 1e12}


def compare(
    B: int, S: int, H: int, r: int, e: int, device: torch.device, dtype: torch.dtype, steps: int, repeats: int,
    told: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Check all sides, then time them taking turns."""
    drawn = torch.Generator(device=device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=drawn, device=device)  # noqa: E731
    q, latent = normal(B, H, 1, CONTENT + e).to(dtype), normal(B, S, r + e).to(dtype)
    up = tuple((normal(H, r, size) / r**0.5).to(dtype) for size in (CONTENT, VALUE))
    scale = (CONTENT + e) ** -0.5
    absorbed = ops.absorb(q, up[0])
    sides: dict[str, Call] = {
        "ours": lambda: kernel.decode(absorbed, latent, rank=r, scale=scale)[0],
        "torch": lambda: plain(absorbed, latent, r, scale),
    }
    if device.type == "cuda":
        sides["whole"] = lambda: ops.attend(q, latent, *up, scale=scale, backend="triton")[0]
    if 2 * B * H * S * (CONTENT + e + VALUE) <= MOST_BYTES:
        k, v = ops.expand(latent, *up)
        sides["expanded"] = lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)
    errors = check(sides, q, latent, up, scale)
    timed = {
        side: spread(found).median
        for side, found in turns(sides, "graph" if latent.is_cuda else "launch", steps, repeats).items()
    }
    moved = latent.nbytes + absorbed.nbytes + absorbed.nbytes * r // (r + e)
    products = 2 * B * H * S * (2 * r + e)
    floor = max(moved / told["copy TB/s"], products / told["product TFLOP/s"]) / 1e12
    return {
        "rows": B, "tokens": S, "ours ms": timed["ours"] * 1e3, "floor ms": floor * 1e3,
        "share of floor": floor / timed["ours"], "TFLOP/s": products / timed["ours"] / 1e12,
        "TB/s": moved / timed["ours"] / 1e12, "torch ms": timed["torch"] * 1e3,
        "whole ms": timed.get("whole", float("nan")) * 1e3, "expanded ms": timed.get("expanded", float("nan")) * 1e3,
        "error": errors["ours"], "errors": errors, "bytes": moved, "operations": products, "seconds": timed,
    }  # fmt: skip


def plain(absorbed: Tensor, latent: Tensor, rank: int, scale: float) -> Tensor:
    """What torch does with two products and a softmax; heads are the rows of one product."""
    weights = (absorbed[:, :, 0] @ latent.mT * scale).softmax(-1)
    return (weights @ latent[..., :rank])[:, :, None]


def check(sides: dict[str, Call], q: Tensor, latent: Tensor, up: tuple[Tensor, ...], scale: float) -> dict[str, float]:
    """What each side errs by on the first and the last request, against float64; ours no more than `MOST`."""
    some = [0, len(q) - 1]
    wide = ops.absorb(q[some].double(), up[0].double())
    sums = plain(wide, latent[some].double(), up[0].shape[1], scale)
    projected = torch.einsum("bhtr,hrd->bhtd", sums, up[1].double())
    errors = {}
    for side, call in sides.items():
        errors[side] = error(call()[some], sums if side in ("ours", "torch") else projected)
    if not errors["ours"] <= MOST:
        raise RegardError(f"the kernel errs by {errors['ours']:.1e} of the largest entry, more than {MOST}")
    return errors
