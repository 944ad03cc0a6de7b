"""Unified layer skipping on a task of its own: a 12-layer model learns to sort, is skipped, and is fine-tuned."""

import copy
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from regard.adapters.install import install
from regard.calibrate.unified_skip import finetune, response_loss
from regard.core.placement import Placement
from regard.measure.seconds import seconds
from regard.search import facts

NUMBERS, EQUALS, LAYERS = 32, 32, 12


def run(
    items: int = 12, learn: int = 3000, tune: int = 600, batch: int = 128, width: int = 128, timing: int = 5
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cross-entropy of the sorted list at full depth, skipped evenly and in the middle, before and after.

    Args:
        items: numbers to sort.
        learn: steps at full depth, from random weights.
        tune: steps of each fine-tuning.
        batch: examples a step.
        width: hidden size.
        timing: pairs of decode timings (0: none).
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": LAYERS,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=NUMBERS + 1, **shape)).to(device).eval()
    taught, judged = examples(200_000, items, 0), examples(1000, items, 1).to(device)
    prompt = items + 1
    finetune(model, taught, speed_up=1.0, steps=learn, batch=batch, prompt=prompt, rate=1e-3)
    weights, goal = copy.deepcopy(model.state_dict()), loss(model, [], judged, prompt)
    told = facts.machine(model) | {"model": facts.model_facts(model), "items": items, "learn": learn, "tune": tune}
    rows = [{"what": "full depth", "before": goal, "after": goal, "recovered": 1.0}]
    for plan in ("even", "middle"):
        model.load_state_dict(weights)
        placed = [Placement("unified_skip", options={"speed_up": 2.0, "plan": plan})]
        before = loss(model, placed, judged, prompt)
        finetune(model, taught, plan=plan, steps=tune, batch=batch, prompt=prompt, rate=3e-4)
        after = loss(model, placed, judged, prompt)
        recovered = (before - after) / (before - goal)
        rows.append({"what": plan, "before": before, "after": after, "recovered": recovered})
    if timing:
        tokens = torch.randint(0, NUMBERS, (192,))
        timed = seconds(model, placed, tokens, steps=64, repeats=timing)
        told["decode"] = {"ratio": timed.decode.ratio.median, "mad": timed.decode.ratio.mad}
    return told, rows


def examples(count: int, items: int, seed: int) -> Tensor:
    """`[count, 2 * items + 1]`: numbers, a sign, and the numbers sorted."""
    drawn = torch.randint(0, NUMBERS, (count, items), generator=torch.Generator().manual_seed(seed))
    return torch.cat((drawn, torch.full((count, 1), EQUALS), drawn.sort(1).values), dim=1)


@torch.no_grad()
def loss(model: Any, placed: list[Placement], judged: Tensor, prompt: int) -> float:
    with install(model, placed) as handle, handle.prompting(prompt):
        return float(response_loss(model, judged, prompt))
