"""Associative recall (MQAR) of every mixer: two layers without MLPs, by width, length and pairs.

The frame of Zoology (arXiv 2312.04927): pre-LayerNorm, tied embeddings, fresh rows for every step, the best of a
small sweep, stopped at 99 %. A mixer stands over a gated short convolution, as in Zoology's later experiments, or over
another layer of itself; softmax attention alone has learned positions, all else none. Batches are smaller and runs
shorter than Zoology's, for time: in pilot runs (H200, width 128, length 256, one seed) GLA and RetNet with 256 rows a
step were step for step where they are with 64. The size of the first weights is swept beside the rate: in pilot runs on
a CPU narrow attention alone learned nothing with the usual 0.02, Gated DeltaNet nothing with 0.1.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from regard.layers import mixers
from regard.search import facts
from regard.train.settings import Settings
from sweep import Job, numbers, over_seeds, picked, slowest_first, sweep

# The sweep: learning rate, and standard deviation of the first weights (None: 1 / sqrt(width)).
TRIES = ((3e-3, 0.02), (1e-2, 0.02), (3e-3, None))
SOLVED = 0.99
# Channels of a head, and the fewest heads: with one, a mixer whose decays are one number a head has one decay. That of
# Gated DeltaNet began by forgetting within a token, with the seed that learned nothing at width 64.
HEAD, HEADS = 64, 2
# What the first layer is.
BELOW = ("base_conv", "itself")


def run(
    widths: int | str = "64,128,256",
    lengths: int | str = "256,512",
    below: int = 1,
    pairs: int = 0,
    tries: int = 2,
    seeds: int = 1,
    steps: int = 2000,
    batch: int = 64,
    vocabulary: int = 8192,
    seconds: int = 460,
    workers: int = 12,
    lanes: int = 1,
    only: str = "",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracy of every mixer, the best of the sweep, by seed.

    Args:
        widths: with commas between.
        lengths: with commas between.
        below: the first layer: 1 a gated short convolution, 2 the mixer itself; 0: both.
        pairs: of a row; 0: an eighth of its length.
        tries: how many of `TRIES` are made, as long as 99 % is not reached; softmax alone begins with the last, HGRN-2,
            which learns nothing with the first, with the second.
        seeds: runs of each.
        steps: optimiser steps at most.
        batch: rows of a step.
        vocabulary: keys and values together.
        seconds: no run begins after that, none goes on.
        workers: processes side by side; 0: one run after the other in this one.
        lanes: runs of each process, side by side too.
        only: mixers, with commas between; empty: all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = picked("mixer", only, mixers.names())
    firsts = BELOW[below - 1 : below] if below else BELOW
    # The longest runs begin first, so that no long one is left at the end.
    jobs = [
        job(
            mixer, first, channels, tokens, pairs or tokens // 8, seed, device,
            steps=steps, batch=batch, vocabulary=vocabulary,
        )
        for first in firsts
        for tokens in sorted(numbers(lengths), reverse=True)
        for channels in sorted(numbers(widths), reverse=True)
        for seed in range(seeds)
        for mixer in chosen
        if mixer != first
    ]  # fmt: skip

    runs = sweep("mqar", slowest_first(jobs), workers, seconds, functools.partial(another, tries), lanes)
    told = facts.machine(SimpleNamespace(device=torch.device(device))) | {"mixers": chosen, "workers": workers}
    told |= {"lanes": lanes, "tries": tries, "steps": steps, "batch": batch, "vocabulary": vocabulary}
    told |= {"bf16": device == "cuda", "gpus": torch.cuda.device_count()}
    return told | {"left out": len(jobs) - len(cells(runs))}, table(runs)


def job(
    mixer: str,
    below: str,
    width: int,
    length: int,
    pairs: int,
    seed: int,
    device: str,
    *,
    steps: int,
    batch: int,
    vocabulary: int,
) -> Job:
    """The first run of a cell."""
    layers = [mixer if below == "itself" else below, mixer]
    model = {
        "hidden_size": width, "mixers": layers, "num_attention_heads": max(HEADS, width // HEAD), "mlp": "none",
        "norm": "layer", "positions": "learned" if set(layers) == {"softmax"} else "none",
        "mixer_options": {"softmax": {"rope": False}} if mixer == "softmax" else None,
    }  # fmt: skip
    settings = Settings(
        task="mqar", task_settings={"pairs": pairs, "vocabulary": vocabulary}, length=length, batch=batch, steps=steps,
        floor=0.1, warmup=min(0.5, 100 / steps), evaluate=max(1, min(100, steps // 2)), held_out=512,
        seed=seed, target=SOLVED, bf16=device == "cuda",
    )  # fmt: skip
    called = {"mixer": mixer, "below": below, "width": width, "length": length, "pairs": pairs}
    return tuned(Job(called, model, settings, device), *sweep_of(called)[0])


def another(tries: int, tried: Job, figures: dict[str, Any]) -> Job | None:
    """The next try of a cell, if there is one and the last one was not enough."""
    order = sweep_of(tried.called)
    number = order.index((tried.settings.rate, tried.called["init"])) + 1
    if figures["ended"] != "steps" or number >= tries:
        return None
    return tuned(tried, *order[number])


def sweep_of(called: dict[str, Any]) -> list[tuple[float, float | None]]:
    """What is tried, in order."""
    alone = (called["mixer"], called["below"]) == ("softmax", "itself")
    first = 2 if alone else 1 if called["mixer"] == "hgrn2" else 0
    return [*TRIES[first:], *TRIES[:first]]


def tuned(job: Job, rate: float, init: float | None) -> Job:
    """The same run with another rate and other first weights."""
    model = job.model | {"initializer_range": init or job.model["hidden_size"] ** -0.5}
    return replace(job, called=job.called | {"init": init}, model=model, settings=replace(job.settings, rate=rate))


def cells(runs: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The runs of each first layer, length, width, mixer and seed."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for one in runs:
        key = (one["below"], one["length"], one["width"], one["mixer"], one.get("seed", 0))
        found.setdefault(key, []).append(one)
    return found


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: the best try of each seed, their mean and half their range."""
    best: dict[tuple, list[dict[str, Any]]] = {}
    for key, tried in sorted(cells(runs).items()):
        best.setdefault(key[:4], []).append(max(tried, key=lambda one: one.get("accuracy", -1.0)))
    rows = []
    for cell, by_seed in best.items():
        below, length, width, mixer = cell
        accuracies = [one["accuracy"] for one in by_seed if "accuracy" in one]
        rows.append(
            {
                "mixer": mixer,
                "below": below,
                "width": width,
                "length": length,
                "pairs": by_seed[0]["pairs"],
                **over_seeds("accuracy", accuracies),
                "steps": max(one.get("steps", 0) for one in by_seed),
                "rate": by_seed[0]["rate"],
                "init": by_seed[0]["init"] or "1/sqrt(width)",
                "ended": by_seed[0]["ended"],
                "runs": [run for key, tried in cells(runs).items() if key[:4] == cell for run in tried],
            }
        )
    return rows
