"""Training of the two projectors of DCD [164]: one on chosen answers, one on rejected ones, each by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.seam import open_free
from regard.calibrate.common import Progress, frozen
from regard.core.errors import RegardError
from regard.ops.logits.dcd import flat, projector

SIDES = {"positive": "chosen", "negative": "rejected"}


@dataclass(frozen=True)
class Pair:
    """A question about images with a chosen and a rejected answer.

    Args:
        prompt: `[n]` token ids, image tokens included.
        chosen: `[c]` token ids.
        rejected: `[r]` token ids.
        images: what the model is given for the images, by name (`pixel_values [images, C, H, W]`).
    """

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    images: Mapping[str, Tensor] = field(default_factory=dict)


def fit(
    model: nn.Module,
    *,
    progress: Progress | None = None,
    pairs: Sequence[Pair],
    sides: Sequence[str] = ("positive", "negative"),
    epochs: int = 3,
    rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The trained projectors of `sides`, flat, `[n]` float32 each: options of `dcd`.

    Each starts as the model's own and learns the answers of its side alone, by AdamW, one pair a step; encoder and
    language model are frozen.

    Args:
        model: a vision-language model, not attached; it is not changed.
        progress: told steps done and steps in all.
        pairs: one at least.
        sides: "positive", "negative", or both; the negative one suffices (Neg-only).
        epochs: how often every pair is seen.
        rate: the learning rate.
        seed: of the order of pairs.

    Raises:
        RegardError: there is no pair, one lacks an answer or images, a side is unknown, or the model has no projector.
    """
    open_free(model)
    if not pairs:
        raise RegardError("'dcd' is fitted on preference pairs; got none")
    for side in sides:
        if side not in SIDES:
            raise RegardError(f"'dcd' has sides {' and '.join(SIDES)}, got {side!r}")
    for number, pair in enumerate(pairs):
        for side in sides:
            if not len(getattr(pair, SIDES[side])):
                raise RegardError(f"pair {number} has no {SIDES[side]} answer, which the {side} projector learns")
        if not pair.images:
            raise RegardError(f"pair {number} has no images, which projectors learn from")
    part, found = projector(model), {}
    order = [torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed + i)) for i in range(epochs)]
    steps = [pairs[i] for i in torch.cat(order).tolist()] if order else []
    with frozen(model):
        for done, side in enumerate(sides):
            weights = flat(part).float().requires_grad_()
            optimiser = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
            for step, pair in enumerate(steps):
                optimiser.zero_grad()
                loss(model, part, weights, pair, side).backward()
                optimiser.step()
                if progress is not None:
                    progress(done * len(steps) + step + 1, len(sides) * len(steps))
            found[side] = weights.detach()
    return found


def loss(model: nn.Module, part: nn.Module, weights: Tensor, pair: Pair, side: str) -> Tensor:
    """`-log p(answer | images through the projector, prompt)` a token, with gradients to `weights` alone.

    Args:
        model: a vision-language model.
        part: its projector.
        weights: `[n]`, what the projector's parameters are to be.
        pair: what is asked and answered.
        side: "positive" for the chosen answer, "negative" for the rejected one.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = list(part.parameters())
    pieces = weights.split([p.numel() for p in parameters])
    given = {names[id(p)]: x.to(p).view_as(p) for p, x in zip(parameters, pieces, strict=True)}
    answer = getattr(pair, SIDES[side])
    ids = torch.cat((pair.prompt, answer))[None].to(parameters[0].device)
    inputs: dict[str, Any] = {name: x.to(ids.device) for name, x in pair.images.items()}
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    logits = torch.func.functional_call(model, given, kwargs=inputs).logits[0, len(pair.prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, len(pair.prompt) :])
