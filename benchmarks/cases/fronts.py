"""Each mechanism searched alone, and all of them together: the fronts of KL and bytes on the demo model.

The joint search begins with what the single ones found, measured again, and goes on from there.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import regard
from regard.catalog import Entry
from regard.core.placement import Placement
from regard.measure import text
from regard.models import pretrained
from regard.search import facts
from regard.search.calibration import calibrate
from regard.search.front import dominates
from regard.search.space import read
from regard.search.study import default_mechanisms

# The corner that areas are measured from, and the loss below which less is not worth telling apart (nats a token).
WORST, LEAST = (1.0, 1.0), 1e-4


def run(seeds: int = 2, trials: int = 8, more: int = 32) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fronts of every mechanism and of all, for each seed.

    Args:
        seeds: searches of each kind.
        trials: of a single mechanism.
        more: trials of the joint search, besides those it begins with.
    """
    model, tokenizer = pretrained.load("demo", device="cuda" if torch.cuda.is_available() else "cpu")
    tokens = text.tokenise(tokenizer, pretrained.demo_text())
    chosen = default_mechanisms(("kl", "bytes"))
    known = calibrate(model, tokens[:32_768], chosen, model.config.num_hidden_layers)
    told = facts.machine(model) | {"model": facts.model_facts(model), "text": facts.text_digest(tokens)}
    told |= {"mechanisms": [e.stem for e in chosen], "trials a mechanism": trials, "more": more}
    told |= {"worst": WORST, "least kl": LEAST}
    rows = []
    for seed in range(seeds):
        alone = {e.stem: front(model, tokenizer, tokens, [e], known, trials, seed) for e in chosen}
        first = [read(point["placements"], known.tensors) for points, _ in alone.values() for point in points]
        joint, spent = front(model, tokenizer, tokens, chosen, known, more + len(first), seed, first)
        for stem, (points, taken) in alone.items():
            beaten = sum(any(reaches(j, p) for j in joint) for p in points)
            rows.append(row(stem, seed, points, taken) | {"reached by joint": f"{beaten} of {len(points)}"})
        rows.append(row("joint", seed, joint, spent) | {"reached by joint": ""})
    return told, rows


def front(
    model: Any,
    tokenizer: Any,
    tokens: torch.Tensor,
    chosen: list[Entry],
    known: Any,
    trials: int,
    seed: int,
    first: list[list[Placement]] | None = None,
) -> tuple[list[dict[str, Any]], float]:
    """Front points but dense, and the seconds it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        study = regard.search(
            model, tokenizer, tokens, mechanisms=chosen, objectives=("kl", "bytes"), constraints=(), trials=trials,
            storage=Path(folder) / "study.db", out=None, calibration=known, progress=False, final_members=0, seed=seed,
            begin_with=first or (), attributions=0,
        )  # fmt: skip
    points = [
        {"kl": r.scores["kl"], "bytes": r.scores["bytes"], "trial": r.number, "placements": list(r.placements)}
        for r in study.front
        if not r.dense
    ]
    return points, time.monotonic() - began


def reaches(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether `a` is at least as good as `b` in both figures."""
    one, other = ([p["kl"], p["bytes"]] for p in (a, b))
    return one == other or dominates(one, other)


def row(who: str, seed: int, points: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """A front and its area."""
    return {"who": who, "seed": seed, "points": len(points), "area": area(points), "seconds": seconds, "front": points}


def area(points: list[dict[str, Any]]) -> float:
    """Share of the box from `LEAST` to `WORST` that the front beats, the loss on a logarithmic scale."""
    span = math.log(WORST[0] / LEAST)
    total, height = 0.0, WORST[1]
    for point in sorted(points, key=lambda p: p["kl"]):
        width = math.log(WORST[0] / max(point["kl"], LEAST)) / span
        if width > 0 and point["bytes"] < height:
            total += width * (height - point["bytes"])
            height = point["bytes"]
    return total
