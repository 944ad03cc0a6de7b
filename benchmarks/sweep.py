"""Many small training runs side by side, on one device or on all GPUs of a machine, until the time is up.

Processes are dealt out to the GPUs. They take turns on each, and streams of one process share it: so every process
leads a few runs, a step of each in turn.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from regard.core.errors import RegardError, choose
from regard.measure.tasks.task import build
from regard.models import pretrained
from regard.models.hybrid import HybridConfig, HybridForCausalLM
from regard.train.data import BYTES, Source, TaskRows, TextRows
from regard.train.loop import Result, paced
from regard.train.settings import Settings


@dataclass(frozen=True)
class Job:
    """One run: what it is called in the table, its model (words of `HybridConfig`) and its settings."""

    called: dict[str, Any]
    model: dict[str, Any]
    settings: Settings
    device: str
    deadline: float = 0.0


def steps(job: Job) -> Iterator[dict[str, Any] | None]:
    """A run, step by step: None after each, its figures at the end.

    None at the end, too, if its time was up before it began. A refusal is a figure, so that it does not end the others.
    """
    if time.time() > job.deadline:
        yield None
        return
    began, called = time.time(), job.called | {"rate": job.settings.rate}
    try:
        torch.manual_seed(job.settings.seed)
        vocabulary = job.settings.task_settings["vocabulary"] if job.settings.task else BYTES
        config = HybridConfig(vocab_size=vocabulary, max_position_embeddings=job.settings.length, **job.model)
        model, result = HybridForCausalLM(config).to(job.device), Result()
        source = rows(job.settings, job.device)
        for so_far in paced(model, source, job.settings, asked=lambda: time.time() > job.deadline):
            result = so_far
            yield None
    except (RegardError, RuntimeError, NotImplementedError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield called | {"ended": "failed", "why": why, "seconds": time.time() - began}
        return
    yield called | {"seed": job.settings.seed, "parameters": model.num_parameters(), **figures(result)}


def figures(result: Result) -> dict[str, Any]:
    """What is kept of a run."""
    final = {key: value for key, value in result.final.items() if key != "step"}
    ended = "out of time" if result.ended == "asked" else result.ended
    curve = [[round(value, 4) for value in point.values()] for point in result.measured]
    return {"ended": ended, "steps": result.step, "seconds": result.seconds, **final, "measured": curve}


def rows(settings: Settings, device: str) -> Source:
    """The task's rows made on `device`, or the bytes of the language reference that every CPython carries."""
    if settings.task:
        return TaskRows(build(settings.task, length=settings.length, **settings.task_settings), settings, device)
    data = bytearray(pretrained.demo_text().encode())
    return TextRows(torch.frombuffer(data, dtype=torch.uint8).long(), BYTES, settings)


def sweep(
    case: str,
    jobs: Sequence[Job],
    workers: int,
    seconds: float,
    again: Callable[[Job, dict[str, Any]], Job | None] = lambda job, found: None,
    lanes: int = 1,
) -> list[dict[str, Any]]:
    """The figures of `jobs` as they finished, `workers` processes with `lanes` runs each (0: here, one by one).

    `again(job, figures)` may name one more run, which waits behind those named before. What has not begun after
    `seconds` is left out, what has not ended then is stopped and says so. Every line is appended at once to
    `partial-<case>.jsonl` in the folder `$OUT` (left unsaid: for temporary files), whatever ends this process.
    """
    deadline = time.time() + seconds
    partial = Path(os.environ.get("OUT") or tempfile.gettempdir()) / f"partial-{case}.jsonl"
    partial.unlink(missing_ok=True)
    found: list[dict[str, Any]] = []
    given: list[Job] = []
    open_runs = 0
    with _here() if not workers else _processes(workers, lanes) as (ask, ended):
        waiting = list(jobs)
        while waiting or open_runs:
            while waiting:
                given.append(replace(waiting.pop(0), deadline=deadline))
                ask((len(given) - 1, given[-1]))
                open_runs += 1
            number, figures = ended()
            open_runs -= 1
            if figures is None:
                continue
            found.append(figures)
            with partial.open("a") as file:
                file.write(json.dumps(figures) + "\n")
            if (more := again(given[number], figures)) is not None:
                waiting.append(more)
    return found


# How a job is asked for, by number, and how the next one that has ended is waited for.
Ways = tuple[Callable[[tuple[int, Job]], None], Callable[[], tuple[int, dict[str, Any] | None]]]


@contextmanager
def _here() -> Iterator[Ways]:
    """One job after the other in this process, when it is waited for."""
    asked: list[tuple[int, Job]] = []

    def ended() -> tuple[int, dict[str, Any] | None]:
        number, job = asked.pop(0)
        *_, last = steps(job)
        return number, last

    yield asked.append, ended


@contextmanager
def _processes(count: int, lanes: int) -> Iterator[Ways]:
    """Several jobs at a time in each of `count` processes, which end with the context."""
    context = multiprocessing.get_context("spawn")
    asked, told = context.Queue(), context.Queue()
    crew = [context.Process(target=_lead, args=(asked, told, lanes, i), daemon=True) for i in range(count)]
    for process in crew:
        process.start()

    def ended() -> tuple[int, dict[str, Any] | None]:
        while True:
            try:
                return told.get(timeout=1)
            except Empty:
                for process in crew:
                    if not process.is_alive():
                        raise RuntimeError(f"a process of the sweep ended with {process.exitcode}") from None

    try:
        yield asked.put, ended
    finally:
        for process in crew:
            process.terminate()
            process.join()


def _lead(asked: Any, told: Any, lanes: int, place: int) -> None:
    """Lead up to `lanes` runs, a step of each in turn, for good, on the GPU that process `place` is dealt to."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    under_way: dict[int, Iterator[dict[str, Any] | None]] = {}
    last: dict[int, dict[str, Any] | None] = {}
    while True:
        # Others may want the rest: one more at a time.
        if len(under_way) < lanes:
            try:
                number, job = asked.get(block=not under_way)
                under_way[number] = steps(job)
            except Empty:
                pass
        for number, run in list(under_way.items()):
            try:
                last[number] = next(run)
            except StopIteration:
                del under_way[number]
                torch.cuda.empty_cache()  # the other processes need it
                told.put((number, last.pop(number)))


def picked(kind: str, written: str, known: Iterable[str]) -> list[str]:
    """What `written` names of `known`, with commas between; nothing: all of it.

    Raises:
        RegardError: a name that is not known.
    """
    known = list(known)
    return [choose(kind, name, known) for name in written.split(",")] if written else known


def numbers(written: int | str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(word) for word in str(written).split(",")]


def slowest_first(jobs: Sequence[Job]) -> list[Job]:
    """Runs of KDA, whose steps take longest, before all others: they are not left to the end."""
    return sorted(jobs, key=lambda job: job.called["mixer"] != "kda")


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float | str]:
    """The mean of `values` under `name`, and half their range; `-` where there are none."""
    if not values:
        return {name: "-", f"{name} spread": "-"}
    return {name: sum(values) / len(values), f"{name} spread": (max(values) - min(values)) / 2}
