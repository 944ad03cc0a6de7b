"""What one forward pass is, told to every layer and store by the adapter; never guessed from shapes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Step:
    """One forward of `width` new tokens over a request that already holds `start` arrivals.

    Args:
        start: arrivals seen before this forward, in every row.
        width: new tokens `T`.
        batch: rows `B`.
        device: where the new tokens live.
        padding: `[B]` int64 left padding of each row, None when no row is padded.
        prompt: arrivals below this are prompt rows, the others response rows; None: all are prompt.
        shared: scratch that the layers of this forward share ([090], [067]); dropped after it.
    """

    start: int
    width: int
    batch: int
    device: torch.device
    padding: Tensor | None = None
    prompt: int | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Arrivals after this forward."""
        return self.start + self.width

    def positions(self, arrivals: Tensor) -> Tensor:
        """Positions of `arrivals [S]`: `[1, S]`, or `[B, S]` under padding; negative for padding."""
        if self.padding is None:
            return arrivals[None]
        return arrivals[None] - self.padding.to(arrivals.device)[:, None]

    def queries(self, device: torch.device | None = None) -> Tensor:
        """Positions of this forward's own rows, `[1 or B, T]`."""
        return self.positions(torch.arange(self.start, self.stop, device=device or self.device))

    @property
    def response(self) -> Tensor:
        """`[T]` bool: which of the new rows belong to the response."""
        arrivals = torch.arange(self.start, self.stop, device=self.device)
        return arrivals >= self.prompt if self.prompt is not None else torch.zeros_like(arrivals, dtype=torch.bool)
