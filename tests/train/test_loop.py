"""The training loop: what it computes, that it is the same every time, and that it goes on exactly where it was."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.core.errors import RegardError
from regard.train import checkpoint
from regard.train.data import TaskRows, TextRows, open_source
from regard.train.loop import logits_at, optimizer, save, train
from regard.train.settings import Settings
from train.toys import llama, same, weights

TEXT = "".join(f"{i} is {i * i} when squared. " for i in range(400))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def settings(**changes):
    words = {"length": 32, "batch": 4, "steps": 12, "warmup": 0.2, "evaluate": 5, "held_out": 3, "checkpoint": 4}
    return Settings(**(words | changes))


def kinds(text):
    return {
        "text": settings(text=text),
        "task": settings(task="mqar", task_settings={"pairs": 4, "vocabulary": 64}),
    }


def run(wanted, out=None, **options):
    torch.manual_seed(7)
    model = llama()
    torch.manual_seed(wanted.seed)
    return model, train(model, open_source(wanted), wanted, out=out, **options)


def after(steps):
    """A function that asks to stop after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) == steps


@pytest.mark.parametrize("kind", ["text", "task"])
def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(text, tmp_path, kind):
    wanted = kinds(text)[kind]
    whole, told = run(wanted)
    half, first = run(wanted, tmp_path / "run", asked=after(7))
    assert (first.step, first.ended) == (7, "asked")
    assert not same(whole, half)
    torch.manual_seed(99)  # the checkpoint brings its own random states
    other = llama(seed=5)
    second = train(other, open_source(wanted), wanted, out=tmp_path / "run", resume=True)
    assert same(whole, other)
    assert (told.losses, told.measured) == (second.losses, second.measured)
    assert (second.step, second.ended) == (12, "steps")
    assert [m["step"] for m in second.measured] == [5, 10, 12]
    assert second.seconds > 0


def test_dropout_makes_random_states_matter(text, tmp_path):
    """The test above would not notice a lost random state without it."""
    wanted = kinds(text)["text"]
    whole, _ = run(wanted)
    torch.manual_seed(7)
    other = llama()
    torch.manual_seed(1)
    train(other, open_source(wanted), wanted)
    assert not same(whole, other)


def test_runs_of_other_seeds_differ_and_the_same_one_does_not(text):
    one, two, three = (run(settings(text=text, seed=seed))[0] for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, three)


# Ends itself in the middle of writing the second checkpoint, after the moment named in its arguments.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from regard.train import checkpoint
from train.test_loop import run, settings
moment, text, out = sys.argv[1:]
def end():
    os.kill(os.getpid(), signal.SIGKILL)
