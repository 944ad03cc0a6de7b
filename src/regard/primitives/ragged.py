"""The ragged store: the rows that a layer ran, each with its arrival, where others passed the layer by."""

import torch
from torch import Tensor

from regard.core.step import Step
from regard.core.store import Codec
from regard.primitives.buffer import Attend, Container, Shown, joined


class Ragged(Container):
    """Keeps the keys and values of the rows it was given, with their arrivals, `-1` where a batch row had none.

    Layers that run fewer rows than the request brings (skipped depth, dropped tokens) have stores of their
    own lengths. `length` is the request's all the same.

    Args:
        sink, recent: as a Ring's: what later queries need. `recent` None: everything.
    """

    kind = "ragged"

    def __init__(
        self,
        attend: Attend,
        sink: int = 0,
        recent: int | None = None,
        key_codec: Codec | None = None,
        value_codec: Codec | None = None,
    ):
        super().__init__(attend, key_codec, value_codec)
        self.sink, self.past = sink, None if recent is None else max(recent - 1, 0)
        # Nothing at or after `base` was ever evicted.
        self.base = 0
        # Whether every arrival so far was given and none evicted: then nobody needs their positions.
        self.complete = True
        self.recording = False

    def append(self, k: Tensor, v: Tensor, step: Step) -> Shown:
        """Write the rows `step.arrivals` of this forward, `k [B, Hk, R, D]`, `v [B, Hk, R, Dv]`.

        Gradients flow through `k` and `v` of this forward; what was written earlier is detached.
        """
        new = self.write(k, v, step)
        self.complete &= step.rows is None and self.buffer.size == self.length
        given = step.arrivals.to(k.device, torch.int32).expand(k.shape[0], -1)
        held = self.state.get("arrivals")
        arrivals = given if held is None else torch.cat((held, given), dim=1)
        fields = joined(self.buffer.read(), new) if self.buffer.fields and torch.is_grad_enabled() else None
        self.buffer.append(new)
        if self.buffer.size == new[0].shape[2]:
            fields = new
        self.length, self.state["arrivals"] = step.stop, arrivals
        if step.padding is not None:
            self.state["padding"] = step.padding.to(k.device)
        positions = self._positions(arrivals)
        known = self.complete and "padding" not in self.state
        shown = self.shown(self.buffer.read() if fields is None else fields, k, v, None if known else positions)
        if self.past is not None and not self.recording:
            self._evict(positions, copied=fields is not None)
        return shown

    def advance(self, step: Step) -> None:
        """A forward went by of which this layer ran no row."""
        self.length = step.stop

    def _positions(self, arrivals: Tensor) -> Tensor:
        padding = self.state.get("padding")
        positions = arrivals.long() if padding is None else arrivals - padding[:, None]
        return positions.masked_fill(arrivals < 0, -1)

    def _evict(self, positions: Tensor, *, copied: bool) -> None:
        """Drop the slots that no later query of any batch row needs; a slot goes for all rows at once."""
        assert self.past is not None
        last = self.length - self.state.get("padding", positions.new_zeros(1))[:, None]
        needed = (positions >= 0) & ((positions < self.sink) | (positions >= last - self.past))
        index = needed.any(0).nonzero()[:, 0]
        self.base = max(self.length - self.past, self.base)
        # Moving everything for every token would cost more than the spare slots do.
        if positions.shape[1] - len(index) <= (0 if copied else max(4, len(index) // 32)):
            return
        kept = tuple(field.index_select(2, index).detach() for field in self.buffer.read())
        # This forward's view still reads the old memory.
        self.buffer.crop(0)
        self.buffer.append(kept)
        self.state["arrivals"] = self.state["arrivals"].index_select(1, index)

    def record(self) -> None:
        """Keep everything from now on until the next `crop`."""
        self.recording = True

    def crop(self, length: int) -> None:
        """Forget arrivals from `length` on.

        Raises:
            RegardError: what is needed before `length` was already evicted.
        """
        self.length, self.recording = self.checked(length), False
        arrivals = self.state.get("arrivals")
        if arrivals is None:
            return
        arrivals = arrivals.masked_fill(arrivals >= self.length, -1)
        kept = (arrivals >= 0).any(0).nonzero()[:, 0]
        size = int(kept[-1]) + 1 if len(kept) else 0
        self.buffer.crop(size)
        self.state["arrivals"] = arrivals[:, :size].contiguous()
        if not size:
            self.state.pop("arrivals")
        elif self.past is not None:
            self._evict(self._positions(self.state["arrivals"]), copied=True)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self.base, self.recording, self.complete = 0, False, True

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        if self.past is None or not self.base:
            return self.length
        return max(self.length - self.base - self.past, 0)
