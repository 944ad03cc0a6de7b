"""`regard.search`: find what to place where, by measuring it.

Trials are drawn by Optuna and measured on short held-out windows; a few of them are measured again at the
final length on other windows, and the choice is made there. Every finished trial is in the storage before
the next begins.
"""

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.adapters.families import open_decoder
from regard.catalog import Entry, attachable, find
from regard.core.errors import RegardError
from regard.measure import text as text_
from regard.measure.measure import SCORES, Measurement
from regard.recipes.legal import Legality, judge
from regard.search import attribution, facts
from regard.search.book import Book, name_of
from regard.search.calibration import Calibration, calibrate, unfittable
from regard.search.picture import holdings
from regard.search.plan import Plan
from regard.search.progress import Screen, Table, figures
from regard.search.results import Row, Study, members
from regard.search.scorer import Measures, Scorer, cut
from regard.search.space import Space, read, words

# Tokens that fits see at most: more would cost minutes and change little.
FIT_TOKENS = 32_768


def search(
    model: Any,
    tokenizer: Any,
    text: str | Path | Tensor,
    *,
    mechanisms: Sequence[str | Entry] | None = None,
    objectives: Sequence[str] = ("kl", "bytes"),
    constraints: Sequence[str] | str = ("bytes<=0.4",),
    trials: int = 24,
    seconds: float | None = None,
    storage: str | Path | None = None,
    study_name: str = "regard",
    out: str | Path | None = "regard-search",
    calibration: Calibration | None = None,
    begin_with: Sequence[Any] = (),
    progress: bool = True,
    measure: Measures | None = None,
    **settings: Any,
) -> Study:
    """Search for placements on `model` that trade quality for bytes and seconds; after Ctrl-C, what was finished.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        text: text to measure on; a `Path` is read; a tensor `[n]` holds token ids.
        mechanisms: names to search over; None: all that save what is asked for, can stand here and can be fitted here.
        objectives: scores to trade off; the first leads (`kl`, `bytes`, `decode`, `prefill`, `recall`, ...).
        constraints: bounds the chosen recipe must meet, such as `"bytes<=0.4"`.
        trials: in all processes together, dense not counted.
        seconds: wall time of this process's trials, measuring some again not counted.
        storage: Optuna storage URL or SQLite file; None: `out/study.db`. Several processes may share it.
        study_name: the study in it; one that exists is continued.
        out: folder for `recipe.yaml`, `front/`, `study.json`, `report.html`; None: nothing is written.
        calibration: what is known beforehand; None: computed, and cached in `out`.
        begin_with: recipes (or lists of placements) of earlier searches, to be tried first.
        progress: show progress on standard error.
        measure: measures in place of the built-in scorer.
        **settings: any other field of `Plan`.

    Raises:
        RegardError: text too short; a named mechanism unknown or impossible here; a study of other settings.
    """
    plan = Plan.of(objectives=objectives, constraints=constraints, trials=trials, seconds=seconds, **settings)
    folder = Path(out) if out is not None else None
    storage = storage or (folder and folder / "study.db")
    if not storage:
        raise RegardError("a search needs a storage: give storage=..., or out=... for an SQLite file")
    tokens, chosen = _tokens(tokenizer, text), _mechanisms(mechanisms, plan)
    parts, run = cut(tokens, plan), _Search(model, plan, folder, progress, tokens)
    run.measure = measure or Scorer(model, tokenizer, parts, plan)
    chosen = run.judge(chosen, named=mechanisms is not None, tensors=calibration.tensors if calibration else {})
    try:
        run.calibration = calibration or run.calibrate(parts.calibration[:FIT_TOKENS], chosen, mechanisms is not None)
        run.open(storage, study_name, chosen, begin_with)
        run.trials()
        run.finals()
        run.attribute()
    except KeyboardInterrupt:
        run.interrupt()
    return run.result()


