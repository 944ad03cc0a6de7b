"""Steering against hallucination on the tiny vision-language model `shapes`: every mechanism that its card lets run.

Each mechanism's setting is chosen on scenes of other seeds (`tuning`); POPE, CHAIR and skills are those of the test
seeds alone. Besides: the seconds that a token takes longer. What cannot run says why.

The rule, set before any figure was seen. Gains are paired: on the same questions of one seed, a figure steered against
the same figure unsteered, positive where it is better. The spread of a figure is half the range of the unsteered
model's over the seeds. A mechanism *improves* if its mean gain in POPE accuracy or in CHAIR_I exceeds that figure's
spread, and none of POPE accuracy, CHAIR_I and recall of captions loses more than its spread. Of the settings tried,
those that lose nothing so on the tuning seeds come first, and of these the one with the largest gain in spreads.

The papers tune to each benchmark by itself. `task=existence` and `task=captions` do so: the same rule over the figures
of one task (POPE accuracy; CHAIR_I and recall), the same questions. They were added once the table of both was known.
"""

import multiprocessing
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean, median, stdev
from typing import Any

import torch

import steers
from regard import catalog
from regard.measure import scene_questions as ask
from regard.measure.hallucination import Captions, Existence, Report
from regard.models import vlm
from regard.search import facts

# The figures that decide, those that must not fall, and those of which less is better.
AIMS, KEPT, LESS = ("accuracy", "chair_i"), ("accuracy", "chair_i", "recall"), ("chair_s", "chair_i")
PRINTED = ("accuracy", "f1", "chair_s", "chair_i", "recall", "neutral")
# Gains that are a spread but for rounding do not exceed it.
ROUNDING = 1e-9
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
    strengths: int
    seconds: float
    task: str


def run(
    seeds: int = 5,
    existence: int = 400,
    captions: int = 100,
    skills: int = 80,
    tuning: int = 3,
    share: int = 50,
    batch: int = 1024,
    strengths: int = len(steers.STRENGTHS),
    workers: int = 0,
    seconds: int = 120,
    timed: int = 12,
    task: str = "all",
    stems: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for the model as it is, and one for every mechanism.

    Args:
        seeds: test seeds.
        existence: questions of this sort a test seed, as `hallucination.evaluate` takes them.
        captions: the same.
        skills: the same.
        tuning: seeds on which settings are chosen.
        share: questions a tuning seed, in percent of those of a test seed.
        batch: questions at a time.
        strengths: how many strengths are tried.
        workers: processes side by side; 0: none but this one.
        seconds: no further setting of a mechanism is tried after so many.
        timed: tokens of the answers by which time is measured.
        task: all, existence or captions.
        stems: mechanisms, commas between them; None: all.
    """
    asked = {"existence": existence, "captions": captions, "skills": skills}
    tuned = {name: max(number * share // 100, 4) for name, number in asked.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = Sizes(device, seeds, tuning, _items(asked), _items(tuned), batch, strengths, seconds, task)
    known = steers.mechanisms() if stems is None else {stem: catalog.find(stem) for stem in stems.split(",")}
    done = judged(known, sizes, workers)
    place = station(sizes)
    plain = [figures(report) for report in place.reports]
    spreads = {name: spread([one[name] for one in plain]) for name in plain[0]}
    shown = summary(compared(plain, plain))
    table = [{"method": "none", "improves": "", "setting": "", **shown, **TIMED, "why": {}, "seeds": plain}]
    for (stem, entry), (row, setting) in zip(known.items(), done, strict=True):
        cost = dict.fromkeys(TIMED) if setting is None else latency(place.bench, setting, timed)
        table.append({"method": stem, **row, **cost, "site": entry.site, "sheet": entry.card.sheet})
    told = facts.machine(place.bench.model) | {"model": facts.model_facts(place.bench.model), "spreads": spreads}
    told |= {"asked": asked, "tuned": tuned}
    told |= {"test seeds": list(place.test.seeds), "tuning seeds": list(place.tune.seeds)}
    settings = {
        "task": task,
        "batch": batch,
        "workers": workers,
        "seconds": seconds,
        "strengths": steers.STRENGTHS[:strengths],
    }
    improving = [row["method"] for row in table if row["improves"] == "yes"]
    return told | settings | {"improving": improving, "not improving": [s for s in known if s not in improving]}, table


@dataclass(eq=False)
class Station:
    """A process's model, its two exams, and how the model does unsteered."""

    bench: steers.Bench
    tune: steers.Exam
    test: steers.Exam
    tuned: list[Any]
    reports: list[Any]


@cache
def station(sizes: Sizes) -> Station:
    """The station of this process."""
    bench = steers.Bench.open(sizes.device)
    # A seed's own scenes have seeds up to 7 above it.
    seeds = range(TUNING, TUNING + 10 * sizes.tuning, 10)
    tune = steers.Exam(bench, seeds, dict(sizes.tuned), sizes.batch, sizes.task)
    test = steers.Exam(bench, range(0, 10 * sizes.seeds, 10), dict(sizes.asked), sizes.batch, sizes.task)
    return Station(bench, tune, test, tune.reports(tune.said()), test.reports(test.said()))


def judged(stems: Iterable[str], sizes: Sizes, workers: int) -> list[tuple[dict[str, Any], steers.Setting | None]]:
    """`judge` of each, by `workers` processes or by this one."""
    if not workers:
        return [judge(stem, sizes) for stem in stems]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(partial(judge, sizes=sizes), stems))


