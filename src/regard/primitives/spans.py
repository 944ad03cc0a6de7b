"""Runs of tokens by position: checked, found in flags, and as rectangles of a Pattern."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.rules import Pair, Rule

Span = tuple[int, int]
# Past every position, and still a number that int32 holds.
END = 2**31 - 1


def ordered(what: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """`spans` as `(start, stop)` pairs in order of position.

    Args:
        what: a span is called in errors.
        spans: of positions, `stop` not included; empty ones are allowed.

    Raises:
        RegardError: a span that is no pair of whole numbers `0 <= start <= stop`, or two that overlap.
    """
    found = []
    for span in spans:
        pair = tuple(span)
        if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
            raise RegardError(f"a span of {what} is (start, stop) in whole numbers, got {pair}")
        if not 0 <= pair[0] <= pair[1]:
            raise RegardError(
                f"a span of {what} needs 0 <= start <= stop, got {pair}; positions count from a row's first real token"
            )
        found.append(pair)
    found.sort()
    for before, after in pairwise(found):
        if after[0] < before[1]:
            raise RegardError(f"spans {before} and {after} of {what} overlap")
    return tuple(found)


def runs(flags: Tensor) -> list[Span]:
    """The spans in which `flags`, bool `[T]`, is True."""
    edges = torch.diff(flags.int(), prepend=flags.new_zeros(1).int(), append=flags.new_zeros(1).int())
    return list(zip((edges > 0).nonzero()[:, 0].tolist(), (edges < 0).nonzero()[:, 0].tolist(), strict=True))


def touches(low: Tensor, high: Tensor, span: Span) -> Tensor:
    """Whether any of positions `low..high` lies in `span`, elementwise."""
    return (low < span[1]) & (high >= span[0])


@dataclass(frozen=True)
class Rectangle(Rule):
    """Queries in `rows` see keys in `keys`, on both sides of the diagonal."""

    rows: Span
    keys: Span

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether queries at `q` see keys at `k`, elementwise."""
        return (q >= self.rows[0]) & (q < self.rows[1]) & (k >= self.keys[0]) & (k < self.keys[1])

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        """Whether any, and whether all pairs of positions `q_low..q_high` and `k_low..k_high` are allowed."""
        every = self(q_low, k_low) & self(q_high, k_high)
        return touches(q_low, q_high, self.rows) & touches(k_low, k_high, self.keys), every

    def __repr__(self) -> str:
        (a, b), (c, d) = self.rows, self.keys
        return f"{a}..{b - 1} see {f'{c}..{d - 1}' if d < END else f'all from {c}'}"


def rectangle(rows: Span, keys: Span) -> Pattern:
    """The two-sided Pattern in which queries of `rows` see keys of `keys`, and no others see anything."""
    return Pattern((Rectangle(rows, keys),), cut=False)
