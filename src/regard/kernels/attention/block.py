"""Exact attention over a `BlockList` on a GPU: forward with lse, and the gradients of q, k and v from both.

Whole blocks run without a line of mask; then come the blocks that are cut. No length, no pattern and no number of
blocks is known to the compiler. `forward.py` and `backward.py` hold the kernels, this file launches them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from regard.core.errors import RegardError
from regard.core.shapes import group_size
from regard.kernels import device
from regard.kernels.attention.arguments import fits, like, lists, on_gluon, spread, three
from regard.kernels.attention.backward import column_gradients, prepare, row_gradients
from regard.kernels.attention.forward import LOG2E, attend_rows
from regard.primitives.block_list import SIZES, BlockList

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (16, 32, 64, 128, 256)
LARGEST = 128  # rows or keys of a block


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: rows and keys of a tile, warps, stages of loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# By kernel, D and whether 16 bits; a block smaller than a tile is one tile. Measured in docs/log.md.
LAUNCHES = {
    "forward": {64: Launch(128, 128, 8, 2), 128: Launch(128, 64, 4, 2), 256: Launch(128, 64, 8, 2)},
    "columns": {64: Launch(64, 128, 8, 2), 128: Launch(64, 64, 4, 2), 256: Launch(32, 64, 8, 1)},
    "rows": {64: Launch(128, 64, 8, 2), 128: Launch(64, 64, 4, 2), 256: Launch(64, 32, 8, 1)},
}
# In float32 products run on plain arithmetic units, and a tile of 128 by 128 would not fit the registers.
EXACT = Launch(32, 32, 4, 1)


def launch(kernel: str, dim: int, dtype: torch.dtype, size: tuple[int, int]) -> Launch:
    """A fixed table, so that nothing is tried at run time."""
    how = EXACT if dtype == torch.float32 else LAUNCHES[kernel][max(dim, 64)]
    return Launch(min(how.rows, size[0]), min(how.keys, size[1]), how.warps, how.stages)


def refuses(q: Tensor, k: Tensor, v: Tensor, *, size: tuple[int, int] = (128, 128)) -> str | None:
    """Why the kernels cannot do this call, or None if they can. `size`: rows and keys of a block."""
    reason = device.refuses(q)
    if reason:
        return reason
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return (
            f"the kernels take q, k, v of one dtype, bfloat16, float16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[3] != v.shape[3] or q.shape[3] not in DIMS:
        known = ", ".join(map(str, DIMS))
        return f"the kernels take D = Dv of {known}, got D = {q.shape[3]} and Dv = {v.shape[3]}"
    if size[0] not in SIZES[0] or size[1] not in SIZES[1]:
        return f"the kernels take blocks of {SIZES[0]} rows by {SIZES[1]} keys, got {size[0]} by {size[1]}"
    if 0 in q.shape or 0 in k.shape:
        return "there is nothing to compute"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the keys that `blocks` shows it, for calls that `refuses` does not refuse.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`.
        v: `[B, Hk, S, D]`.
        blocks: `ceil(T / M)` lists of blocks of `N` keys, for 1 or B batch rows and 1, Hk or H heads. The last
            block of keys, where it is not full, is an entry that is cut.
        scale: of the scores.
        softcap: `s` becomes `softcap * tanh(s / softcap)`.

    Returns:
        out `[B, H, T, D]` in q's dtype and lse `[B, H, T]` float32, 0 and -inf where nothing is seen; differentiable
        once. On Hopper dq adds up in any order, unless `torch.use_deterministic_algorithms` is on.

    Raises:
        RegardError: the list is of other lengths, heads or batch rows than q and k.
    """
    _check(q, k, blocks)
    if scale <= 0:
        q, scale = q * (-1 if scale < 0 else 0), -scale if scale < 0 else 1.0
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Attend.apply(q, k, v, blocks, float(scale), softcap)  # type: ignore[return-value]


