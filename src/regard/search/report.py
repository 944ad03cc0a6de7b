"""The report: one self-contained HTML file, readable without a network."""

from collections.abc import Mapping
from typing import Any

from regard.core.pages import fill


def render(study: Mapping[str, Any]) -> str:
    """The report on `study` (`Study.to_json()`)."""
    name = study.get("facts", {}).get("model", {}).get("name", "model")
    title = f"{name.rstrip('/').rpartition('/')[2]} · regard"
    return fill("regard.search", "report", title=title, brand="search report", data=study)
