"""Layers of every mixer for each layer of softmax attention (arXiv 2507.06457): recall, and loss on text.

Recall is MQAR at a width at which a state is too small for all pairs. Below the layers that are counted lies a gated
short convolution, as in `mqar`: without one no model left chance. The text is the language reference that every CPython
carries, byte by byte; its last tenth is measured on.
"""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from regard.layers import mixers
from regard.models import layouts
from regard.search import facts
from regard.train.settings import Settings
from sweep import Job, over_seeds, picked, slowest_first, sweep

# Layers of the mixer for one of softmax attention; None: no softmax at all.
RATIOS = {"pure": None, "7:1": 7, "3:1": 3, "1:1": 1}
# Of recall. HGRN-2 learns nothing with the first.
RATES = (3e-3, 1e-2)


def run(
    layers: int = 8,
    only: str = "",
    ratios: str = "",
    recall_width: int = 128,
    recall_heads: int = 4,
    text_width: int = 128,
    length: int = 256,
    pairs: int = 32,
    vocabulary: int = 8192,
    recall_steps: int = 2000,
    tries: int = 2,
    text_steps: int = 250,
    batch: int = 64,
    seeds: int = 1,
    seconds: int = 240,
    workers: int = 7,
    lanes: int = 2,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracy and loss (nats a byte) of every mixer at every ratio, and of softmax attention alone.

    Args:
        layers: of every model; ratios that leave no softmax layer are left out.
        only: mixers, with commas between; empty: all. Softmax attention alone is in each run.
        ratios: of `RATIOS`, with commas between; empty: all.
        recall_width: channels of the models that recall.
        recall_heads: heads of the models that recall; with one, decays that are one number a head would be one.
        text_width: channels of the models that read text, in heads of 64; with MLPs.
        length: tokens of a row, of both.
        pairs: of MQAR.
        vocabulary: of MQAR.
        recall_steps: optimiser steps of recall; 0 leaves recall out.
        tries: how many of `RATES` recall is tried with, as long as 99 % is not reached.
        text_steps: optimiser steps on text; 0 leaves text out.
        batch: rows of a step.
        seeds: runs of each.
        seconds: no run begins after that, none goes on.
        workers: processes side by side; 0: one run after the other in this one.
        lanes: runs of each process, side by side too.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = asked(only, ratios, layers)
    shared = {"length": length, "batch": batch, "floor": 0.1, "held_out": 128, "bf16": device == "cuda"}
    task = {"pairs": pairs, "vocabulary": vocabulary}
    jobs = []
    for seed, ((mixer, ratio), layout) in itertools.product(range(seeds), made.items()):
        cell = {"mixer": mixer, "ratio": ratio}
        if recall_steps:
            model = recalling(layout, recall_width, recall_heads)
            settings = of_recall(recall_steps, task, seed=seed, **shared)
            jobs.append(Job(cell | {"what": "recall"}, model, settings, device))
        if text_steps:
            settings = of_text(text_steps, seed=seed, **shared)
            jobs.append(Job(cell | {"what": "text"}, reading(layout, text_width), settings, device))
    runs = sweep("ratios", slowest_first(jobs), workers, seconds, functools.partial(another, tries), lanes)
    told = facts.machine(SimpleNamespace(device=torch.device(device))) | shared | {"layers": layers, "workers": workers}
    told |= task | {"recall width": recall_width, "recall heads": recall_heads, "recall steps": recall_steps}
    told |= {"tries": tries, "text width": text_width, "text steps": text_steps, "seeds": seeds, "lanes": lanes}
    begun = [one for one in runs if one["what"] == "text" or one["rate"] == RATES[0]]
    return told | {"gpus": torch.cuda.device_count(), "left out": len(jobs) - len(begun)}, table(runs, made)


def asked(only: str, ratios: str, layers: int) -> dict[tuple[str, str], list[str]]:
    """The layout of every mixer and ratio that is asked for, and of softmax attention alone."""
    chosen = picked("mixer", only, [name for name in mixers.names() if name != layouts.SOFTMAX])
    made = {(layouts.SOFTMAX, "0:1"): [layouts.SOFTMAX] * layers}
    for name in picked("ratio", ratios, RATIOS):
        ratio = RATIOS[name]
        if ratio is None or ratio < layers:
            made |= {(mixer, name): layouts.ratio(mixer, ratio, layers=layers, recall=False) for mixer in chosen}
    return made


def of_recall(steps: int, task: dict[str, int], **shared: Any) -> Settings:
    """How recall is learned first."""
    return Settings(
        task="mqar", task_settings=task, steps=steps, rate=RATES[0], target=0.99, evaluate=max(1, min(100, steps // 2)),
        warmup=0.1, **shared,
    )  # fmt: skip


def of_text(steps: int, **shared: Any) -> Settings:
    """How text is learned."""
    return Settings(text="the language reference", steps=steps, rate=2e-3, evaluate=steps, **shared)


def another(tries: int, tried: Job, figures: dict[str, Any]) -> Job | None:
    """A run of recall with the next rate, if there is one and the last one was not enough."""
    if tried.called["what"] != "recall" or figures["ended"] != "steps":
        return None
    number = RATES.index(tried.settings.rate) + 1
    return replace(tried, settings=replace(tried.settings, rate=RATES[number])) if number < tries else None


def recalling(layout: list[str], width: int, heads: int) -> dict[str, Any]:
    """A model without MLPs, over a gated short convolution; no layer is told positions."""
    return {
        "hidden_size": width, "mixers": ["base_conv", *layout], "num_attention_heads": heads, "mlp": "none",
        "norm": "layer", "positions": "none",
        "mixer_options": {"softmax": {"rope": False}} if layouts.SOFTMAX in layout else None,
    }  # fmt: skip


def reading(layout: list[str], width: int) -> dict[str, Any]:
    """A plain language model; its softmax layers have rotary positions."""
    return {"hidden_size": width, "mixers": layout, "num_attention_heads": max(1, width // 64)}


def table(runs: list[dict[str, Any]], made: dict[tuple[str, str], list[str]]) -> list[dict[str, Any]]:
    """One row a mixer and ratio: the best try of each seed, their mean and half their range."""
    rows = []
    for (mixer, ratio), layout in made.items():
        row: dict[str, Any] = {"mixer": mixer, "ratio": ratio, "softmax layers": layout.count(layouts.SOFTMAX)}
        mine = [one for one in runs if (one["mixer"], one["ratio"]) == (mixer, ratio)]
        for what, figure in (("recall", "accuracy"), ("text", "loss")):
            tried = best([one for one in mine if one["what"] == what and figure in one])
            row |= over_seeds(f"{what} {figure}", [one[figure] for one in tried])
        ended = sorted({f"{one['what']}: {one['ended']}" for one in mine if one["ended"] in ("failed", "out of time")})
        rows.append(row | {"note": "; ".join(ended), "runs": mine})
    return rows


def best(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each seed, the run that recalled most; text is tried once."""
    return list({one["seed"]: one for one in sorted(runs, key=lambda one: one.get("accuracy", 0.0))}.values())
