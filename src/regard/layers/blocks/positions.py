"""Where a token stands: counting without padding."""

import torch
from torch import Tensor

from regard.primitives.memory import Memory


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
