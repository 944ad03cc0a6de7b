"""Algorithms as cascades of Einsums: how often each has to traverse a rank, what it holds, moves and computes.

Source: FuseMax (2406.10491); its formal rule for passes is inferred. Sizes are of one batch row and head, in elements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from regard.core.errors import RegardError

Kind = Literal["multiply", "max", "add", "exp", "divide"]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Einsum:
    """One named tensor, and the tensors it is computed from.

    Args:
        name: of the tensor.
        ranks: its ranks; those of its inputs that it lacks are reduced.
        inputs: names of tensors.
        kind: what is done at every point of the ranks of inputs and output.
        array: whether the two-dimensional array of the cost model does it, or the one-dimensional one.
        running: a running value along its last rank: it reads itself one step before, and is read as far as it got.
    """

    name: str
    ranks: tuple[str, ...]
    inputs: tuple[str, ...]
    kind: Kind
    array: Literal[1, 2] = 2
    running: bool = False


@dataclass(frozen=True)
class Cascade:
    """Einsums in order, over named inputs.

    Args:
        inputs: name -> ranks.
        einsums: each reads inputs and earlier ones; the last one is the result.
        parts: rank -> the ranks it is split into, slowest first; sizes are given for the parts.

    Raises:
        RegardError: an Einsum reads what is not there yet (a cycle), or a name is used twice.
    """

    inputs: Mapping[str, tuple[str, ...]]
    einsums: tuple[Einsum, ...]
    parts: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        known = set(self.inputs)
        names = {e.name for e in self.einsums}
        for e in self.einsums:
            if e.name in known:
                raise RegardError(f"tensor {e.name!r} of the cascade is named twice")
            for name in set(e.inputs) - known:
                why = "is computed later: a cycle" if name in names else "is no tensor of the cascade"
                raise RegardError(f"Einsum {e.name!r} reads {name!r}, which {why}")
            known.add(e.name)

    @cached_property
    def ranks(self) -> dict[str, tuple[str, ...]]:
        """Every tensor's ranks."""
        return {**self.inputs, **{e.name: e.ranks for e in self.einsums}}

    def passes(self, rank: str) -> int:
        """How often `rank` has to be traversed: one more than the longest chain of reductions that are fed back.

        A full reduction closes a pass where it feeds an Einsum that reads again a fibre of the rank which the reduction
        depended on. Running values close nothing.

        Raises:
            RegardError: no tensor has the rank.
        """
        return max(self._when(rank).values())

    def live_elements(self, sizes: Sizes, rank: str) -> int:
        """The most elements that must be held while `rank` is traversed, a step at a time.

        Inputs without the rank, running values (one step of them), reductions, and fibres of the rank that a later pass
        reads again. Elements of one step are not counted, nor a result that is made when the traversal is over.

        Raises:
            RegardError: an unknown rank, or one without a size.
        """
        when, last = self._when(rank), self._last(rank)
        running = {e.name: e.ranks[-1] for e in self.einsums if e.running}
        begun = dict(when)
        for e in self.einsums:
            steps = [name for name in e.inputs if self._along(self.ranks[name], rank) and name not in running]
            begun[e.name] += not steps
        most = 0
        for now in range(1, max(when.values()) + 1):
            fixed, entering, leaving = 0, 0, 0
            for name, ranks in self.ranks.items():
                if name in running and when[name] == now:
                    fixed += self._size([r for r in ranks if r != running[name]], sizes)
                elif not self._along(ranks, rank):
                    fixed += self._size(ranks, sizes) * (begun[name] <= now <= last[name])
                elif name not in self.inputs and name not in running:
                    entering += self._size(ranks, sizes) * (when[name] < now <= last[name])
                    leaving += self._size(ranks, sizes) * (when[name] <= now < last[name])
            # What a step reads for the last time makes room for what it writes.
            most = max(most, fixed + max(entering, leaving))
        return most

    def traffic(self, sizes: Sizes, rank: str, spill: bool = False) -> dict[str, int]:
        """Elements moved from and to memory, by tensor: inputs once a pass that reads them, the result once.

        Args:
            sizes: of all ranks.
            rank: the one that is traversed.
            spill: fibres that a later pass reads again are written to memory and read from there, not held.

        Raises:
            RegardError: as `live_elements`.
        """
        when, moved = self._when(rank), {}
        readers = {name: {when[e.name] for e in self.einsums if name in e.inputs} for name in self.ranks}
        for name, ranks in self.inputs.items():
            again = len(readers[name]) if self._along(ranks, rank) else 1
            moved[name] = self._size(ranks, sizes) * again
        for e in self.einsums[:-1]:
            later = {at for at in readers[e.name] if at > when[e.name]}
            if spill and later and not e.running and self._along(e.ranks, rank):
                moved[e.name] = self._size(e.ranks, sizes) * (1 + len(later))
        result = self.einsums[-1]
        return {**moved, result.name: self._size(result.ranks, sizes)}

    def operations(self, sizes: Sizes) -> dict[str, int]:
        """How many of each kind: points of the ranks of an Einsum's inputs and output, summed.

        Raises:
            RegardError: a rank without a size.
        """
        counts: dict[str, int] = {}
        for e in self.einsums:
            counts[e.kind] = counts.get(e.kind, 0) + self._points(e, sizes)
        return counts

    def cycles(self, sizes: Sizes, width: int = 256) -> tuple[float, float]:
        """Cycles of the `width` x `width` array and of the row of `width`: the paper's machine needs the larger one.

        An exponential takes seven operations (six multiply-adds and an addition), everything else one.

        Raises:
            RegardError: a rank without a size.
        """
        busy = {1: 0, 2: 0}
        for e in self.einsums:
            busy[e.array] += self._points(e, sizes) * (7 if e.kind == "exp" else 1)
        return busy[2] / width**2, busy[1] / width

    def seconds(
        self, sizes: Sizes, rank: str, *, rate: float, bandwidth: float, size: int = 2, spill: bool = False
    ) -> tuple[float, str]:
        """The roofline: the time it takes at least, and what bounds it ("compute" or "memory").

        Args:
            sizes: of all ranks.
            rank: the one that is traversed.
            rate: operations a second; an exponential counts as seven.
            bandwidth: bytes a second.
            size: bytes an element.
            spill: as `traffic` takes it.

        Raises:
            RegardError: as `live_elements`.
        """
        work = sum(n * (7 if kind == "exp" else 1) for kind, n in self.operations(sizes).items()) / rate
        moved = sum(self.traffic(sizes, rank, spill).values()) * size / bandwidth
        return max(work, moved), "compute" if work >= moved else "memory"

    def _along(self, ranks: tuple[str, ...], rank: str) -> bool:
        return not {rank, *self.parts.get(rank, ())}.isdisjoint(ranks)

    def _when(self, rank: str) -> dict[str, int]:
        """The pass in which every tensor is complete."""
        if not any(self._along(ranks, rank) for ranks in self.ranks.values()):
            known = sorted({r for ranks in self.ranks.values() for r in ranks} | set(self.parts))
            raise RegardError(f"unknown rank {rank!r} of the cascade; known: {', '.join(known)}")
        # The fibres along the rank that each tensor was made of, itself included.
        fibres = {name: {name} if self._along(ranks, rank) else set() for name, ranks in self.inputs.items()}
        when = dict.fromkeys(self.inputs, 1)
        for e in self.einsums:
            read = [name for name in e.inputs if self._along(self.ranks[name], rank)]
            again = set().union(*(fibres[name] for name in read))
            reduced = [name for name in e.inputs if name not in read]
            closed = [when[name] + 1 for name in reduced if fibres[name] & again]
            when[e.name] = max([when[name] for name in e.inputs] + closed)
            fibres[e.name] = set().union(*(fibres[name] for name in e.inputs))
            if self._along(e.ranks, rank):
                fibres[e.name] |= {e.name}
        return when

    def _last(self, rank: str) -> dict[str, int]:
        """The pass in which every tensor is read for the last time; the result stays."""
        when = self._when(rank)
        last = dict(when)
        for e in self.einsums:
            for name in e.inputs:
                last[name] = max(last[name], when[e.name])
        return {**last, self.einsums[-1].name: max(when.values())}

    def _points(self, e: Einsum, sizes: Sizes) -> int:
        # Of running values an Einsum outside their loop reads the last step only.
        made = {e.name: e for e in self.einsums}
        ranks = dict.fromkeys(e.ranks)
        for name in e.inputs:
            own = self.ranks[name]
            ended = name in made and made[name].running and own[-1] not in e.ranks
            ranks |= dict.fromkeys(own[:-1] if ended else own)
        return self._size(ranks, sizes)

    def _size(self, ranks: "tuple[str, ...] | list[str] | dict[str, None]", sizes: Sizes) -> int:
        for r in ranks:
            if r not in sizes:
                raise RegardError(f"rank {r!r} has no size; sizes are given for {', '.join(sizes)}")
        return math.prod(sizes[r] for r in ranks)
