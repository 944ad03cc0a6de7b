"""Chunks of keys and blocks of rows, against slow loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.pattern import Pattern
from regard.core.slots import Chosen, Reading
from regard.core.step import Step
from regard.ops.attention import attend
from regard.primitives.blocks import FAR, cut, edges
from regard.primitives.buffer import fold, unfold
from regard.primitives.chunks import chunk_scores, fill, peaks
from regard.primitives.stores import build

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 4), st.integers(0, 12), st.randoms())
def test_peaks_are_those_of_the_greedy_loop(values, half, count, random):
    score = torch.tensor([values], dtype=torch.float32)
    allowed = torch.tensor([[random.random() < 0.7 for _ in values]])
    kept: list[int] = []
    for at in sorted(range(len(values)), key=lambda t: (-values[t], t)):
        if allowed[0, at] and len(kept) < count and all(abs(at - other) > half for other in kept):
            kept.append(at)
    found = peaks(score, allowed, torch.tensor([count]), half)
    assert found[0].nonzero()[:, 0].tolist() == sorted(kept)


def cases():
    """`edges, low, high, stop` of three batch rows and four blocks."""
    cuts = torch.tensor([[0, 3, 4, 9, 16, 23], [0, 1, 2, 15, 22, 23], [0, 6, 12, 18, 20, 20]])
    high = torch.tensor([[4, 8, 12, 20], [4, 9, 11, 21], [0, 7, 13, 17]])
    low = torch.tensor([[0, 0, 5, 12], [2, 2, 2, 2], [0, 0, 0, 0]])
    return cuts, low, high, high + torch.tensor([[3, 3, 3, 3], [2, 3, 1, 2], [0, 1, 3, 3]])


def test_scores_equal_the_loop_over_cut_chunks():
    cuts, low, high, _ = cases()
    queries, keys = drawn(3, 4, 8), drawn(3, 23, 8, seed=1)
    found = chunk_scores(queries, keys, cuts, low, high)
    for row in range(3):
        for block in range(4):
            for c in range(5):
                a, b = max(int(cuts[row, c]), int(low[row, block])), min(int(cuts[row, c + 1]), int(high[row, block]))
                want = keys[row, a:b].mean(0) @ queries[row, block] * max(b - a, 0) ** 0.5 if b > a else -torch.inf
                torch.testing.assert_close(found[row, block, c], torch.as_tensor(want, dtype=torch.float64))


def by_loop(score, cuts, low, high, stop, budget, first, last, sink):
    """The definition: forced ranks, then tokens by the score of their chunk."""
    lead = min(sink, low)
    begin = min(low + max(first - lead, 0), high)
    chosen = [*range(lead), *range(low, begin)]
    chosen += [r for r in range(max(stop - last, begin), stop) if r >= low]
    free = [(-float(score[c]), c, r) for c in range(len(score)) for r in range(int(cuts[c]), int(cuts[c + 1]))]
    free = [entry for entry in sorted(free) if begin <= entry[2] < high and entry[2] not in chosen]
    return sorted(chosen + [r for *_, r in free[: max(budget - len(chosen), 0)]])


@pytest.mark.parametrize(("budget", "first", "last", "sink"), [(8, 2, 3, 0), (6, 0, 3, 0), (9, 1, 5, 2), (30, 2, 3, 1)])
def test_lists_equal_the_loop_over_tokens(budget, first, last, sink):
    cuts, low, high, stop = cases()
    # Halves, so that some scores are equal.
    scores = (drawn(3, 4, 5) * 2).round() / 2
    found = fill(scores, cuts, low, high, stop, budget=budget, first=first, last=last, sink=sink)
    for row in range(3):
        for block in range(4):
            spot = [int(x[row, block]) for x in (low, high, stop)]
            ranks = found[row, block]
            want = by_loop(scores[row, block], cuts[row], *spot, budget, first, last, sink)
            assert ranks[ranks >= 0].tolist() == want
            assert len(want) <= budget + max(sink - first, 0)


def test_own_keys_left_out_are_the_last_of_the_list():
    cuts = torch.tensor([[0, 3, 9, 16, 24]])
    low, high, stop = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[16, 20]]), torch.tensor([[20, 24]])
    call = {"budget": 11, "first": 1, "last": 5}
    scores = drawn(1, 2, 4)
    whole = fill(scores, cuts, low, high, stop, **call)
    apart = fill(scores, cuts, low, high, stop, apart=4, **call)
    assert torch.equal(whole[:, :, :7], apart)
    assert whole[0, :, 7:].tolist() == [list(range(16, 20)), list(range(20, 24))]


def reading(step, rows, positions, pattern=None):
    keys = positions.shape[1]
    q, k = drawn(step.batch, 4, rows, 8), drawn(step.batch, 2, keys, 8, seed=1)
    return Reading(q, k, positions, pattern or Pattern.causal(), 1.0, None, step, {})


def test_rows_are_cut_from_the_end_of_the_prompt():
    step = Step(0, 30, 1, CPU, prompt=27)
    blocks = cut(reading(step, 30, torch.arange(30)[None]), budget=9, block=4, dense=3, decode=True)
    # 24 sparse rows; the first two blocks reach 8 keys and read all of them.
    assert blocks.whole == (slice(0, 8), slice(24, 27))
    assert [(run.rows, run.length) for run in blocks.runs] == [(slice(8, 24), 4), (slice(27, 30), 1)]
    assert blocks.runs[0].high.tolist() == [[8, 12, 16, 20]]
    assert blocks.runs[1].stop.tolist() == [[28, 29, 30]]
    assert blocks.apart


def test_a_window_bounds_what_a_block_reaches_and_sinks_stay():
    pattern = Pattern.sink(2) | Pattern.window(6)
    step = Step(0, 16, 1, CPU)
    blocks = cut(reading(step, 16, torch.arange(16)[None], pattern), budget=4, block=4, dense=0, decode=True)
    (run,) = blocks.runs
    for block, start in enumerate(range(16 - 4 * run.blocks, 16, 4)):
        seen = pattern.to_dense(16)[0, start : start + 4].any(0)
        beyond = seen[2:].nonzero()[:, 0] + 2
        assert int(run.low[0, block]) <= int(beyond[0]) <= max(int(run.low[0, block]), 2)
        assert int(run.stop[0, block]) == int(beyond[-1]) + 1
    assert blocks.sink == 2
    assert not blocks.apart


def test_padding_moves_no_block():
    pad = torch.tensor([3, 0])
    step = Step(0, 15, 2, CPU, padding=pad)
    positions = step.positions(torch.arange(15))
    both = cut(reading(step, 15, positions), budget=6, block=4, dense=1, decode=True)
    alone = cut(reading(Step(0, 12, 1, CPU), 12, torch.arange(12)[None]), budget=6, block=4, dense=1, decode=True)
    assert not both.apart
    for name in ("low", "high", "stop"):
        padded, single = (getattr(b.runs[-1], name) for b in (both, alone))
        assert torch.equal(padded[0, -single.shape[1] :], single[0])
    ranks = torch.tensor([[[0, 2, -1]], [[0, 2, -1]]])
    assert both.slots(ranks).tolist() == [[[3, 5, -1]], [[0, 2, -1]]]


def test_edges_are_where_chunks_begin_among_the_keys_held():
    starts = torch.zeros(2, 10, dtype=torch.bool)
    starts[:, [3, 4, 8]] = True
    step = Step(0, 10, 2, CPU, padding=torch.tensor([2, 0]))
    place = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, FAR, FAR], list(range(10))])
    assert edges(starts, place, step).tolist() == [[0, 1, 2, 6, 8], [0, 3, 4, 8, 10]]


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_of_rows_attend_as_their_pieces_do(batch, monkeypatch):
    from regard.primitives import buffer

    # One block at a time, then all at once.
    q, k, v = drawn(batch, 4, 12, 8), drawn(batch, 2, 20, 8, seed=1), drawn(batch, 2, 20, 8, seed=2)
    store = build(Pattern.causal(), [None] * 2, [None] * 2, 2, attend)
    store.append(k[:, :, :8], v[:, :, :8], Step(0, 8, batch, CPU))
    step = Step(8, 12, batch, CPU)
    view = store.append(k[:, :, 8:], v[:, :, 8:], step)
    call = {"pattern": Pattern.causal(), "scale": 0.3}
    index = torch.stack([torch.randperm(11 + 4 * b, generator=torch.Generator().manual_seed(b))[:5] for b in range(2)])
    lists = torch.cat((index, torch.tensor([[11, 12, 13, -1], [15, 17, -1, -1]])), 1).expand(batch, -1, -1)
    past = torch.stack([torch.arange(12)[None, [1, 2, 6]], torch.arange(16)[None, [0, 9, 15]]], 1).expand(batch, -1, -1)
    for piece in (Chosen(slice(4, 12), lists), Chosen(slice(4, 12), past, own=True)):
        want = [
            view.attend(q[:, :, one.rows], index=one.index, step=step.only(step.arrivals[:, one.rows]), **call)[0]
            for one in piece.split(8)
        ]
        for room in (1, 2**20):
            monkeypatch.setattr(buffer, "GATHERED", {"cpu": room})
            own, rows = piece.rows if piece.own else None, step.only(step.arrivals[:, 4:12])
            found = view.attend_blocks(q[:, :, 4:12], piece.index, own=own, step=rows, **call)
            torch.testing.assert_close(found, torch.cat(want, 2))


def test_unfold_undoes_fold():
    x = drawn(2, 3, 12, 5)
    assert fold(x, 4).shape == (8, 3, 3, 5)
    assert torch.equal(unfold(fold(x, 4), 4), x)