def judge(stem: str, sizes: Sizes) -> tuple[dict[str, Any], steers.Setting | None]:
    """A mechanism's row, but for its time, and the setting that was chosen; None: it cannot run, as the row says."""
    place, began = station(sizes), time.monotonic()
    before, tried = [figures(report) for report in place.tuned], []
    try:
        for setting in steers.settings(place.bench, stem, steers.STRENGTHS[: sizes.strengths]):
            if tried and time.monotonic() - began > sizes.seconds:
                break
            found = [figures(report) for report in place.tune.reports(place.tune.said(setting))]
            tried.append((setting, compared(found, before)))
        setting, _ = max(tried, key=lambda one: merit(one[1]))
        found = [figures(report) for report in place.test.reports(place.test.said(setting))]
        result = compared(found, [figures(report) for report in place.reports])
        asked, same = place.test.alone(setting, ANSWERS_ALONE)
    except Exception as error:
        # One mechanism that fails must not lose the others' figures.
        why = {"error": type(error).__name__, "said": " ".join(str(error).split())[:300]}
        blank = dict.fromkeys(summary(compared(before, before)))
        return {"improves": "cannot run", "setting": "", **blank, "why": why}, None
    row = {
        "improves": "yes" if result.pop("improves") else "no",
        "setting": _short(setting),
        **summary(result),
        "why": {},
    }
    row |= {"chosen": setting.told(), "alone": {"asked": asked, "same": same}, "seeds": found, **result}
    row["tried"] = [one.told() | {"merit": merit(told), "mean": told["mean"]} for one, told in tried]
    return row | {"seconds": time.monotonic() - began}, setting


def figures(report: Report | Captions | Mapping[str, Existence]) -> dict[str, float]:
    """The figures of one seed and task, by name."""
    if isinstance(report, Captions):
        return {"chair_s": report.sentence, "chair_i": report.instance, "recall": report.recall}
    if isinstance(report, Mapping):
        means = {name: mean(getattr(one, name) for one in report.values()) for name in ("accuracy", "f1")}
        return means | {name: one.accuracy for name, one in report.items()}
    return figures(report.existence) | figures(report.captions) | report.skills


def compared(own: Sequence[Mapping[str, float]], plain: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Paired gains of every figure, their mean and deviation over the seeds, and the verdict of the rule above."""
    gains = {
        name: [(b - a if name in LESS else a - b) for a, b in zip(_of(own, name), _of(plain, name), strict=True)]
        for name in plain[0]
    }
    average = {name: mean(values) for name, values in gains.items()}
    bound = {name: spread(_of(plain, name)) for name in plain[0]}
    better = [name for name in AIMS if name in plain[0] and average[name] > bound[name] + ROUNDING]
    worse = [name for name in average if average[name] < -bound[name] - ROUNDING]
    return {
        "improves": bool(better) and not set(worse) & set(KEPT),
        "better": better,
        "worse": [name for name in worse if name in KEPT],
        "spoiled": [name for name in worse if name in (*ask.ABOUT_A_SCENE, *ask.ABOUT_NONE)],
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
    """How settings rank: those that lose nothing first, then by the larger gain in spreads."""
    return not result["worse"], max(
        result["mean"][name] / max(result["spread"][name], 1e-3) for name in AIMS if name in result["mean"]
    )


def latency(bench: steers.Bench, setting: steers.Setting, count: int, repeats: int = 3) -> dict[str, Any]:
    """Seconds of one caption, steered and not, in turns: a token, prompt included, and what is made of its image first.

    Such are sets of tokens, another view, or a picture drawn from a first caption.
    """
    image = torch.zeros(vlm.SIDE, vlm.SIDE, 3, dtype=torch.uint8)

    def once(one: steers.Setting | None) -> tuple[float, float]:
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


def _items(told: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(told.items())


def _short(setting: steers.Setting) -> str:
    return f"x{setting.strength:g} layers {setting.layers if isinstance(setting.layers, str) else list(setting.layers)}"


def _now(bench: steers.Bench) -> float:
    if bench.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
