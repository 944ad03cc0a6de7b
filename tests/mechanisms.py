"""Mechanisms made up for tests, in a folder of their own, that `bind` finds as it finds those of the package."""

from regard import catalog

HEAD = '''"""Made up."""

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern

CARD = Card(
    title="{stem}",
    arxiv=None,
    sheet=None,
    implements="",
    exact=False,
    saving="{saving}",
    whole_model={whole},
    options={{"n": Option(default={default}, search={values}, doc="")}},
)


'''
KEEP = """def keep(where, *, n):
    return Pattern.window(8 * n)
"""
ALLOW = """def allow(where, *, n):
    return Pattern.window(8 * n)
"""
ENCODE = """def encode(where, *, n):
    return None, None
"""
# Stands on models of seven layers only.
PICKY = """def allow(where, *, n):
    if where.layers != 7:
        raise RegardError(f"'picky' needs 7 layers, this model has {where.layers}")
    return Pattern.window(n)
"""
# Its default cannot be served, its other values can.
ODD = """def allow(where, *, n):
    if n == 1:
        raise RegardError("'odd' needs n of at least 2")
    return Pattern.window(8 * n)
"""
FAKES = {
    "cache/hoard": (KEEP, "memory", False, (4, 6)),
    "cache/miser": (KEEP, "memory", False, (1, 2)),
    "cache/cipher": (ENCODE, "memory", False, (1, 2)),
    "masks/planner": (ALLOW, "memory", True, (4, 5)),
    "masks/picky": (PICKY, "memory", False, (4, 6)),
    "masks/odd": (ODD, "memory", False, (1, 2, 3)),
}


def install(root, monkeypatch):
    """Write the mechanisms of `FAKES` under `root`, and let the catalog find them; returns them by stem."""
    for name, (verb, saving, whole, values) in FAKES.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = HEAD.format(stem=path.stem, saving=saving, whole=whole, values=values, default=values[0])
        path.write_text(head + verb, encoding="utf-8")
    known = catalog.entries(root)
    monkeypatch.setattr(catalog, "entries", lambda *roots: known)
    return {path.rpartition("/")[2]: known[path.rpartition("/")[2]] for path in FAKES}
