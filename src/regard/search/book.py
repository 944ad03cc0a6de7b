"""The book of trials: an Optuna study that survives kills, is shared by processes, and measures nothing twice."""

import contextlib
import datetime
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.core.errors import RegardError
from regard.core.extras import need
from regard.core.placement import Placement
from regard.search.space import Space, tell

# After this many draws in a row that were all measured before, draw at random; after the second, stop.
STALE_DRAWS, EXHAUSTED = 3, 40
# A trial of another machine, or one whose owner is not written, is taken for dead after this long (s).
FOREIGN, OWNERLESS = 3600.0, 60.0


class Book:
    """One study in one storage. `exhausted`: `ask` stopped because it drew nothing new any more.

    Args:
        storage: an Optuna storage URL, or the path of an SQLite file.
        name: the study's name in it.
        space: what trials are drawn from.
        costs: whether larger is better, for each objective.
        seed: of the sampler; processes and resumed runs draw differently.
        sampler: `tpe` or `nsga2`.

    Raises:
        RegardError: Optuna is missing, or the storage cannot be opened.
    """

    exhausted = False

    def __init__(
        self,
        storage: str | Path,
        name: str,
        space: Space,
        costs: Sequence[bool],
        *,
        seed: int = 0,
        sampler: str = "tpe",
    ):
        self.optuna = need("optuna")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.space, self.name, self.seed, self.kind = space, name, seed, sampler
        self.url = storage_url(storage)
        self.study = self._open(["maximize" if larger else "minimize" for larger in costs])
        self.study.sampler = self._sampler(seed + len(self.study.get_trials(deepcopy=False)))

    def _open(self, directions: list[str]) -> Any:
        error: Exception | None = None
        for attempt in range(6):
            try:
                extra = {"connect_args": {"timeout": 60}} if self.url.startswith("sqlite") else {}
                store = self.optuna.storages.RDBStorage(self.url, engine_kwargs=extra)
                return self.optuna.create_study(
                    study_name=self.name, storage=store, directions=directions, load_if_exists=True
                )
            except ImportError as missing:
                raise RegardError(f"storage {self.url!r} needs a database driver: {missing}") from missing
            except Exception as caught:  # two processes may both be making the tables
                error = caught
                time.sleep(0.1 * 2**attempt if self.url.startswith("sqlite") else 0)
        raise RegardError(f"storage {self.url!r} cannot be opened: {error}")

    def _sampler(self, seed: int) -> Any:
        samplers = self.optuna.samplers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental arguments, chosen on purpose
            if self.kind == "nsga2":
                return samplers.NSGAIISampler(seed=seed, population_size=12, constraints_func=_violations)
            return samplers.TPESampler(
                seed=seed,
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=8,
                constraints_func=_violations,
            )

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Write `settings` into a new study; refuse one that was begun under others.

        Raises:
            RegardError: names what differs.
        """
        told = json.loads(json.dumps(settings, sort_keys=True))
        held = self.study.user_attrs.get("settings")
        if held is None:
            self.study.set_user_attr("settings", told)
            return
        differ = sorted(k for k in {*told, *held} if told.get(k) != held.get(k))
        if differ:
            parts = "; ".join(f"{k}: {_short(held.get(k))} then, {_short(told.get(k))} now" for k in differ)
            raise RegardError(
                f"study {self.name!r} in {self.url} was begun under other settings ({parts}). "
                "Use another study name or folder"
            )

    def begin_with(self, draws: Sequence[Mapping[str, Any]]) -> None:
        """Queue draws to be tried first, unless they are in the book already."""
        for draw in draws:
            self.study.enqueue_trial(dict(draw), skip_if_exists=True)

    def ask(self, total: int) -> tuple[Any, list[Placement]] | None:
        """The next trial and its placements; None once `total` are measured or under way, or nothing is new."""
        for draws in range(EXHAUSTED):
            trials = self.sweep()
            if self.finished(trials) + len(self.running(trials)) >= total:
                return None
            if draws >= STALE_DRAWS:
                self.study.sampler = self.optuna.samplers.RandomSampler(seed=self.seed + draws + 97 * len(trials))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = self.study.ask()
                # First of all: should this process die now, others know that nobody works on it.
                trial.set_user_attr("owner", _owner())
                placements = self.space.suggest(trial)
            told = tell(placements)
            ident = name_of(told)
            trial.set_user_attr("placements", told)
            twin = self._twin(ident, trial.number)
            trial.set_user_attr("recipe", ident)
            if draws >= STALE_DRAWS:
                self.study.sampler = self._sampler(self.seed + trial.number)
            if twin is not None:
                self._repeat(trial, twin)
            elif reason := self.space.refusal(placements):
                self._refuse(trial, reason)
            else:
                return trial, placements
        self.exhausted = True
        return None

    def _refuse(self, trial: Any, reason: str) -> None:
        """Close a draw that the model cannot be given: it costs no trial, and its reason is kept."""
        trial.set_user_attr("refused", True)
        self.fail(trial, reason)

    def refused(self) -> list[dict[str, Any]]:
        """Draws that the model could not be given: their placements and why, by number."""
        closed = [t.user_attrs for t in self.study.get_trials(deepcopy=False) if "refused" in t.user_attrs]
        return [{"placements": a["placements"], "reason": a["reason"]} for a in closed if "reason" in a]

    def _twin(self, ident: str, number: int) -> Any:
        """An earlier trial of the same placements that was measured, failed, or is being measured."""
        for other in self.study.get_trials(deepcopy=False):
            same = other.number != number and other.user_attrs.get("recipe") == ident
            if same and "same_as" not in other.user_attrs and not _interrupted(other):
                return other
        return None

    def _repeat(self, trial: Any, twin: Any) -> None:
        """Close a draw that repeats another: the sampler learns the same values, nothing is measured."""
        trial.set_user_attr("same_as", twin.number)
        if twin.state.name == "COMPLETE":
            trial.set_user_attr("violations", twin.user_attrs.get("violations", []))
            self.study.tell(trial, list(twin.values))
        else:
            self.fail(trial, f"the same as trial {twin.number}")

    def complete(
        self, trial: Any, values: Sequence[float], violations: Sequence[float], told: Mapping[str, Any]
    ) -> None:
        """Record a measured trial: objective `values`, constraint `violations`, and all that was measured."""
        trial.set_user_attr("measurement", dict(told))
        # Optuna takes finite numbers only; a constraint on what was not measured is simply far away.
        trial.set_user_attr("violations", [min(v, 1e9) for v in violations])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.study.tell(trial, list(values))

    def fail(self, trial: Any, reason: str) -> None:
        """Record a trial that could not be measured, and why."""
        trial.set_user_attr("reason", reason[:1000])
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def interrupt(self, trial: Any) -> None:
        """Give up a trial that was cut short; its draw goes back into the queue."""
        self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        self.study.enqueue_trial(trial.params)

    def sweep(self) -> list[Any]:
        """Close trials whose process is gone, and queue their draws again; returns all trials as they were."""
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state.name == "RUNNING" and not _alive(trial):
                with contextlib.suppress(ValueError, RuntimeError):  # another process swept it first
                    self.interrupt(trial)
        return trials

    def running(self, trials: Sequence[Any] | None = None) -> list[Any]:
        """Trials under way in living processes; repeats, refused draws and dense left out."""
        known = list(trials or self.study.get_trials(deepcopy=False))
        under_way = [t for t in known if t.state.name == "RUNNING" and "same_as" not in t.user_attrs and _alive(t)]
        return [t for t in under_way if t.user_attrs.get("placements") != [] and "refused" not in t.user_attrs]

    def trials(self, trials: Sequence[Any] | None = None) -> list[Any]:
        """Every trial that was measured or failed on its own account, dense included, by number."""
        known = list(trials or self.study.get_trials(deepcopy=False))
        over = [t for t in known if t.state.name in ("COMPLETE", "FAIL") and not _interrupted(t)]
        return [t for t in over if not {"same_as", "refused"} & set(t.user_attrs)]

    def finished(self, trials: Sequence[Any] | None = None) -> int:
        """How many of `trials` count against the budget: all but dense."""
        return sum(t.user_attrs.get("placements") != [] for t in self.trials(trials))

    def note(self, key: str, value: Any) -> None:
        """Keep `value` (JSON) with the study."""
        self.study.set_user_attr(key, value)

    def noted(self) -> dict[str, Any]:
        """Everything `note` kept."""
        return dict(self.study.user_attrs)


def name_of(told: Sequence[Mapping[str, Any]]) -> str:
    """A short name of placements as `tell` wrote them."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def storage_url(storage: str | Path) -> str:
    """`storage` as a URL: a plain path is an SQLite file, whose folder is made."""
    text = str(storage)
    if "://" in text:
        return text
    Path(text).parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{Path(text).absolute()}"


def _violations(trial: Any) -> list[float]:
    return list(trial.user_attrs.get("violations", []))


def _interrupted(trial: Any) -> bool:
    """Whether a trial was given up: it failed and nobody gave a reason."""
    return trial.state.name == "FAIL" and "reason" not in trial.user_attrs


def _owner() -> dict[str, Any]:
    """This process, as other processes can tell whether it still lives."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def _alive(trial: Any) -> bool:
    owner, began = trial.user_attrs.get("owner"), trial.datetime_start
    age = (datetime.datetime.now() - began).total_seconds() if began else 0.0
    if owner is None:
        return age < OWNERLESS
    if owner["host"] != socket.gethostname():
        return age < FOREIGN
    if not _there(owner["pid"]):
        return False
    # Numbers are used again, also by this very process in a restarted container: compare births.
    return _born(owner["pid"]) == owner["born"]


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _born(pid: int) -> str | None:
    """When process `pid` began, in the kernel's ticks; "zombie" once dead, None where that cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "zombie" if fields[0] == "Z" else fields[19]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}…{hashlib.sha256(text.encode()).hexdigest()[:6]}"
