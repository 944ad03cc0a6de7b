"""One token of the gated recurrence: read the state once, write it once, read out.

The state is everything: 8 bytes an element, read and written. The correction of the delta rule and the output both
need a product of the old state with a vector, so both are taken from the tile while it is in registers:

    S' = A S,  w = beta (v - [delta] S'^T k),  S <- S' + k w^T,  o = scale (S'^T q + (q . k) w).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.core.shapes import power_of_two
from regard.kernels import device

SMALLEST, LARGEST = 16, 256
TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # elements a program holds; 32 a thread are eight loads of 16 bytes in flight
PER_WARP = 1024
NARROWEST = 16  # columns: less would waste parts of a memory sector pair
PROGRAMS = 264  # two for each multiprocessor of a large card; with fewer, tiles become narrower


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
) -> str | None:
    """Why `step` cannot do this call, or None. Shapes are those of `step` already."""
    if why := device.refuses(q):
        return why
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}
    for name, tensor in given.items():
        if tensor is not None and tensor.dtype not in TYPES:
            return f"the kernel of a step takes float32, bfloat16 and float16; {name} is {tensor.dtype}"
    if state.dtype != torch.float32:
        return f"the kernel of a step keeps the state in float32, not in {state.dtype}"
    if state.stride(-1) != 1 and state.shape[-1] != 1:
        return f"the kernel of a step needs the last dimension of the state to be contiguous; strides {state.stride()}"
    for name, size in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if not SMALLEST <= size <= LARGEST:
            return f"the kernel of a step takes {name} from {SMALLEST} to {LARGEST}, not {size}"
    return None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    delta: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Write one token into `state`, in place, and read it out. Nothing is checked: ask `refuses` first.

    Args:
        q: `[B, Hk, 1, D]`, any strides.
        k: As `q`.
        v: `[B, H, 1, Dv]`; value head h reads key head `h // (H / Hk)`.
        state: `[B, H, D, Dv]` float32, overwritten.
        decay: None, `[H]`, `[B, H, 1]` or `[B, H or Hk, 1, D]`: logarithms, at most 0.
        beta: None or `[B, H, 1]`.
        delta: Whether what the state already holds for this key is taken off before writing.
        scale: Factor of the output.

    Returns:
        `[B, H, 1, Dv]` in the dtype of `v`.
    """
    B, H, _, Dv = v.shape
    D = q.shape[-1]
    width, warps = tile(B * H, D, Dv)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    gate, gate_strides, gate_group = _gate(decay, H)
    grid = (-(-Dv // width) * B * H,)
    _step[grid](
        q, k, v, gate, beta, state, out, scale, H,
        q.stride(0), q.stride(1), q.stride(3),
        k.stride(0), k.stride(1), k.stride(3),
        v.stride(0), v.stride(1), v.stride(3),
        *gate_strides,
        *((0, 0) if beta is None else beta.stride()[:2]),
        state.stride(0), state.stride(1), state.stride(2),
        D=D, DV=Dv, GROUP=H // q.shape[1], GATE_GROUP=gate_group,
        CHANNELS=decay is not None and decay.dim() == 4, DELTA=delta,
        BLOCK_D=power_of_two(D), BLOCK_V=width, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def tile(states: int, D: int, Dv: int) -> tuple[int, int]:
    """Columns of a program's tile, and its warps, for so many states of `D` by `Dv`."""
    rows = power_of_two(D)
    width = max(NARROWEST, min(TILE // rows, power_of_two(Dv)))
    while width > NARROWEST and states * -(-Dv // width) < PROGRAMS:
        width //= 2
    return width, max(1, min(4, rows * width // PER_WARP))


def _gate(decay: Tensor | None, heads: int) -> tuple[Tensor | None, tuple[int, int, int], int]:
    """The gate with its strides by row, head and channel, and how many value heads share one of its heads."""
    if decay is None:
        return None, (0, 0, 0), 1
    if decay.dim() == 1:
        return decay, (0, decay.stride(0), 0), 1
    channel = decay.stride(3) if decay.dim() == 4 else 0
    return decay, (decay.stride(0), decay.stride(1), channel), heads // decay.shape[1]


@triton.jit
def _step(
    q, k, v, decay, beta, state, out, scale, heads,
    q_row, q_head, q_channel,
    k_row, k_head, k_channel,
    v_row, v_head, v_channel,
    decay_row, decay_head, decay_channel,
    beta_row, beta_head,
    state_row, state_head, state_channel,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, GATE_GROUP: tl.constexpr,
    CHANNELS: tl.constexpr, DELTA: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_V` columns of one state. Neighbours hold neighbouring columns, so rows are read whole."""
    blocks = (DV + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % blocks
    which = program // blocks
    row = (which // heads).to(tl.int64)
    head = which % heads

    channels = tl.arange(0, BLOCK_D)
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    real, wide = channels < D, columns < DV
    inside = real[:, None] & wide[None, :]
    held = state + row * state_row + head * state_head + channels[:, None] * state_channel + columns[None, :]
    key_head = head // GROUP

    # All loads stand before the first use of any, so that a program waits for memory once.
    tile = tl.load(held, mask=inside, other=0.0)
    query = tl.load(q + row * q_row + key_head * q_head + channels * q_channel, mask=real, other=0.0)
    key = tl.load(k + row * k_row + key_head * k_head + channels * k_channel, mask=real, other=0.0)
    written = tl.load(v + row * v_row + head * v_head + columns * v_channel, mask=wide, other=0.0)
    if decay is not None:
        gate = decay + row * decay_row + (head // GATE_GROUP) * decay_head
        kept = tl.load(gate + channels * decay_channel, mask=real, other=0.0) if CHANNELS else tl.load(gate)
    if beta is not None:
        strength = tl.load(beta + row * beta_row + head * beta_head)

    query, key, written = query.to(tl.float32), key.to(tl.float32), written.to(tl.float32)
    if decay is not None:
        kept = tl.exp(kept.to(tl.float32))
        tile *= kept[:, None] if CHANNELS else kept
    read = tl.sum(tile * query[:, None], 0)
    if DELTA:
        written -= tl.sum(tile * key[:, None], 0)
    if beta is not None:
        written *= strength.to(tl.float32)

    tl.store(held, tile + key[:, None] * written[None, :], mask=inside)
    read = scale * (read + tl.sum(query * key, 0) * written)
    tl.store(out + (row * heads + head) * DV + columns, read.to(out.dtype.element_ty), mask=wide)
