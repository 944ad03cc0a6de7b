"""What attention calibration (ACT) does to recall of planted facts, and to plain text, with and without head search."""

from typing import Any

import torch

from regard.calibrate import act
from regard.core.placement import Placement
from regard.measure.measure import run as measured
from regard.measure.measure import setting
from regard.measure.text import split, tokenise, windows
from regard.models import pretrained
from regard.search import facts

# Tokens of each of the two search windows that a head is scored on.
SCORED = 64


def run(
    context: int = 384, continuation: int = 32, planted: int = 8, seeds: int = 3, heads: int = 32
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Each seed plants other facts in another window; heads are searched on text that no window holds.

    Args:
        context: tokens of a window's prompt, facts not counted.
        continuation: tokens that KL is measured on.
        planted: facts a window.
        seeds: windows.
        heads: heads tried in the search.
    """
    model, tokenizer = pretrained.load("demo", device="cuda" if torch.cuda.is_available() else "cpu")
    size = context + continuation
    searched = 2 * (context + SCORED)
    text = tokenise(tokenizer, pretrained.demo_text()[: 8 * (searched + seeds * size)])
    parts = split(text, 0, seeds * size, searched)
    layers = model.config.num_hidden_layers
    # The paper's layers: all but the first two and the last.
    inner = tuple(range(2, layers - 1))
    found = act.fit(model, parts.calibration, context=context, continuation=SCORED, limit=heads)
    told = facts.machine(model) | {"model": facts.model_facts(model), "context": context, "planted": planted}
    told["heads kept"] = [tuple(place) for place in found["heads_mask"].nonzero().tolist()]
    told["heads tried"] = heads
    tried = {"searched heads": found, "every head": {}}
    rows = []
    for seed, window in enumerate(windows(parts.final, context, continuation, seeds, parts.offsets[2])):
        shared = setting([window], facts=planted, tokenizer=tokenizer, seed=seed)
        for name, tensors in tried.items():
            rows.append(row(name, seed, measured(model, [Placement("act", inner, "all", {}, tensors)], shared)))
    return told, rows


def row(name: str, seed: int, found: Any) -> dict[str, Any]:
    """Recall and text quality before (dense) and after."""
    return {
        "what": name,
        "seed": seed,
        "recall before": found.recall.dense_recalled,
        "recall after": found.recall.recalled,
        "margin before": found.recall.dense_margin,
        "margin after": found.recall.margin,
        "perplexity ratio": found.quality.perplexity_ratio,
        "kl": found.quality.kl,
        "measurement": found.to_json(),
    }
