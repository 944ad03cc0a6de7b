"""`import regard` costs nothing and changes nothing; imports only go down."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import regard

ROOT = Path(__file__).parents[2]


def fresh(code):
    """Run `code` in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = ["torch", "transformers", "optuna", "plotly", "typer", "rich", "yaml", "safetensors", "numpy"]
    assert fresh(f"import sys, regard; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_listing_mechanisms_needs_no_torch():
    assert fresh("import sys; from regard import catalog; catalog.entries(); print('torch' in sys.modules)") == "False"


def test_import_registers_nothing():
    """Even with every public name loaded, transformers' registries are as they were."""
    code = """
import torch, transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
before = sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)
call = torch.nn.Module.__call__, transformers.PreTrainedModel.from_pretrained.__func__
import regard
names = [getattr(regard, name) for name in regard.__all__]
after = sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)
print(before == after, call == (torch.nn.Module.__call__, transformers.PreTrainedModel.from_pretrained.__func__))
"""
    assert fresh(code) == "True True"


@pytest.mark.slow
def test_import_time():
    """`import regard` adds at most 0.2 s to `import torch` (median of 5, torch already imported)."""
    code = "import torch, time; t = time.perf_counter(); import regard; print(time.perf_counter() - t)"
    assert statistics.median(float(fresh(code)) for _ in range(5)) < 0.2


def test_at_most_ten_names():
    assert len(regard.__all__) <= 10
    assert sorted(regard.__all__) == sorted(regard._NAMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match="public names"):
        regard.atach  # noqa: B018


def test_public_names_resolve_and_search_stays_callable():
    code = """
import regard, regard.search.study
print(all(callable(getattr(regard, name)) for name in regard.__all__))
"""
    assert fresh(code) == "True"


def test_contracts_of_imports():
    pytest.importorskip("importlinter")
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
