"""Rows in blocks and keys in ranks: what a choice of keys by blocks of rows starts from.

The real keys of a batch row have ranks `0, 1, ...` in order of position, whatever padding or holes lie between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.core.slots import Chosen, Reading
from regard.core.step import Step

FAR = 2**40


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring rows of a forward in `blocks` of one length.

    Args:
        rows: of the forward.
        blocks: how many.
        low, high, stop: `[1|B, blocks]` ranks: a block's rows reach keys from `low` on (and the pattern's sinks),
            its own keys are `high..stop-1`.
        rows_real: `[1|B, rows]` bool, False for padding.
    """

    rows: slice
    blocks: int
    low: Tensor
    high: Tensor
    stop: Tensor
    rows_real: Tensor

    @property
    def length(self) -> int:
        """Rows of a block."""
        return (self.rows.stop - self.rows.start) // self.blocks

    def part(self, start: int, stop: int) -> "Run":
        """Blocks `start..stop-1`."""
        t = self.length
        rows, cut = slice(self.rows.start + start * t, self.rows.start + stop * t), slice(start, stop)
        real = self.rows_real[:, start * t : stop * t]
        return replace(
            self, rows=rows, blocks=stop - start, low=self.low[:, cut], high=self.high[:, cut],
            stop=self.stop[:, cut], rows_real=real,
        )  # fmt: skip

    def queries(self, q: Tensor) -> Tensor:
        """One query a block, `[B, blocks, D]`: its rows' mean over heads and rows, times the root of their number."""
        pooled = q[:, :, self.rows].to(torch.promote_types(q.dtype, torch.float32)).mean(1) * self.rows_real[..., None]
        count = self.rows_real.unflatten(1, (self.blocks, -1)).sum(-1, keepdim=True)
        return pooled.unflatten(1, (self.blocks, -1)).sum(2) / count.clamp(min=1).sqrt()


@dataclass(frozen=True, eq=False)
class Blocks:
    """The rows of a forward: those that read all keys, and runs of blocks that choose.

    Args:
        place: positions of the keys by rank, `[1|B, S]`, `FAR` beyond the last real one.
        order: their slots, `[1|B, S]`.
        whole: rows that read all keys.
        runs: the others.
        sink: first positions that the layer's pattern keeps in reach.
        apart: no mask is needed but inside a block: no padding, nothing missing, a causal pattern.
    """

    place: Tensor
    order: Tensor
    whole: tuple[slice, ...]
    runs: tuple[Run, ...]
    sink: int
    apart: bool

    def keys(self, key: Tensor) -> Tensor:
        """`key [B, Hk, S, D]` averaged over heads, in order of rank: `[B, S, D]`, at least float32."""
        mean = key.to(torch.promote_types(key.dtype, torch.float32)).mean(1)
        return mean if self.apart else mean.take_along_dim(self.order[..., None], 1)

    def slots(self, ranks: Tensor) -> Tensor:
        """`ranks [B, blocks, n]` as slots of the store, -1 as it is."""
        if self.apart:
            return ranks
        flat = ranks.clamp(min=0).flatten(1)
        return self.order.expand(len(flat), -1).gather(1, flat).view_as(ranks).masked_fill(ranks < 0, -1)

    def wholes(self, keys: int, rows: int) -> list[Chosen]:
        """The pieces of `whole`, for `keys` slots that end with the forward's `rows`."""
        pieces = []
        for part in self.whole:
            stop = keys - rows + (part.start if self.apart else part.stop)
            every = torch.arange(stop, device=self.place.device)[None]
            pieces.append(Chosen(part, every[None], own=True) if self.apart else Chosen(part, every))
        return pieces


