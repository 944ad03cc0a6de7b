"""Choosing what goes where by measurement, under a budget of bytes, seconds or quality."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """`regard.search` is both this package and the verb: importing the package must not hide the verb."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """`regard.search.study.search`."""
        from regard.search.study import search  # needs the extra `search`; the package alone does not

        return search(*args, **options)


sys.modules[__name__].__class__ = _Callable
