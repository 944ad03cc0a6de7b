"""What each mechanism of a recipe brings: the recipe is measured again without it, everything else kept."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from regard.search.book import name_of
from regard.search.results import Row, Study, costs

Told = Sequence[Mapping[str, Any]]


def stems(placements: Told) -> list[str]:
    """The mechanisms of `placements`, each once, in order."""
    return list(dict.fromkeys(place["mechanism"] for place in placements))


def without(placements: Told, stem: str) -> list[Mapping[str, Any]]:
    """`placements` less mechanism `stem`."""
    return [place for place in placements if place["mechanism"] != stem]


def members(study: Study) -> list[Row]:
    """Rows to explain, the chosen one first: those of several mechanisms on the front where the choice is made."""
    front = study.final_front or study.front
    rows = sorted(front, key=lambda row: row is not study.chosen)
    return [row for row in rows if row.measurement is not None and len(stems(row.placements)) > 1]


def missing(study: Study, known: Iterable[str], most: int) -> Iterator[tuple[str, Told]]:
    """Names and placements of the variants to measure: neither a trial nor in `known`, `most` of them in all."""
    there = {name_of(row.placements) for row in study.rows if row.measurement} | set(known)
    for row in members(study):
        for stem in stems(row.placements):
            told = without(row.placements, stem)
            name = name_of(told)
            if name not in there and most > 0:
                most -= 1
                there.add(name)
                yield name, told


def owes(row: Row, measured: Mapping[str, Mapping[str, Any]], criteria: Sequence[str]) -> dict[str, Any]:
    """What `row` owes to each of its mechanisms, as JSON; mechanisms without a measurement are left out.

    Args:
        row: a member.
        measured: name of placements (`book.name_of`) -> measurement at the trials' length, as JSON; one that
            failed has a `reason` instead.
        criteria: scores to compare in.

    Returns:
        stem -> `without`, the scores of the row less that mechanism; `change`, by how much they differ from the
        row's own; `pays`, whether the row is worse without it in any of `criteria`. Or stem -> `reason`, why that
        could not be measured.
    """
    found: dict[str, Any] = {}
    for stem in stems(row.placements):
        told = measured.get(name_of(without(row.placements, stem)))
        if told is None:
            continue
        if "reason" in told:
            found[stem] = {"reason": told["reason"]}
            continue
        there, here = told["scores"], row.scores
        names = [n for n in criteria if not math.isnan(there.get(n, math.nan)) and n in here]
        found[stem] = {
            "without": {n: there[n] for n in names},
            "change": {n: there[n] - here[n] for n in names},
            "pays": any(a > b for a, b in zip(costs(there, names), costs(here, names), strict=True)),
        }
    return found


def words(owed: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for people, what each mechanism brings: `streaming -41.0 % bytes, +0.0100 KL; saw_int4 ...`."""
    parts = []
    for stem, told in owed.items():
        if "reason" in told:
            parts.append(f"{stem} not known: the rest could not be measured")
            continue
        said = ", ".join(_brought(name, -change) for name, change in told["change"].items())
        parts.append(f"{stem} {said}" + ("" if told["pays"] else " (does not pay)"))
    return "; ".join(parts)


def _brought(name: str, change: float) -> str:
    change += 0.0  # no -0
    if name in ("bytes", "top1", "recall"):
        return f"{100 * change:+.1f} % {name}"
    if name in ("prefill", "decode", "perplexity"):
        return f"{change:+.2f}x {name}"
    return f"{change:+.4f} {name.replace('kl', 'KL')}"
