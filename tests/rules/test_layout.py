"""The house rules of layout and size, checked on the files themselves."""

import ast
import re
import sys
from pathlib import Path

import pytest

from regard import catalog

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "regard"
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".html", ".json", ".js", ".css", ""}
SCAN = {"initial_state", "cu_seqlens", "mask", "check", "backend"}
FILE_LINES, OP_LINES, FUNCTION_LINES, FOLDER_FILES = 600, 250, 60, 30


def ours(*folders):
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


PYTHON = ours("src", "tests", "tools", "benchmarks")


def named(paths):
    return {"argvalues": paths, "ids": [str(p.relative_to(ROOT)) for p in paths]}


@pytest.mark.parametrize("path", **named(PYTHON))
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    limit = OP_LINES if path.is_relative_to(SRC / "ops") and path.parent != SRC / "ops" else FILE_LINES
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


def test_two_folder_levels_and_at_most_thirty_files():
    for path in SRC.rglob("*.py"):
        assert len(path.relative_to(SRC).parent.parts) <= 2, path
    for folder in {path.parent for path in SRC.rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= FOLDER_FILES, folder


@pytest.mark.parametrize("path", **named(ours("src")))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no module docstring"


@pytest.mark.parametrize("path", **named([p for p in PYTHON if p.name != Path(__file__).name]))
def test_no_unsafe_reading(path):
    """A recipe or a weights file comes from anywhere: nothing that runs code may read it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & {n.split(".")[0] for n in names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {
                ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch", "load"),
            }  # fmt: skip


def tracked():
    skip = {".git", ".venv", ".venv-floor", "site", "demo-out", "dist", "build", "__pycache__", "node_modules"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(p in skip or p.endswith(("_cache", ".egg-info")) for p in parts) or parts[0] == ".hypothesis"
        if path.is_file() and path.suffix in TEXT and not hidden:
            yield path


def test_no_machine_paths_or_registry_hosts():
    """What is committed must work anywhere: no home folders, scratch folders, mirrors or package hosts."""
    # Written in pieces so that this file passes its own test.
    words = ["/" + "root/", "/" + "work/", "/" + "home/", "/" + "tmp/v", "pypi" + ".org", "download.py" + "torch.org",
             "files.python" + "hosted", "--index" + "-url", "--find" + "-links"]  # fmt: skip
    bad = re.compile("|".join(map(re.escape, words)))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if bad.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", list(catalog.entries()) or ["-"])
def test_every_mechanism_has_a_card_a_verb_and_a_test(name):
    if name == "-":
        pytest.skip("no mechanisms yet")
    entry = catalog.entries()[name]
    assert entry.verbs, f"expected one of {catalog.VERBS.get(entry.site)} in {entry.path.name}"
    assert entry.site in catalog.VERBS
    test = ROOT / "tests" / "ops" / entry.site / f"test_{entry.stem}.py"
    assert test.is_file(), f"{test.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("name", list(catalog.entries()) or ["-"])
def test_card_agrees_with_the_file(name):
    """The card read from the text is the card of the module; options are the verbs' keywords; values are legal.

    Every `scan` takes the keywords of `SCAN` besides, and an `attend` may take a backend.
    """
    if name == "-":
        pytest.skip("no mechanisms yet")
    entry = catalog.entries()[name]
    module = catalog.load(name)
    assert entry.card == module.CARD
    for verb in entry.verbs:
        code = getattr(module, verb).__code__
        keywords = set(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
        shared = SCAN if verb == "scan" else {"backend"} & keywords if verb == "attend" else set()
        assert keywords == set(entry.card.options) | shared, f"{verb} takes {keywords}"
    if entry.card.neutral is not None:
        catalog.check_options(entry, entry.card.neutral)
    for option_name, option in entry.card.options.items():
        for value in (option.default, *option.search):
            if value is not None:
                catalog.check_options(entry, {option_name: value})


def test_stems_are_names_and_aliases_are_free():
    entries = catalog.entries()
    for entry in entries.values():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.stem)
        assert entry.stem not in sys.stdlib_module_names
        for alias in entry.card.aliases:
            assert catalog.find(alias) == entry
