"""What tiles of rows give to every key, from the log-sum-exp: by a kernel where there is one, else in plain torch.

`mass` is the same for a few segments of keys, row by row and with gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.shapes import group_size
from regard.ops.attention import attend
from regard.primitives.columns import tile_mass


def edges(length: int, tiles: int) -> Tensor:
    """Where `tiles` tiles of `length` things begin and end: `[min(tiles, length) + 1]` int64, sizes differ by 1."""
    count = max(min(tiles, length), 1)
    return torch.arange(count + 1) * length // count


def refuses(q: Tensor, k: Tensor, softcap: float | None) -> str | None:
    """Why `totals` runs in plain torch, or None if the kernel does it."""
    if softcap is not None:
        return "the kernel has no softcap"
    from regard.kernels import device

    if reason := device.refuses(q):
        return reason
    from regard.kernels.attention import totals as kernel

    return kernel.refuses(q, k)


def totals(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    tiles: int,
    real: Tensor,
    scale: float,
    first: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities that every key gets, summed over the rows of a tile, and the entropy of these rows, summed.

    Row i stands at arrival `first + i`, sees keys up to its own, and of them the last `window` (None: all).

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `S >= first + T`.
        lse: `[B, H, T]` log-sum-exp of the scores.
        tiles: 1 to T; tile r holds rows `edges(T, tiles)[r]` to `edges(T, tiles)[r + 1] - 1`.
        real: `[1|B, S]` bool by arrival; False: padding, which sees nothing and is not seen.
        scale: of the scores.
        first: arrival of the first row.
        window: keys that a row sees at most.
        softcap: of the scores.
        entropy: whether it is wanted.

    Returns:
        `[B, H, tiles, S]` and `[B, H, tiles]` in nats (None if not wanted), float32 (float64 for float64).
    """
    rows = q.shape[2]
    if refuses(q, k, softcap) is None:
        from regard.kernels.attention import totals as kernel

        seen = real[:, None, first : first + rows]
        known = torch.where(seen, lse, -torch.inf)
        call = {"tiles": tiles, "scale": scale, "first": first, "window": window, "entropy": entropy}
        return kernel.totals(q, k, known, real=real.expand(len(q), -1), **call)
    arrivals = torch.where(real, torch.arange(real.shape[1], device=real.device), -1)
    pattern = Pattern.causal() if window is None else Pattern.window(window)
    places = {"q_positions": arrivals[:, first : first + rows], "k_positions": arrivals}
    call = {"pattern": pattern, "scale": scale, "softcap": softcap, **places}
    mass, spread = tile_mass(q, k, lse, edges=edges(rows, tiles), **call)
    return mass, spread if entropy else None


def mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[Tensor],
    *,
    lse: Tensor | None = None,
    pattern: Pattern | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> Tensor:
    """The share of every row's attention that goes to segments of the keys, with gradients, for losses and tests.

    `exp(lse_s - lse)`, with `lse_s` of attention over the segment alone: no probability is built where a fused
    kernel runs.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`.
        v: `[B, Hk, S, Dv]`; it only says where kernels run, its numbers do not matter.
        segments: bool `[1|B, S]` each; they may overlap.
        lse: `[B, H, T]` of the whole, if it is known.
        pattern: as `attend` takes it; None: causal.
        scale: as `attend` takes it.
        softcap: as `attend` takes it.
        q_positions: as `attend` takes them.
        k_positions: as `attend` takes them, `[1|B, S]`.

    Returns:
        `[B, H, T, n]` float32 (float64 for float64), 0 in rows that see nothing; differentiable once in q and k.

    Raises:
        RegardError: a segment is not bool or of another length, or what `attend` raises.
    """
    group_size(q, k)
    keys = torch.arange(k.shape[2], device=k.device)[None] if k_positions is None else k_positions
    call = {"pattern": pattern, "scale": scale, "softcap": softcap, "q_positions": q_positions}
    if lse is None:
        lse = attend(q, k, v, **call, k_positions=k_positions)[1]
    found = []
    for number, segment in enumerate(segments):
        fits = segment.dtype == torch.bool and segment.ndim == 2 and segment.shape[1] == k.shape[2]
        if not fits or segment.shape[0] not in (1, k.shape[0]):
            raise RegardError(
                f"segment {number} must be bool [1 or {k.shape[0]}, {k.shape[2]}], got {segment.dtype} "
                f"{list(segment.shape)}"
            )
        alone = attend(q, k, v, **call, k_positions=torch.where(segment, keys, -1))[1]
        seen = alone > -torch.inf
        # Rows without a key in the segment would have a gradient of 0 times infinity.
        found.append(torch.where(seen, torch.exp(torch.where(seen, alone - lse, 0.0)), 0.0))
    return torch.stack(found, -1) if found else lse.new_zeros(*lse.shape, 0)
