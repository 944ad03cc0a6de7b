"""Steering against hallucination on the tiny vision-language model `shapes`: every mechanism that its card lets run.

The papers tune to each benchmark by itself, and so does this case: a mechanism has a row a task, with a setting chosen
for POPE (`existence`) or for CHAIR (`captions`) by that task's figures alone, on scenes of other seeds (`tuning`).
Every figure shown is of the test seeds; those of the other task are shown too and do not count. Besides: answers that
need no image, other skills, and the seconds that a token takes longer. What cannot run says why.

The rule was set before any figure was seen. Gains are paired: on the same questions of one seed, a figure steered
against the same figure unsteered, positive where it is better. The spread of a figure is half the range of the
unsteered model's over the seeds. A mechanism *improves* if its mean gain in POPE accuracy or in CHAIR_I exceeds that
figure's spread, and none of POPE accuracy, CHAIR_I and recall of captions loses more than its spread; of the three,
those that the task asks about. The task `all` has one setting for all three.

Added later: more questions a seed, as the spread of seeds is mostly that of their questions; and `paired`, which says
whether the mean gain exceeds half the range of the gains themselves and no seed loses. It is no part of the rule.

Of the settings tried, those that lose less than a third of a spread on the tuning seeds come first, and of these the
one with the largest gain in spreads. Tried are the paper's setting, what earlier searches found on tuning scenes
(`steers.FOUND`), then settings drawn from `steers.GIVEN` and what differs from the best so far in one value.
"""

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from random import Random
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import steers
from regard import catalog
from regard.core.errors import RegardError, choose
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
ANSWERS_ALONE = 6
# Columns of time, as they are for the model itself.
TIMED = {"added ms a token": 0.0, "ms a request": 0.0}
# Tuning scenes have seeds from here on.
TUNING = 5_000


