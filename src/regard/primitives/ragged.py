"""The ragged store: tokens anywhere in the text, each with its arrival."""

import torch
from torch import Tensor

from regard.core.reach import FOR_EVER, Reach
from regard.core.step import Step
from regard.core.store import Codec
from regard.primitives.buffer import Attend, Container, Shown, joined


class Ragged(Container):
    """Keeps keys and values with their arrivals, `-1` where a batch row had none.

    For layers that run fewer rows than the request brings (skipped depth, dropped tokens), and for reaches with
    holes. `length` is the request's all the same.

    Args:
        reach: what later queries need; the rest is dropped.
    """

    kind = "ragged"

    def __init__(
        self,
        attend: Attend,
        reach: Reach = FOR_EVER,
        key_codec: Codec | None = None,
        value_codec: Codec | None = None,
    ):
        super().__init__(attend, key_codec, value_codec)
        self.reach = reach
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
        if self.reach.recent is not None and not self.recording:
            self._evict(positions, spare=True)
        return shown

    def advance(self, step: Step) -> None:
        """A forward went by of which this layer ran no row."""
        self.length = step.stop

    def _positions(self, arrivals: Tensor) -> Tensor:
        padding = self.state.get("padding")
        positions = arrivals.long() if padding is None else arrivals - padding[:, None]
        return positions.masked_fill(arrivals < 0, -1)

    def _evict(self, positions: Tensor, *, spare: bool) -> None:
        """Drop the slots that no later query of any batch row needs; a slot goes for all rows at once."""
        following = self.length - self.state.get("padding", positions.new_zeros(1))[:, None]
        needed = (positions >= 0) & self.reach.needs(following, positions)
        index = needed.any(0).nonzero()[:, 0]
        self.base = max(self.length - self._past, self.base)
        # Moving everything for every token would cost more than the spare slots do.
        if positions.shape[1] - len(index) <= (max(4, len(index) // 32) if spare else 0):
            return
        kept = tuple(field.index_select(2, index) for field in self.buffer.read())
        # New memory: the View of this forward still reads the old.
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
        elif self.reach.recent is not None:
            self._evict(self._positions(self.state["arrivals"]), spare=False)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        super().reset()
        self.base, self.recording, self.complete = 0, False, True

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        return max(self.length - self.base - self._past, 0) if self.base else self.length

    @property
    def _past(self) -> int:
        """Arrivals before the next one that it may still see wherever they lie."""
        return max((self.reach.recent or 0) - 1, 0)
