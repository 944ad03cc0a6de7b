"""Stream-K: the key tiles of all outputs in one line, cut into equal intervals, one a worker (2405.10480).

An output is one KV head of one request: all its query rows read the same keys, once. The line holds request after
request, in it head after head, in it the tiles of the head's keys, and intervals begin and end anywhere. Softmax is
associative over keys (`merge`), so whoever holds pieces of an output joins them. An output without keys still takes one
tile, so that someone writes its 0. Everything but `pieces` and what is read from it is computed where `lengths` lies:
lengths may grow between the replays of a CUDA graph, and nothing waits for the device.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.errors import RegardError


class Piece(NamedTuple):
    """Tiles `start..stop-1` of one output, of `tiles` in all, which one worker reads in one go."""

    worker: int
    request: int
    head: int
    start: int
    stop: int
    tiles: int

    @property
    def whole(self) -> bool:
        """Whether this is all of its output, so that nothing is to be joined."""
        return self.stop - self.start == self.tiles


@dataclass(frozen=True, eq=False)
class WorkList:
    """Which tiles every worker reads; built by `plan`.

    Args:
        lengths: keys of each request, `[B]` integers on any device.
        heads: KV heads of each request.
        tile: keys in a tile.
        workers: intervals, however many tiles there are.
    """

    lengths: Tensor
    heads: int
    tile: int
    workers: int

    @property
    def tiles(self) -> Tensor:
        """Tiles of one output of each request, `[B]`, at least 1."""
        return (self.lengths.clamp(min=1) + self.tile - 1) // self.tile

    @property
    def total(self) -> Tensor:
        """Tiles in the line, 0-d."""
        return self.heads * self.tiles.sum()

    @property
    def bounds(self) -> Tensor:
        """`[workers + 1]`: worker w reads tiles `bounds[w]..bounds[w + 1] - 1` of the line.

        With `most = ceil(total / workers)`, the first `total - (most - 1) workers` read `most` tiles, others one less.
        """
        most = (self.total + self.workers - 1) // self.workers
        longer = self.total - (most - 1) * self.workers
        worker = torch.arange(self.workers + 1, device=self.lengths.device)
        return worker * (most - 1) + torch.minimum(worker, longer)

    def locate(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Request, head and tile of that head's keys, for `places` in the line, of any shape."""
        tiles = self.tiles
        ends = (self.heads * tiles).cumsum(0)
        request = torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)
        within = places - (ends - self.heads * tiles)[request]
        return request, within // tiles[request], within % tiles[request]

    def pieces(self) -> list[Piece]:
        """The intervals, cut where outputs end: by worker, then in order. Reads `lengths`."""
        tiles, bounds, found = self.tiles.tolist(), self.bounds.tolist(), []
        outputs = [(b, h, count) for b, count in enumerate(tiles) for h in range(self.heads)]
        begin, worker = 0, 0
        for request, head, count in outputs:
            start = 0
            while start < count:
                while bounds[worker + 1] <= begin + start:
                    worker += 1
                stop = min(count, bounds[worker + 1] - begin)
                found.append(Piece(worker, request, head, start, stop, count))
                start = stop
            begin += count
        return found

    @property
    def makespan(self) -> int:
        """Tiles that the busiest worker reads. Reads `lengths`."""
        return int(self.bounds.diff().amax())


def plan(lengths: Tensor | Sequence[int], heads: int, tile: int, workers: int) -> WorkList:
    """The work list for requests of `lengths` keys, `[B]`, and `heads` KV heads each.

    Raises:
        RegardError: no request, lengths that are not whole numbers or (on a CPU, where they are read) negative, or
            `heads`, `tile` or `workers` below 1.
    """
    for name, value in (("heads", heads), ("tile", tile), ("workers", workers)):
        if value < 1:
            raise RegardError(f"a work list needs {name} of 1 or more, got {value}")
    lengths = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
    if lengths.dim() != 1 or not len(lengths) or lengths.dtype not in (torch.int32, torch.int64):
        raise RegardError(f"lengths must be whole numbers [B], B at least 1, got {list(lengths.shape)} {lengths.dtype}")
    if lengths.device.type == "cpu" and bool((lengths < 0).any()):
        raise RegardError(
            f"request {int((lengths < 0).nonzero()[0])} has {int(lengths.amin())} keys; lengths are 0 or more"
        )
    return WorkList(lengths.long(), heads, tile, workers)


def fixed_split(work: WorkList, splits: int) -> int:
    """Makespan where every output is cut into `splits` equal pieces instead (flash-decoding), 1: one worker an output.

    Pieces are given out longest first, each to the worker that is free first. Reads `lengths`.

    Raises:
        RegardError: `splits < 1`.
    """
    if splits < 1:
        raise RegardError(f"an output is cut into 1 piece or more, got {splits}")
    sizes = [
        size
        for count in work.tiles.tolist()
        for size in [-(-(count - s) // splits) for s in range(min(splits, count))] * work.heads
    ]
    loads = [0] * work.workers
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads)