flushed, removed = checkpoint._flushed, checkpoint.shutil.rmtree
calls = {{"files": 0}}
def dying(path, data):
    calls["files"] += 1
    if calls["files"] == 3 and moment == "half a file":
        path.write_bytes(data[: len(data) // 2]); end()
    flushed(path, data)
    if calls["files"] == 3 and moment == "half a folder":
        end()
def removing(path, **options):
    if moment == "before the old one goes" and calls["files"] == 4 and Path(path).name == "step-00000004":
        end()
    removed(path, **options)
checkpoint._flushed, checkpoint.shutil.rmtree = dying, removing
run(settings(text=text), out)
"""


@pytest.mark.parametrize(("moment", "left"), [("half a file", 4), ("half a folder", 4), ("before the old one goes", 8)])
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(text, tmp_path, moment, left):
    out = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code, moment, text, str(out)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert checkpoint.latest(out).name == f"step-{left:08d}"
    wanted = settings(text=text)
    whole, _ = run(wanted)
    model, result = run(wanted, out, resume=True)
    assert same(whole, model)
    assert result.step == 12
    assert [path.name for path in (out / checkpoint.FOLDER).iterdir()] == ["step-00000012"]


@pytest.mark.parametrize("kind", ["text", "task"])
def test_parts_of_a_batch_add_up(text, kind):
    """The same rows in one, two and four parts: the same losses and weights but for rounding."""
    base = kinds(text)[kind]
    found = []
    for parts in (1, 2, 4):
        model = llama(seed=3, attention_dropout=0.0).double()
        wanted = Settings(**base.to_json() | {"accumulate": parts})
        found.append((train(model, open_source(wanted), wanted).losses, weights(model)))
    for losses, held in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-6)
        assert all(torch.allclose(held[name], tensor, atol=1e-6) for name, tensor in found[0][1].items())


def test_the_steps_are_adamw(text):
    """Three steps against a loop that writes them out."""
    wanted = settings(text=text, steps=3, warmup=0.3, clip=0.5, rate=0.01, floor=0.1)
    source, model, by_hand = open_source(wanted), llama(attention_dropout=0.0), llama(attention_dropout=0.0)
    train(model, source, wanted)
    held = dict(by_hand.named_parameters())
    mean = {name: torch.zeros_like(x) for name, x in held.items()}
    square = {name: torch.zeros_like(x) for name, x in held.items()}
    for step, rate in enumerate((0.01, 0.01, 0.001), 1):
        rows = source.batch(step - 1).inputs
        by_hand.zero_grad()
        by_hand(input_ids=rows, labels=rows).loss.backward()
        norm = torch.stack([x.grad.norm() for x in held.values()]).norm()
        for name, x in held.items():
            gradient = x.grad * min(1.0, 0.5 / (norm + 1e-6))
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            decay = 0.0 if "norm" in name else 0.1
            with torch.no_grad():
                x *= 1 - rate * decay
                x -= rate * (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor, held[name], atol=2e-6), name


def test_what_is_decayed():
    groups = optimizer(llama(), settings(task="copy")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}


def test_answers_are_read_where_they_are_asked():
    wanted = settings(task="mqar", task_settings={"pairs": 4, "vocabulary": 64})
    rows, model = open_source(wanted).batch(0), llama().eval()
    found = logits_at(model, rows.inputs, rows.places)
    whole = model(input_ids=rows.inputs).logits
    wanted = torch.stack([whole[i, rows.places[i]] for i in range(len(whole))])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert model(input_ids=rows.inputs).logits.shape == whole.shape


def test_bfloat16_trains_too(text):
    _, told = run(settings(text=text, bf16=True, steps=30, rate=0.01))
    assert told.losses[-1] < 0.8 * told.losses[0]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_kept(text, tmp_path):
    wanted = settings(text=text, checkpoint=2, evaluate=1000)
    model, source = llama(), open_source(wanted)
    torch.manual_seed(0)
    batch = source.batch

    def broken(step):
        if step == 5:
            with torch.no_grad():
                model.model.embed_tokens.weight[:] = math.inf
        return batch(step)

    source.batch = broken
    with pytest.raises(RegardError, match=r"the loss of step 6 is nan.*lower the rate \(0.001\) or clip \(clip 1.0\)"):
        train(model, source, wanted, out=tmp_path)
    assert checkpoint.latest(tmp_path).name == "step-00000004"


def test_it_stops_at_the_target():
    wanted = settings(task="mqar", task_settings={"pairs": 4, "vocabulary": 64}, target=1e-9, steps=1000, held_out=256)
    _, told = run(wanted)
    assert told.ended == "target"
    assert told.step < 1000
    assert told.step % 5 == 0
    assert told.final["accuracy"] >= 1e-9


def test_what_is_saved(text, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = settings(text=text, model={"layers": 1})
    model, told = run(wanted, tmp_path)
    save(model, open_source(wanted), wanted, told, tmp_path, {"device": "cpu"})
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    said = "naïve 12 \n\t\x00 日本"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(said)["input_ids"] == list(said.encode())
    assert tokenizer.decode(list(said.encode())) == said
    read = json.loads((tmp_path / "train.json").read_text())
    assert Settings(**read["settings"]) == wanted
    assert read["device"] == "cpu"
    assert len(read["losses"]) == read["step"] == 12
    assert read["measured"][-1]["loss"] == told.final["loss"]


def change(text, /, **changes):
    return Settings(**kinds(text)["text"].to_json() | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 0.002}, "is of another run: rate was 0.001, now 0.002"),
        ({"batch": 8, "seed": 3}, "batch was 4, now 8; seed was 0, now 3"),
        ({"model": {"layers": 2}}, "model.layers was None, now 2"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(text, tmp_path, changes, said):
    run(kinds(text)["text"], tmp_path, asked=after(2))
    model = llama(seed=4)
    before = weights(model)
    with pytest.raises(RegardError) as refused:
        train(model, open_source(change(text, **changes)), change(text, **changes), out=tmp_path, resume=True)
    assert said in str(refused.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_may_change_when_a_run_goes_on(text, tmp_path):
    wanted = kinds(text)["text"]
    run(wanted, tmp_path / "run", asked=after(2))
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT)
    _, told = run(change(text, text=str(moved), checkpoint=1), tmp_path / "run", resume=True)
    assert told.step == 12
    moved.write_text(TEXT + "more")
    with pytest.raises(RegardError, match=r"is of another run: tokens was .*digest was"):
        run(change(text, text=str(moved)), tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_layout_is_refused(text, tmp_path):
    wanted = kinds(text)["text"]
    run(wanted, tmp_path, asked=after(2))
    for model, said in (
        (llama(layers=2), r"layout: model\.layers\.1\..* is absent there and float32 \[.*\] in this model"),
        (llama(width=64), r"model.embed_tokens.weight is float32 \[256, 32\] there and float32 \[256, 64\]"),
        (llama().double(), r"is float32 \[256, 32\] there and float64 \[256, 32\]"),
    ):
        with pytest.raises(RegardError, match=said):
            train(model, open_source(wanted), wanted, out=tmp_path, resume=True)


def test_damaged_checkpoints_are_refused(text, tmp_path):
    wanted = kinds(text)["text"]
    run(wanted, tmp_path, asked=after(2))
    folder = checkpoint.latest(tmp_path)
    state, tensors = folder / "state.json", folder / "tensors.safetensors"
    told, data = state.read_text(), tensors.read_bytes()
    for path, content, said in (
        (tensors, data[:-1] + b"?", "is damaged: tensors.safetensors is not the file that was written"),
        (state, told[:-5].encode(), "cannot be read"),
        (state, json.dumps({"format": 1}).encode(), "state.json does not say about, device"),
        (state, told.replace('"format": 1', '"format": 2').encode(), "has format 2, this version reads 1"),
        (
            state,
            told.replace('"device": "cpu"', '"device": "cuda"').encode(),
            "written on 'cuda', this run is on 'cpu'",
        ),
    ):
        state.write_text(told)
        tensors.write_bytes(data)
        path.write_bytes(content)
        with pytest.raises(RegardError, match=said):
            run(wanted, tmp_path, resume=True)
    tensors.unlink()
    with pytest.raises(RegardError, match="cannot be read"):
        run(wanted, tmp_path, resume=True)


def test_a_folder_with_a_run_is_not_begun_anew(text, tmp_path):
    wanted = kinds(text)["text"]
    run(wanted, tmp_path, asked=after(2))
    with pytest.raises(RegardError, match=r"holds a run already \(step-00000002\): resume it, or name another folder"):
        run(wanted, tmp_path)


def test_tokens_that_the_model_does_not_know(text):
    wanted = kinds(text)["text"]
    with pytest.raises(RegardError, match="the data have 256 different tokens, the model embeds 100"):
        train(llama(vocabulary=100), open_source(wanted), wanted)


def test_rows_of_a_text():
    """In one reading every row comes once, rows never overlap, and the last tenth is never trained on."""
    wanted = settings(text="-", length=10, batch=4)
    source = TextRows(torch.arange(1000), 1000, wanted)
    assert source.rows == 89
    readings = [[], [], []]
    for step in range(3 * 89 // 4):
        for place, row in enumerate(source.batch(step).inputs.tolist(), 4 * step):
            assert row == list(range(row[0], row[0] + 10))
            assert row[-1] < 900
            readings[place // 89].append(row[0])
    offsets = [reading[0] % 10 for reading in readings]
    assert len(set(offsets)) > 1
    for reading, offset in zip(readings[:2], offsets, strict=False):
        assert sorted(reading) == [offset + 10 * i for i in range(89)]
        assert reading != sorted(reading)
    assert sorted(source.held_out().inputs[:, 0].tolist()) == [900, 945, 990]
    with pytest.raises(RegardError, match="the text has 28 tokens; rows of 10 need at least 29"):
        TextRows(torch.arange(28), 1000, wanted)
    assert TextRows(torch.arange(29), 1000, wanted).batch(3).inputs.shape == (4, 10)


def test_rows_of_a_task_are_fresh_and_held_out_ones_are_the_same_for_every_seed():
    sources = [open_source(settings(task="copy", task_settings={"lag": 3}, seed=seed)) for seed in (0, 1)]
    assert all(isinstance(source, TaskRows) for source in sources)
    batches = [source.batch(step).inputs for source in sources for step in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
    assert torch.equal(sources[0].held_out().inputs, sources[1].held_out().inputs)
    assert not torch.equal(sources[0].held_out().inputs[:1], batches[0][:1])


@pytest.mark.slow
def test_a_hybrid_learns_recall_and_one_that_sees_no_pairs_does_not():
    """Two layers without MLPs on four pairs of 32 tokens, V = 128, a smaller task than the sheet's smallest."""
    from regard.models.hybrid import HybridConfig, HybridForCausalLM

    scores = {}
    for mixers, window in ((["delta_net", "softmax"], None), (["softmax", "softmax"], 2)):
        torch.manual_seed(0)
        options = {"softmax": {"rope": False, "window": window}}
        config = HybridConfig(
            vocab_size=128, hidden_size=64, mixers=mixers, num_attention_heads=1, mlp="none", mixer_options=options
        )
        wanted = Settings(
            task="mqar", length=32, task_settings={"pairs": 4, "vocabulary": 128}, batch=64, steps=300, rate=5e-3,
            evaluate=50, held_out=256, target=0.99, warmup=0.33,
        )  # fmt: skip
        told = train(HybridForCausalLM(config), open_source(wanted), wanted)
        scores[mixers[0]] = told.final["accuracy"]
    assert scores["delta_net"] >= 0.99
    # Windows of two see a query's own pair nowhere: guessing among the four values is all that is left.
    assert scores["softmax"] < 0.35
