"""What a search found: rows, the fronts, the chosen recipe, and the files that hold them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure.measure import SCORES
from regard.search.constraints import Constraint
from regard.search.front import front, spread_out
from regard.search.space import read, words

# What dense is by definition: every score but recall compares with dense itself.
DENSE = {"kl": 0.0, "kl_last_half": 0.0, "kl_worst": 0.0, "top1": 1.0, "perplexity": 1.0, "bytes": 1.0}
DENSE |= {"prefill": 1.0, "decode": 1.0}


@dataclass(frozen=True)
class Row:
    """One trial.

    Args:
        number: the trial's number in the Optuna study.
        placements: as plain JSON (`space.tell`); empty for dense.
        reason: why it could not be measured; None if it was.
        measurement: what was measured at the trial's length, as JSON; None if it failed.
        seconds: wall seconds the trial took.
        final: what was measured again at the final length, as JSON; None if it was not.
        owes: for a member of the final front, what it owes to each mechanism (`attribution.owes`).
    """

    number: int
    placements: Sequence[Mapping[str, Any]]
    reason: str | None
    measurement: Mapping[str, Any] | None
    seconds: float
    final: Mapping[str, Any] | None = None
    owes: Mapping[str, Any] | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Scores at the trial's length; empty if it failed."""
        return dict(self.measurement["scores"]) if self.measurement else {}

    @property
    def final_scores(self) -> dict[str, float]:
        """Scores at the final length; empty if it was not measured there."""
        return dict(self.final["scores"]) if self.final else {}

    @property
    def dense(self) -> bool:
        """Whether nothing is placed: the model as it is."""
        return not self.placements


