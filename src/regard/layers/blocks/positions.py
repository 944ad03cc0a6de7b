"""Where a token stands: counting without padding."""

from typing import Protocol

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives.memory import Memory


class Counted(Protocol):
    """What has seen some tokens of a request."""

    @property
    def seen(self) -> int:
        """Tokens that went by, padding included."""
        ...


def positions(tokens: int, device: torch.device, memory: Memory | None, mask: Tensor | None) -> Tensor:
    """Positions `[1|B, T]` of the next `tokens` of a request, padding not counted; the memory keeps the count.

    Args:
        tokens: T of this forward.
        device: of the answer.
        memory: what the layer remembers, None for a whole sequence.
        mask: `[B, T]` bool, False at padding (whose own position is that of the token before it).
    """
    counted = memory.get("count") if memory is not None else None
    seen = memory.seen if memory is not None else 0
    if mask is None and counted is None:
        return torch.arange(seen, seen + tokens, device=device)[None]
    if mask is None:
        assert counted is not None
        ends = counted + torch.arange(1, tokens + 1, device=device)
    else:
        ends = mask.long().cumsum(1) + (seen if counted is None else counted)
    if memory is not None:
        memory.set("count", ends[:, -1:].clone())
    return ends - 1


def covering(x: Tensor, width: int, memory: Counted | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions `[1|B, seen + T]` of all keys so far, padding not counted and itself -1, for `x [B, T, width]`.

    Raises:
        RegardError: x is of another width, the mask does not cover all keys, or sequences are packed beside either.
    """
    if x.dim() != 3 or x.shape[-1] != width:
        raise RegardError(f"a mixer of width {width} takes [B, T, {width}], got {list(x.shape)}")
    rows, total = x.shape[0], x.shape[1] + (0 if memory is None else memory.seen)
    if cu_seqlens is not None and (memory is not None or mask is not None or rows != 1):
        raise RegardError("packed sequences lie in one row, whole and without padding: no memory, no mask")
    if mask is None:
        return torch.arange(total, device=x.device)[None]
    if mask.dtype != torch.bool or mask.shape != (rows, total):
        raise RegardError(
            f"mask must be bool [{rows}, {total}], all keys so far (True: a token), got {mask.dtype} {list(mask.shape)}"
        )
    return torch.where(mask, mask.long().cumsum(1) - 1, -1)


def same_sequence(cu_seqlens: Tensor, tokens: int) -> Pattern:
    """Pairs of positions in the same packed sequence."""
    number = torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device), right=True)
    return Pattern.predicate(lambda q, k, head: number.to(q.device)[q] == number.to(k.device)[k])
