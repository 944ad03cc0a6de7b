"""The sweeps of the benchmarks, too small to learn anything: what runs, what is left out, what is kept."""

import json

import pytest
import torch

import sweep
from cases import mqar, ratios, train_step
from regard.core.errors import RegardError
from regard.train.settings import Settings

TINY = {"batch": 2, "seconds": 600, "workers": 0}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """On the CPU, with one thread, and what is kept on the way in a folder of its own."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def job(**changes):
    settings = Settings(task="copy", task_settings={"vocabulary": 8, "lag": 2}, length=8, batch=2, steps=2)
    words = {"hidden_size": 8, "mixers": ["softmax"], "num_attention_heads": 1} | changes
    return sweep.Job({"what": str(changes)}, words, settings, "cpu")


def test_the_best_rate_of_every_mixer(monkeypatch):
    monkeypatch.setattr(mqar.mixers, "names", lambda: ("delta_net", "softmax", "tnl"))
    facts, rows = mqar.run(widths=16, lengths=16, below=2, tries=3, steps=2, vocabulary=32, only="softmax", **TINY)
    assert facts["mixers"] == ["softmax"]
    assert facts["left out"] == 0
    (row,) = rows
    assert [(one["rate"], one["init"]) for one in row["runs"]] == [(3e-3, None), (3e-3, 0.02), (1e-2, 0.02)]
    assert row["accuracy"] == max(one["accuracy"] for one in row["runs"])
    assert (row["mixer"], row["width"], row["pairs"]) == ("softmax", 16, 2)


def test_what_a_mixer_stands_on(monkeypatch):
    monkeypatch.setattr(mqar.mixers, "names", lambda: ("base_conv", "softmax"))
    _, rows = mqar.run(widths=16, lengths=16, below=0, tries=1, steps=1, vocabulary=32, **TINY)
    found = {(row["mixer"], row["below"]): row["runs"][0]["parameters"] for row in rows}
    assert sorted(found) == [("base_conv", "itself"), ("softmax", "base_conv"), ("softmax", "itself")]
    # Embeddings of 32 tokens, 2 LayerNorms and a last one, and what the layers themselves have.
    shared, conv, attention = 32 * 16 + 3 * 32, 3 * 16 + 16 * 16 + 16, 4 * 16 * 16
    assert found["base_conv", "itself"] == shared + 2 * conv
    assert found["softmax", "base_conv"] == shared + conv + attention
    assert found["softmax", "itself"] == shared + 2 * attention + 16 * 16


def test_every_ratio():
    words = {"only": "tnl", "layers": 4, "recall_width": 8, "text_width": 8, "length": 16, "vocabulary": 32} | TINY
    _, rows = ratios.run(recall_steps=1, text_steps=1, pairs=2, seeds=2, **words)
    found = [(row["mixer"], row["ratio"], row["softmax layers"]) for row in rows]
    assert found == [("softmax", "0:1", 4), ("tnl", "pure", 0), ("tnl", "3:1", 1), ("tnl", "1:1", 2)]
    for row in rows:
        losses = [one["loss"] for one in row["runs"] if one["what"] == "text"]
        assert row["text loss"] == pytest.approx(sum(losses) / 2)
        assert row["text loss spread"] == pytest.approx(abs(losses[0] - losses[1]) / 2)
        assert row["text loss spread"] > 0
        recalled = [(one["rate"], one["ended"]) for one in row["runs"] if one["what"] == "recall"]
        assert recalled == [(3e-3, "steps")] * 2 + [(1e-2, "steps")] * 2
    _, rows = ratios.run(ratios="1:1,pure", recall_steps=0, text_steps=1, **words)
    assert [(row["mixer"], row["ratio"]) for row in rows] == [("softmax", "0:1"), ("tnl", "1:1"), ("tnl", "pure")]
    assert ratios.best([{"seed": 0, "accuracy": 0.5}, {"seed": 0, "accuracy": 0.2}]) == [{"seed": 0, "accuracy": 0.5}]
    with pytest.raises(RegardError, match=r"unknown ratio '2:1'; known: 1:1, 3:1, 7:1, pure"):
        ratios.run(ratios="pure,2:1", **words)


def test_both_ways_of_taking_steps(monkeypatch):
    monkeypatch.setattr(train_step.mixers, "names", lambda: ("delta_net", "softmax", "tnl"))
    words = {"width": 16, "length": 16, "batch": 2, "vocabulary": 32, "steps": 2, "repeats": 2, "part": 1, "parts": 2}
    _, (row,) = train_step.run(**words)
    assert (row["mixer"], row["losses apart"]) == ("softmax", 0)
    assert row["why not"] == "graphs are captured on CUDA devices, not on cpu"
    assert row["launched ms"] > 0
    assert row["replayed ms"] > 0
    begun = train_step.begun
    faster = lambda job, graphs: begun(mqar.tuned(job, 0.003 if graphs is False else 0.5, None), graphs)  # noqa: E731
    monkeypatch.setattr(train_step, "begun", faster)
    with pytest.raises(RegardError, match="not the same steps, and not timed"):
        train_step.run(**words)


def test_a_refusal_ends_no_other_run(tmp_path):
    found = sweep.sweep("some", [job(mlp="wide"), job()], 0, 600)
    assert [one["ended"] for one in found] == ["failed", "steps"]
    assert "unknown mlp 'wide'" in found[0]["why"]
    kept = [json.loads(line) for line in (tmp_path / "partial-some.jsonl").read_text().splitlines()]
    assert kept == found


def test_no_run_begins_when_time_is_up(monkeypatch):
    assert sweep.sweep("some", [job()], 0, -1) == []
    clock = iter([0.0, 0.0, 0.0])
    monkeypatch.setattr(sweep.time, "time", lambda: next(clock, 100.0))
    (stopped,) = sweep.sweep("some", [job()], 0, 50)
    assert (stopped["ended"], stopped["steps"]) == ("out of time", 1)


@pytest.mark.slow
def test_processes_side_by_side():
    jobs = [job(), job(mlp="none"), job(mlp="wide"), job(norm="layer")]
    here = sweep.sweep("some", jobs, 0, 600)
    for workers, lanes in ((2, 1), (1, 3)):
        found = sweep.sweep("some", jobs, workers, 600, lanes=lanes)
        assert {one["what"] for one in found} == {one["what"] for one in here}
        losses = [sorted(one["loss"] for one in runs if "loss" in one) for runs in (found, here)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert len(losses[0]) == 3


def _dies(asked, told, lanes, place):
    raise SystemExit(3)


@pytest.mark.slow
def test_a_process_that_ends_is_noticed(monkeypatch):
    monkeypatch.setattr(sweep, "_lead", _dies)
    with pytest.raises(RuntimeError, match="a process of the sweep ended with 3"):
        sweep.sweep("some", [job()], 1, 600)