@dataclass(frozen=True)
class Study:
    """The outcome of a search.

    Args:
        rows: every trial, failed ones included, by number; dense is one of them.
        objectives, constraints: what was asked for.
        layers: the model's layers.
        facts: how it was measured: model, text, windows, machine, versions, repeats.
        tensors: trained tensors of each stem.
        picture: row number -> layer x KV head table (`picture.holdings`).
        shape: layers, heads, kv_heads and head_dim of the model.
        control: dense timed against dense, as JSON.
        interrupted: whether it was stopped before its budget was spent.
        folder: where its files are, None before they are written.
    """

    rows: tuple[Row, ...]
    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    layers: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    picture: Mapping[int, Any] = field(default_factory=dict)
    shape: Mapping[str, int] | None = None
    control: Mapping[str, Any] | None = None
    interrupted: bool = False
    folder: Path | None = None

    @property
    def criteria(self) -> list[str]:
        """What rows are compared in: the objectives, then what only constraints speak of.

        With the latter, a row that meets the constraints is never beaten by one that does not.
        """
        return list(dict.fromkeys([*self.objectives, *(c.name for c in self.constraints)]))

    @property
    def front(self) -> list[Row]:
        """Rows that no other row beats in every criterion at the trials' length, by the first objective."""
        return self._unbeaten([(r, r.scores) for r in self.rows])

    @property
    def final_front(self) -> list[Row]:
        """Rows that no other row beats in every criterion at the final length, dense among them.

        Only rows measured there take part; empty before there are any. The chosen row is one of these.
        """
        return self._unbeaten([(r, self.at_final(r)) for r in self.rows])

    def _unbeaten(self, told: Sequence[tuple[Row, Mapping[str, float]]]) -> list[Row]:
        table = [(costs(scores, self.criteria), r) for r, scores in told if scores]
        found = [table[i] for i in front([cost for cost, _ in table])]
        return [r for _, r in sorted(found, key=lambda item: item[0])]

    def at_final(self, row: Row) -> dict[str, float]:
        """Scores of `row` at the final length; empty if it was not measured there.

        Dense is what the others are measured against there, so it is known without a measurement of its own.
        """
        if row.final or not row.dense:
            return row.final_scores
        finals = [r.final for r in self.rows if r.final]
        known = {n: DENSE[n] for told in finals for n in told["scores"] if n in DENSE}
        recalled = [told["recall"]["dense_recalled"] for told in finals if told.get("recall")]
        return known | ({"recall": recalled[0]} if recalled else {})

    @property
    def contenders(self) -> list[Row]:
        """Recipes measured at the final length; before there are any, those on the front; without, all measured."""
        recipes = [r for r in self.rows if r.measurement is not None and not r.dense]
        finals = [r for r in recipes if r.final]
        return finals or [r for r in self.front if not r.dense] or recipes

    @property
    def chosen(self) -> Row | None:
        """The row to deploy: of the front at the final length, the best that meets all constraints there.

        Best in the first objective that no constraint bounds (in the first, if all are bounded). Before
        anything was measured at the final length, the trials' length decides. Dense is never chosen.
        """
        good = [r for r in self.final_front or self.front if not r.dense and self.meets(r)]
        if not good:
            return None
        bounded = {c.name for c in self.constraints}
        free = [name for name in self.objectives if name not in bounded] or list(self.objectives)
        if not self.constraints:
            return knee(good, self.objectives)
        return min(good, key=lambda r: costs(r.final_scores or r.scores, [free[0], *self.objectives]))

    def meets(self, row: Row) -> bool:
        """Whether `row` meets every constraint, at the final length if it was measured there."""
        scores = row.final_scores or row.scores
        return all(c.met(scores) for c in self.constraints)

    def nearest(self) -> dict[str, tuple[float, int]]:
        """For each constraint the best value among the contenders and the row that has it."""
        found: dict[str, tuple[float, int]] = {}
        for constraint in self.constraints:
            told = [(r.final_scores or r.scores, r.number) for r in self.contenders]
            told = [(scores, number) for scores, number in told if constraint.name in scores]
            if told:
                scores, number = min(told, key=lambda item: constraint.violation(item[0]))
                found[str(constraint)] = (scores[constraint.name], number)
        return found

    def shortfall(self) -> str | None:
        """Why nothing was chosen: how near the front came to the constraints; None if something was."""
        if self.chosen is not None:
            return None
        asked = " and ".join(map(str, self.constraints))
        pool = self.contenders
        if not pool:
            return f"nothing meets {asked}: no trial could be measured" if asked else "no trial could be measured"
        if any(self.meets(r) for r in pool):
            those = f"every recipe that meets {asked}" if asked else "every recipe"
            return f"the model's own attention is as good as {those} in all of {', '.join(self.criteria)}"
        near = min(pool, key=lambda r: distance(self.constraints, r.final_scores or r.scores))
        scores = near.final_scores or near.scores
        values = ", ".join(f"{c.name} {scores[c.name]:.4g}" for c in self.constraints if c.name in scores)
        alone = ", ".join(f"{name}: {value:.4g} (trial {n})" for name, (value, n) in self.nearest().items())
        return f"nothing on the front meets {asked}. Nearest: trial {near.number} with {values}. Best of each: {alone}"

    def placements(self, row: Row) -> list[Placement]:
        """The placements of `row`, trained tensors included."""
        return read(row.placements, self.tensors)

    @property
    def recipe(self) -> Any:
        """The chosen row's `Recipe`.

        Raises:
            RegardError: nothing meets the constraints; says how near the front came.
        """
        if self.chosen is None:
            raise RegardError(self.shortfall() or "no trial could be measured")
        return self.recipe_of(self.chosen)

    def recipe_of(self, row: Row) -> Any:
        """Any row as a `Recipe`, its note telling what was measured."""
        from regard.recipes.recipe import Recipe

        scores = row.final_scores or row.scores
        length = (row.final or row.measurement or {}).get("length", 0)
        told = ", ".join(f"{name} {scores[name]:.4g}" for name in ("kl", "bytes", "decode") if name in scores)
        note = f"{words(row.placements, self.layers)}: {told} at {length:,} tokens (trial {row.number})"
        return Recipe(self.placements(row), note, self.shape)

    def to_json(self) -> dict[str, Any]:
        """Everything but the trained tensors, as plain JSON."""
        chosen, on_front = self.chosen, {r.number for r in self.front}
        on_final_front = {r.number for r in self.final_front}
        return {
            "regard": 1,
            "objectives": list(self.objectives),
            "criteria": self.criteria,
            "constraints": [{"name": c.name, "sign": c.sign, "bound": c.bound} for c in self.constraints],
            "chosen": chosen.number if chosen else None,
            "shortfall": self.shortfall(),
            "nearest": {k: {"value": v, "trial": n} for k, (v, n) in self.nearest().items()},
            "interrupted": self.interrupted,
            "shape": dict(self.shape) if self.shape else None,
            "facts": dict(self.facts),
            "scores": {name: {"doc": doc, "larger": larger} for name, (doc, larger) in SCORES.items()},
            "control": self.control,
            "rows": [
                asdict(r)
                | {
                    "words": words(r.placements, self.layers),
                    "scores": r.scores,
                    "final_scores": self.at_final(r),
                    "dense": r.dense,
                    "front": r.number in on_front,
                    "final_front": r.number in on_final_front,
                    "meets": r.measurement is not None and self.meets(r),
                    "picture": self.picture.get(r.number),
                }
                for r in self.rows
            ],
        }

    def write(self, folder: str | Path) -> "Study":
        """Write `study.json`, `report.html`, `front/*.yaml` and, if one was chosen, `recipe.yaml` into `folder`."""
        from regard.search.report import render

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        told = self.to_json()
        put(folder / "study.json", json.dumps(told, indent=1))
        put(folder / "report.html", render(told))
        for old in [*(folder / "front").glob("trial-*.*"), folder / "recipe.yaml", folder / "recipe.safetensors"]:
            old.unlink(missing_ok=True)  # of an earlier run: must not be taken for this one's
        for row in self.rows:
            if not row.dense and (row.final or row in self.front):
                self.recipe_of(row).save(folder / "front" / f"trial-{row.number:03d}.yaml")
        if self.chosen is not None:
            self.recipe_of(self.chosen).save(folder / "recipe.yaml")
        return replace(self, folder=folder)


