"""Which keys later queries may still need."""

from typing import NamedTuple

import torch
from torch import Tensor


class Reach(NamedTuple):
    """When a key at position `p_k` is needed by a query at `p_q`: `p_k < sink`, `p_q - p_k < recent`, or in `phases`.

    `recent` None: for ever. `sink` and `phases` are then without meaning and empty. Of a phase
    `(block, stride, residues)` a key is if the number of its block is one of `residues` modulo `stride`.
    """

    sink: int
    recent: int | None
    phases: "tuple[Phase, ...]" = ()

    @property
    def bounded(self) -> bool:
        """Whether what is needed does not grow with the text."""
        return self.recent is not None and not self.phases

    def needs(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether keys at positions `k` are needed by queries at `q` or later; elementwise, bool."""
        if self.recent is None:
            return torch.ones_like(k, dtype=torch.bool)
        needed = (k < self.sink) | (k > q - self.recent)
        for block, stride, residues in self.phases:
            number = k.div(block, rounding_mode="floor") % stride
            for residue in residues:
                needed = needed | (number == residue)
        return needed

    def may(self, q_low: Tensor, k_low: Tensor, k_high: Tensor) -> Tensor:
        """Whether any key of `k_low..k_high` is needed by a query at `q_low` or a later one."""
        if self.recent is None:
            return torch.ones_like(k_low, dtype=torch.bool)
        may = (k_low < self.sink) | (k_high > q_low - self.recent)
        for phase in self.phases:
            may = may | (chosen_blocks(phase, k_low, k_high)[0] > 0)
        return may

    def __or__(self, other: "Reach") -> "Reach":  # type: ignore[override]
        """The smallest reach that covers both."""
        if self.recent is None or other.recent is None:
            return FOR_EVER
        phases = tuple(sorted({*self.phases, *other.phases}))
        return Reach(max(self.sink, other.sink), max(self.recent, other.recent), phases)

    def __and__(self, other: "Reach") -> "Reach":
        """The smaller of the two: each covers the intersection."""
        return min(self, other, key=Reach._size)

    def _size(self) -> tuple[float, ...]:
        share = sum(len(residues) / stride for _, stride, residues in self.phases)
        return (float("inf"), 0) if self.recent is None else (share, self.sink + self.recent)


Phase = tuple[int, int, tuple[int, ...]]
FOR_EVER = Reach(0, None)


def chosen_blocks(phase: Phase, k_low: Tensor, k_high: Tensor) -> tuple[Tensor, Tensor]:
    """Of the blocks that hold positions `k_low..k_high`: how many are in the phase, and how many there are."""
    block, stride, residues = phase
    before = torch.tensor([sum(r < n for r in residues) for n in range(stride)], device=k_low.device)
    first, last = k_low.div(block, rounding_mode="floor"), k_high.div(block, rounding_mode="floor") + 1

    def chosen(end: Tensor) -> Tensor:
        return end.div(stride, rounding_mode="floor") * len(residues) + before[end % stride]

    return chosen(last) - chosen(first), last - first
