"""Training of DARA's factors [097]: on answers to few-shot prompts with images, everything else frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapters import tokens
from regard.adapters.install import install
from regard.adapters.seam import open_free
from regard.calibrate.common import Progress, check_ids, check_least, check_rates, frozen
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.core.token_map import TokenMap


@dataclass(frozen=True)
class Shots:
    """Demonstrations with images and a question behind them, and its answer.

    Args:
        prompt: `[n]` token ids, image tokens included.
        answer: `[a]` token ids.
        images: what the model is given for the images, by name (`pixel_values [images, C, H, W]`).
        tokens: what the prompt's tokens are; None: as `regard.adapters.tokens.read` finds.
    """

    prompt: Tensor
    answer: Tensor
    images: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: TokenMap | None = None


def fit(
    model: nn.Module,
    *,
    progress: Progress | None = None,
    shots: Sequence[Shots],
    layers: Sequence[int] = (0,),
    mode: str = "scale",
    epochs: int = 3,
    rate: float = 1e-2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The trained factors `{"factors": [L, H, M]}`, float32, for as many images as a prompt has at most.

    They start where they change nothing and learn the answers by AdamW, one prompt a step; the model is frozen.

    Args:
        model: a vision-language model, not attached; it is not changed.
        progress: told steps done and steps in all.
        shots: one at least.
        layers: those that learn factors (the first, as far as is known); others keep theirs where they began.
        mode: "scale" or "add", as the mechanism's option, which must be placed with the same one.
        epochs: how often every prompt is seen.
        rate: the learning rate (inferred).
        seed: of the order of prompts.

    Raises:
        RegardError: there is no prompt, one lacks an image or an answer, or an option is out of range.
    """
    decoder, _ = open_free(model)
    check_least(0, epochs=epochs)
    check_rates(rate=rate)
    if not layers:
        raise RegardError("'dara' learns factors in one layer at least; got layers=()")
    maps = [_mapped(model, number, one, decoder.vocabulary) for number, one in enumerate(shots)]
    if not maps:
        raise RegardError("'dara' is fitted on prompts with images; got none")
    images = max(int(told.images.max()) + 1 for told in maps)
    start = torch.full((decoder.layers, decoder.heads, images), float(mode == "scale"))
    factors = start.to(next(model.parameters()).device).requires_grad_()
    # Factors are no weights: those of other layers, and of images that a prompt lacks, have gradients of 0 and stay.
    optimiser = torch.optim.AdamW([factors], lr=rate, weight_decay=0.0)
    order = [torch.randperm(len(shots), generator=torch.Generator().manual_seed(seed + i)) for i in range(epochs)]
    steps = torch.cat(order).tolist() if order else []
    with frozen(model):
        for done, number in enumerate(steps):
            optimiser.zero_grad()
            loss(model, factors, shots[number], maps[number], layers=layers, mode=mode).backward()
            optimiser.step()
            if progress is not None:
                progress(done + 1, len(steps))
    return {"factors": factors.detach().float().cpu()}


def loss(
    model: nn.Module, factors: Tensor, one: Shots, told: TokenMap, *, layers: Sequence[int] = (0,), mode: str = "scale"
) -> Tensor:
    """`-log p(answer | prompt)` a token under `factors [L, H, M]`, with gradients to them; `told` maps the prompt."""
    placed = Placement("dara", tuple(layers), "all", {"mode": mode, "share": False}, {"factors": factors})
    ids = torch.cat((one.prompt, one.answer))[None].to(factors.device)
    images = {name: x.to(ids.device) for name, x in one.images.items()}
    with install(model, [placed]) as handle, handle.reading(told):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits
    return F.cross_entropy(logits[0, len(one.prompt) - 1 : -1].float(), ids[0, len(one.prompt) :])


def _mapped(model: nn.Module, number: int, one: Shots, vocabulary: int) -> TokenMap:
    """The map of prompt `number`, which must have an image."""
    check_ids(f"the answer of prompt {number}", one.answer, vocabulary)
    told = one.tokens
    if told is None:
        told = tokens.read(model, {"input_ids": one.prompt[None].to(next(model.parameters()).device), **one.images})
    if not told.spans:
        raise RegardError(f"prompt {number} has no image, and factors are learnt on images alone")
    return told
