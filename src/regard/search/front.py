"""Pareto dominance, the front, and which of its members deserve a longer look."""

import math
from collections.abc import Sequence

Costs = Sequence[float]


def dominates(a: Costs, b: Costs) -> bool:
    """Whether costs `a` are nowhere larger than `b` and somewhere smaller (all costs: smaller is better)."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(costs: Sequence[Costs]) -> list[int]:
    """Indices of the rows that no other row dominates, in ascending order.

    Of several equal rows only the first is kept; a row holding NaN is never on the front.
    """
    kept: list[int] = []
    # NaN has no place in an order: sorting with it would leave the other rows unsorted too.
    known = [i for i, row in enumerate(costs) if not any(math.isnan(x) for x in row)]
    # In lexicographic order a row can only be dominated by one before it.
    for i in sorted(known, key=lambda i: (tuple(costs[i]), i)):
        row = costs[i]
        if not any(dominates(costs[j], row) or list(costs[j]) == list(row) for j in kept):
            kept.append(i)
    return sorted(kept)


def spread_out(costs: Sequence[Costs], chosen: Sequence[int], count: int) -> list[int]:
    """Extend `chosen` to `count` rows, each time by the row farthest from those chosen (scaled to 0..1)."""
    picked = list(dict.fromkeys(chosen))
    low = [min(column) for column in zip(*costs, strict=True)]
    high = [max(column) for column in zip(*costs, strict=True)]

    def distance(a: Costs, b: Costs) -> float:
        return math.dist(
            [(x - lo) / ((hi - lo) or 1.0) for x, lo, hi in zip(a, low, high, strict=True)],
            [(x - lo) / ((hi - lo) or 1.0) for x, lo, hi in zip(b, low, high, strict=True)],
        )

    while len(picked) < min(count, len(costs)):
        rest = [i for i in range(len(costs)) if i not in picked]
        picked.append(max(rest, key=lambda i: min((distance(costs[i], costs[j]) for j in picked), default=0.0)))
    return picked