def costs(scores: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Scores as costs: those of which more is better change sign; NaN where not measured."""
    return [scores.get(n, float("nan")) * (-1.0 if SCORES[n][1] else 1.0) for n in names]


def distance(constraints: Sequence[Constraint], scores: Mapping[str, float]) -> float:
    """Sum of violations, each relative to its bound; 0 where all are met."""
    return sum(max(c.violation(scores), 0.0) / (abs(c.bound) or 1.0) for c in constraints)


def knee(rows: Sequence[Row], objectives: Sequence[str]) -> Row:
    """The row nearest to the best of every objective, each scaled to the rows' range."""
    table = [costs(r.final_scores or r.scores, objectives) for r in rows]
    low = [min(column) for column in zip(*table, strict=True)]
    high = [max(column) for column in zip(*table, strict=True)]
    away = [
        sum(((x - lo) / ((hi - lo) or 1.0)) ** 2 for x, lo, hi in zip(row, low, high, strict=True)) for row in table
    ]
    return rows[away.index(min(away))]


def members(study: Study, count: int) -> list[Row]:
    """Which rows to measure again, dense left out: at most `count`, from three sources in turn.

    The best row that meets the constraints; the best such row of every other combination of mechanisms,
    because short trials flatter those that drop tokens, and length may turn the order round; then a
    spread of the front, beginning with the row nearest to the constraints. What was already measured again
    has no say, so that a search that is continued asks for the same rows.
    """
    short = replace(study, rows=tuple(replace(r, final=None) for r in study.rows))
    best = short.chosen.number if short.chosen else None
    pool = [r for r in study.rows if r.measurement is not None and not r.dense]
    table = [costs(r.scores, study.objectives) for r in pool]
    away = [distance(study.constraints, r.scores) for r in pool]
    ranked = sorted(range(len(pool)), key=lambda i: (pool[i].number != best, away[i], table[i]))
    picked: dict[frozenset[str], int] = {}
    for i in ranked:
        if study.constraints and away[i] == 0:
            picked.setdefault(frozenset(p["mechanism"] for p in pool[i].placements), i)
    best_at_all = {r.number for r in study.front}
    on_front = [i for i in ranked if pool[i].number in best_at_all]
    head = list(picked.values())[:count] or on_front[:1]
    rows = [pool[i] for i in dict.fromkeys([*head, *on_front])]
    return [rows[i] for i in spread_out([costs(r.scores, study.objectives) for r in rows], range(len(head)), count)]


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