def cut(reading: Reading, *, budget: int, block: int, dense: int, decode: bool) -> Blocks:
    """Cut the rows of `reading` into blocks, counted from the end of its prompt rows; response rows stand alone.

    Args:
        reading: what the rows read.
        budget: blocks that reach no more keys than this read all of them.
        block: rows of a block.
        dense: last rows of the prompt (of the forward, where its end is unknown) that read all keys.
        decode: False lets response rows read all keys.
    """
    step, rows = reading.step, reading.query.shape[2]
    positions = reading.positions
    place, order = positions.masked_fill(positions < 0, FAR).sort(1)
    known = step.stop if step.prompt is None else step.prompt
    sparse, prompt = _first(reading, known - dense, rows), _first(reading, known, rows)
    short = sparse % block
    spans = [(0, short, short), (short, sparse, block), (prompt, rows, 1 if decode else 0)]
    whole, runs = [slice(sparse, prompt)] * (prompt > sparse), []
    reaches = reading.pattern.reach()
    recent = None if any(r.recent is None for r in reaches) else max(r.recent or 0 for r in reaches)
    sink = 0 if recent is None else max(r.sink for r in reaches)
    queries = step.queries(positions.device)
    for start, stop, length in spans:
        if start == stop or not length:
            whole += [slice(start, stop)] * (stop > start)
            continue
        run = _run(slice(start, stop), (stop - start) // length, queries, place, recent)
        free = (run.stop - run.low + run.low.clamp(max=sink)).amax(0) <= budget
        # Reach only grows, so blocks with room for all of it come first.
        fits = int(free.long().cumprod(0).sum())
        if fits:
            whole.append(run.part(0, fits).rows)
        if fits < run.blocks:
            runs.append(run.part(fits, run.blocks))
    apart = reading.pattern.is_causal and step.rows is None and not bool((positions < 0).any())
    return Blocks(place, order, tuple(_joined(whole)), tuple(runs), sink, apart)


def _first(reading: Reading, bound: int, rows: int) -> int:
    """The first row of the forward whose arrival is `bound` or later, in any batch row."""
    step = reading.step
    if step.rows is None:
        return min(max(bound - step.start, 0), rows)
    late = (step.rows >= bound).any(0).nonzero()[:, 0]
    return int(late[0]) if len(late) else rows


def _run(rows: slice, blocks: int, queries: Tensor, place: Tensor, recent: int | None) -> Run:
    at = queries[:, rows].unflatten(1, (blocks, -1))
    real = at >= 0
    batch = max(len(at), len(place))
    begin, end = at.masked_fill(~real, FAR).amin(-1), at.amax(-1)
    begin, end, place = (x.expand(batch, -1).contiguous() for x in (begin, end, place))
    stop = torch.searchsorted(place, end, right=True)
    high = torch.minimum(torch.searchsorted(place, begin), stop)
    low = torch.zeros_like(high)
    if recent is not None:
        low = torch.minimum(torch.searchsorted(place, begin - recent, right=True), high)
    return Run(rows, blocks, low, high, stop, real.flatten(1))


def _joined(parts: Sequence[slice]) -> list[slice]:
    """`parts` in order, neighbours as one."""
    found: list[slice] = []
    for part in sorted(parts, key=lambda part: part.start):
        if found and found[-1].stop == part.start:
            found[-1] = slice(found[-1].start, part.stop)
        else:
            found.append(part)
    return found


def edges(starts: Tensor, place: Tensor, step: Step) -> Tensor:
    """Ranks where chunks begin and the last one ends, `[1|B, C + 1]`, from `starts [1|B, stop]` by arrival.

    Args:
        starts: what was decided for every arrival.
        place: positions of the keys by rank, as `Blocks.place`.
        step: the forward.
    """
    real = place < FAR
    shift = 0 if step.padding is None else step.padding.to(place.device)[:, None]
    at = (place + shift).clamp(max=starts.shape[1] - 1)
    batch = max(len(at), len(starts))
    begins = starts.expand(batch, -1).gather(1, at.expand(batch, -1)) & real
    begins[:, 0] = True
    count = real.sum(1, keepdim=True)
    ranks = torch.where(begins, torch.arange(place.shape[1], device=place.device), count).sort(1).values
    return torch.cat((ranks[:, : int(begins.sum(1).max())], count.expand(batch, -1)), 1)
