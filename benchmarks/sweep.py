"""Many small training runs side by side on one device, until the time is up."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regard.core.errors import RegardError
from regard.measure.tasks.task import build
from regard.models import pretrained
from regard.models.hybrid import HybridConfig, HybridForCausalLM
from regard.train.data import BYTES, Source, TaskRows, TextRows
from regard.train.loop import train
from regard.train.settings import Settings


@dataclass(frozen=True)
class Job:
    """One run: what it is called in the table, its model (words of `HybridConfig`) and its settings."""

    called: dict[str, Any]
    model: dict[str, Any]
    settings: Settings
    device: str
    deadline: float = 0.0


def done(job: Job) -> dict[str, Any]:
    """The figures of a run; a refusal is one, so that it does not end the others."""
    torch.set_num_threads(1)
    began = time.time()
    try:
        return job.called | {"rate": job.settings.rate, "seed": job.settings.seed} | _run(job)
    except (RegardError, RuntimeError, NotImplementedError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return job.called | {"rate": job.settings.rate, "ended": "failed", "why": why, "seconds": time.time() - began}
    finally:
        if job.device == "cuda":
            torch.cuda.empty_cache()  # the other processes need it


def _run(job: Job) -> dict[str, Any]:
    settings = job.settings
    torch.manual_seed(settings.seed)
    vocabulary = settings.task_settings["vocabulary"] if settings.task else BYTES
    config = HybridConfig(vocab_size=vocabulary, max_position_embeddings=settings.length, **job.model)
    model = HybridForCausalLM(config).to(job.device)
    result = train(model, rows(settings, job.device), settings, asked=lambda: time.time() > job.deadline)
    final = {key: value for key, value in result.final.items() if key != "step"}
    ended = "out of time" if result.ended == "asked" else result.ended
    curve = [[round(value, 4) for value in point.values()] for point in result.measured]
    found = {"ended": ended, "steps": result.step, "seconds": result.seconds, **final}
    return found | {"parameters": model.num_parameters(), "measured": curve}


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
) -> list[dict[str, Any]]:
    """The figures of `jobs` as they finished, `workers` processes at a time (0: here, one by one).

    `again(job, figures)` may name one more run, which waits behind those named before. What has not begun after
    `seconds` is left out, what has not ended then is stopped and says so. Every line is appended at once to
    `partial-<case>.jsonl` in the folder `$OUT` (left unsaid: for temporary files), whatever ends this process.
    """
    deadline = time.time() + seconds
    partial = Path(os.environ.get("OUT") or tempfile.gettempdir()) / f"partial-{case}.jsonl"
    partial.unlink(missing_ok=True)
    found: list[dict[str, Any]] = []
    with _executor(workers) as pool:
        waiting: dict[Future, Job] = {}

        def begin(job: Job) -> None:
            job = replace(job, deadline=deadline)
            waiting[pool.submit(_in_time, job)] = job

        for job in jobs:
            begin(job)
        while waiting:
            ended = wait(waiting, return_when=FIRST_COMPLETED).done
            for future in [one for one in waiting if one in ended]:
                job, figures = waiting.pop(future), future.result()
                if figures is None:
                    continue
                found.append(figures)
                with partial.open("a") as file:
                    file.write(json.dumps(figures) + "\n")
                if (more := again(job, figures)) is not None:
                    begin(more)
    return found


def _in_time(job: Job) -> dict[str, Any] | None:
    return None if time.time() > job.deadline else done(job)


def _executor(workers: int) -> Executor:
    if workers:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    return _Here()


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def over_seeds(name: str, values: Sequence[float]) -> dict[str, float | str]:
    """The mean of `values` under `name`, and half their range; `-` where there are none."""
    if not values:
        return {name: "-", f"{name} spread": "-"}
    return {name: sum(values) / len(values), f"{name} spread": (max(values) - min(values)) / 2}
