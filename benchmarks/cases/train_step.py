"""A training step of every mixer, launched kernel by kernel and replayed as a CUDA graph: the same losses, the time.

The model and the rows are those of the recall benchmark, two layers of the mixer without MLPs.
"""

import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from cases import mqar
from regard.core.errors import RegardError
from regard.layers import mixers
from regard.models.hybrid import HybridConfig, HybridForCausalLM
from regard.search import facts
from regard.train.loop import Result, paced
from regard.train.settings import Settings
from sweep import Job, rows

# Losses may differ by this share; kernels that add in any order differ so much from one run to the next.
APART = 1e-2
WARM = 10


def run(
    width: int = 128,
    length: int = 256,
    batch: int = 64,
    vocabulary: int = 8192,
    steps: int = 40,
    repeats: int = 5,
    part: int = 0,
    parts: int = 1,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Milliseconds a step, launched and replayed, and their ratio; medians of interleaved repeats.

    Args:
        width: channels of the model, in heads of 64.
        length: tokens of a row.
        batch: rows of a step.
        vocabulary: keys and values together.
        steps: timed at once.
        repeats: of those.
        part: which part of the mixers, from 0.
        parts: into how many parts the mixers are dealt.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = facts.machine(SimpleNamespace(device=torch.device(device)))
    told |= {"width": width, "length": length, "batch": batch, "vocabulary": vocabulary, "steps": steps}
    found = []
    for mixer in mixers.names()[part::parts]:
        # The last step is never taken: it would be measured.
        count = WARM + steps * repeats + 1
        job = mqar.job(
            mixer, "itself", width, length, length // 8, 0, device, steps=count, batch=batch, vocabulary=vocabulary
        )
        found.append({"mixer": mixer} | compared(job, steps, repeats))
    return told, found


def compared(job: Job, steps: int, repeats: int) -> dict[str, Any]:
    """One row: both ways take turns."""
    ways = {"launched": begun(job, graphs=False), "replayed": begun(job, graphs=None)}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    told: dict[str, Result] = {name: after(way, WARM)[0] for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            told[name], seconds = after(way, steps)
            taken[name].append(seconds / steps * 1e3)
    apart = max(abs(a - b) / abs(a) for a, b in zip(*(one.losses for one in told.values()), strict=True))
    if apart > APART:
        raise RegardError(f"losses differ by {apart:.1%}: not the same steps, and not timed")
    found: dict[str, Any] = {f"{name} ms": statistics.median(times) for name, times in taken.items()}
    ratios = [a / b for a, b in zip(taken["launched"], taken["replayed"], strict=True)]
    return found | {"ratio": statistics.median(ratios), "losses apart": apart, "why not": told["replayed"].eager}


def begun(job: Job, graphs: bool | None) -> Iterator[Result]:
    """A run of `job`, one step for each result that is asked for."""
    words = job.settings.to_json() | {"graphs": graphs, "target": 2.0, "evaluate": job.settings.steps, "held_out": 1}
    torch.manual_seed(job.settings.seed)
    config = HybridConfig(
        vocab_size=job.settings.task_settings["vocabulary"],
        max_position_embeddings=job.settings.length,
        **job.model,
    )
    settings = Settings(**words)
    return paced(HybridForCausalLM(config).to(job.device), rows(settings, job.device), settings)


def after(way: Iterator[Result], steps: int) -> tuple[Result, float]:
    """The result of so many more steps, and the seconds they took."""
    synchronise()
    began = time.perf_counter()
    for _ in range(steps - 1):
        next(way)
    result = next(way)
    synchronise()
    return result, time.perf_counter() - began


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
