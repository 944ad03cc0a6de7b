"""The mechanism in CONTRIBUTING.md works as printed, in two files and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with the two files of the example in it."""
    target = tmp_path_factory.mktemp("contributing")
    for folder in ("src", "tests", "docs", "tools"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"`((?:src|tests)/\S+?\.py)`.*?```python\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in files] == ["src/regard/ops/masks/dilated.py", "tests/ops/masks/test_dilated.py"]
    for name, code in files:
        (target / name).write_text(code, encoding="utf-8")
    return target


def run(copy, *words):
    # The copy's package, not the installed one; and no cache of the checkout's.
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(copy):
    assert "dilated" in run(copy, "-m", "regard.cli", "list")


def test_its_test_and_the_rules_pass(copy):
    tests = ["tests/ops/masks/test_dilated.py", "tests/rules/test_layout.py"]
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "dilated")
    # Its own test, and the rules on both files and on the card.
    assert int(re.search(r"(\d+) passed", out).group(1)) >= 7, out


def test_it_is_clean(copy):
    ruff = pytest.importorskip("ruff")
    assert ruff
    run(copy, "-m", "ruff", "check", "src/regard/ops/masks/dilated.py", "tests/ops/masks/test_dilated.py")


@pytest.mark.slow
def test_the_contract_suite_finds_it(copy):
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts", "-k", "dilated and llama")
    assert re.search(r"[1-9]\d* passed", out)
