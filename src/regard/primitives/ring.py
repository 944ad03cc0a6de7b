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

    Fixed steps turn the layout: `[sinks | arrival a in slot a % turn]`, so that nothing moves and every slot's arrival
    follows from the last one. All else turns it back first.

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
        self.turned = False
        # Slots of the turned layout, and so the arrivals that it remembers: those that the newest query may need.
        self.turn = self.past + 1

    def append(self, k: Tensor, v: Tensor, step: Step) -> Shown:
        """Write `k [B, Hk, T, D]`, `v [B, Hk, T, Dv]`; the View shows sinks, recent tokens and all of `k`, `v`.

        Gradients flow through `k` and `v` of this forward; what was written earlier is detached.
        """
        self._turn_back()
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
        index = self._sinks(fields[0].device, size)
        tail = width + base - self.base
        self.buffer.replace(tuple(torch.cat((pick(f.detach(), index, 2), f[:, :, tail:]), dim=2) for f in fields))
        self.base = base

    def unfixed(self, step: Step) -> str | None:
        """Why `step` cannot be a fixed step, or None."""
        if self.recording:
            return "a ring records what a crop may bring back"
        if self.turned:
            return None
        padding = 0 if step.padding is None or not self.sink else int(step.padding.max())
        return None if self.length >= max(self.sink + padding, 1) else f"the first {self.sink} tokens are not all there"

    def fix(self, spare: int) -> int | None:
        """Turn the layout, which has room for any number of arrivals."""
        if self.turned:
            return None
        if not self.buffer.size:
            # Without a past, the next token is all there will be.
            self.buffer.reserve(self.turn)
            self.buffer.size = self.turn
        device = self.buffer.fields[0].device
        slots, width = torch.arange(self.turn, device=device), self._width()
        last = self.length - 1
        recent = (last - (last - slots) % self.turn - self.base + width).clamp(min=0)[None]
        index = self._sinks(device, self.length - self.base + width)
        index = torch.cat((index, recent.expand(len(index), -1)), dim=1)
        fields = tuple(pick(field, index, 2) for field in self.buffer.read())
        self.buffer.replace(fields)
        self.base, self.turned = max(self.base, self.length - self.past), True
        return None

    def _turn_back(self) -> None:
        """Sinks and consecutive arrivals again, as `append` and `crop` have them."""
        if not self.turned:
            return
        base = max(self.length - self.past, 0)
        device = self.buffer.fields[0].device
        recent = self.sink + torch.arange(base, self.length, device=device) % self.turn
        kept = torch.arange(self.sink if base else 0, device=device)
        self.buffer.replace(tuple(field.index_select(2, torch.cat((kept, recent))) for field in self.buffer.read()))
        self.base, self.turned = base, False

    def _fixed(self, step: Step, rows: int) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
        assert step.at is not None
        key = f"fixed ring {self.sink} {self.turn}"
        if key not in step.shared:
            at, device = step.at, step.at.device
            slot = self.sink + at % self.turn
            recent = at - (at - torch.arange(self.turn, device=device)) % self.turn
            sinks = torch.arange(self.sink, device=device)[None]
            padding = 0 if step.padding is None else step.padding[:, None]
            sinks = torch.where(sinks + padding < at - self.past, sinks, -1)
            places = torch.cat((sinks, step.positions(recent)), dim=1)
            step.shared[key] = slot.repeat(rows), self.sink + self.turn, None, places
        return step.shared[key]

    def passed(self) -> None:
        """A fixed step went by."""
        super().passed()
        self.base = max(self.base, self.length - self.past)

    def _sinks(self, device: torch.device, size: int) -> Tensor:
        """Where the sinks lie among the `size` slots of the layout that is not turned, `[1|B, sink]`."""
        padding = self.state.get("padding", torch.zeros(1, dtype=torch.long)).to(device)[:, None]
        slots = torch.arange(self.sink, device=device)[None]
        arrivals = slots + padding
        # Clamped entries are sinks that are not yet evicted, or not yet there: they do not count.
        return torch.where(arrivals < self.base, slots, arrivals - self.base + self._width()).clamp(max=size - 1)

    def record(self) -> None:
        """Keep everything from now on until the next `crop`."""
        self._turn_back()
        self.recording = True

    def crop(self, length: int) -> None:
        """Forget arrivals from `length` on, stop recording and give back what recording took.

        Raises:
            RegardError: what is needed before `length` was already evicted.
        """
        length = self.checked(length)
        self._turn_back()
        self.length = length
        self.recording = False
        self.buffer.crop(self._width() + self.length - self.base)
        if self.buffer.size > (self.buffer.limit or 0):
            self._evict(self.buffer.read())

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self.base = 0
        self.recording = self.turned = False

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        return max(self.length - self.base - self.past, 0) if self.base else self.length
