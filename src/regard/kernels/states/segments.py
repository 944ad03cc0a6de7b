"""Cutting few long sequences into segments, so that every multiprocessor has work.

A segment is carried from a zero state first; `join` then gives each the state it really begins with:
`S' = 2^total S + S_local`, or `S' = M S + S_local` for the delta rule, whose decay is a matrix.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from regard.kernels.device import keep_for_graphs

# Anchors (see gates.py) lie this many chunks apart, and segments and sequences begin at one.
EVERY = 4
# Programs wanted for each multiprocessor: two run at once and hide each other's latency.
WAVES = 2


class Segments:
    """`table [n, 4]` int32 on the device: batch row, first token, end, first chunk; `offsets [N + 1]` by sequence."""

    def __init__(self, spans: Sequence[tuple[int, int, int]], chunk: int, length: int, device: torch.device) -> None:
        rows, offsets, chunks = [], [0], 0
        for batch, start, end in spans:
            for begin in range(start, max(end, start + 1), length):
                stop = min(begin + length, end)
                rows.append((batch, begin, stop, chunks))
                chunks += -(-(stop - begin) // (chunk * EVERY)) * EVERY
            offsets.append(len(rows))
        self.table = torch.tensor(rows, dtype=torch.int32).to(device)
        self.offsets = torch.tensor(offsets, dtype=torch.int32).to(device)
        self.count, self.sequences, self.chunks = len(rows), len(spans), chunks
        self.longest = -(-max(stop - begin for _, begin, stop, _ in rows) // chunk)


def cut(spans: tuple[tuple[int, int, int], ...], chunk: int, programs: int | None, device: torch.device) -> Segments:
    """Segments of `spans` (batch row, start, end), each of which is worked on by `programs` programs.

    Sequences are cut where they alone would leave multiprocessors idle, into pieces of at least 16 chunks; never where
    `programs` is None. The first call for some spans copies a table to the device and waits for it.
    """
    return keep_for_graphs(_cut(spans, chunk, programs, device), device)


@functools.lru_cache(maxsize=64)
def _cut(spans: tuple[tuple[int, int, int], ...], chunk: int, programs: int | None, device: torch.device) -> Segments:
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    longest = max(end - start for _, start, end in spans)
    tokens = sum(end - start for _, start, end in spans)
    pieces = WAVES * cores // (programs * len(spans)) if programs else 1
    unit = chunk * EVERY
    if pieces < 2:
        return Segments(spans, chunk, max(longest, 1), device)
    return Segments(spans, chunk, max(-(-tokens // (pieces * len(spans) * unit)) * unit, 4 * unit), device)


@triton.jit
def join(
    LOCAL, PASSED, BEGIN, FIRST, LAST, OFFSETS, sf, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MATRIX: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state each segment of one sequence begins with, `BLOCK` of its columns; FIRST may be None.

    LOCAL, BEGIN `[n, heads, DIM, COLUMNS]`; PASSED `[n, heads, DIM]`, or `[n, heads, DIM, DIM]` (transposed backwards).
    """
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dims, columns = tl.arange(0, DIM), block * BLOCK + tl.arange(0, BLOCK)
    here = dims[:, None] * COLUMNS + columns[None, :]
    S = tl.zeros((DIM, BLOCK), tl.float32)
    if FIRST is not None:
        S = tl.load(FIRST + sequence * sf[0] + head * sf[1] + dims[:, None] * sf[2] + columns[None, :] * sf[3])
        S = S.to(tl.float32)
    low, high = tl.load(OFFSETS + sequence), tl.load(OFFSETS + sequence + 1)
    for i in range(low, high):
        n = (low + high - 1 - i if REVERSE else i) * heads + head
        tl.store(BEGIN + n.to(tl.int64) * DIM * COLUMNS + here, S)
        local = tl.load(LOCAL + n.to(tl.int64) * DIM * COLUMNS + here)
        if MATRIX:
            spot = dims[:, None] + dims[None, :] * DIM if REVERSE else dims[:, None] * DIM + dims[None, :]
            S = tl.dot(tl.load(PASSED + n.to(tl.int64) * DIM * DIM + spot), S, input_precision="tf32x3") + local
        else:
            S = S * tl.exp2(tl.load(PASSED + n * DIM + dims))[:, None] + local
    tl.store(LAST + (sequence * heads + head).to(tl.int64) * DIM * COLUMNS + here, S)
