"""What a run shows: points for TensorBoard, continued ones too, and a bar."""

import importlib.util

import pytest

from regard.core.errors import RegardError
from regard.train.progress import Bar, Board


def points(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {event.step: event.value for event in read.Scalars(name)}


def test_curves(tmp_path):
    board = Board(tmp_path)
    board.begin(0, 10)
    board.losses(3, [3.0, 2.0, 1.5], 0.1)
    board.losses(5, [9.0, 8.0], 0.2)
    board.measured({"step": 3, "loss": 1.75, "accuracy": 0.5})
    board.close()
    again = Board(tmp_path)  # goes on from a checkpoint at step 3: what came after it never happened
    again.begin(3, 10)
    again.losses(4, [1.25], 0.3)
    again.close()
    assert points(tmp_path, "train/loss") == {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.25}
    assert points(tmp_path, "held out/accuracy") == {3: 0.5}


def test_without_tensorboard(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("regard.core.extras.find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(RegardError, match=r"'tensorboard', which is not installed: pip install 'regard\[train\]'"):
        Board(tmp_path)
    assert not list(tmp_path.iterdir())


def test_bar(capsys):
    with Bar() as bar:
        bar.begin(0, 10)
        bar.losses(4, [2.5], 0.1)
        bar.measured({"step": 4, "loss": 2.25, "accuracy": 0.5})
        bar.losses(5, [2.0], 0.1)
        task = bar._bars.tasks[0]
        assert (task.completed, task.total) == (5, 10)
        assert task.fields["note"] == "loss 2.0000, held out 2.2500, accuracy 50.0%"
    assert capsys.readouterr().out == ""