class _Search:
    """One process's part in a search."""

    measure: Measures
    calibration: Calibration
    book: Book | None = None
    interrupted = False

    def __init__(self, model: Any, plan: Plan, folder: Path | None, progress: bool, tokens: Tensor):
        self.model, self.plan, self.folder = model, plan, folder
        self.decoder = open_decoder(model)
        self.told: dict[str, Any] = {
            "model": facts.model_facts(model),
            "text": facts.text_digest(tokens),
            "tokens": len(tokens),
        }
        self.shape = {name: getattr(self.decoder, name) for name in ("layers", "heads", "kv_heads", "head_dim")}
        self.legal = Legality()
        self.screen = Screen(progress, self.shape["layers"])

    def judge(self, chosen: Sequence[Entry], *, named: bool, tensors: Any) -> list[Entry]:
        """The entries that can stand on the model; which of them can stand together is kept.

        Raises:
            RegardError: one that was `named` cannot, or none can that has something to search.
        """
        self.legal = judge(chosen, self.decoder, tensors)
        for stem, reason in self.legal.alone.items():
            if named:
                raise RegardError(f"{stem!r} cannot stand on this model: {reason}")
        able = [entry for entry in chosen if self.legal.allows(entry.stem)]
        _searchable(able, "; ".join(self.legal.alone.values()))
        return able

    def calibrate(self, tokens: Tensor, chosen: Sequence[Entry], named: bool) -> Calibration:
        """Fit and probe, with a bar; cached in the folder. What cannot be is left out, unless it was `named`.

        Raises:
            RegardError: one that was named cannot be fitted or probed.
        """

        def refuse(stem: str, reason: str) -> None:
            self.legal = dataclasses.replace(self.legal, alone={**self.legal.alone, stem: reason})

        cache = self.folder / "calibration.safetensors" if self.folder else None
        key = f"{self.told['model']['digest']} {facts.text_digest(tokens)}"
        with self.screen.phase("calibrating", None) as bar:
            return calibrate(
                self.model,
                tokens,
                chosen,
                self.shape["layers"],
                cache=cache,
                key=key,
                progress=lambda name, done, total: bar.at(done, total, name),
                refuse=None if named else refuse,
            )

    def open(self, storage: str | Path, name: str, chosen: Sequence[Entry], first: Sequence[Any]) -> None:
        """Open or continue the study; recipes `first` are tried before all else.

        Raises:
            RegardError: it was begun under other settings, calibration left nothing to search, or one of `first`
                cannot be drawn.
        """
        chosen = [entry for entry in chosen if self.legal.allows(entry.stem)]
        _searchable(chosen, "; ".join(self.legal.alone.values()))
        known = self.calibration
        space = Space(tuple(chosen), self.shape["layers"], known.order(), known.tensors, self.legal)
        larger = [SCORES[o][1] for o in self.plan.objectives]
        self.book = Book(storage, name, space, larger, seed=self.plan.seed, sampler=self.plan.sampler)
        told = {"model": self.told["model"]["digest"], "text": self.told["text"], "plan": self.plan.fixed()}
        self.book.agree({**told, "space": space.describe(), "calibration": self.calibration.digest})
        draws = [space.draw(getattr(recipe, "placements", recipe)) for recipe in first]
        # Half of the budget for what is worth trying anyway; the sampler has the rest.
        self.book.begin_with([*draws, *space.starts(1 + max(2, (self.plan.trials - len(draws)) // 2))])

    def trials(self) -> None:
        """Draw and measure until the budget is spent."""
        assert self.book is not None
        book, began = self.book, time.monotonic()
        with self.screen.phase("trials", self.plan.trials) as bar:
            bar.at(book.finished())
            while self.plan.seconds is None or time.monotonic() - began < self.plan.seconds:
                drawn = book.ask(self.plan.trials)
                if drawn is not None:
                    self.trial(*drawn)
                    bar.at(book.finished(), note=self._best())
                elif self.plan.seconds is not None or not self.wait():
                    break

    def wait(self) -> bool:
        """Let others end their trials, which the front needs; whether one gave up, and left room for another."""
        assert self.book is not None
        while self.book.running():
            self.book.sweep()
            time.sleep(0.5)
        return not self.book.exhausted and self.book.finished() < self.plan.trials

    def trial(self, trial: Any, placements: Sequence[Any]) -> None:
        """Measure one draw and record it, whatever happens."""
        assert self.book is not None
        try:
            measured = self.measured(placements, final=False)
        except KeyboardInterrupt:
            self.book.interrupt(trial)
            raise
        except Exception as error:
            self.book.fail(trial, _reason(error))
            del error
            gc.collect()
        else:
            scores = measured.scores()
            violations = [c.violation(scores) for c in self.plan.constraints]
            self.book.complete(trial, [scores[o] for o in self.plan.objectives], violations, measured.to_json())
        self.screen.trial(next(r for r in self.rows() if r.number == trial.number))

    def measured(self, placements: Sequence[Any], *, final: bool) -> Measurement:
        """Measure `placements`.

        Raises:
            RegardError: a score that was asked for is missing or NaN.
        """
        found = self.measure(placements, final=final)
        scores = found.scores()
        for name in (*self.plan.objectives, *(c.name for c in self.plan.constraints)):
            if name not in scores or scores[name] != scores[name]:
                raise RegardError(f"{name} was not measured" if name not in scores else f"{name} is NaN")
        return found

    def finals(self) -> None:
        """Measure a few rows again at the final length; those already noted are kept."""
        assert self.book is not None
        wanted = members(self.study(), self.plan.final_members)
        if not wanted:
            return
        with self.screen.phase(f"again at {self.plan.final_length:,}", len(wanted) + 1) as bar:
            for done, row in enumerate(wanted):
                bar.at(done)
                if f"final:{row.number}" in self.book.noted():
                    continue
                try:
                    told: dict[str, Any] = self.measured(self.study().placements(row), final=True).to_json()
                except Exception as error:
                    told = {"reason": _reason(error)}
                    gc.collect()
                self.book.note(f"final:{row.number}", told)
            bar.at(len(wanted))
            if "control" not in self.book.noted():
                control = self.measure.control()
                if control is not None:
                    self.book.note("control", dataclasses.asdict(control))

    def attribute(self) -> None:
        """Measure the final front's recipes less one mechanism each; those already noted are kept."""
        assert self.book is not None
        wanted = list(attribution.missing(self.study(), self._variants(), self.plan.attributions))
        if not wanted:
            return
        with self.screen.phase("less one mechanism", len(wanted)) as bar:
            for done, (name, placements) in enumerate(wanted):
                bar.at(done)
                try:
                    told: dict[str, Any] = self.measured(
                        read(placements, self.calibration.tensors), final=False
                    ).to_json()
                except Exception as error:
                    told = {"reason": _reason(error)}
                    gc.collect()
                self.book.note(f"variant:{name}", told)

    def _variants(self) -> dict[str, Any]:
        """What was measured less one mechanism, by the name of its placements."""
        assert self.book is not None
        return {k.partition(":")[2]: v for k, v in self.book.noted().items() if k.startswith("variant:")}

    def interrupt(self) -> None:
        """Say that finished trials are kept; before there are any, let the interruption through."""
        if self.book is None:
            raise KeyboardInterrupt
        self.interrupted = True
        self.screen.console.print("[yellow]interrupted[/]: finished trials are kept; run again to continue")

    def rows(self) -> tuple[Row, ...]:
        """Every trial of the study."""
        assert self.book is not None
        noted = self.book.noted()
        rows = []
        for trial in self.book.trials():
            attrs = trial.user_attrs
            final = noted.get(f"final:{trial.number}")
            took = trial.duration.total_seconds() if trial.duration else 0.0
            rows.append(
                Row(
                    number=trial.number,
                    placements=attrs.get("placements", []),
                    reason=attrs.get("reason"),
                    measurement=attrs.get("measurement"),
                    seconds=took,
                    final=None if final is None or "reason" in final else final,
                )
            )
        return tuple(rows)

    def study(self, **more: Any) -> Study:
        """The study as it stands."""
        plan = self.plan
        return Study(
            rows=self.rows(),
            objectives=plan.objectives,
            constraints=plan.constraints,
            layers=self.shape["layers"],
            tensors=self.calibration.tensors,
            shape=self.shape,
            interrupted=self.interrupted,
            **more,
        )

    def result(self) -> Study:
        """The study with its facts and pictures, written and shown."""
        assert self.book is not None
        plan, noted = self.plan, self.book.noted()
        told: dict[str, Any] = self.told | {
            "plan": plan.fixed() | {"trials": plan.trials, "seconds": plan.seconds, "seed": plan.seed},
            "machine": facts.machine(self.model),
            "study": self.book.name,
            "sensitivity": {s: t.tolist() for s, t in self.calibration.sensitivity.items()},
            "failed_finals": {
                k.partition(":")[2]: v["reason"] for k, v in noted.items() if k.startswith("final:") and "reason" in v
            },
            **self.legal.to_json(),
            "refused_draws": [
                {"words": words(r["placements"], self.shape["layers"]), "reason": r["reason"]}
                for r in self.book.refused()
            ],
        }
        study = self.explained(self.study(facts=told, control=noted.get("control")))
        pictures = {}
        for row in study.rows:
            if row.measurement is not None:
                pictures[row.number] = holdings(self.model, study.placements(row))
        study = dataclasses.replace(study, picture=pictures)
        if self.folder is not None:
            study = study.write(self.folder)
        self.screen.console.print(Table(study))
        if study.shortfall():
            self.screen.console.print(f"[yellow]{study.shortfall()}[/]")
        elif self.folder is not None:
            self.screen.console.print(f"wrote {self.folder / 'recipe.yaml'} and {self.folder / 'report.html'}")
        return study

    def explained(self, study: Study) -> Study:
        """`study` with what each member of the final front owes to its mechanisms."""
        measured = {name_of(r.placements): r.measurement for r in study.rows if r.measurement} | self._variants()
        explained = {r.number for r in attribution.members(study)}
        rows = (
            dataclasses.replace(r, owes=attribution.owes(r, measured, study.criteria)) if r.number in explained else r
            for r in study.rows
        )
        return dataclasses.replace(study, rows=tuple(rows))

    def _best(self) -> str:
        study = self.study()
        best = study.chosen
        count = f"{len(study.front)} on the front"
        return f"{count}; best: {figures(best.scores)}" if best else count


def _mechanisms(written: Sequence[str | Entry] | None, plan: Plan) -> list[Entry]:
    """The entries to search over.

    Raises:
        RegardError: an unknown name, one that cannot be attached, nothing to search, or one that must be fitted and
            cannot be.
    """
    if written is not None:
        chosen = [name if isinstance(name, Entry) else find(name) for name in written]
        for entry in chosen:
            entry.refuse_unattachable()
            if why := unfittable(entry):
                raise RegardError(why)
    else:
        chosen = default_mechanisms((*plan.objectives, *(constraint.name for constraint in plan.constraints)))
    _searchable(chosen)
    return chosen


def default_mechanisms(criteria: Sequence[str]) -> list[Entry]:
    """What a search takes unless told: mechanisms that may pay in `criteria`, and are fitted here or need not be.

    What saves memory alone can only pay in bytes, what saves computing alone only in time.
    """
    pays = {"memory": "bytes", "compute": "prefill decode"}
    wanted = {saving for saving, scores in pays.items() if set(scores.split()) & set(criteria)} or set(pays)
    return [e for e in attachable().values() if e.card.saving in wanted and unfittable(e) is None]


def _searchable(chosen: Sequence[Entry], why: str = "no mechanism given has options with values to search") -> None:
    """Raise if there is nothing to vary.

    Raises:
        RegardError: no mechanism has values to search, and `why`.
    """
    if not any(o.search or o.kind == "tensor" for e in chosen for o in e.card.options.values()):
        raise RegardError(f"nothing to search: {why}")


def _tokens(tokenizer: Any, text: str | Path | Tensor) -> Tensor:
    if not isinstance(text, (str, Path)):
        return torch.as_tensor(text, dtype=torch.int64).flatten()
    return text_.tokenise(tokenizer, text_.load(text) if isinstance(text, Path) else text)


def _reason(error: Exception) -> str:
    """Why a trial failed, in one line."""
    text = " ".join(str(error).split()) or "no message"
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    if memory:
        return f"out of memory: {text}"
    return text if isinstance(error, RegardError) else f"{type(error).__name__}: {text}"
