"""Which mechanisms there are: reads the card of every file in `ops/<site>/`, importing none of them.

A card is one literal (`CARD = Card(...)`), so it can be read from the text. Nothing is registered and
no list is kept: a new file is known by standing in its folder.
"""

import ast
import functools
import importlib
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose

# Site -> the verbs a file there may define (docs/design.md, "Mechanism file").
VERBS = {
    "masks": ("allow", "pattern", "attend"),
    "cache": ("keep", "encode"),
    "qkv": ("prepare",),
    "sparsity": ("select", "attend"),
    "scores": ("rescore", "watch"),
    "probabilities": ("reweigh", "watch", "rewrite"),
    "heads": ("mix",),
    "residual": ("write",),
    "depth": ("skip", "feed"),
    "tokens": ("drop",),
    "logits": ("contrast",),
    "parameters": ("edit",),
    "states": ("scan",),
    "schedules": ("attend",),
    "objectives": ("penalty",),
    "views": ("show",),
}
# Verbs that a user calls and that are not bound to a layer -> why a recipe cannot place a mechanism that has one.
CALLED = {
    "scan": "replaces the product of queries, keys and values, so it cannot be attached to weights trained for softmax",
    "pattern": "needs a grid or the types of the tokens, which no recipe knows, so it cannot be attached",
    "attend": "is a whole attention of its own, so it cannot be attached",
    "penalty": "is added to a loss, so it cannot be attached",
    "show": "chooses what of an image is shown to a model, so it cannot be attached",
    "rewrite": "takes whole maps of probabilities, which attached layers never build, so it cannot be attached",
}

OPS = Path(__file__).parent / "ops"
LAYERS = Path(__file__).parent / "layers"
_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}


@dataclass(frozen=True)
class Entry:
    """One mechanism: where it stands, what its card says, and the verbs of its site that it defines."""

    stem: str
    site: str
    card: Card
    path: Path
    module: str
    verbs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The unambiguous name, `site/stem`."""
        return f"{self.site}/{self.stem}"

    @property
    def attachable(self) -> bool:
        """Whether a recipe can give it to a pretrained model."""
        return not CALLED.keys() & set(self.verbs)

    @property
    def used_by(self) -> str:
        """How it is put to use: by `attaching` it, by `training` a model that has its layer, or by `calling` it."""
        if self.attachable:
            return "attaching"
        return "training" if (LAYERS / self.site / f"{self.stem}.py").is_file() else "calling"

    @property
    def call(self) -> str:
        """The dotted name of the function that one calls where it is not attached."""
        return f"{self.module}.{self.verbs[-1]}"

    def refuse_unattachable(self) -> None:
        """Raise unless a recipe can place it.

        Raises:
            RegardError: it has a verb that is called.
        """
        if self.attachable:
            return
        other = "train a model with it (`regard train`)" if self.used_by == "training" else f"call `{self.call}`"
        why = next(CALLED[verb] for verb in self.verbs if verb in CALLED)
        raise RegardError(f"{self.stem!r} {why}; {other}, or attach another (`regard list`)")


def entries(*roots: Path) -> dict[str, Entry]:
    """Every mechanism by stem, sorted; by `site/stem` where two sites share a stem.

    Args:
        roots: further folders laid out as `ops` is (`<root>/<site>/<stem>.py`).

    Raises:
        RegardError: a card is missing or is not a literal.
    """
    found: dict[str, list[Entry]] = {}
    for root in (OPS, *map(Path, roots)):
        for path in sorted(root.glob("*/*.py")):
            if not path.name.startswith("_"):
                found.setdefault(path.stem, []).append(_read(path, root, path.stat().st_mtime_ns))
    named = {(e.stem if len(group) == 1 else e.name): e for group in found.values() for e in group}
    return dict(sorted(named.items()))


def attachable(*roots: Path) -> dict[str, Entry]:
    """Of `entries`, those that a recipe can give to a pretrained model."""
    return {name: entry for name, entry in entries(*roots).items() if entry.attachable}


def find(name: str, *roots: Path) -> Entry:
    """The mechanism called `name`: its stem, `site/stem`, or an alias on its card.

    Raises:
        RegardError: there is none, or several; names the nearest.
    """
    known = entries(*roots)
    if name in known:
        return known[name]
    hits = [e for e in known.values() if name in (e.stem, e.name, *e.card.aliases)]
    if len(hits) > 1:
        raise RegardError(f"mechanism {name!r} stands at several sites; write {' or '.join(e.name for e in hits)}")
    if hits:
        return hits[0]
    return known[choose("mechanism", name, known)]


def load(name: str, *roots: Path) -> ModuleType:
    """Import the file of mechanism `name`."""
    entry = find(name, *roots)
    if entry.path.is_relative_to(OPS):
        return importlib.import_module(entry.module)
    spec = importlib.util.spec_from_file_location(entry.module, entry.path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(name: str, *roots: Path) -> dict[str, Option]:
    """The options of mechanism `name`."""
    return dict(find(name, *roots).card.options)


def check_options(entry: Entry, written: Mapping[str, Any]) -> dict[str, Any]:
    """Check `written` (options and trained tensors) against the card; returns them, defaults not filled in.

    Whole numbers written for a float become floats, token ids a tuple.

    Raises:
        RegardError: an unknown option, or a value of the wrong kind, out of bounds or not a choice.
    """
    for name in written:
        choose(f"option of {entry.stem!r}", name, entry.card.options)
    return {name: _check(entry.stem, name, entry.card.options[name], value) for name, value in written.items()}


def fill_options(entry: Entry, written: Mapping[str, Any]) -> dict[str, Any]:
    """`check_options`, with the card's defaults for what is not written."""
    defaults = {name: option.default for name, option in entry.card.options.items()}
    return defaults | check_options(entry, written)


