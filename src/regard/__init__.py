"""regard: change how a pretrained model pays attention, and choose the change by measurement.

The names below are loaded when first used: importing `regard` imports neither torch nor
transformers, and registers and patches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.core.errors import RegardError as RegardError
    from regard.core.pattern import Pattern as Pattern
    from regard.ops.attention import attend as attend
    from regard.ops.explain import explain as explain
    from regard.ops.recurrence import scan as scan
    from regard.primitives.merge import merge as merge
    from regard.recipes.attach import attach as attach
    from regard.recipes.recipe import Recipe as Recipe
    from regard.recipes.recipe import place as place
    from regard.search.study import search as search

__version__ = "0.1.0"

# Name -> the module that defines it. At most ten (tests/rules).
_NAMES = {
    "attach": "regard.recipes.attach",
    "attend": "regard.ops.attention",
    "explain": "regard.ops.explain",
    "scan": "regard.ops.recurrence",
    "merge": "regard.primitives.merge",
    "place": "regard.recipes.recipe",
    "Recipe": "regard.recipes.recipe",
    "Pattern": "regard.core.pattern",
    "search": "regard.search",
    "RegardError": "regard.core.errors",
}

__all__ = ["Pattern", "Recipe", "RegardError", "attach", "attend", "explain", "merge", "place", "scan", "search"]


def __getattr__(name: str) -> Any:
    """Load one of the public names."""
    if name not in _NAMES:
        raise AttributeError(f"module 'regard' has no attribute {name!r}; public names: {', '.join(sorted(_NAMES))}")
    module = import_module(_NAMES[name])
    # `regard.search` is a package that can be called, so that it stays itself once it is imported.
    value = module if name == "search" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
