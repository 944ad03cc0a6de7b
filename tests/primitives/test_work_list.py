"""Stream-K work lists against their definition: tiles counted one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.core.errors import RegardError
from regard.primitives.work_list import fixed_split, plan

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=6)
SIZES = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 4), SIZES, SIZES)
def test_every_tile_once_and_loads_differ_by_one(lengths, heads, tile, workers):
    work = plan(lengths, heads, tile, workers)
    pieces = work.pieces()
    line = [(p.request, p.head, t) for p in pieces for t in range(p.start, p.stop)]
    tiles = [-(-max(length, 1) // tile) for length in lengths]
    assert line == [(b, h, t) for b, count in enumerate(tiles) for h in range(heads) for t in range(count)]
    loads = [sum(p.stop - p.start for p in pieces if p.worker == w) for w in range(workers)]
    assert max(loads) - min(loads) <= 1
    assert sorted(loads, reverse=True) == loads
    assert loads == work.bounds.diff().tolist()
    assert work.makespan == max(loads) == -(-len(line) // workers)
    assert all(p.whole == (p.start == 0 and p.stop == tiles[p.request]) for p in pieces)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), SIZES, SIZES)
def test_no_output_has_more_pieces_than_the_paper_says(lengths, heads, tile, workers):
    pieces = plan(lengths, heads, tile, workers).pieces()
    total = sum(p.stop - p.start for p in pieces)
    most = -(-total // workers)
    fewest = most if total % workers == 0 else max(most - 1, 1)
    for p in pieces:
        count = sum((p.request, p.head) == (other.request, other.head) for other in pieces)
        assert count <= 1 + -(-(p.tiles - 1) // fewest)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), SIZES, SIZES)
def test_tiles_are_found_again(lengths, heads, tile, workers):
    work = plan(torch.tensor(lengths, dtype=torch.int32), heads, tile, workers)
    found = torch.stack(work.locate(torch.arange(int(work.total)))).T.tolist()
    assert found == [[p.request, p.head, t] for p in work.pieces() for t in range(p.start, p.stop)]


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 4), SIZES, SIZES, st.integers(1, 12))
def test_fixed_splits_take_at_least_as_long(lengths, heads, tile, workers, splits):
    work = plan(lengths, heads, tile, workers)
    assert fixed_split(work, splits) >= work.makespan


def test_ragged_lengths_of_the_paper():
    """1k, 7k and 100k keys, 8 heads, 108 workers: within a tile of the mean, where a worker a head is 5 times worse."""
    work = plan([1_000, 7_000, 100_000], 8, 64, 108)
    assert work.makespan - int(work.total) / 108 < 1
    assert fixed_split(work, 1) >= 5 * work.makespan
    assert fixed_split(work, 16) > work.makespan


def test_one_worker_reads_all_in_order_and_as_many_as_tiles_read_one_each():
    assert [(p.request, p.head, p.start, p.stop) for p in plan([100, 20], 2, 32, 1).pieces()] == [
        (0, 0, 0, 4), (0, 1, 0, 4), (1, 0, 0, 1), (1, 1, 0, 1),
    ]  # fmt: skip
    assert plan([100, 20], 2, 32, 10).bounds.tolist() == list(range(11))
    assert plan([100, 20], 2, 32, 13).bounds.tolist() == [*range(11), 10, 10, 10]


def test_refuses_by_name():
    for heads, tile, workers, name in [(0, 1, 1, "heads"), (1, 0, 1, "tile"), (1, 1, 0, "workers")]:
        with pytest.raises(RegardError, match=f"{name} of 1 or more, got 0"):
            plan([1], heads, tile, workers)
    with pytest.raises(RegardError, match="request 1 has -2 keys"):
        plan([1, -2], 1, 1, 1)
    with pytest.raises(RegardError, match=r"\[1\] torch.float32"):
        plan(torch.ones(1), 1, 1, 1)
    with pytest.raises(RegardError, match="got 0"):
        fixed_split(plan([1], 1, 1, 1), 0)