def _check(stem: str, name: str, option: Option, value: Any) -> Any:
    where = f"option {name!r} of {stem!r}"
    if value is None and (option.optional or option.default is None):
        return None
    if option.kind == "tensor":
        if not (hasattr(value, "dtype") and hasattr(value, "shape")):
            raise RegardError(f"{where} must be a tensor (it is fitted on text), got {value!r}")
        return value
    if option.kind == "tokens":
        return _tokens(where, value)
    # bool is an int to Python, never to a user.
    if not isinstance(value, _TYPES[option.kind]) or (isinstance(value, bool) and option.kind != "bool"):
        extra = " or none" if option.optional else ""
        raise RegardError(f"{where} must be of kind {option.kind}{extra}, got {value!r}")
    if option.choices and value not in option.choices:
        raise RegardError(f"{where} must be one of {_join(option.choices)}, got {value!r}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_bounds(where, option, value)
        return float(value) if option.kind == "float" else value
    return value


def _tokens(where: str, value: Any) -> tuple[int, ...]:
    ids = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and i is not True and i >= 0 for i in ids):
        raise RegardError(f"{where} must be a list of token ids, whole numbers from 0 up, got {value!r}")
    return tuple(ids)


def _check_bounds(where: str, option: Option, value: float) -> None:
    low = -math.inf if option.low is None else option.low
    high = math.inf if option.high is None else option.high
    if not (math.isfinite(value) and low <= value <= high):
        nearest = "" if not math.isfinite(value) else f"; the nearest is {min(max(value, low), high)}"
        raise RegardError(f"{where} must lie in [{low}, {high}], got {value!r}{nearest}")


def _join(values: Iterable[Any]) -> str:
    return ", ".join(repr(v) for v in values)


@functools.cache
def _read(path: Path, root: Path, changed: int) -> Entry:
    """The mechanism in `path`, read again only after a change."""
    text = path.read_text(encoding="utf-8")
    site = path.parent.name
    verbs = tuple(v for v in VERBS.get(site, ()) if re.search(rf"^def {v}\(", text, re.MULTILINE))
    dotted = f"regard.ops.{site}.{path.stem}" if root == OPS else f"regard_extra_{site}_{path.stem}"
    return Entry(path.stem, site, _card(text, path), path, dotted, verbs)


def _card(text: str, path: Path) -> Card:
    """The card in `text`. Only its own lines are parsed: it ends at the first line that is a lone `)`."""
    start = re.search(r"^CARD = Card\(", text, re.MULTILINE)
    if start is None:
        raise RegardError(f"{path} has no card: expected a line `CARD = Card(` (see CONTRIBUTING.md)")
    end = re.compile(r"^\)", re.MULTILINE).search(text, start.start())
    source = text[start.start() : end.end() if end else None]
    try:
        statement = ast.parse(source).body[0]
        assert isinstance(statement, ast.Assign)
        card = _literal(statement.value)
    except (SyntaxError, ValueError, TypeError) as error:
        raise RegardError(f"the card of {path} is not one literal: {error}") from error
    assert isinstance(card, Card)
    return card


def _literal(node: ast.AST) -> Any:
    """Evaluate a literal in which `Card(...)` and `Option(...)` may be called with keywords."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Card", "Option"):
        if node.args:
            raise ValueError(f"{node.func.id} takes keywords only")
        kind = Card if node.func.id == "Card" else Option
        return kind(**{str(k.arg): _literal(k.value) for k in node.keywords})
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    return ast.literal_eval(node)
