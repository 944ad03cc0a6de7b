"""A missing extra is named with the command that installs it."""

import json

import pytest

from regard.core import extras
from regard.core.errors import RegardError


def test_present():
    assert extras.need("json") is json


def test_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(RegardError, match=r"'optuna'.*pip install 'regard\[search\]'"):
        extras.need("optuna")
    with pytest.raises(RegardError, match="pip install surely_absent"):
        extras.need("surely_absent.part")