def _check(q: Tensor, k: Tensor, blocks: BlockList) -> None:
    group_size(q, k)
    if (blocks.rows, blocks.keys) != (q.shape[2], k.shape[2]) or blocks.by_key:
        way = ", by key" if blocks.by_key else ""
        raise RegardError(
            f"a list by row of {q.shape[2]} rows and {k.shape[2]} keys is needed, got one of {blocks.rows} rows and "
            f"{blocks.keys} keys{way}"
        )
    batch, heads = blocks.count.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, k.shape[1], q.shape[1]):
        raise RegardError(
            f"lists of {batch} batch rows and {heads} heads for {q.shape[0]} rows, {k.shape[1]} key heads and "
            f"{q.shape[1]} query heads"
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float, cap: float | None) -> Any:
        out, lse = forward(q, k, v, blocks, scale, cap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale, ctx.cap = blocks, scale, cap
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        return *backward(q, k, v, out, lse, dout, dlse, ctx.blocks, ctx.scale, ctx.cap, wanted), None, None, None


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of the forward."""
    if on_hopper(q, k, v, blocks, cap):
        from regard.kernels.attention import hopper

        return hopper.forward(q, k, v, blocks, scale, cap)
    (B, H, T, D), S = q.shape, k.shape[2]
    out, lse = like(q), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    how = launch("forward", D, q.dtype, blocks.size)
    bulk = all(map(fits, (q, k, v)))
    described = [bulked(q, how.rows, bulk), bulked(k, how.keys, bulk), bulked(v, how.keys, bulk)]
    attend_rows[(-(-T // how.rows), H, B)](
        *described, out, lse, *lists(blocks), three(q), three(k), three(v), three(out),
        *spread(blocks, H), scale * LOG2E.value, cap, T, S, **settings(q, k, blocks, how, bulk),
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    blocks: BlockList, scale: float, cap: float | None, wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Launch the kernels of the gradients; `wanted`: of q, and of k and v."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    exactly = torch.are_deterministic_algorithms_enabled()
    if all(wanted) and not exactly and on_hopper(q, k, v, blocks, cap) and fits(dout):
        from regard.kernels.attention import hopper_backward

        return hopper_backward.backward(q, k, v, out, lse, dout, dlse, blocks, scale, cap)
    (B, H, T, D), (Hk, S) = q.shape, k.shape[1:3]
    padded = -(-T // LARGEST) * LARGEST
    top, delta = torch.empty(2, B, H, padded, dtype=torch.float32, device=q.device)
    prepare[(padded // 64, H, B)](
        out, dout, lse, dlse, top, delta, three(out), three(dout), T, padded,
        DIM=D, ROWS=64, PACKED=False,
    )  # fmt: skip
    bulk = all(map(fits, (q, k, v, dout)))
    inputs = (q, k, v, dout)
    shared = (scale, scale * LOG2E.value, cap, T, S, padded)
    dq = dk = dv = None
    if wanted[0]:
        dq = like(q)
        how = launch("rows", D, q.dtype, blocks.size)
        row_gradients[(-(-T // how.rows), H, B)](
            *_described(inputs, how, bulk), dq, top, delta, *lists(blocks), *map(three, inputs), three(dq),
            *spread(blocks, H), *shared, **settings(q, k, blocks, how, bulk),
        )  # fmt: skip
    if wanted[1]:
        dk, dv, turned = like(k), like(v), blocks.turned()
        how = launch("columns", D, q.dtype, blocks.size)
        column_gradients[(-(-S // how.keys), Hk, B)](
            *_described(inputs, how, bulk), dk, dv, top, delta, *lists(turned), *map(three, inputs), three(dk),
            three(dv), *spread(turned, H), *shared, **settings(q, k, blocks, how, bulk),
        )  # fmt: skip
    return dq, dk, dv


def on_hopper(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, cap: float | None) -> bool:
    """Whether the kernels written for Hopper alone do this call.

    They take D of 64 and softcaps as well, but have not been checked with those on a card yet.
    """
    return (
        on_gluon(q.device)
        and q.dtype != torch.float32
        and q.shape[3] == 128
        and cap is None
        and blocks.size == (128, 128)
        and all(map(fits, (q, k, v)))
    )


def settings(q: Tensor, k: Tensor, blocks: BlockList, how: Launch, bulk: bool) -> dict[str, Any]:
    """What the compiler knows of a launch."""
    return {
        "DIM": q.shape[3], "M": blocks.size[0], "N": blocks.size[1], "ROWS": how.rows, "KEYS": how.keys,
        "GROUP": q.shape[1] // k.shape[1], "BULK": bulk, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": how.warps, "num_stages": how.stages,
    }  # fmt: skip


def bulked(x: Tensor | None, rows: int, bulk: bool) -> Any:
    """x, or its tensor descriptor in tiles of `rows`."""
    if x is None or not bulk:
        return x
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, rows, x.shape[3]])


def _described(inputs: tuple[Tensor, ...], how: Launch, bulk: bool) -> list[Any]:
    """q, k, v and dout in tiles."""
    rows = (how.rows, how.keys, how.keys, how.rows)
    return [bulked(x, n, bulk) for x, n in zip(inputs, rows, strict=True)]
