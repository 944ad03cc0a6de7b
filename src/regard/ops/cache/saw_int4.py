"""Keys and values in 4 (or 8) bits a number, one scale a token and head, keys rotated (SAW-INT4)."""

import math
import warnings
from functools import lru_cache, partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.store import Codec, Fields, Form, Kernels
from regard.kernels import device

CARD = Card(
    title="SAW-INT4: System-Aware 4-Bit KV-Cache Quantization for Real-World LLM Serving",
    arxiv=None,
    sheet=0,
    implements="Per-token, per-head asymmetric INT4 and INT8 with a block-diagonal Hadamard rotation of keys "
    "and optionally values, D/2 (D) + 8 bytes a vector.",
    exact=False,
    saving="memory",
    departures=(
        "lo is stored in place of the zero point -lo/s: the same numbers, safer in fp32.",
        "The default order of the rotation is the largest power of two that divides D, at most 128.",
        "The k-means offset ablation is left out.",
        "NaN or infinite numbers raise on a CPU; elsewhere, where looking would stall every write, they show as NaN.",
        "Gradients pass straight through the rounding.",
    ),
    oracles=(
        "without rounding the rotation leaves logits and outputs unchanged (1e-12, fp64)",
        "order 1 is plain INT4",
        "|z - z'| <= s/2; minimum, maximum and constant vectors come back",
        "pack and unpack round trip",
        "bytes a token and head = D/2 + 8",
        "incremental writes are bit-identical to one batched write",
        "keys with two outlier channels, D = 128: logit RMSE 12.7 plain, 5.3 at order 16, <= 3.5 from order 64",
    ),
    aliases=("sawint4", "int4", "kv_int4"),
    neutral={"key_bits": 16, "value_bits": 16},
    example={"key_bits": 8, "value_bits": 4, "rotate_v": True},
    options={
        "key_bits": Option(
            default=4, choices=(4, 8, 16), search=(4, 8, 16), doc="bits of a key's number; 16: untouched"
        ),
        "value_bits": Option(default=4, choices=(4, 8, 16), search=(4, 8, 16), doc="bits of a value's; 16: untouched"),
        "block": Option(
            default=None,
            optional=True,
            low=1,
            doc="order of the Hadamard rotation, a power of two dividing the head dimension; 1: no rotation; "
            "none: the largest up to 128",
        ),
        "rotate_v": Option(kind="bool", default=False, search=(False, True), doc="rotate values too"),
    },
)


def encode(
    where: Where, *, key_bits: int, value_bits: int, block: int | None, rotate_v: bool
) -> tuple[Codec | None, Codec | None]:
    """Codecs of keys and values; None where stored as they come (16 bits).

    Raises:
        RegardError: bits other than 4, 8 and 16, `block` not a power of two that divides the head
            dimension, or an odd head dimension with 4 bits.
    """
    D = where.head_dim
    rotated = key_bits < 16 or (rotate_v and value_bits < 16)
    if block is not None and block > 1 and not rotated:
        warnings.warn(f"'saw_int4' rotates nothing with these bits; block={block} is ignored", stacklevel=2)
    order = min(128, D & -D) if block is None else block
    if order < 1 or order & (order - 1) or D % order:
        raise RegardError(
            f"option 'block' of 'saw_int4' must be a power of two that divides the head dimension {D}, got {order}; "
            f"the largest is {D & -D}"
        )
    return _codec(key_bits, order, D), _codec(value_bits, order if rotate_v else 1, D)


def _codec(bits: int, order: int, D: int) -> Codec | None:
    if bits == 16:
        return None
    if bits not in (4, 8):
        raise RegardError(f"'saw_int4' writes 4, 8 or 16 bits, got {bits}")
    if bits == 4 and D % 2:
        raise RegardError(f"'saw_int4' packs two 4-bit codes a byte and needs an even head dimension, got {D}")
    rotate = partial(hadamard, order=order)
    return Codec(
        name=f"int{bits}" + (f" hadamard {order}" if order > 1 else ""),
        encode=lambda x: _encode(x, order, bits),
        decode=partial(dequantise, bits=bits),
        query=rotate,
        output=rotate,
        straight=rotate,
        form=Form(bits, order),
        kernels=_kernels,
    )


def _kernels(x: Tensor) -> Kernels | str:
    """What reads and writes these codes on the device of `x`, or why nothing does."""
    if why := device.refuses(x):
        return why
    from regard.kernels.cache import saw_int4

    return saw_int4


def _encode(x: Tensor, order: int, bits: int) -> Fields:
    # On a CPU in slices that stay in its cache: a long prompt is written in about half the time.
    slices = x.split(512, dim=2) if x.device.type == "cpu" else (x,)
    parts = [quantise(_rotated(part, order), bits) for part in slices]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(field, dim=2) for field in zip(*parts, strict=True))


def hadamard(x: Tensor, order: int) -> Tensor:
    """`x [..., D]` times the orthonormal block-diagonal Hadamard matrix of `order`, its own inverse."""
    if order == 1:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ _matrix(x.shape[-1], order, x.device, wide)).to(x.dtype)


def _rotated(x: Tensor, order: int) -> Tensor:
    """`hadamard` for writing, in fp32."""
    # Summed in fp64, fp32 numbers round to the same fp32 number however many tokens are written at once.
    exact = x if order == 1 or x.device.type == "mps" else x.double()
    return hadamard(exact, order).float()


@lru_cache(maxsize=32)
def _matrix(D: int, order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A tensor made in inference mode could not be used under autograd later.
    with torch.inference_mode(False), torch.no_grad():
        signs = torch.ones(1, 1, device=device, dtype=dtype)
        while signs.shape[0] < order:
            signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
        return torch.block_diag(*[signs * order**-0.5] * (D // order))


def quantise(z: Tensor, bits: int) -> Fields:
    """`z [..., D]` as codes, uint8 `[..., D/2]` (4 bits, packed) or `[..., D]` (8), and `(s, lo)`, fp32 `[..., 2]`.

    `lo = min z`, `s = max(max z - lo, 1e-8) / (2^bits - 1)`, `code = floor((z - lo) / s + 1/2)`.

    Raises:
        RegardError: a number is NaN or infinite (checked on a CPU).
    """
    z = z.float()
    lo, hi = z.aminmax(dim=-1, keepdim=True)
    s = (hi - lo).clamp_(min=1e-8).div_(2**bits - 1)
    if z.device.type == "cpu" and z.numel() and not math.isfinite(s.amax()):
        raise RegardError("'saw_int4' was given keys or values that are not finite numbers")
    # Positive numbers are cut to whole ones by the cast.
    codes = (z - lo).div_(s).add_(0.5).to(torch.uint8)
    return (pack(codes) if bits == 4 else codes), torch.cat((s, lo), dim=-1)


def dequantise(fields: Fields, dtype: torch.dtype, bits: int) -> Tensor:
    """`code * s + lo` `[..., D]`, computed in fp32 (fp64 for fp64)."""
    codes, affine = fields
    wide = torch.promote_types(dtype, torch.float32)
    z = (unpack(codes) if bits == 4 else codes).to(wide)
    return z.mul_(affine[..., :1]).add_(affine[..., 1:]).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15 `[..., D]` in bytes `[..., D/2]`: code i low, code i + D/2 high."""
    low, high = codes.chunk(2, dim=-1)
    return torch.add(low, high, alpha=16)


def unpack(packed: Tensor) -> Tensor:
    """The codes `[..., D]` of bytes `[..., D/2]`."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)
