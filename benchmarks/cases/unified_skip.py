"""Unified layer skipping on the demo model: what skipping costs, what fine-tuning wins back, and two controls.

The skipped run in the middle keeps as many layers as the spread plan; full depth is fine-tuned the same way,
so that what the text alone teaches is not taken for recovery.
"""

import copy
import time
from typing import Any

import torch
from torch import Tensor

from regard.calibrate.unified_skip import finetune
from regard.core.placement import Placement
from regard.measure import text
from regard.measure.quality import Dense, dense, quality
from regard.measure.seconds import seconds
from regard.models import pretrained
from regard.ops.depth.unified_skip import kept_layers
from regard.search import facts

HELD_OUT = 16_000


def run(
    speed_up: int = 2,
    minutes: int = 5,
    steps: int = 4000,
    batch: int = 32,
    length: int = 512,
    rate: int = 200,
    distil: int = 90,
    samples: int = 4096,
    windows: int = 12,
    timing: int = 5,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """KL, perplexity and decode time at full depth, skipped evenly and skipped in the middle, before and after.

    Args:
        speed_up: of all plans.
        minutes: for the three fine-tunings together; the first decides how many steps each takes.
        steps: at most so many each.
        batch: examples a step.
        length: tokens of an example, and of a held-out window, of which half is the prompt.
        rate: largest learning rate, in millionths.
        distil: per cent of the loss that is distillation from full depth.
        samples: examples that the model itself writes, besides those of the text (0: none).
        windows: held-out windows.
        timing: pairs of decode timings (0: none).
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, tokenizer = pretrained.load("demo", torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    tokens = text.tokenise(tokenizer, pretrained.demo_text())
    taught, held = tokens[:-HELD_OUT], tokens[-HELD_OUT:]
    judged = text.windows(held, length // 2, length // 2, windows)
    layers, started = model.config.num_hidden_layers, time.monotonic()
    examples = blocks(taught, length)
    if samples:
        examples = torch.cat((examples, written(model, examples[:, :32], samples, length)))
    told = facts.machine(model) | {
        "model": facts.model_facts(model), "text": facts.text_digest(tokens), "speed_up": speed_up,
        "kept": {plan: list(kept_layers(layers, speed_up, plan)) for plan in ("even", "middle")},
        "examples": len(examples), "written by the model": samples, "seconds for writing": time.monotonic() - started,
        "batch": batch, "length": length, "rate": rate / 1e6, "distil": distil / 100, "windows": windows,
    }  # fmt: skip
    reference, weights = dense(model, judged), copy.deepcopy(model.state_dict())
    how = {"batch": batch, "rate": rate / 1e6, "distil": distil / 100}
    rows, taken = [], steps
    for plan in ("even", "middle", "full depth"):
        model.load_state_dict(weights)
        options = {"speed_up": 1.0} if plan == "full depth" else {"speed_up": float(speed_up), "plan": plan}
        placed = [Placement("unified_skip", options=options)]
        rows.append(row(f"{plan}, as given", model, placed, reference, []))
        # Full depth costs most: the first gets less than a third, and the others as many steps as it took.
        budget = 60 * minutes * 0.27 if plan == "even" else None
        began = time.monotonic()
        losses = finetune(model, examples, steps=taken, seconds=budget, **options, **how)
        taken = len(losses)
        rows.append(row(f"{plan}, fine-tuned", model, placed, reference, losses, time.monotonic() - began))
        if plan == "even" and timing:
            told["decode"] = timings(model, placed, held, timing)
    told["recovered"] = recovered(rows)
    return told, rows


def blocks(tokens: Tensor, length: int) -> Tensor:
    """`tokens [n]` as examples `[N, length]`."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def written(model: Any, prompts: Tensor, count: int, length: int, together: int = 512) -> Tensor:
    """`[count, length]`: texts that the model samples itself, each begun with 32 tokens of `prompts [N, 32]`."""
    writer = copy.deepcopy(model).to(torch.bfloat16 if model.device.type == "cuda" else torch.float32)
    chosen = prompts[torch.randint(0, len(prompts), (count,), generator=torch.Generator().manual_seed(0))]
    made = []
    for part in chosen.split(together):
        # A text that ended early would leave examples of many lengths.
        new = {"min_new_tokens": length - part.shape[1], "max_new_tokens": length - part.shape[1]}
        ids = part.to(model.device)
        made.append(writer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, **new).cpu())
    return torch.cat(made)


def row(
    what: str, model: Any, placed: list[Placement], reference: Dense, losses: list[float], spent: float = 0.0
) -> dict[str, Any]:
    found = quality(model, placed, reference.windows, reference.chunk, reference)
    tail = losses[-max(len(losses) // 20, 1) :]
    return {
        "what": what,
        "kl": found.kl,
        "top1": found.top1,
        "perplexity": found.perplexity,
        "ratio": found.perplexity_ratio,
        "steps": len(losses),
        "seconds": spent,
        "last loss": sum(tail) / max(len(tail), 1),
        "losses": losses[:: max(len(losses) // 100, 1)],
    }


def timings(model: Any, placed: list[Placement], held: Tensor, repeats: int) -> dict[str, Any]:
    """Decode time over full depth's, float32, one request."""
    timed = seconds(model, placed, held[:576], steps=64, repeats=repeats)
    return {
        "ratio": timed.decode.ratio.median,
        "mad": timed.decode.ratio.mad,
        "milliseconds": timed.decode.method.median,
        "full depth": timed.decode.dense.median,
        "prefill ratio": timed.prefill.ratio.median,
    }


def recovered(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the gap in cross-entropy to full depth, fine-tuned alike, that fine-tuning closed; 1 is all of it."""
    nats = {r["what"]: torch.tensor(r["perplexity"]).log().item() for r in rows}
    goal = nats["full depth, fine-tuned"]
    return {
        plan: 1 - (nats[f"{plan}, fine-tuned"] - goal) / (nats[f"{plan}, as given"] - goal)
        for plan in ("even", "middle")
    }
