"""DHSA against dense attention: prefill seconds and what predictions lose, by length and budget.

Runs on the GPU in bfloat16 where there is one, else on CPU in float32. Chunks are those of the fitted predictor
(`fit=0`: fixed ones). What the floor of a row says: the share of dense attention's scores that is still computed.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from regard.calibrate import dhsa
from regard.core.placement import Placement
from regard.measure.quality import dense, quality
from regard.measure.seconds import seconds
from regard.measure.text import windows
from regard.models import pretrained
from regard.search import facts

LENGTHS, CONTINUATION = (2048, 4096, 8192), 64
PERCENT = (10, 25)


def run(
    shortest: int = LENGTHS[0], longest: int = LENGTHS[-1], repeats: int = 3, fit: int = 1, block: int = 128
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Prefill time over dense's, interleaved, and KL of a continuation, for contexts doubling from `shortest` on."""
    model, tokenizer = pretrained.load("demo")
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    text = tokenizer(pretrained.demo_text(), return_tensors="pt").input_ids[0]
    # The predictor is fitted on the half of the text that nothing is measured on.
    fitted = dhsa.fit(model, text[len(text) // 2 :]) if fit else {}
    text = text[: len(text) // 2]
    settings = {"fit": fit, "block": block, "repeats": repeats}
    told = facts.machine(model) | {"model": facts.model_facts(model)} | settings
    rows, length = [], shortest
    while length <= longest:
        rows += [row(model, text, length, percent, block, repeats, fitted) for percent in PERCENT]
        length *= 2
    return told, rows


def row(
    model: Any, text: Tensor, length: int, percent: int, block: int, repeats: int, fitted: dict[str, Tensor]
) -> dict[str, Any]:
    """One length and budget: medians of paired ratios, and everything they come from."""
    budget = length * percent // 100
    forced = min(128, budget // 4)
    options = {
        "budget": budget,
        "block": min(block, forced),
        "first": forced,
        "last": forced,
        "chunks": "predicted" if fitted else "fixed",
    }
    placed = [Placement("dhsa", options=options, tensors=fitted)]
    held = windows(text, length, CONTINUATION, 1)
    timed = seconds(model, placed, text[: length + 8], steps=8, repeats=repeats)
    found = quality(model, placed, held, CONTINUATION, dense(model, held, CONTINUATION))
    share = budget / length
    return {
        "length": length,
        "budget": budget,
        "floor": share * (2 - share),
        "prefill": timed.prefill.ratio.median,
        "prefill mad": timed.prefill.ratio.mad,
        "dense s": timed.prefill.dense.median,
        "dhsa s": timed.prefill.method.median,
        "decode": timed.decode.ratio.median,
        "kl": found.kl,
        "top1": found.top1,
        "options": options,
        "timings": asdict(timed),
        "quality": asdict(found),
    }
