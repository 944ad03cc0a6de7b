"""The report: one self-contained HTML file, readable without a network."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def render(study: Mapping[str, Any]) -> str:
    """The report on `study` (`Study.to_json()`): the template with its style, script and data put in."""
    return "stub"
