"""Tokens of a row that see each other both ways: what of a mask no `Pattern` says, since it differs by row."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from regard.core.errors import RegardError


class TwoSided(NamedTuple):
    """Positions `start` to `stop - 1` of batch row `row` see those of them that come later."""

    row: int
    start: int
    stop: int


def checked(spans: Sequence[tuple[int, int, int]], rows: int) -> tuple[TwoSided, ...]:
    """`spans` of a batch of `rows`, in order.

    Raises:
        RegardError: one is no three whole numbers, is outside the batch, over padding or empty; two overlap.
    """
    found = []
    for span in spans:
        if len(span) != 3 or any(isinstance(n, bool) or not isinstance(n, int) for n in span):
            raise RegardError(f"a two-sided span is (row, start, stop) in whole numbers, got {tuple(span)}")
        one = TwoSided(*span)
        if not 0 <= one.row < rows:
            raise RegardError(f"{one} is of row {one.row}, and the batch has rows 0 to {rows - 1}")
        if not 0 <= one.start < one.stop:
            raise RegardError(
                f"{one} needs 0 <= start < stop; positions count from a row's first real token, below 0 is padding"
            )
        found.append(one)
    found.sort()
    for before, after in pairwise(found):
        if before.row == after.row and after.start < before.stop:
            raise RegardError(f"{before} and {after} overlap; make one span of what sees each other")
    return tuple(found)


def later(spans: Sequence[TwoSided], q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Which keys queries see ahead of themselves: bool `[B, 1|Hk, T, S]`.

    Args:
        spans: of the batch.
        q_positions: `[B, T]`.
        k_positions: `[1|B, S]` or `[1|B, Hk, S]`.
    """
    last = q_positions.clone()
    for row, start, stop in spans:
        inside = (q_positions[row] >= start) & (q_positions[row] < stop)
        last[row] = last[row].masked_fill(inside, stop - 1)
    k = (k_positions[:, None] if k_positions.dim() == 2 else k_positions)[:, :, None]
    return (k > q_positions[:, None, :, None]) & (k <= last[:, None, :, None])
