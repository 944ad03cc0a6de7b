"""The work list of `primitives/work_list.py` as a kernel reads it: nothing is built, each program finds its interval.

Lengths lie on the device and may change between launches: the grid is fixed, no number is read back. `LENGTHS` None
means that all requests have `length` keys.
"""

import triton
import triton.language as tl

BATCH = tl.constexpr(128)  # requests looked at in one go


@triton.jit
def keys(LENGTHS, request, length):
    """Keys of one request, never more than the `length` that there is memory for."""
    held = length
    if LENGTHS is not None:
        held = tl.minimum(tl.load(LENGTHS + request).to(tl.int32), length)
    return held


@triton.jit
def named(NAMED, head):
    """The number of KV head `head` among all of its layer; `NAMED` None: the same."""
    found = head
    if NAMED is not None:
        found = tl.load(NAMED + head).to(tl.int32)
    return found


@triton.jit
def counted(held, TILE: tl.constexpr):
    """Tiles of an output of so many keys."""
    return (tl.maximum(held, 1) + TILE - 1) // TILE


@triton.jit
def tiles(LENGTHS, at, stop, length, TILE: tl.constexpr):
    """Tiles of one output of each of the requests `at`; none from request `stop` on."""
    held = tl.load(LENGTHS + at, mask=at < stop, other=0).to(tl.int32)
    return tl.where(at < stop, counted(tl.minimum(held, length), TILE), 0)


@triton.jit
def before(LENGTHS, stop, length, TILE: tl.constexpr):
    """Tiles of one output of each of the requests before `stop`, summed."""
    if LENGTHS is None:
        found = stop * counted(length, TILE)
    else:
        found = 0
        for begin in range(0, stop, BATCH):
            found += tl.sum(tiles(LENGTHS, begin + tl.arange(0, BATCH), stop, length, TILE))
    return found


@triton.jit
def bound(worker, workers, whole):
    """First tile that `worker` reads of a line of `whole`; its last one lies before that of `worker + 1`."""
    most = (whole + workers - 1) // workers
    return worker * (most - 1) + tl.minimum(worker, whole - (most - 1) * workers)


@triton.jit
def reader(place, workers, whole):
    """The worker that reads tile `place` of the line."""
    most = (whole + workers - 1) // workers
    longer = whole - (most - 1) * workers
    later = longer + (place - longer * most) // tl.maximum(most - 1, 1)
    return tl.where(place < longer * most, place // most, later)


@triton.jit
def locate(LENGTHS, place, batch, length, heads, TILE: tl.constexpr):
    """Of tile `place` of the line: request, head, tile of that head's keys, and tiles of one head of the request."""
    if LENGTHS is None:
        count = counted(length, TILE)
        request = place // (count * heads)
        within = place % (count * heads)
    else:
        request, past, passed = 0, 0, 0
        for begin in range(0, batch, BATCH):
            counts = tiles(LENGTHS, begin + tl.arange(0, BATCH), batch, length, TILE) * heads
            behind = (counts > 0) & (passed + tl.cumsum(counts, 0) <= place)
            request += tl.sum(behind.to(tl.int32))
            past += tl.sum(tl.where(behind, counts, 0))
            passed += tl.sum(counts)
        count = counted(keys(LENGTHS, request, length), TILE)
        within = place - past
    return request, within // count, within % count, count
