"""Constraints and objectives as users write them: `"bytes<=0.4"`, `"recall>=0.9"`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from regard.core.errors import RegardError, choose
from regard.measure.measure import SCORES

_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Constraint:
    """`name sign bound`, `name` being one of `measure.SCORES`."""

    name: str
    sign: str
    bound: float

    def violation(self, scores: Mapping[str, float]) -> float:
        """How far `scores` lie beyond the bound; at most 0 where they meet it, inf if not measured."""
        value = scores.get(self.name, math.nan)
        if math.isnan(value):
            return math.inf
        beyond = value - self.bound if self.sign[0] == "<" else self.bound - value
        # A strict bound that is exactly reached is not met; the smallest positive number says so.
        return math.ulp(0.0) if beyond == 0 and len(self.sign) == 1 else beyond

    def met(self, scores: Mapping[str, float]) -> bool:
        """Whether `scores` meet it."""
        return self.violation(scores) <= 0

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"


def parse(written: str) -> Constraint:
    """Read one constraint.

    Raises:
        RegardError: it has another form, names no known score, or can never bind as written.
    """
    found = _FORM.fullmatch(written)
    if found is None:
        raise RegardError(f"constraint {written!r} has not the form name<=number, such as 'bytes<=0.4'")
    name = choose("score in a constraint", found[1], SCORES)
    constraint = Constraint(name, found[2], float(found[3]))
    larger = SCORES[name][1]
    if larger != (constraint.sign[0] == ">"):
        right = ">=" if larger else "<="
        raise RegardError(
            f"constraint {written!r} bounds {name} from the wrong side: {'larger' if larger else 'smaller'} is "
            f"better; did you mean '{name}{right}{constraint.bound:g}'?"
        )
    return constraint


def parse_all(written: str | Iterable[str]) -> list[Constraint]:
    """Read several constraints; a string may hold some, separated by commas.

    Raises:
        RegardError: one cannot be read, or two bound the same score.
    """
    texts = [written] if isinstance(written, str) else list(written)
    found = [parse(part) for text in texts for part in text.split(",") if part.strip()]
    names = [c.name for c in found]
    for name in names:
        if names.count(name) > 1:
            both = " and ".join(repr(str(c)) for c in found if c.name == name)
            raise RegardError(f"{name} is bounded more than once: {both}")
    return found


def objectives(written: Sequence[str]) -> list[str]:
    """Check the names of objectives.

    Raises:
        RegardError: none, an unknown one, or one twice.
    """
    names = [choose("objective", name, SCORES) for name in written]
    if not names or len(set(names)) != len(names):
        raise RegardError(f"objectives must be one or more different scores, not {list(written)}")
    return names
