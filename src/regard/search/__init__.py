"""Choosing what goes where by measurement, under a budget of bytes, seconds or quality.

`regard.search(model, tokenizer, text, ...)` calls `regard.search.study.search`: the package can be
called, so that the name stays itself once the package is imported.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        """See `regard.search.study.search`."""
        from regard.search.study import search

        return search(*args, **settings)


sys.modules[__name__].__class__ = _Callable
