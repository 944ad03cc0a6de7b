"""Settings: where they come from, what they refuse, and the learning rate."""

import re

import pytest

from regard.core.errors import RegardError
from regard.train.data import open_source
from regard.train.settings import Settings, read


def test_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: mqar\ntask_settings: {pairs: 4}\nrate: 0.003\nsteps: 50\nwarmup: 0\nclip: 1\nmodel: {layers: 2}\n"
    )
    found = Settings.of(**read(path))
    assert (found.rate, found.clip, found.task_settings, found.batch) == (0.003, 1.0, {"pairs": 4}, 32)
    assert Settings(**found.to_json()) == found
    # YAML reads 1e-3 as a word: the refusal says so.
    path.write_text("task: mqar\nrate: 1e-3\n")
    with pytest.raises(RegardError, match=re.escape("must be float, not '1e-3' (write it with a dot, as in 1.0e-3)")):
        Settings.of(**read(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("a: [", "cannot be read: while parsing"),
        ("- task", "must hold lines NAME: VALUE, not ['task']"),
        ("1: 2", "must hold lines NAME: VALUE"),
        ("a: !!python/name:os.system", "cannot be read: could not determine a constructor"),
    ],
)
def test_files_that_are_refused(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RegardError, match=re.escape(said)):
        read(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "name either a text or a task to train on, not neither"),
        ({"text": "a", "task": "mqar"}, "not both text 'a' and task 'mqar'"),
        ({"text": "a", "stepps": 3}, "unknown training setting 'stepps'"),
        ({"text": "a", "stepps": 3}, "Did you mean 'steps'"),
        ({"task": "mqar", "tokenizer": "gpt2"}, "tokenizer 'gpt2' means nothing for a task"),
        ({"text": "a", "task_settings": {"pairs": 2}}, "task_settings {'pairs': 2} means nothing for a text"),
        ({"text": "a", "steps": 0}, "setting steps (optimiser steps) must be at least 1, not 0"),
        ({"text": "a", "steps": 10.0}, "setting steps (optimiser steps) must be int, not 10.0"),
        ({"text": "a", "steps": True}, "must be int, not True"),
        ({"text": "a", "rate": 0}, "setting rate (largest learning rate) must be above 0, not 0"),
        ({"text": "a", "rate": float("nan")}, "must be finite, not nan"),
        ({"text": "a", "floor": 1.5}, "must be at least 0 and at most 1, not 1.5"),
        ({"text": "a", "weight_decay": -0.1}, "must be at least 0, not -0.1"),
        ({"text": "a", "beta2": 1.0}, "must be at least 0 and at most 0.99999, not 1.0"),
        ({"text": "a", "bf16": 1}, "must be bool, not 1"),
        ({"text": "a", "text_": ""}, "unknown training setting 'text_'"),
        ({"text": "a", "model": "llama"}, "setting model (what the model was built from) must hold names and values"),
        ({"text": "a", "batch": 6, "accumulate": 4}, "a batch of 6 rows cannot be run in 4 equal parts"),
    ],
)
def test_refusals(words, said):
    with pytest.raises(RegardError, match=re.escape(said)):
        Settings.of(**words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"text": "absent.txt"}, "text file 'absent.txt' does not exist"),
        ({"task": "mqra"}, "Did you mean 'mqar'"),
        ({"task": "mqar", "task_settings": {"pairz": 2}}, "Did you mean 'pairs'"),
        ({"task": "mqar", "length": 31}, "the length of mqar must be even"),
        ({"task": "mqar", "length": 64, "task_settings": {"length": 32}}, "length is 64, but task_settings say 32"),
    ],
)
def test_data_that_cannot_be_opened(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegardError, match=re.escape(said)):
        open_source(Settings.of(**words))


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words " * 1000)
    with pytest.raises(RegardError, match="cannot load tokenizer"):
        open_source(Settings(text=str(text), tokenizer=str(tmp_path / "absent")))


def test_the_rate_rises_and_falls():
    found = Settings(task="copy", rate=2.0, warmup=0.25, steps=15, floor=0.25)
    rates = [found.rate_at(step) for step in range(15)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[14] == pytest.approx(0.5)
    assert Settings(task="copy", rate=2.0, warmup=0, steps=1).rate_at(0) == 2.0
