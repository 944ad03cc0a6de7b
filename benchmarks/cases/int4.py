"""Decoding straight from codes: seconds of a read, against cuDNN over bfloat16 and against a plain copy.

Every read is first compared with attention over the decoded codes in float64, and written codes with those of the
definition. Then all sides take turns, replayed from a CUDA graph. "int4" rotates keys, "int4 plain" nothing, "int4
values too" both; "copy" copies half the codes, so that as many bytes pass through memory. On a CPU this runs only where
Triton interprets (TRITON_INTERPRET=1), to show that it runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cases.state_step import clock, graph, many, version
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.store import Codec, Fields, Form
from regard.kernels.cache import saw_int4 as kernel
from regard.measure.seconds import spread
from regard.ops.attention import attend
from regard.ops.cache.saw_int4 import encode
from regard.search import facts

SHAPES = ((8, 32768), (1, 32768), (1, 131072))
SIDES = {
    "int4": (4, None, False),
    "int4 plain": (4, 1, False),
    "int4 values too": (4, None, True),
    "int8": (8, None, False),
}
MOST = 1e-2  # what a bfloat16 output may err by, of its largest entry
Call = Callable[[], Any]


def run(
    batch: int = 0,
    tokens: int = 0,
    heads: int = 32,
    kv_heads: int = 8,
    width: int = 128,
    steps: int = 20,
    repeats: int = 9,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every shape (`batch=0`: 8 and 1 rows of 32,768 tokens, and 1 of 131,072) and side, read and written.

    Args:
        batch: rows.
        tokens: keys of each.
        heads: of queries.
        kv_heads: of keys and values.
        width: of a head.
        steps: in one timing.
        repeats: timings of each side, taking turns.

    Raises:
        RegardError: a result is not that of the definition.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = facts.machine(torch.empty(0, device=device)) | {
        "heads": heads, "kv_heads": kv_heads, "width": width, "steps": steps, "repeats": repeats, "dtype": "bfloat16",
    }  # fmt: skip
    told["versions"] |= {"triton": version("triton")}
    rows = []
    with torch.no_grad():
        for B, S in [(batch, tokens)] if batch else SHAPES:
            q, k, v = inputs(B, S, heads, kv_heads, width, device)
            errors = check(q[:1], k[:1, :, : min(S, 4096)], v[:1, :, : min(S, 4096)])
            rows += reads(q, k, v, errors, steps, repeats) + writes(k, v, steps, repeats)
            rows += writes(k[:, :, :1], v[:, :, :1], steps, repeats)
    return told, rows


def inputs(B: int, S: int, H: int, Hk: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One query a row and `S` keys and values."""
    drawn = torch.Generator(device).manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=drawn, device=device, dtype=torch.bfloat16)  # noqa: E731
    return made(B, H, 1, D), made(B, Hk, S, D), made(B, Hk, S, D)


def codecs(D: int, bits: int, block: int | None, rotate_v: bool) -> tuple[Codec, Codec]:
    where = Where(layer=0, layers=1, heads=1, kv_heads=1, head_dim=D)
    key, value = encode(where, key_bits=bits, value_bits=bits, block=block, rotate_v=rotate_v)
    assert key is not None
    assert value is not None
    return key, value


def forms(pair: tuple[Codec, Codec]) -> dict[str, Form | None]:
    return {"key": pair[0].form, "value": pair[1].form}


def blank(x: Tensor, codec: Codec) -> Fields:
    """Fields for the vectors of `x`."""
    assert codec.form is not None
    codes = x.new_empty(*x.shape[:3], x.shape[3] * codec.form.bits // 8, dtype=torch.uint8)
    return codes, x.new_empty(*x.shape[:3], 2, dtype=torch.float32)


def written(k: Tensor, v: Tensor, pair: tuple[Codec, Codec]) -> tuple[Fields, Fields]:
    fields = blank(k, pair[0]), blank(v, pair[1])
    kernel.write(k, v, *fields, **forms(pair))
    return fields


def check(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """What each side's output errs by; all codes must be the definition's."""
    errors = {}
    for side, options in SIDES.items():
        pair = codecs(q.shape[3], *options)
        fields = written(k, v, pair)
        for codec, x, found in zip(pair, (k, v), fields, strict=True):
            # On a CPU, where the definition divides as it says; torch multiplies by 1 / 15 on a GPU.
            exact = codec.encode(x.cpu())
            if not all(torch.equal(a.cpu(), b) for a, b in zip(found, exact, strict=True)):
                raise RegardError(f"{side}: written codes are not those of the definition")
        keys, values = (c.decode(f, torch.float64) for c, f in zip(pair, fields, strict=True))
        expected = pair[1].output(attend(pair[0].query(q).double(), keys, values, backend="reference")[0])
        found = kernel.read(q, *fields, scale=q.shape[3] ** -0.5, **forms(pair))[0]
        errors[side] = ((found.double() - expected).abs().max() / expected.abs().max()).item()
        if not errors[side] <= MOST:
            raise RegardError(f"{side} errs by {errors[side]:.1e} of the largest entry, more than {MOST}")
    return errors


def reads(q: Tensor, k: Tensor, v: Tensor, errors: dict[str, float], steps: int, repeats: int) -> list[dict[str, Any]]:
    """Time all sides; a row for each."""
    sides: dict[str, Call] = {}
    moved = {"cudnn": k.nbytes + v.nbytes}
    for side, options in SIDES.items():
        pair = codecs(q.shape[3], *options)
        fields = written(k, v, pair)
        moved[side] = sum(f.nbytes for held in fields for f in held)
        call = {"scale": q.shape[3] ** -0.5} | forms(pair)
        sides[side] = lambda fields=fields, call=call: kernel.read(q, *fields, **call)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    source = torch.empty(moved["int4"] // 2, dtype=torch.uint8, device=q.device)
    into = torch.empty_like(source)
    sides |= {"cudnn": cudnn, "copy": lambda: into.copy_(source)}
    moved["copy"] = 2 * source.nbytes
    return timed("read", k, sides, moved, errors, steps, repeats)


def writes(k: Tensor, v: Tensor, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Time the kernel and plain torch writing 4 bits, keys rotated."""
    pair = codecs(k.shape[3], *SIDES["int4"])
    fields = blank(k, pair[0]), blank(v, pair[1])
    sides: dict[str, Call] = {
        "int4": lambda: kernel.write(k, v, *fields, **forms(pair)),
        "torch": lambda: (pair[0].encode(k), pair[1].encode(v)),
    }
    moved = k.nbytes + v.nbytes + sum(f.nbytes for held in fields for f in held)
    return timed("write", k, sides, dict.fromkeys(sides, moved), {}, steps, repeats)


def timed(
    what: str,
    k: Tensor,
    sides: dict[str, Call],
    moved: dict[str, int],
    errors: dict[str, float],
    steps: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds of one call of each side, taking turns, as rows."""
    runs = {side: graph(call, steps) if k.is_cuda else many(call, steps) for side, call in sides.items()}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for run in runs.values():
        clock(run)
    for _ in range(repeats):
        for side, run in runs.items():
            found[side].append(clock(run) / steps)
    peer = spread(found["cudnn" if what == "read" else "torch"]).median
    return [
        {
            "what": what, "batch": k.shape[0], "tokens": k.shape[2], "side": side, "us": spread(seconds).median * 1e6,
            "TB/s": moved[side] / spread(seconds).median / 1e12, "times the peer": peer / spread(seconds).median,
            "error": errors.get(side), "bytes": moved[side], "seconds": vars(spread(seconds)),
        }
        for side, seconds in found.items()
    ]  # fmt: skip
