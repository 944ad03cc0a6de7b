"""`regard train`: what it writes, that it goes on, and how it refuses."""

import json
import os
import signal
import threading

import pytest
import torch

from regard.models.hybrid import HybridForCausalLM
from regard.train.settings import Settings

TINY = "--mixers gated_delta_net,softmax --width 16 --heads 1 --length 16 --batch 2 --quiet".split()
TASK = [*TINY, "--task", "mqar", "--pairs", "2", "--set", "vocabulary=32", "--set", "held_out=8"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three four five " * 20)
    return path


def weights(folder):
    return HybridForCausalLM.from_pretrained(folder).state_dict()


def same(one, other):
    left, right = weights(one), weights(other)
    return all(torch.equal(left[name], right[name]) for name in left)


def test_on_a_task(regard_command, tmp_path):
    out = tmp_path / "run"
    done = regard_command("train", *TASK, "--steps", 6, "--out", out)
    assert done.code == 0, done.err
    assert done.err == ""
    for name in ("mixers", "held-out loss", "accuracy", "seconds"):
        assert name in done.out
    told = json.loads((out / "train.json").read_text())
    assert len(told["losses"]) == 6
    assert set(told["measured"][-1]) == {"step", "loss", "accuracy"}
    assert told["machine"]["versions"]["torch"] == torch.__version__
    wanted = Settings(**told["settings"])
    assert wanted.model == {"mixers": ["gated_delta_net", "softmax"], "width": 16, "heads": 1}
    assert wanted.task_settings == {"pairs": 2, "vocabulary": 32}
    model = HybridForCausalLM.from_pretrained(out)
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (32, 2)


def test_on_a_text_in_two_parts(regard_command, tmp_path, text):
    words = ["train", *TINY, "--text", text, "--steps", 6, "--set", "checkpoint=3"]
    assert regard_command(*words, "--out", tmp_path / "whole").code == 0
    # The second part starts from the checkpoint of the first one's middle and needs no other words.
    assert regard_command(*words, "--out", tmp_path / "run", "--seed", 0).code == 0
    (tmp_path / "run" / "config.json").unlink()
    done = regard_command("train", "--resume", "--out", tmp_path / "run", "--quiet", "--json")
    assert done.code == 0, done.err
    assert same(tmp_path / "whole", tmp_path / "run")
    told = json.loads(done.out)
    assert told["steps"] == 6
    assert told["accuracy"] is None


def test_settings_from_a_file_and_flags_that_win(regard_command, tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"text: {text}\nlength: 16\nbatch: 2\nsteps: 99\nclip: 1\n"
        "model: {mixers: 'kda:3,softmax', layers: 6, width: 16, mlp: none}\n"
    )
    done = regard_command("train", "--settings", file, "--steps", 2, "--width", 32, "--set", "norm=layer",
                          "--set", "beta2=0.99", "--out", tmp_path / "run", "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    wanted = json.loads((tmp_path / "run" / "train.json").read_text())["settings"]
    assert (wanted["steps"], wanted["beta2"], wanted["length"]) == (2, 0.99, 16)
    assert wanted["model"]["mixers"] == ["kda", "kda", "kda", "softmax", "kda", "kda"]
    assert {name: wanted["model"][name] for name in ("width", "heads", "mlp", "norm")} == {
        "width": 32, "heads": 1, "mlp": "none", "norm": "layer",
    }  # fmt: skip


def test_curves(regard_command, tmp_path):
    done = regard_command("train", *TASK, "--steps", 2, "--out", tmp_path / "run", "--tensorboard")
    assert done.code == 0, done.err
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_an_interrupt_keeps_what_was_learned(regard_command, tmp_path, monkeypatch):
    from regard.train import loop

    assert regard_command("train", *TASK, "--steps", 8, "--out", tmp_path / "whole").code == 0
    step = loop._Run.step

    def pressing(self, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "step", pressing)
        done = regard_command("train", *TASK, "--steps", 8, "--out", tmp_path / "run")
    assert done.code == 130
    assert "stopped at step 5; --resume goes on" in done.err
    assert signal.getsignal(signal.SIGINT) is before
    assert threading.current_thread() is threading.main_thread()
    done = regard_command("train", *TASK, "--steps", 8, "--out", tmp_path / "run", "--resume")
    assert done.code == 0, done.err
    assert same(tmp_path / "whole", tmp_path / "run")


def test_resuming_nothing_says_so(regard_command, tmp_path):
    done = regard_command("train", *TASK, "--steps", 2, "--out", tmp_path / "run", "--resume")
    assert done.code == 0
    assert "beginning at step 0" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*TINY], "name either a text or a task to train on, not neither"),
        ([*TINY, "--task", "mqra"], "Did you mean 'mqar'"),
        ([*TINY, "--text", "absent.txt"], "'absent.txt' does not exist"),
        ([*TINY, "--text", "TEXT", "--length", "400"], "rows of 400 need at least 1199"),
        ([*TINY, "--text", "TEXT", "--pairs", "3"], "task_settings {'pairs': 3} means nothing for a text"),
        (["--task", "mqar"], "name the model's mixers, such as --mixers kda:3,softmax"),
        (["--task", "mqar", "--mixers", "kda:0"], "'kda:0' has not the form NAME:COUNT"),
        (["--task", "mqar", "--mixers", "kdaa,softmax"], "layer 0: unknown mixer 'kdaa'"),
        ([*TASK, "--set", "bets2=0.9"], "unknown setting 'bets2'"),
        ([*TASK, "--set", "beta2"], "has not the form NAME=VALUE, such as beta2=0.99"),
        ([*TASK, "--set", "rate=1e-3"], "write it with a dot, as in 1.0e-3"),
        ([*TASK, "--set", "mlp=swigl"], "Did you mean 'swiglu'"),
        ([*TASK, "--set", "power=0.0"], "the power of mqar must be above 0"),
        ([*TASK, "--steps", "0"], "setting steps (optimiser steps) must be at least 1, not 0"),
        ([*TASK, "--device", "abacus"], "device 'abacus' cannot be used"),
        ([*TASK, "--set", "graphs=true"], "graphs=True refuses: graphs are captured on CUDA devices, not on cpu"),
        ([*TASK, "--settings", "absent.yaml"], "settings file 'absent.yaml' cannot be read"),
        ([*TASK, "--settings", "YAML"], "unknown setting of the model 'with'; known: "),
        ([*TASK, "--out", "TEXT"], "is a file or holds another model"),
        ([*TASK, "--out", "MODEL"], "is a file or holds another model"),
        ([*TASK, "--steps", "2", "--out", "RUN"], "holds a run already (step-00000002)"),
        ([*TASK, "--steps", "3", "--out", "RUN", "--resume"], "is of another run: steps was 2, now 3"),
        (["--layers", "3", "--out", "RUN", "--resume"], "2 mixers are named for 3 layers"),
        (["--width", "32", "--out", "RUN", "--resume"], "is of another run: model.width was 16, now 32"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(regard_command, tmp_path, text, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {with: 3}\n")
    known = {"TEXT": text, "YAML": tmp_path / "run.yaml", "RUN": tmp_path / "run", "MODEL": tmp_path / "model"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    if "RUN" in words:
        assert regard_command("train", *TASK, "--steps", 2, "--out", tmp_path / "run").code == 0
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    done = regard_command("train", *(known.get(word, word) for word in words))
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert said in done.err
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
