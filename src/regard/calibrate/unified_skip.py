"""Fine-tuning of Unified Layer Skipping [055]: a model learns to respond from its kept layers.

Nothing belongs to the card here: the model's own weights change, and its user saves them
(`model.save_pretrained`). Prompt rows run every layer and response rows the kept ones, in one forward, so
that gradients reach the skipped layers through the prompt.
"""

import copy
import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.adapters.install import install
from regard.calibrate.common import Progress
from regard.core.errors import RegardError
from regard.core.placement import Placement

# The paper's: the rate rises over the first 3 % of the steps and falls to 0 along a cosine.
WARM_UP = 0.03
# Largest norm of a gradient.
CLIP = 1.0


def finetune(
    model: Any,
    tokens: Tensor,
    *,
    speed_up: float = 2.0,
    plan: str = "even",
    steps: int = 400,
    batch: int = 16,
    length: int = 512,
    prompt: int | None = None,
    rate: float = 2e-5,
    distil: float = 0.0,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train `model` in place for responses at `kept_layers(layers, speed_up, plan)`; returns the loss of each step.

    The loss is `(1 - distil) CE + distil KL(full depth || skipped)` of the response tokens, in nats a token; full
    depth is the model as it was given. AdamW without weight decay or dropout; input embeddings, and output ones
    tied to them, are frozen. On CUDA products run in bfloat16. `speed_up` 1 trains the model as it is, a control.

    Args:
        model: any causal language model `regard.attach` takes, float32, not attached.
        tokens: a text `[n]` int64, cut anew for every example, or examples `[N, length]` of one length.
        speed_up: of the mechanism `unified_skip`.
        plan: of the mechanism.
        steps: optimiser steps.
        batch: examples a step.
        length: tokens of an example cut from a text.
        prompt: prompt tokens of every example; None: drawn for every step, up to half of an example.
        rate: largest learning rate.
        distil: share of the distillation loss, 0 to 1.
        seconds: stop after about so long; the schedule is run through all the same.
        seed: of what is drawn.
        progress: told steps done and steps in all.

    Raises:
        RegardError: the text is too short, an option is out of bounds, the weights are of 16 bits, the model is
            attached, or a loss is not finite (its step is not taken).
    """
    size = length if tokens.ndim == 1 else tokens.shape[1]
    _check(model, tokens, size, prompt, steps=steps, batch=batch, rate=rate, distil=distil)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if distil else None
    drawn, losses = torch.Generator().manual_seed(seed), []
    placed = [Placement("unified_skip", options={"speed_up": float(speed_up), "plan": plan})]
    with install(model, placed) as handle, _learning(model) as weights:
        optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        start, done = time.monotonic(), 0.0
        while len(losses) < steps and done < 1:
            ids = _draw(tokens, size, batch, drawn).to(model.device)
            ends = prompt or int(torch.randint(1, size // 2 + 1, (1,), generator=drawn))
            with _precision(model), handle.prompting(ends):
                loss = response_loss(model, ids, ends, teacher, distil)
            losses.append(_step(optimiser, loss, rate * schedule(done)))
            spent = 0.0 if seconds is None else (time.monotonic() - start) / seconds
            done = max(len(losses) / steps, spent)
            if progress is not None:
                progress(len(losses), steps)
    return losses


def _step(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> float:
    """One step down `loss`, returned; gradients are gone afterwards.

    Raises:
        RegardError: it is not finite; no step is taken.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RegardError(f"the loss became {value}; choose a lower rate than {rate:g}")
    loss.backward()
    for group in optimiser.param_groups:
        group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(group["params"], CLIP)
    optimiser.step()
    optimiser.zero_grad()
    return value


def response_loss(model: Any, ids: Tensor, prompt: int, teacher: Any = None, distil: float = 0.0) -> Tensor:
    """The loss of predicting `ids [B, T]` from arrival `prompt` on: a scalar, float32.

    Args:
        model: attached with a handle that was told `prompt`.
        ids: prompts and responses.
        prompt: prompt tokens, at least 1.
        teacher: a model of the same vocabulary; None where `distil` is 0.
        distil: share of `KL(teacher || model)`, the rest is cross-entropy with the tokens themselves.
    """
    logits = _logits(model, ids, prompt)
    loss = torch.zeros((), device=logits.device)
    if distil < 1:
        loss = (1 - distil) * F.cross_entropy(logits, ids[:, prompt:].flatten())
    if distil and teacher is not None:
        with torch.no_grad():
            target = _logits(teacher, ids, prompt).log_softmax(-1)
        loss = loss + distil * F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
    return loss


def schedule(done: float) -> float:
    """The learning rate as a share of its largest, after `done` (0 to 1) of the training."""
    if done < WARM_UP:
        # The first step moves too.
        return max(done, WARM_UP / 10) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _logits(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """What predicts the tokens from arrival `prompt` on, `[B * (T - prompt), V]` float32."""
    kept = ids.shape[1] - prompt + 1
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    out = model(input_ids=ids, use_cache=False, **({"logits_to_keep": kept} if known else {})).logits
    return out[:, -kept:-1].flatten(0, 1).float()


def _precision(model: Any) -> Any:
    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def _draw(tokens: Tensor, size: int, batch: int, drawn: torch.Generator) -> Tensor:
    """`[batch, size]`: windows of a text, or examples."""
    if tokens.ndim == 2:
        return tokens[torch.randint(0, len(tokens), (batch,), generator=drawn)]
    starts = torch.randint(0, len(tokens) - size + 1, (batch,), generator=drawn)
    return tokens[starts[:, None] + torch.arange(size)]


@contextmanager
def _learning(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The weights that learn inside, all but the input embeddings; what learnt before and the mode are put back."""
    before, mode = {p: p.requires_grad for p in model.parameters()}, model.training
    frozen = set(model.get_input_embeddings().parameters())  # pyright: ignore[reportCallIssue]
    try:
        # Dropout would also switch on attention dropout, which attached layers refuse.
        model.eval()
        for parameter in before:
            parameter.requires_grad_(parameter not in frozen)
        yield [parameter for parameter in before if parameter not in frozen]
    finally:
        for parameter, learnt in before.items():
            parameter.requires_grad_(learnt)
        model.train(mode)


def _check(model: Any, tokens: Tensor, size: int, prompt: int | None, **numbers: float) -> None:
    """Raise RegardError for what cannot be trained on, or with."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes & {torch.bfloat16, torch.float16}:
        raise RegardError(f"fine-tuning needs float32 weights (steps vanish in 16 bits); this model has {model.dtype}")
    if tokens.ndim not in (1, 2) or tokens.is_floating_point() or not len(tokens):
        raise RegardError(f"tokens must be a text [n] or examples [N, T] of whole numbers, got {list(tokens.shape)}")
    if tokens.ndim == 1 and len(tokens) < size:
        raise RegardError(f"fine-tuning on examples of {size} tokens needs a text as long, got {len(tokens)} tokens")
    if size < 2 or (prompt is not None and not 1 <= prompt < size):
        raise RegardError(f"an example of {size} tokens needs 1 <= prompt < {size}, got prompt={prompt}")
    for name in ("steps", "batch", "rate"):
        if not numbers[name] > 0:
            raise RegardError(f"fine-tuning needs {name} above 0, got {numbers[name]}")
    if not 0 <= numbers["distil"] <= 1:
        raise RegardError(f"distil is a share of the loss, 0 to 1, got {numbers['distil']}")
