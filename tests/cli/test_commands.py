"""The commands that run a model, on a tiny one: what they print, and how they refuse."""

import json

import pytest

import mechanisms
import regard
from regard.models.pretrained import demo_text
from terminal import QUICK_MEASURE, QUICK_SEARCH


@pytest.fixture
def recipe(tmp_path):
    recipe = regard.Recipe([regard.place("streaming", sink=2, window=8), regard.place("saw_int4")], note="a note")
    return recipe.save(tmp_path / "recipe.yaml")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(demo_text()[:60_000], encoding="utf-8")
    return path


def test_explain(regard_command, tiny_folder, recipe):
    done = regard_command("explain", tiny_folder, "--recipe", recipe)
    assert done.code == 0, done.err
    assert "layers 0-1" in done.out
    told = json.loads(regard_command("explain", tiny_folder, "--recipe", recipe, "--json").out)
    assert told["note"] == "a note"
    assert "\n".join(told["lines"]) == done.out.strip()


@pytest.fixture
def clashing(tmp_path, regard_command, monkeypatch):
    """A recipe of which two placements clash, and one cannot be served at all."""
    fakes = mechanisms.install(tmp_path / "ops", monkeypatch)
    placed = [regard.place(fakes[stem].stem) for stem in ("hoard", "picky", "miser")]
    return regard.Recipe(placed).save(tmp_path / "clashing.yaml")


def test_explain_says_why_a_recipe_cannot_be_served(regard_command, tiny_folder, clashing):
    done = regard_command("explain", tiny_folder, "--recipe", clashing)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "cannot be served on LlamaForCausalLM: placement 1 picky: 'picky' needs 7 layers" in done.err
    assert "(and 1 more)" in done.err
    assert "0 hoard + 2 miser" in done.out
    assert "both keep layer 0 head 0" in " ".join(done.out.split())
    done = regard_command("explain", tiny_folder, "--recipe", clashing, "--json")
    assert done.code == 2
    refused = json.loads(done.out)["refused"]
    assert [fault["placements"] for fault in refused] == [[1], [0, 2]]


def test_explain_a_set_of_mechanisms(regard_command, tiny_folder, clashing):
    done = regard_command("explain", tiny_folder, "--with", "hoard", "--with", "saw_int4", "--with", "streaming_llm")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()[1:]]
    assert [line[-1] for line in lines] == ["yes"] * 7
    assert " ".join(lines[-1]) == "hoard + saw_int4 + streaming yes"
    words = ("explain", tiny_folder, "--with", "hoard", "--with", "miser", "--with", "picky", "--with", "duo")
    done = regard_command(*words)
    assert done.code == 1
    told = {tuple(a["mechanisms"]): a["reason"] for a in json.loads(regard_command(*words, "--json").out)}
    assert told["duo",] is None
    assert told["picky",] == "'picky' needs 7 layers, this model has 2"
    assert all("both keep" in told[pair] for pair in (("hoard", "miser"), ("hoard", "duo"), ("miser", "duo")))
    assert len(told) == 7
    assert "'picky' needs 7 layers" in done.out


def test_run(regard_command, tiny_folder, recipe):
    words = ("run", tiny_folder, "--recipe", recipe, "--prompt", "One two three", "--max-new-tokens", 4)
    done = regard_command(*words)
    assert done.code == 0, done.err
    assert "of dense bf16" in done.err
    told = json.loads(regard_command(*words, "--json").out)
    assert told["text"] == done.out.removesuffix("\n")
    assert 0 < told["bytes"]["stored"] < told["bytes"]["dense"]
    assert told["bytes"]["length"] == told["prompt_tokens"] + told["new_tokens"] - 1


def test_run_raw_and_with_a_text(regard_command, tiny_folder, recipe, text):
    words = ("run", tiny_folder, "--recipe", recipe, "--prompt", "Hello", "--max-new-tokens", 1, "--json", "--raw")
    alone = json.loads(regard_command(*words).out)["prompt_tokens"]
    assert alone < 4
    text.write_text("Some words before.", encoding="utf-8")
    assert json.loads(regard_command(*words, "--text", text).out)["prompt_tokens"] > alone


def test_measure(regard_command, tiny_folder, recipe, text):
    words = ("measure", tiny_folder, "--recipe", recipe, "--text", text, *QUICK_MEASURE)
    told = json.loads(regard_command(*words, "--json").out)
    assert {"kl", "top1", "perplexity", "bytes", "prefill", "decode", "recall"} <= set(told["scores"])
    assert told["scores"]["kl"] > 0
    done = regard_command(*words)
    assert done.code == 0, done.err
    assert "KL to dense" in done.out


@pytest.mark.slow
def test_search_then_continue(regard_command, tiny_folder, text, tmp_path):
    out = tmp_path / "out"
    words = ["search", tiny_folder, "--text", text, "--out", out, *QUICK_SEARCH]
    done = regard_command(*words, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["chosen"] is not None
    for name in ("recipe.yaml", "report.html", "study.json", "study.db"):
        assert (out / name).is_file()
    regard.Recipe.load(out / "recipe.yaml")
    again = json.loads(regard_command(*words, "--json").out)
    assert [row["placements"] for row in again["rows"]] == [row["placements"] for row in told["rows"]]


@pytest.mark.slow
def test_search_that_nothing_satisfies_exits_with_1(regard_command, tiny_folder, text, tmp_path):
    words = ["search", tiny_folder, "--text", text, "--out", tmp_path / "out", "--constraint", "bytes<=0.01"]
    done = regard_command(*words, *QUICK_SEARCH)
    assert done.code == 1, done.err
    assert "nothing on the front meets bytes<=0.01" in " ".join(done.err.split())
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "MODEL", "--recipe", "absent.yaml"], "absent.yaml"),
        (["explain", "MODEL"], "--recipe FILE, or mechanisms with --with STEM"),
        (["explain", "MODEL", "--recipe", "RECIPE", "--with", "duo"], "--recipe FILE, or mechanisms"),
        (["explain", "MODEL", "--with", "doo"], "Did you mean 'duo'"),
        (["explain", "./absent", "--recipe", "RECIPE"], "no folder './absent'"),
        (["explain", "MODEL", "--recipe", "RECIPE", "--dtype", "float31"], "Did you mean 'float32'"),
        (["explain", "MODEL", "--recipe", "RECIPE", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["run", "MODEL", "--recipe", "RECIPE", "--prompt", " "], "the prompt is empty"),
        (["measure", "MODEL", "--recipe", "RECIPE"], "--text FILE"),
        (["measure", "MODEL", "--recipe", "RECIPE", "--text", "absent.txt"], "does not exist"),
        (["measure", "MODEL", "--recipe", "RECIPE", "--text", "TEXT", "--context", "99999"], "tokens"),
        (["search", "MODEL", "--text", "TEXT", "--constraint", "bites<=0.4"], "Did you mean 'bytes'"),
        (["search", "MODEL", "--text", "TEXT", "--constraint", "bytes"], "name<=number"),
        (["search", "MODEL", "--text", "TEXT", "--set", "contxt=5"], "Did you mean 'context'"),
        (["search", "MODEL", "--text", "TEXT", "--set", "context"], "NAME=VALUE"),
        (["search", "MODEL", "--text", "TEXT", "--mechanism", "doo"], "Did you mean 'duo'"),
    ],
)
def test_refusals_are_one_line_and_status_2(
    regard_command, tiny_folder, recipe, text, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    known = {"MODEL": tiny_folder, "RECIPE": recipe, "TEXT": text}
    done = regard_command(*(known.get(word, word) for word in words))
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert said in done.err
