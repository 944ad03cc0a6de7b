"""The report: one self-contained HTML file, readable without a network."""

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def render(study: Mapping[str, Any]) -> str:
    """The report on `study` (`Study.to_json()`): the template with its style, script and data put in."""
    folder = files("regard.search") / "template"
    page = (folder / "report.html").read_text(encoding="utf-8")
    name = study.get("facts", {}).get("model", {}).get("name", "model")
    parts = {
        "TITLE": html.escape(f"{name.rstrip('/').rpartition('/')[2]} · regard"),
        "STYLE": (folder / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (folder / "report.js").read_text(encoding="utf-8"),
        "DATA": embed(study),
    }
    # Split once, so that nothing inside a part is taken for another placeholder.
    pieces = page.split("%%")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def embed(data: Any) -> str:
    """JSON that may stand inside a `<script>` element: no `<`, `>` or `&`, whatever the strings hold."""
    # NaN and infinities are not JSON: JSON.parse would refuse the whole report for one of them.
    text = json.dumps(_finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if data - data == 0 else None
    if isinstance(data, Mapping):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(v) for v in data]
    return data
