"""`regard list` and `regard show`, run as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from families import FAMILIES
from regard import catalog
from regard.cli.mechanisms import families_text, support

REGARD = Path(sys.executable).with_name("regard")


def regard(*words):
    return subprocess.run([REGARD, *words], capture_output=True, text=True)


def test_list_names_every_mechanism():
    done = regard("list")
    assert done.returncode == 0
    for name in catalog.entries():
        assert name in done.stdout


def test_list_json():
    listed = json.loads(regard("list", "--json").stdout)
    assert [item["name"] for item in listed] == list(catalog.entries())


@pytest.mark.parametrize("name", list(catalog.entries()))
def test_show(name):
    entry = catalog.entries()[name]
    done = regard("show", name)
    assert done.returncode == 0, done.stderr
    for option in entry.card.options:
        assert option in done.stdout
    assert "families" in done.stdout
    told = json.loads(regard("show", name, "--json").stdout)
    assert told["title"] == entry.card.title
    assert set(told["options"]) == set(entry.card.options)


def test_unknown_mechanism_is_one_line_and_status_2():
    done = regard("show", "streeming")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Did you mean 'streaming'" in done.stderr


@pytest.mark.parametrize("words", [("shwo",), ("show",), ("show", "duo", "--jsn")])
def test_usage_errors_are_status_2(words):
    assert regard(*words).returncode == 2


def test_help():
    assert regard("--help").returncode == 0


def test_every_mechanism_was_tried_on_every_family():
    for entry in catalog.attachable().values():
        if entry.card.needs != "pixels":
            assert set(support(entry)) == set(FAMILIES), "run `make docs`"


def test_families_in_words():
    assert families_text(None).startswith("not tried yet")
    assert families_text({"llama": None, "gpt2": None}) == "all 2"
    answers = {"llama": None, "gpt2": "no rotary positions", "gpt_neox": "one head", "opt": "no rotary positions"}
    said = "1 of 4; refused by gpt2, opt: no rotary positions; refused by gpt_neox: one head"
    assert families_text(answers) == said


def test_show_imports_no_torch():
    code = """
import sys
sys.argv = ["regard", "show", "duo"]
from regard.cli.app import run
try:
    run()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
