"""SLA's linear part over all tokens, each of q, k, v and the output read or written once.

`sum_products` makes `h = phi(k)^T v` and `z = sum phi(k)` in pieces of the tokens; `read_products`
reads them with phi(q) and adds what the exact part found. Features are computed where they are used and never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.kernels import device
from regard.kernels.states.sweep import dot

FEATURES = ("softmax", "elu", "relu")
SIZES = (16, 32, 64, 128)
ROWS = 128
# Programs wanted: two for each multiprocessor of a large card.
PROGRAMS = 264


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot do this call, or None."""
    if why := device.refuses(q):
        return why
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take q, k, v of one dtype of at most 32 bits, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] not in SIZES or v.shape[3] not in SIZES:
        return f"the kernels take D and Dv of {', '.join(map(str, SIZES))}, got {q.shape[3]} and {v.shape[3]}"
    return None


def linear(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, exact: Tensor, bias: Tensor | None, *, features: str, floor: float
) -> Tensor:
    """`exact + phi(q) h W^T / (phi(q) . z + floor) + bias`, `[B, H, N, Dv]`; no gradients. Nothing is checked."""
    q, k, v, exact = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, exact))
    (B, H, N, D), (Hk, S, Dv) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    kind = FEATURES.index(features)
    precise = q.dtype == torch.float32
    rows = min(ROWS, 32) if precise else ROWS  # three products for one take registers and shared memory
    pieces = max(1, min(-(-S // rows), PROGRAMS // (B * Hk)))
    span = -(-S // (pieces * rows)) * rows
    h = torch.empty(B, Hk, pieces, D, Dv, dtype=torch.float32, device=q.device)
    z = torch.empty(B, Hk, pieces, D, dtype=torch.float32, device=q.device)
    sum_products[(pieces, Hk, B)](
        k, v, h, z, k.stride()[:3], v.stride()[:3], Hk, S, span,
        D=D, DV=Dv, ROWS=rows, KIND=kind, EXACT=precise, num_warps=8, num_stages=1 if precise else 2,
    )  # fmt: skip
    read = (h.sum(2) @ weight.float().mT).to(q.dtype)
    out = torch.empty_like(exact)
    read_products[(-(-N // rows), H, B)](
        q, read, z.sum(2), exact, bias, out, q.stride()[:3], exact.stride()[:3], out.stride()[:3], Hk, N, floor,
        D=D, DV=Dv, ROWS=rows, GROUP=H // Hk, KIND=kind, EXACT=precise, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit
def phi(x, KIND: tl.constexpr):
    """Features of rows `[n, D]`, float32."""
    x = x.to(tl.float32)
    if KIND == 0:
        x = tl.exp(x - tl.max(x, 1)[:, None])
        return x / tl.sum(x, 1)[:, None]
    elif KIND == 1:
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def sum_products(
    K, V, H, Z, sk, sv, heads, tokens, span,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`span` tokens of one head: H `[B, heads, pieces, D, DV]`, Z `[B, heads, pieces, D]`."""
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    piece, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, dims, columns = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, DV)
    h, z = tl.zeros((D, DV), tl.float32), tl.zeros((D,), tl.float32)
    K += batch * sk[0] + head * sk[1]
    V += batch * sv[0] + head * sv[1]
    end = tl.minimum((piece + 1) * span, tokens)
    for start in range(piece * span, end, ROWS):
        at = (start + rows).to(tl.int64)
        ok = at < end
        k = tl.load(K + at[:, None] * sk[2] + dims[None, :], mask=ok[:, None], other=0.0)
        v = tl.load(V + at[:, None] * sv[2] + columns[None, :], mask=ok[:, None], other=0.0)
        b = tl.where(ok[:, None], phi(k, KIND), 0.0)
        z += tl.sum(b, 0)
        h += dot(tl.trans(b.to(v.dtype)), v, PRECISION)
    place = (batch * heads + head) * tl.num_programs(0) + piece
    tl.store(H + place * D * DV + dims[:, None] * DV + columns[None, :], h)
    tl.store(Z + place * D + dims, z)


@triton.jit
def read_products(
    Q, READ, Z, ADDED, BIAS, OUT, sq, sa, so, heads, tokens, floor,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; READ `[B, heads, D, DV]` and Z `[B, heads, D]` belong to `GROUP` heads each."""
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at, dims, columns = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, D), tl.arange(0, DV)
    ok = at[:, None] < tokens
    q = tl.load(Q + batch * sq[0] + head * sq[1] + at[:, None] * sq[2] + dims[None, :], mask=ok, other=0.0)
    added = tl.load(ADDED + batch * sa[0] + head * sa[1] + at[:, None] * sa[2] + columns[None, :], mask=ok, other=0.0)
    place = batch * heads + head // GROUP
    read = tl.load(READ + place * D * DV + dims[:, None] * DV + columns[None, :])
    z = tl.load(Z + place * D + dims)
    a = phi(q, KIND)
    out = dot(a.to(q.dtype), read, PRECISION) / (tl.sum(a * z[None, :], 1) + floor)[:, None] + added.to(tl.float32)
    if BIAS is not None:
        out += tl.load(BIAS + columns).to(tl.float32)[None, :]
    tl.store(
        OUT + batch * so[0] + head * so[1] + at[:, None] * so[2] + columns[None, :],
        out.to(OUT.dtype.element_ty),
        mask=ok,
    )
