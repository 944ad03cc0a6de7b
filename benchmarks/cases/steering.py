"""Steering against hallucination on the tiny vision-language model `shapes`: every mechanism that its card lets run.

The papers tune to each benchmark by itself, and so does each run of this case: `task=existence` to POPE,
`task=captions` to CHAIR, `task=all` to both with one setting. Settings are chosen on scenes of other seeds (`tuning`)
by the task's figures alone; every figure shown is of the test seeds. Besides: answers that need no image, other skills,
and the seconds that a token takes longer. What cannot run says why.

The rule was set before any figure was seen. Gains are paired: on the same questions of one seed, a figure steered
against the same figure unsteered, positive where it is better. The spread of a figure is half the range of the
unsteered model's over the seeds. A mechanism *improves* if its mean gain in POPE accuracy or in CHAIR_I exceeds that
figure's spread, and none of POPE accuracy, CHAIR_I and recall of captions loses more than its spread; of the three,
those that the task asks about.

Added later: `paired` says whether the mean gain exceeds half the range of the gains themselves and no seed loses, which
is no part of the rule; and more questions a seed, since the spread of seeds is mostly that of their questions. Of the
settings tried, those that lose less than half a spread on the tuning seeds come first, and of these the one with the
largest gain in spreads: the paper's setting, then settings drawn from `steers.GIVEN`, then what differs from the best
so far in one value.
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from statistics import mean, median, stdev
from typing import Any

import torch

import steers
from regard import catalog
from regard.core.errors import choose
from regard.measure import scene_questions as ask
from regard.models import vlm
from regard.search import facts
from steer_bench import Bench, Setting

# By task, the figures that decide and those that must not fall; and those of which less is better.
AIMS = {"existence": ("accuracy",), "captions": ("chair_i",), "all": ("accuracy", "chair_i")}
KEPT = {"existence": ("accuracy",), "captions": ("chair_i", "recall"), "all": ("accuracy", "chair_i", "recall")}
LESS = ("chair_s", "chair_i")
PRINTED = ("accuracy", "f1", "chair_s", "chair_i", "recall", "neutral")
# Gains that are a spread but for rounding do not exceed it; and the least spread that gains are counted in.
ROUNDING, LEAST = 1e-9, 1e-3
ANSWERS_ALONE = 12
# Columns of time, as they are for the model itself.
TIMED = {"added ms a token": 0.0, "ms a request": 0.0}
# Tuning scenes have seeds from here on; each seed takes a few numbers above itself.
TUNING = 5_000


@dataclass(frozen=True)
class Sizes:
    """How much is asked, where, and for how long settings may be tried, a mechanism."""

    device: str
    seeds: int
    tuning: int
    asked: tuple[tuple[str, int], ...]
    tuned: tuple[tuple[str, int], ...]
    batch: int
    trials: int
    seconds: float
    task: str


def run(
    seeds: int = 5,
    existence: int = 3200,
    captions: int = 800,
    skills: int = 200,
    tuning: int = 3,
    share: int = 50,
    batch: int = 1024,
    trials: int = 40,
    workers: int = 0,
    seconds: int = 120,
    timed: int = 12,
    task: str = "all",
    stems: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for the model as it is, and one for every mechanism.

    Args:
        seeds: test seeds.
        existence: questions of this sort a test seed, as `hallucination.evaluate` takes them; 0: none.
        captions: the same.
        skills: the same.
        tuning: seeds on which settings are chosen.
        share: questions a tuning seed, in percent of those of a test seed.
        batch: questions at a time.
        trials: settings tried of a mechanism.
        workers: processes side by side; 0: none but this one.
        seconds: no further setting of a mechanism is tried after so many.
        timed: tokens of the answers by which time is measured.
        task: all, existence or captions.
        stems: mechanisms, commas between them; None: all.
    """
    asked = {"existence": existence, "captions": captions, "skills": skills}
    own = {name for name in ("existence", "captions") if choose("task", task, AIMS) in (name, "all")}
    tuned = {name: max(number * share // 100, 4) for name, number in asked.items() if name in own}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = Sizes(device, seeds, tuning, tuple(asked.items()), tuple(tuned.items()), batch, trials, seconds, task)
    known = steers.mechanisms() if stems is None else {stem: catalog.find(stem) for stem in stems.split(",")}
    done = judged(known, sizes, workers)
    place = station(sizes)
    spreads = {name: spread(_of(place.plain, name)) for name in place.plain[0]}
    shown = summary(compared(place.plain, place.plain, task))
    table = [{"method": "none", "improves": "", "paired": "", **shown, **TIMED, "why": {}, "seeds": place.plain}]
    for (stem, entry), (row, setting) in zip(known.items(), done, strict=True):
        cost = dict.fromkeys(TIMED) if setting is None else latency(place.bench, setting, timed)
        table.append({"method": stem, **row, **cost, "site": entry.site, "sheet": entry.card.sheet})
    told = facts.machine(place.bench.model) | {"model": facts.model_facts(place.bench.model), "spreads": spreads}
    told |= {"task": task, "asked": asked, "tuned": tuned}
    told |= {"test seeds": list(place.test.seeds), "tuning seeds": list(place.tune.seeds)}
    told |= {"batch": batch, "workers": workers, "limit": seconds, "trials": trials}
    for title, verdict in (("improving", "yes"), ("not improving", "no"), ("cannot run", "cannot run")):
        told[title] = [row["method"] for row in table if row["improves"] == verdict]
    return told | {"paired": [row["method"] for row in table if row["paired"] == "yes"]}, table


@dataclass(eq=False)
class Station:
    """A process's model, its two exams, and how the model does unsteered."""

    bench: Bench
    tune: steers.Exam
    test: steers.Exam
    before: list[dict[str, float]]
    plain: list[dict[str, float]]


@cache
def station(sizes: Sizes) -> Station:
    """The station of this process."""
    bench = Bench.open(sizes.device)
    # A seed's own scenes have seeds up to 7 above it.
    seeds = range(TUNING, TUNING + 10 * sizes.tuning, 10)
    tune = steers.Exam(bench, seeds, dict(sizes.tuned), sizes.batch)
    test = steers.Exam(bench, range(0, 10 * sizes.seeds, 10), dict(sizes.asked), sizes.batch)
    return Station(bench, tune, test, tune.figures(), test.figures())


def judged(stems: Iterable[str], sizes: Sizes, workers: int) -> list[tuple[dict[str, Any], Setting | None]]:
    """`judge` of each, by `workers` processes or by this one."""
    if not workers:
        return [judge(stem, sizes) for stem in stems]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(partial(judge, sizes=sizes), stems)
        # This process makes its own meanwhile.
        station(sizes)
        return list(done)


def judge(stem: str, sizes: Sizes) -> tuple[dict[str, Any], Setting | None]:
    """A mechanism's row, but for its time, and the setting that was chosen; None: it cannot run, as the row says."""
    place, began = station(sizes), time.monotonic()
    try:
        tried = list(trials(stem, place, sizes))
        setting, _ = max(tried, key=lambda one: merit(one[1]))
        found = place.test.figures(setting)
        result = compared(found, place.plain, sizes.task)
        asked, same = place.test.alone(setting, ANSWERS_ALONE)
    except Exception as error:
        # One mechanism that fails must not lose the others' figures.
        why = {"error": type(error).__name__, "said": " ".join(str(error).split())[:300]}
        blank = dict.fromkeys(summary(compared(place.plain, place.plain, sizes.task)))
        return {"improves": "cannot run", "paired": "", **blank, "why": why}, None
    verdicts = {name: "yes" if result.pop(name) else "no" for name in ("improves", "paired")}
    row = {**verdicts, **summary(result), "why": {}, "chosen": setting.told(), "alone": {"asked": asked, "same": same}}
    row["tried"] = [one.told() | {"merit": merit(told), "mean": told["mean"]} for one, told in tried]
    return row | {"seeds": found, **result, "seconds": time.monotonic() - began}, setting


def trials(stem: str, place: Station, sizes: Sizes) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Settings of a mechanism, each with what it changes on the tuning seeds; none twice."""
    random, began, seen = Random(stem), time.monotonic(), []
    best, most = steers.usual(stem), (False, float("-inf"))
    for number in range(sizes.trials):
        if number and time.monotonic() - began > sizes.seconds:
            return
        choice = best if not number else steers.drawn(stem, random, best if number > sizes.trials // 2 else None)
        if choice in seen:
            continue
        seen.append(choice)
        setting = steers.made(place.bench, stem, choice, sizes.task)
        told = compared(place.tune.figures(setting), place.before, sizes.task)
        if merit(told) > most:
            best, most = choice, merit(told)
        yield setting, told


def compared(own: Sequence[Mapping[str, float]], plain: Sequence[Mapping[str, float]], task: str) -> dict[str, Any]:
    """Paired gains of every figure, their mean and deviation over the seeds, and the verdicts of the rule above."""
    gains = {
        name: [(b - a if name in LESS else a - b) for a, b in zip(_of(own, name), _of(plain, name), strict=True)]
        for name in plain[0]
    }
    average = {name: mean(values) for name, values in gains.items()}
    bound = {name: spread(_of(plain, name)) for name in plain[0]}
    better = [name for name in AIMS[task] if average[name] > bound[name] + ROUNDING]
    worse = [name for name in average if average[name] < -bound[name] - ROUNDING]
    return {
        "improves": bool(better) and not set(worse) & set(KEPT[task]),
        "paired": any(min(gains[one]) > 0 and average[one] > spread(gains[one]) + ROUNDING for one in AIMS[task]),
        "better": better,
        "worse": [name for name in worse if name in KEPT["all"]],
        "spoiled": [name for name in worse if name in (*ask.ABOUT_A_SCENE, *ask.ABOUT_NONE)],
        "lost": max(-average[name] / max(bound[name], LEAST) for name in KEPT[task]),
        "won": max(average[name] / max(bound[name], LEAST) for name in AIMS[task]),
        "mean": average,
        "deviation": {name: stdev(values) if len(values) > 1 else 0.0 for name, values in gains.items()},
        "spread": bound,
        "gains": gains,
        "plain": list(plain),
    }


def spread(values: Sequence[float]) -> float:
    """Half the range."""
    return (max(values) - min(values)) / 2


def merit(result: Mapping[str, Any]) -> tuple[bool, float]:
    """How settings rank: those that lose less than half a spread first, then by the larger gain in spreads."""
    return result["lost"] < 0.5, result["won"]


def latency(bench: Bench, setting: Setting, count: int, repeats: int = 3) -> dict[str, Any]:
    """Seconds of one caption, steered and not, in turns: a token, prompt included, and what is made of its image first.

    Such are sets of tokens, another view, or a picture drawn from a first caption.
    """
    image = torch.zeros(vlm.SIDE, vlm.SIDE, 3, dtype=torch.uint8)

    def once(one: Setting | None) -> tuple[float, float]:
        batch = bench.batch([image], [ask.TEXTS["caption"]])
        with torch.no_grad():
            marks = [_now(bench)]
            steers.ready(bench, batch, one)
            marks.append(_now(bench))
            with steers.steered(bench, batch, one) as inputs:
                marks.append(_now(bench))
                bench.model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
                marks.append(_now(bench))
        return (marks[3] - marks[2]) / count, marks[1] - marks[0]

    for one in (None, setting):
        once(one)
    pairs = [(once(None), once(setting)) for _ in range(repeats)]
    return {
        "added ms a token": 1e3 * median(steered[0] - plain[0] for plain, steered in pairs),
        "ms a request": 1e3 * median(steered[1] for _, steered in pairs),
        "timings": pairs,
    }


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are printed: means, and mean gains."""
    columns = {}
    for name in PRINTED:
        if name in result["mean"]:
            gain = result["mean"][name]
            columns[name] = mean(_of(result["plain"], name)) + (-gain if name in LESS else gain)
            columns[f"+{name}"] = gain
    return columns


def _of(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _now(bench: Bench) -> float:
    if bench.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
