"""Multi-query associative recall against the released generator's rows, its definition and its solver."""

import hashlib
import re
import time

import pytest
import torch

from regard.core.errors import RegardError
from regard.measure.tasks.mqar import Mqar
from regard.measure.tasks.task import build, known


def fresh(seed=0):
    return torch.Generator().manual_seed(seed)


# Rows of the released generator: seed 0, vocabulary 20, length 16, two pairs.
GOLDEN = [
    ([8, 15, 3, 11, 8, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0], {4: 15, 6: 11}),
    ([4, 15, 2, 12, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0], {4: 15, 14: 12}),
    ([6, 11, 3, 18, 0, 0, 6, 0, 3, 0, 0, 0, 0, 0, 0, 0], {6: 11, 8: 18}),
]


def test_the_released_rows():
    rows = Mqar(length=16, vocabulary=20, pairs=2).released(3, seed=0)
    for inputs, labels, (row, asked) in zip(rows.inputs.tolist(), rows.labels.tolist(), GOLDEN, strict=True):
        assert inputs == row
        assert {place: label for place, label in enumerate(labels) if label != -100} == asked


def test_the_digest_of_released_rows():
    rows = Mqar(length=128, pairs=8).released(8, seed=123)
    labels = rows.labels
    assert rows.inputs.sum() == 670298
    assert labels[labels >= 0].sum() == 398980
    data = rows.inputs.numpy().astype("<i8").tobytes() + labels.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest().startswith("e890980e0e1cf525")


def by_hand(task, row, places, answers):
    """One row, read token by token."""
    book = {}
    for i in range(0, 2 * task.pairs, 2):
        assert 1 <= row[i] < task.vocabulary // 2 <= row[i + 1] < task.vocabulary
        book[row[i]] = row[i + 1]
    assert len(book) == len(set(book.values())) == task.pairs
    for again in range(1, task.passes):
        assert row[2 * task.pairs * again :][: 2 * task.pairs] == row[: 2 * task.pairs]
    assert sorted(row[place] for place in places) == sorted(book)
    for place, answer in zip(places, answers, strict=True):
        assert place >= task.said
        assert place % 2 == 0
        assert book[row[place]] == answer
    if not task.fill:
        assert all(token == 0 for i, token in enumerate(row) if i >= task.said and i not in places)


@pytest.mark.parametrize("how", ["released", "make"])
@pytest.mark.parametrize(
    "task",
    [
        Mqar(length=64, vocabulary=256, pairs=4),
        Mqar(length=64, vocabulary=65, pairs=16),  # no gap is free, and nearly no key
        Mqar(length=48, vocabulary=99, pairs=4, passes=3),
        Mqar(length=64, vocabulary=128, pairs=5, fill=True),
    ],
    ids=str,
)
def test_rows_keep_the_definition(task, how):
    rows = task.released(40, 7) if how == "released" else task.make(40, fresh(7))
    for row, places, answers in zip(rows.inputs.tolist(), rows.places.tolist(), rows.answers.tolist(), strict=True):
        by_hand(task, row, places, answers)
    assert (rows.labels >= 0).sum(1).eq(task.pairs).all()
    said = task.solve(rows.inputs).gather(1, rows.places)
    assert rows.score(said).tolist() == [1.0] * 40


def test_filled_rows_draw_from_the_whole_vocabulary():
    task = Mqar(length=64, vocabulary=128, pairs=2, fill=True)
    for rows in (task.released(200, 1), task.make(200, fresh(1))):
        assert set(rows.inputs.flatten().tolist()) == set(range(128))


def test_rows_follow_from_the_seed_alone():
    task = Mqar(length=64, vocabulary=256, pairs=4)
    torch.manual_seed(0)
    one, other = task.make(9, fresh(3)), task.make(9, fresh(4))
    torch.manual_seed(1)
    assert torch.equal(one.inputs, task.make(9, fresh(3)).inputs)
    assert not torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_both_generators_draw_alike(power):
    """The same gaps, keys and values, as often: each share within five standard errors."""
    task, count = Mqar(length=16, vocabulary=18, pairs=2, power=power), 20_000
    parts = [(rows.inputs, rows.places) for rows in (task.released(count, 5), task.make(count, fresh(5)))]
    for query in range(2):
        shares = [places[:, query].bincount(minlength=16) / count for _, places in parts]
        assert (shares[0] - shares[1]).abs().max() < 5 * (0.5 / count) ** 0.5
    for column in range(4):
        shares = [inputs[:, column].bincount(minlength=18) / count for inputs, _ in parts]
        assert (shares[0] - shares[1]).abs().max() < 5 * (0.5 / count) ** 0.5
    first = parts[1][1][:, 0].bincount(minlength=16)[4::2] / count
    assert torch.allclose(first.double(), torch.as_tensor(task.chances), atol=5 * (0.25 / count) ** 0.5)
    if power == 1.0:
        assert torch.as_tensor(task.chances).unique().numel() == 1


def test_guesses_score_by_chance():
    task = Mqar(length=64, vocabulary=256, pairs=8)
    rows = task.make(4000, fresh())
    own = rows.answers.gather(1, torch.randint(8, rows.answers.shape, generator=fresh(1)))
    assert abs(rows.score(own).mean() - 1 / 8) < 0.01
    any_value = torch.randint(128, 256, rows.answers.shape, generator=fresh(2))
    assert abs(rows.score(any_value).mean() - 2 / 256) < 0.004


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds():
    began = time.monotonic()
    Mqar().make(100_000, fresh())
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 63}, "must be even, since queries stand at even places; got 63"),
        ({"length": 64, "vocabulary": 64}, "must exceed its length 64; got 64"),
        ({"length": 64, "pairs": 17}, "17 pairs said 1 times and asked once need a length of 68, not 64; at most 16"),
        ({"length": 64, "pairs": 9, "passes": 3}, "need a length of 72, not 64; at most 8 pairs fit"),
        ({"pairs": 0}, "at least 1 pair and 1 pass, not pairs 0, passes 1"),
        ({"power": 0.0}, "must be above 0, got 0.0"),
        ({"power": float("nan")}, "must be above 0, got nan"),
        ({"pair": 4}, "Did you mean 'pairs'"),
        ({"pairs": "4"}, "setting pairs of task mqar must be int, not '4'"),
        ({"fill": 1}, "setting fill of task mqar must be bool, not 1"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(RegardError, match=re.escape(said)):
        build("mqar", **settings)


def test_tasks_are_found_by_name():
    assert known()["mqar"] is Mqar
    assert build("mqar", pairs=4, power=1) == Mqar(pairs=4, power=1)
    with pytest.raises(RegardError, match=r"unknown task 'mqra'.*Did you mean 'mqar'"):
        build("mqra")
