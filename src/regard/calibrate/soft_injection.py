"""Fitting Soft Injection [028]: a task embedding from solved examples, and how much of it each head takes.

The embedding is what every head puts out at the end of prompts that hold solved examples. The weights are
then trained so that the same model, given the embedding and no examples, answers as the examples would have
it. Plain text holds no solved examples, so this `fit` is called with them and never by a search.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.adapters.families import Decoder
from regard.adapters.intercept import intercept
from regard.adapters.seam import Call
from regard.calibrate.common import Best, Progress, check_ids, check_least, check_rates, frozen, logits
from regard.core.errors import RegardError
from regard.core.step import Step
from regard.ops.heads.soft_injection import inject

# Queries held out at most (official code).
HELD_OUT = 100


def fit(
    model: nn.Module,
    *,
    prompts: Sequence[Tensor],
    queries: Sequence[Tensor],
    targets: Sequence[int],
    progress: Progress | None = None,
    steps: int = 400,
    rate: float = 0.2,
    every: int = 50,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensors of one task, `{"task": [L, H, D], "weights": [L, H]}`, float32; weights in 0..1.

    `weights` are the sigmoid of what Adam trains, one query a step; those with the lowest loss on held-out
    queries are kept. Defaults are the official code's, which takes 50 prompts of ten examples.

    Args:
        model: a language model that `regard.attach` takes; its weights are not changed.
        prompts: token ids `[n]` each: solved examples, then a query without its answer.
        queries: token ids `[n]` each: a query alone, written as those that end the prompts.
        targets: for each query, the first token of its answer.
        progress: told steps done and steps in all.
        steps: optimiser steps, one query each.
        rate: Adam's learning rate.
        every: steps between two looks at the held-out queries: the last fifth, at most 100.
        seed: of the queries' order.

    Raises:
        RegardError: no prompts, fewer than two queries, another number of targets, something that is no token
            id of this model, a setting out of range, or a model that gives no logits.
    """
    check_least(1, steps=steps, every=every)
    check_rates(rate=rate)
    with frozen(model), intercept(model, run := _Injected()) as decoder:
        _check(prompts, queries, targets, decoder.config.vocab_size)
        run.task = task = _embed(model, run, prompts, decoder)
        theta = torch.zeros(task.shape[:2], requires_grad=True)
        pairs = list(zip(queries, map(int, targets), strict=True))
        count = len(pairs) - max(1, min(HELD_OUT, len(pairs) // 5))
        train, held = pairs[:count], pairs[count:]
        drawn = torch.Generator().manual_seed(seed)
        optimiser, best = torch.optim.Adam([theta], lr=rate), Best()
        for step in range(steps):
            if step % count == 0:
                order = torch.randperm(count, generator=drawn).tolist()
            run.weights = theta.sigmoid()
            loss = _loss(model, *train[order[step % count]])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                run.weights = theta.detach().sigmoid()
                best.offer(_held_out(model, held), {"weights": run.weights})
            if progress is not None:
                progress(step + 1, steps)
    return {"task": task, **best.taken()}


class _Injected:
    """Answers every layer's attention: as the model does, its last row remembered, until there are weights."""

    task: Tensor

    def __init__(self) -> None:
        self.last: dict[int, Tensor] = {}
        self.weights: Tensor | None = None

    def __call__(self, call: Call) -> Tensor:
        call.refuse_extras()
        layer, out = call.seat.layer, call.own()[0].transpose(1, 2)
        if self.weights is None:
            self.last[layer] = out[0, :, -1].float().cpu()
            return out
        width = out.shape[2]
        step = Step(0, width, 1, out.device, prompt=width)
        return inject(out, self.weights[layer], self.task[layer], step)


@torch.no_grad()
def _embed(model: nn.Module, run: _Injected, prompts: Sequence[Tensor], decoder: Decoder) -> Tensor:
    """Mean of every head's output at the last token of `prompts`, `[L, H, D]`."""
    total = torch.zeros(decoder.layers, decoder.heads, decoder.head_dim)
    for prompt in prompts:
        logits(model, prompt[None])
        total += torch.stack([run.last[layer] for layer in range(decoder.layers)])
    return total / len(prompts)


def _loss(model: nn.Module, query: Tensor, target: int) -> Tensor:
    """Cross-entropy of `target` after `query [n]`, nats."""
    predicted = logits(model, query[None])[:, -1]
    return F.cross_entropy(predicted, torch.tensor([target], device=predicted.device))


@torch.no_grad()
def _held_out(model: nn.Module, pairs: Sequence[tuple[Tensor, int]]) -> float:
    return sum(float(_loss(model, *pair)) for pair in pairs) / len(pairs)


def _check(prompts: Sequence[Tensor], queries: Sequence[Tensor], targets: Sequence[int], vocabulary: int) -> None:
    """Raise unless there is something to learn from."""
    if len(prompts) < 1 or len(queries) < 2:
        raise RegardError(
            "fitting 'soft_injection' needs solved examples: at least one prompt, and two queries (one to learn from, "
            f"one to judge by); got {len(prompts)} prompts and {len(queries)} queries"
        )
    if len(targets) != len(queries):
        raise RegardError(f"each query needs one target: got {len(queries)} queries and {len(targets)} targets")
    for name, rows in (("prompt", prompts), ("query", queries)):
        for index, row in enumerate(rows):
            check_ids(f"{name} {index}", row, vocabulary)
    for index, target in enumerate(targets):
        if not 0 <= int(target) < vocabulary:
            raise RegardError(f"target {index} is token {target}; this model's vocabulary is 0 to {vocabulary - 1}")
