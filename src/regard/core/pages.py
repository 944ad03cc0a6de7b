"""Pages of one file, readable without a network: a template with its style, script and data put in."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def fill(package: str, name: str, **parts: str) -> str:
    """`template/<name>.html` of `package`, with `.css`, `.js` and `parts` where it says `%%STYLE%%` and the like.

    Args:
        package: whose folder `template` holds the three files.
        name: their stem.
        parts: what else it names, lower case here; HTML, escaped by the caller.
    """
    folder = files(package) / "template"
    page, style, script = ((folder / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    known = {"STYLE": style, "SCRIPT": script} | {part.upper(): text for part, text in parts.items()}
    # Split once, so that nothing inside a part is taken for another placeholder.
    return "".join(known[piece] if i % 2 else piece for i, piece in enumerate(page.split("%%")))


def embed(data: Any) -> str:
    """JSON that may stand inside a `<script>` element: no `<`, `>` or `&`, whatever the strings hold."""
    # NaN and infinities are not JSON: JSON.parse would refuse the whole page for one of them.
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
