"""Copying tasks against loops that state them."""

import re

import pytest
import torch

from regard.core.errors import RegardError
from regard.measure.tasks.task import build


def rows_of(name, **settings):
    task = build(name, **settings)
    rows = task.make(20, torch.Generator().manual_seed(1))
    assert rows.inputs.shape == (20, task.length)
    assert rows.inputs.max() < task.vocabulary
    assert rows.score(task.solve(rows.inputs).gather(1, rows.places)).eq(1).all()
    return task, rows


@pytest.mark.parametrize("lag", [1, 5, 15])
def test_copy(lag):
    _, rows = rows_of("copy", length=16, vocabulary=7, lag=lag)
    for row, labels in zip(rows.inputs.tolist(), rows.labels.tolist(), strict=True):
        assert labels == [row[i - lag] if i >= lag else -100 for i in range(16)]


def test_reverse_copy():
    _, rows = rows_of("reverse_copy", length=12, vocabulary=5)
    for row, labels in zip(rows.inputs.tolist(), rows.labels.tolist(), strict=True):
        assert row[6] == 0
        assert all(row[:6])
        # What is said at one token is the next one, and the whole is a palindrome around 0.
        assert labels == [-100] * 6 + [*row[7:], row[0]]
        assert labels[6:] == row[5::-1]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("copy", {"length": 16, "lag": 16}, "lag of copy must be between 1 and its length - 1 = 15, got 16"),
        ("copy", {"lag": 0}, "got 0"),
        ("copy", {"vocabulary": 1}, "vocabulary of copy must be at least 2, got 1"),
        ("reverse_copy", {"length": 13}, "length of reverse_copy must be even and at least 2, got 13"),
        ("reverse_copy", {"vocabulary": 2}, "must be at least 3, got 2"),
        ("reverse_copy", {"lag": 2}, "unknown setting of task reverse_copy 'lag'"),
    ],
)
def test_refusals(name, settings, said):
    with pytest.raises(RegardError, match=re.escape(said)):
        build(name, **settings)
