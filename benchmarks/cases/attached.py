"""What being attached costs by itself: an empty recipe against the model's own attention, with a control."""

from dataclasses import asdict
from typing import Any

from regard.measure.seconds import Seconds, control, seconds
from regard.models import pretrained
from regard.search import facts


def run(length: int = 1024, steps: int = 32, repeats: int = 7) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Prefill and decode time of `Recipe([])` and of the model's own attention, each over the model's own."""
    model, tokenizer = pretrained.load("demo")
    tokens = tokenizer(pretrained.demo_text()[: 8 * length], return_tensors="pt").input_ids[0, : length + steps]
    told = facts.machine(model) | {"model": facts.model_facts(model), "length": length, "steps": steps}
    return told, [
        row("own against own", control(model, tokens, steps, repeats)),
        row("Recipe([]) against own", seconds(model, [], tokens, steps, repeats)),
    ]


def row(name: str, timed: Seconds) -> dict[str, Any]:
    """Medians of paired ratios, and everything they come from."""
    return {
        "what": name,
        "prefill": timed.prefill.ratio.median,
        "prefill mad": timed.prefill.ratio.mad,
        "decode": timed.decode.ratio.median,
        "decode mad": timed.decode.ratio.mad,
        "pairs": timed.repeats,
        "timings": asdict(timed),
    }
