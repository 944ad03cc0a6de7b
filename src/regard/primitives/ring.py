"""The ring store: the first tokens of every row and the most recent ones, in constant memory."""

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.step import Step
from regard.core.store import Codec, Fields
from regard.primitives.buffer import Attend, Container, Shown, joined, pick


class Ring(Container):
    """Keeps what later queries need: keys with `p_k < sink` or `p_q - p_k < recent`.

    One buffer holds `[sinks | consecutive arrivals base..length-1]`. There are no sinks until the first
    eviction (`base` 0). When the few spare slots are used up, the recent arrivals move down. Sinks are
    real tokens: under left padding each row has its own, and those still among the recent arrivals are
    told from their copy by `base`: a sink slot counts only if its arrival lies before `base`.

    Args:
        sink: first positions of each row to keep, 0 or more.
        recent: positions a query may look back, its own included; 0 or 1 keep no past but the sinks.

    Raises:
        RegardError: `sink` or `recent` is negative.
    """

    kind = "ring"

    def __init__(
        self,
        attend: Attend,
        sink: int,
        recent: int,
        key_codec: Codec | None = None,
        value_codec: Codec | None = None,
    ):
        if sink < 0 or recent < 0:
            raise RegardError(f"a ring needs sink >= 0 and recent >= 0, got sink={sink}, recent={recent}")
        super().__init__(attend, key_codec, value_codec, sink + recent + max(4, (sink + recent) // 32))
        self.sink = sink
        self.past = max(recent - 1, 0)
        self.base = 0
        self.recording = False

    def append(self, k: Tensor, v: Tensor, step: Step) -> Shown:
        """Write `k [B, Hk, T, D]`, `v [B, Hk, T, Dv]`; the View shows sinks, recent tokens and all of `k`, `v`.

        Gradients flow through `k` and `v` of this forward; what was written earlier is detached.
        """
        size = self.buffer.size + k.shape[2]
        fits = self.recording or size <= (self.buffer.limit or 0)
        fields, new = None, None
        if not (fits and self.place(k, v, step)):
            new = self.write(k, v, step)
            if step.start == 0:
                fields = new
            elif torch.is_grad_enabled() or not fits:
                fields = joined(self.buffer.read(), new)
        if step.padding is not None:
            self.state["padding"] = step.padding
        self.length = step.stop
        positions = self._positions(size, step, k.device)
        if fits and new is not None:
            self.buffer.append(new)
        elif not fits and fields is not None:
            self._evict(fields)
        return self.shown(self.buffer.read() if fields is None else fields, k, v, positions)

    def _width(self) -> int:
        return self.sink if self.base else 0

    def _positions(self, size: int, step: Step, device: torch.device) -> Tensor | None:
        """Positions `[1|B, size]` of what is held; None where they are simply consecutive."""
        if self.base == 0 and step.padding is None:
            return None
        # Layers whose rings have the same shape hold the same positions.
        key = f"ring {self._width()} {self.base} {size} {device}"
        if key not in step.shared:
            recent = step.positions(torch.arange(self.base, self.base + size - self._width(), device=device))
            slots = torch.arange(self._width(), device=device)[None]
            padding = 0 if step.padding is None else step.padding.to(device)[:, None]
            sinks = torch.where(slots + padding < self.base, slots, -1)
            step.shared[key] = torch.cat((sinks, recent), dim=1)
        return step.shared[key]

    def _evict(self, fields: Fields) -> None:
        """Keep of `fields`, which reach up to `length`, the sinks and the last `past` arrivals."""
        size, width = fields[0].shape[2], self._width()
        base = max(self.length - self.past, self.base)
        device = fields[0].device
        padding = self.state.get("padding", torch.zeros(1, dtype=torch.long)).to(device)[:, None]
        slots = torch.arange(self.sink, device=device)[None]
        arrivals = slots + padding
        # Clamped entries are sinks that are not yet evicted, or not yet there: they do not count.
        index = torch.where(arrivals < self.base, slots, arrivals - self.base + width).clamp(max=size - 1)
        tail = width + base - self.base
        self.buffer.replace(tuple(torch.cat((pick(f.detach(), index, 2), f[:, :, tail:]), dim=2) for f in fields))
        self.base = base

    def record(self) -> None:
        """Keep everything from now on until the next `crop`."""
        self.recording = True

    def crop(self, length: int) -> None:
        """Forget arrivals from `length` on, stop recording and give back what recording took.

        Raises:
            RegardError: what is needed before `length` was already evicted.
        """
        self.length = self.checked(length)
        self.recording = False
        self.buffer.crop(self._width() + self.length - self.base)
        if self.buffer.size > (self.buffer.limit or 0):
            self._evict(self.buffer.read())

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self.base = 0
        self.recording = False

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        return max(self.length - self.base - self.past, 0) if self.base else self.length
