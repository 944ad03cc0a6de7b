"""What the README and the site tell a user to type works."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from regard.models import pretrained
from terminal import QUICK_MEASURE, QUICK_SEARCH, QUICK_TRAIN

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/quickstart.md", "docs/concepts.md", "docs/commands.md"]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """Every line that starts with `regard` in a shell block or an indented block, in order."""
    return re.findall(r"^(?: {4})?(regard [^\n]*)$", text_of(page), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_snippets(page, demo, tmp_path, monkeypatch):
    """The page's Python blocks run one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
        exec(compile(block, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands(page, regard_command, tiny_folder, tmp_path, monkeypatch):
    """The page's commands run in order in one folder: on a tiny model instead of `demo`, with short windows."""
    monkeypatch.chdir(tmp_path)
    short = pretrained.demo_text()[:60_000]
    (tmp_path / "book.txt").write_text(short, encoding="utf-8")
    monkeypatch.setattr(pretrained, "demo_folder", lambda: tiny_folder)
    monkeypatch.setattr(pretrained, "demo_text", lambda: short)
    for command in _in_order(page):
        words = shlex.split(command, comments=True)[1:]
        words += {"search": QUICK_SEARCH, "measure": QUICK_MEASURE, "train": QUICK_TRAIN}.get(words[0], [])
        done = regard_command(*words)
        assert done.code == 0, f"{command}: {done.err}"


def _in_order(page):
    """A page that uses a recipe without saying how it is made continues the README's search."""
    found = commands(page)
    if any("demo-out/recipe.yaml" in c for c in found) and not any(c.startswith("regard search") for c in found):
        found.insert(0, next(c for c in commands("README.md") if c.startswith("regard search")))
    return found


def test_readme_shows_every_command(regard_command):
    listed = re.findall(r"^\W*([a-z]+) {2,}[A-Z]", regard_command("--help").out, re.MULTILINE)
    assert {"list", "show", "search", "measure", "run", "explain"} <= set(listed)
    for name in listed:
        assert f"regard {name}" in text_of("README.md")


def test_make_targets_exist():
    """Every `make X` in the documents is a target."""
    makefile = text_of("Makefile")
    for page in [*PAGES, "CONTRIBUTING.md"]:
        for target in re.findall(
            r"make ([a-z]+)\b", " ".join(re.findall(r"`make \w+`|^ {4}make \w+", text_of(page), re.M))
        ):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_make_demo_is_a_command_of_the_readme():
    """`make demo` runs what the README shows, so that its test covers it."""
    recipe = re.search(r"^demo:.*\n\t(.*)$", text_of("Makefile"), re.MULTILINE).group(1)
    assert recipe.replace("$(BIN)/", "") in commands("README.md")


def test_extras_exist():
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for page in PAGES:
        for written in re.findall(r"regard\[([\w,]+)\]", text_of(page)):
            assert set(written.split(",")) <= set(extras)


def test_links_lead_somewhere():
    for page in [*PAGES, "CONTRIBUTING.md", "docs/index.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", text_of(page)):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_readme_is_two_screens():
    assert len(text_of("README.md").splitlines()) <= 120


def test_map_is_up_to_date():
    import sys

    done = subprocess.run([sys.executable, ROOT / "tools" / "map.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
