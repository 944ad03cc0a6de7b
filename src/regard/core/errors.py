"""Errors a user can cause, and the hint that ends each of them."""

import difflib
from collections.abc import Iterable


class RegardError(ValueError):
    """Something the user wrote cannot be done; the message names it and the nearest valid choice."""


def choose(kind: str, name: object, choices: Iterable[str]) -> str:
    """Return `name` if it is one of `choices`, else raise naming the nearest of them.

    Raises:
        RegardError: `name` is not in `choices`.
    """
    names = sorted(choices)
    if name in names:
        return str(name)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RegardError(f"unknown {kind} {name!r}; known: {', '.join(names) or 'none'}.{hint}")
