"""Pages of one file, readable without a network: a frame that all share, with a page's own style and script put in."""

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def fill(package: str, name: str, *, title: str, brand: str, data: Any) -> str:
    """The page of `template/<name>.html` (what stands below its title), `.css` and `.js` of `package`.

    The frame in `template/` beside this module comes first: variables and cards of both styles, and the script's `$`,
    `h` and `s`, which make elements.

    Args:
        package: whose folder `template` holds the three files.
        name: their stem.
        title: of the window; escaped here.
        brand: what the page calls itself, behind "regard".
        data: what the script finds as JSON in `$("data")`.
    """
    frame, own = (files(where) / "template" for where in ("regard.core", package))
    read = lambda kind: tuple(  # noqa: E731
        (folder / f"{stem}.{kind}").read_text(encoding="utf-8") for folder, stem in ((frame, "frame"), (own, name))
    )
    page, body = read("html")
    known = {"STYLE": "".join(read("css")), "SCRIPT": "".join(read("js")), "BODY": body}
    known |= {"TITLE": html.escape(title), "BRAND": html.escape(brand), "DATA": embed(data)}
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