# A mechanism and a task; what is known of it, as JSON.
Job = tuple[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is asked, where, and for how long settings may be tried, a mechanism and task.

    `asked` and `tuned` are questions by sort. `pictures` is the file that holds the images of all exams; `stop` is the
    time of `time.time()` after which nothing is begun, 0: none.
    """

    device: str
    seeds: int
    tuning: int
    asked: tuple[tuple[str, int], ...]
    tuned: tuple[tuple[str, int], ...]
    batch: int
    trials: int
    seconds: float
    tasks: tuple[str, ...]
    stop: float
    pictures: str = ""


def run(
    seeds: int = 5,
    existence: int = 4000,
    captions: int = 3000,
    skills: int = 60,
    tuning: int = 5,
    tuned_existence: int = 960,
    tuned_captions: int = 300,
    batch: int = 2048,
    trials: int = 24,
    workers: int = 0,
    seconds: int = 120,
    until: int = 0,
    timed: int = 8,
    tasks: str = "existence,captions",
    stems: str | None = None,
    lines: str = "",
    elsewhere: str = "",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """For every task a row for the model as it is, and one for every mechanism.

    Args:
        seeds: test seeds; 0: settings are searched and not tested.
        existence: questions of this sort a test seed, as `hallucination.evaluate` takes them; 0: none.
        captions: the same.
        skills: the same.
        tuning: seeds on which settings are chosen; 0: the first of `steers.FOUND` is taken, or the paper's.
        tuned_existence: questions of this sort a tuning seed.
        tuned_captions: the same.
        batch: questions at a time.
        trials: settings tried of a mechanism for a task; those that were found are, in any case.
        workers: processes side by side; 0: none but this one.
        seconds: no further setting of a mechanism is tried for a task after so many.
        until: no mechanism is begun after so many, so that some are not run; 0: all are.
        timed: tokens of the answers by which time is measured; 0: it is not.
        tasks: existence, captions or all; commas between them.
        stems: mechanisms, commas between them, in the order in which they are begun; None: all.
        lines: a file to which every row is added as soon as it is known; those with figures that it holds are taken as
            they are. Empty: none.
        elsewhere: the device on which those were judged; time is measured on this one. Empty: they were, too.
    """
    asked = {"existence": existence, "captions": captions, "skills": skills}
    tuned = {"existence": tuned_existence, "captions": tuned_captions}
    named = tuple(choose("task", one, AIMS) for one in tasks.split(","))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = (batch, trials, seconds, named, time.time() + until if until else 0.0)
    sizes = Sizes(device, seeds, tuning, tuple(asked.items()), tuple(tuned.items()), *limits)
    known = steers.mechanisms() if stems is None else {stem: catalog.find(stem) for stem in stems.split(",")}
    jobs = [(stem, task) for stem in known for task in named]
    with TemporaryDirectory() as folder:
        sizes = replace(sizes, pictures=f"{folder}/pictures.safetensors")
        done = judged(jobs, sizes, workers, lines)
        table = [row for task in named for row in tabled(task, known, done, sizes, timed)]
    bench = station(sizes).bench
    told = facts.machine(bench.model) | {"model": facts.model_facts(bench.model), "spreads": table[0]["spread"]}
    told |= {"judged on": elsewhere or told["device"]}
    told |= {"tasks": list(named), "asked": asked, "tuned": tuned, "batch": batch, "workers": workers}
    told |= {"test seeds": list(_tests(sizes)), "tuning seeds": list(_tunings(sizes))}
    return told | {"limit": seconds, "until": until, "trials": trials} | verdicts(table), table


def tabled(
    task: str, known: Mapping[str, catalog.Entry], done: Mapping[Job, Row], sizes: Sizes, timed: int
) -> Iterator[Row]:
    """The rows of a task, with the time that a mechanism takes."""
    yield unsteered(sizes, task, done.values())
    bench = station(sizes).bench
    for stem, entry in known.items():
        row, cost = done[stem, task], dict.fromkeys(TIMED)
        if sizes.seeds and timed and "choice" in row:
            cost = latency(bench, steers.made(bench, stem, row["choice"], task), timed)
        yield {**row, **cost, "site": entry.site, "sheet": entry.card.sheet}


def verdicts(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which mechanisms improve, in which task; which do in neither, and which cannot run."""
    found: dict[str, Any] = {}
    for title, column in (("improving", "improves"), ("paired", "paired")):
        yes = [row for row in table if row[column] == "yes"]
        found[title] = {task: [row["method"] for row in yes if row["task"] == task] for task in AIMS}
    yes = {stem for stems in found["improving"].values() for stem in stems}
    found["not improving"] = sorted({row["method"] for row in table if row["improves"] == "no"} - yes)
    for title in ("cannot run", "not run"):
        found[title] = sorted({row["method"] for row in table if row["improves"] == title})
    return found | {"improving in all": len(yes)}


def drawn(sizes: Sizes) -> dict[str, torch.Tensor]:
    """The images of all exams, so that no process draws them again."""
    tasks = sizes.tasks if sizes.tuning else ()
    made = {task: steers.pictures(_tunings(sizes), _tuned(sizes, task)) for task in tasks}
    return made | ({"test": steers.pictures(_tests(sizes), dict(sizes.asked))} if sizes.seeds else {})


@dataclass(eq=False)
class Sitting:
    """An exam, and how the unsteered model does in it."""

    exam: steers.Exam
    plain: list[dict[str, float]]


@dataclass(eq=False)
class Station:
    """A process's model, and its sittings by name: `test`, and what a task is tuned on."""

    sizes: Sizes
    bench: Bench

    @cached_property
    def images(self) -> dict[str, torch.Tensor]:
        """Of every sitting."""
        return load_file(self.sizes.pictures)

    def sitting(self, name: str) -> Sitting:
        """Made when it is first needed."""
        return self.bench.once(("sitting", name), lambda: self._sit(name))

    def _sit(self, name: str) -> Sitting:
        tested = name == "test"
        seeds = _tests(self.sizes) if tested else _tunings(self.sizes)
        asked = dict(self.sizes.asked) if tested else _tuned(self.sizes, name)
        exam = steers.Exam(self.bench, seeds, asked, self.sizes.batch, self.images[name])
        return Sitting(exam, exam.figures())


@cache
def station(sizes: Sizes) -> Station:
    """The station of this process."""
    return Station(sizes, Bench.open(sizes.device))


def judged(jobs: Sequence[Job], sizes: Sizes, workers: int, lines: str) -> dict[Job, Row]:
    """The rows of mechanisms and tasks, but for their time: those that `lines` holds, the others by `judge`.

    By `workers` processes or by this one.
    """
    done = earlier(lines) if lines else {}
    left = [job for job in jobs if job not in done]

    def keep(job: Job, row: Row) -> None:
        done[job] = row
        if lines:
            with Path(lines).open("a") as file:
                file.write(json.dumps(row) + "\n")

    if left:
        save_file(drawn(sizes), sizes.pictures)
    if not workers or not left:
        for job in left:
            keep(job, judge(job, sizes))
        return done
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        asked = {pool.submit(judge, job, sizes): job for job in left}
        for one in as_completed(asked):
            keep(asked[one], one.result())
    return done


def earlier(lines: str) -> dict[Job, Row]:
    """The rows with figures that the file `lines` holds.

    Raises:
        RegardError: they are of different exams.
    """
    path = Path(lines)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if "choice" in row]
    if any(row.get("plain") != rows[0].get("plain") for row in rows):
        raise RegardError(f"{path.name} holds rows of different exams: the unsteered model's figures differ")
    return {(row["method"], row["task"]): row for row in rows}


