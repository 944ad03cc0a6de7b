"""Whether the induction heads that `observe.roles` finds are what copies: SmolLM2 on repeated rows of random tokens.

Each row of tokens stands twice in a prompt; counted is how often the model's most likely token is the right one in the
second half, and the loss there. Heads are switched off: those found, and as many drawn from the others.
"""

from types import SimpleNamespace
from typing import Any

import torch

from regard import observe
from regard.models import pretrained
from regard.search import facts


def run(length: int = 48, rows: int = 4, draws: int = 5, seed: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for the model as it is, without the heads found, and without as many others for every draw.

    Args:
        length: tokens that are repeated.
        rows: prompts.
        draws: of other heads.
        seed: of the prompts and the draws; the roles are scored on other prompts.
    """
    model, _ = pretrained.load("demo")
    found = observe.roles(model)
    heads = found.of("induction")
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, model.config.vocab_size, (rows, length), generator=drawn).repeat(1, 2)
    layers, count = found.scores["induction"].shape
    others = [(layer, head) for layer in range(layers) for head in range(count) if (layer, head) not in heads]
    off = {"none": [], "induction": heads}
    for draw in range(draws):
        order = torch.randperm(len(others), generator=drawn)[: len(heads)].tolist()
        off[f"others {draw}"] = [others[i] for i in order]
    table = [{"off": name, "heads": len(some), "which": some} | copied(model, ids, some) for name, some in off.items()]
    told = facts.machine(SimpleNamespace(device=torch.device("cpu"))) | {"thresholds": dict(found.thresholds)}
    best = {role: [[*place, float(found.scores[role][place])] for place in found.of(role)] for role in found.scores}
    return told | {"length": length, "rows": rows, "roles": best}, table


@torch.no_grad()
def copied(model: Any, ids: torch.Tensor, heads: list[tuple[int, int]]) -> dict[str, float]:
    """Share of right tokens in the second half, and their loss in nats, with `heads` off."""
    half = ids.shape[1] // 2
    with observe.ablated(model, heads):
        logs = model(ids, use_cache=False).logits[:, half:-1].float().log_softmax(-1)
    right = ids[:, half + 1 :]
    loss = -logs.gather(-1, right[..., None]).mean()
    return {"copied": float((logs.argmax(-1) == right).float().mean()), "loss": float(loss)}
