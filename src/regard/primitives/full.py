"""The full store: every token that arrived, growing."""

import torch
from torch import Tensor

from regard.core.step import Step
from regard.primitives.buffer import Container, Shown, joined


class Full(Container):
    """Keeps all keys and values. See Container for the arguments."""

    kind = "full"

    def append(self, k: Tensor, v: Tensor, step: Step) -> Shown:
        """Write `k [B, Hk, T, D]`, `v [B, Hk, T, Dv]`; the View shows all arrivals.

        Gradients flow through `k` and `v` of this forward; what was written earlier is detached.
        """
        fields = None
        if not self.place(k, v, step):
            new = self.write(k, v, step)
            if step.start == 0:
                fields = new
            elif torch.is_grad_enabled():
                # Backward would find the buffer's own memory changed by the next append.
                fields = joined(self.buffer.read(), new)
            self.buffer.append(new)
        self.length = step.stop
        positions = None if step.padding is None else step.positions(torch.arange(self.length, device=k.device))
        return self.shown(self.buffer.read() if fields is None else fields, k, v, positions)

    def unfixed(self, step: Step) -> str | None:
        """Why `step` cannot be a fixed step, or None."""
        return None if self.length else "nothing is held yet"

    def _fixed(self, step: Step, rows: int) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
        assert step.at is not None
        slots = self.buffer.slots
        key = f"fixed full {slots}"
        if key not in step.shared:
            slot = step.at.repeat(rows)
            places = None if step.padding is None else step.positions(torch.arange(slots, device=slot.device))
            step.shared[key] = slot, slots, slot + 1, places
        return step.shared[key]

    def passed(self) -> None:
        """A fixed step went by."""
        super().passed()
        self.buffer.size += 1

    def record(self) -> None:
        """Nothing to do: all is kept anyway."""

    def crop(self, length: int) -> None:
        """Forget arrivals from `length` on."""
        self.length = self.checked(length)
        self.buffer.crop(self.length)
