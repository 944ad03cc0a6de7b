"""The ragged store against masked dense attention: rows that pass by, windows, crops."""

import pytest
import torch

from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.ops.attention import attend
from regard.primitives.stores import build

TOTAL, SINK, RECENT = 40, 2, 6
G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, heads, TOTAL, 8, generator=G, dtype=torch.float64) for heads in (4, 2, 2))
CPU = torch.device("cpu")
WINDOW = Pattern.sink(SINK) | Pattern.window(RECENT)


def ragged(pattern):
    return build(pattern, [None] * 2, [None] * 2, 2, attend, ragged=True)


def read(store, rows, step, pattern):
    view = store.append(K[:, :, rows], V[:, :, rows], step)
    return view, view.attend(Q[:, :, rows], pattern=pattern, step=step, scale=0.3)[0]


def dense(pattern, present):
    """Attention of all queries over the arrivals that are `present [TOTAL]` bool."""
    mask = pattern.to_dense(TOTAL).reshape(TOTAL, TOTAL) & present
    scores = Q @ K.repeat_interleave(2, 1).mT * 0.3
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0) @ V.repeat_interleave(2, 1)


@torch.no_grad()
@pytest.mark.parametrize("widths", [[1] * TOTAL, [7] * 6, [16, 1, 1, 5, 17], [40]], ids=str)
@pytest.mark.parametrize("pattern", [Pattern.causal(), WINDOW], ids=["all", "window"])
def test_a_view_outlives_what_its_forward_evicts(widths, pattern):
    store = ragged(pattern)
    want, start = dense(pattern, torch.ones(TOTAL, dtype=torch.bool)), 0
    for width in widths:
        rows = slice(start, min(start + width, TOTAL))
        _, out = read(store, rows, Step(start, rows.stop - start, 2, CPU), pattern)
        torch.testing.assert_close(out, want[:, :, rows])
        start = rows.stop
    assert store.length == TOTAL
    assert store.buffer.size <= (TOTAL if pattern.is_causal else SINK + RECENT + 4)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [Pattern.causal(), WINDOW], ids=["all", "window"])
def test_rows_that_pass_by_leave_nothing_and_positions_are_asked_only_then(pattern):
    store = ragged(pattern)
    present = torch.ones(TOTAL, dtype=torch.bool)
    present[12:20] = present[25:30:2] = False
    want = dense(pattern, present)
    view, out = read(store, slice(0, 12), Step(0, 12, 2, CPU), pattern)
    torch.testing.assert_close(out, want[:, :, :12])
    assert view.positions is None
    store.advance(Step(12, 8, 2, CPU))
    for start, stop in ((20, 25), (25, 31), (31, TOTAL)):
        rows = [t for t in range(start, stop) if present[t]]
        step = Step(start, stop - start, 2, CPU).only(torch.tensor([rows]))
        view, out = read(store, rows, step, pattern)
        torch.testing.assert_close(out, want[:, :, rows])
        assert view.positions is not None
    assert store.length == TOTAL


@torch.no_grad()
def test_a_crop_behind_a_gap_forgets_what_came_after_it():
    store = ragged(Pattern.causal())
    read(store, slice(0, 12), Step(0, 12, 2, CPU), Pattern.causal())
    store.advance(Step(12, 8, 2, CPU))
    store.crop(9)
    assert (store.length, store.buffer.size) == (9, 9)
    _, out = read(store, slice(9, 15), Step(9, 6, 2, CPU), Pattern.causal())
    torch.testing.assert_close(out, dense(Pattern.causal(), torch.ones(TOTAL, dtype=torch.bool))[:, :, 9:15])
    store.reset()
    assert list(store.storages()) == []