def judge(job: Job, sizes: Sizes) -> Row:
    """The row of a mechanism and task; where it cannot run, the row says why."""
    row = {"method": job[0], "task": job[1], "improves": "cannot run", "paired": "", **_blank(), "why": {}}
    try:
        steers.refuse(job[0])
        if sizes.stop and time.time() > sizes.stop:
            return row | {"improves": "not run"}
        return row | judge_task(*job, station(sizes))
    except Exception as error:
        # One mechanism that fails must not lose the others' figures.
        return row | {"why": {"error": type(error).__name__, "said": " ".join(str(error).split())[:300]}}


def judge_task(stem: str, task: str, place: Station) -> Row:
    """What becomes known of a mechanism, or what it raises."""
    began, tried = time.monotonic(), []
    if place.sizes.tuning:
        tried = list(trials(stem, place, task))
        choice, setting, _ = max(tried, key=lambda one: merit(one[2]))
    else:
        choice = steers.usual(stem) | next(iter(steers.FOUND.get((stem, task), ())), {})
        setting = steers.made(place.bench, stem, choice, task)
    row: Row = {"improves": "", "choice": choice, "told": setting.told()}
    row["tried"] = [{**one, "merit": merit(told), "mean": told["mean"]} for one, _, told in tried]
    if place.sizes.seeds:
        test = place.sitting("test")
        found = test.exam.figures(setting)
        result = compared(found, test.plain, task)
        asked, same = test.exam.alone(setting, ANSWERS_ALONE)
        row |= {name: "yes" if result.pop(name) else "no" for name in ("improves", "paired")}
        row |= {**summary(result), "alone": {"asked": asked, "same": same}, "seeds": found, **result}
    return row | {"seconds": time.monotonic() - began}


def unsteered(sizes: Sizes, task: str, rows: Iterable[Row]) -> Row:
    """The row of the model as it is, which rows with figures were compared with."""
    row = {"method": "none", "task": task, "improves": "", "paired": ""}
    if not sizes.seeds:
        return {**row, **_blank(), **TIMED, "spread": {}}
    known = [one["plain"] for one in rows if "plain" in one]
    plain = known[0] if known else station(sizes).sitting("test").plain
    result = compared(plain, plain, task)
    return {**row, **summary(result), **TIMED, "why": {}, "seeds": plain, "spread": result["spread"]}


def trials(stem: str, place: Station, task: str) -> Iterator[tuple[steers.Choice, Setting, dict[str, Any]]]:
    """Settings of a mechanism, each with what it changes on the tuning seeds; none twice."""
    random, seen, tune, sizes = Random(stem), [], place.sitting(task), place.sizes
    best, most, began = steers.usual(stem), (False, float("-inf")), time.monotonic()
    first = [best, *(best | one for one in steers.FOUND.get((stem, task), ()))]
    for number in range(max(sizes.trials, len(first))):
        if number and time.monotonic() - began > sizes.seconds:
            return
        near = best if number > sizes.trials // 3 else None
        choice = first[number] if number < len(first) else steers.drawn(stem, random, near)
        if choice in seen:
            continue
        seen.append(choice)
        setting = steers.made(place.bench, stem, choice, task)
        told = compared(tune.exam.figures(setting), tune.plain, task)
        if merit(told) > most:
            best, most = choice, merit(told)
        yield choice, setting, told


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
    """How settings rank: those that lose less than a third of a spread first, then by the larger gain in spreads."""
    return result["lost"] < 1 / 3, result["won"]


def latency(bench: Bench, setting: Setting, count: int, repeats: int = 7) -> dict[str, Any]:
    """Seconds of one caption, steered and not, in turns: a token, prompt included, and what is made of its image first.

    Such are sets of tokens, another view, or a picture drawn from a first caption.
    """
    image = torch.zeros(1, vlm.SIDE, vlm.SIDE, 3, dtype=torch.uint8)

    def once(one: Setting | None) -> tuple[float, float]:
        batch = bench.batch(image, [ask.TEXTS["caption"]])
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


def _blank() -> dict[str, None]:
    return {f"{sign}{name}": None for name in PRINTED for sign in ("", "+")}


def _tests(sizes: Sizes) -> range:
    return range(0, 10 * sizes.seeds, 10)


def _tunings(sizes: Sizes) -> range:
    # A seed's own scenes have seeds up to 7 above it.
    return range(TUNING, TUNING + 10 * sizes.tuning, 10)


def _tuned(sizes: Sizes, task: str) -> dict[str, int]:
    return {name: number for name, number in sizes.tuned if task in (name, "all")}


def _of(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _now(bench: Bench) -> float:
    if bench.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
