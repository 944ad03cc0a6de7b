"""Two sets of image tokens (PAINT): scores of local and of summary tokens are raised by margins of their own."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Reading, Rescore
from regard.core.step import Step
from regard.core.token_map import Kind, TokenMap
from regard.ops import class_token

CARD = Card(
    title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
    arxiv=None,
    sheet=114,
    implements="The decoder's margins on the last prompt row and all after it, and the two sets from an encoder's CLS "
    "attention (`sets`, `marked`; `tell` does both where image tokens are the encoder's patches). The paper edits "
    "layers 2 and up: say so in the placement's layers.",
    exact=False,
    saving="none",
    departures=(
        "The sets come with the token map, since an encoder runs before the model that is attached.",
        "The contrast with a text-only branch is left to mechanisms of site `logits`.",
        "The paper's spatial set, off in its code, is left out.",
    ),
    oracles=(
        "S + gamma |S|, whatever constant scores share: it is not invariant to one",
        "visual mass grows with gamma, and no other key gains",
        "planted outliers are the summary set, and the two sets are apart",
    ),
    needs="image",
    neutral={"alpha": 0.0, "beta": 0.0},
    options={
        "alpha": Option(kind="float", default=0.7, low=0.0, high=1e6, search=(0.3, 0.7), doc="margin of local tokens"),
        "beta": Option(kind="float", default=0.3, low=0.0, high=1e6, search=(0.1, 0.3), doc="margin of summary tokens"),
        "by_head": Option(
            kind="bool", default=False, doc="margins in proportion to a head's share of visual mass (inferred)"
        ),
    },
)

# The sets of a token map that it reads.
LOCAL, SUMMARY = "local", "summary"
_BY_HAND = "say them yourself: regard.ops.scores.paint.marked(token_map, local, summary)"
# Patches that quartiles need.
LEAST = 8


def rescore(where: Where, *, alpha: float, beta: float, by_head: bool) -> Rescore | None:
    """`S + alpha |S|` on local tokens and `S + beta |S|` on summary tokens, for rows that emit the answer."""
    if alpha == 0 and beta == 0:
        return None
    heads = torch.zeros(where.heads, dtype=torch.bool)
    heads[where.rows(where.heads)] = True
    bias = partial(_bias, heads, {LOCAL: alpha, SUMMARY: beta}, by_head)
    return Rescore(f"paint: alpha {alpha:g}, beta {beta:g}", _emitting, bias)


def sets(early: Tensor, late: Tensor, patches: int, ratio: float = 0.25) -> tuple[Tensor, Tensor]:
    """Local and summary patches of an image, `[..., patches]` bool each, no patch in both.

    Args:
        early: probabilities of the encoder's first layer, `[..., heads, 1 + patches, 1 + patches]`, CLS first.
        late: the same of its last layer but one.
        patches: how many there are.
        ratio: share of patches that are local.

    Returns:
        local: the `ratio * patches` that CLS attends to most in `early`, less the summary. summary: those whose
        attention from CLS in `late` lies above the third quartile plus 1.5 times the quartiles' distance.

    Raises:
        RegardError: the encoder has no CLS token, or fewer than 8 patches; `ratio` is not in 0..1.
    """
    for name, maps in (("early", early), ("late", late)):
        if maps.ndim < 3 or maps.shape[-1] != maps.shape[-2] or maps.shape[-1] != patches + 1:
            raise RegardError(
                f"'paint' needs maps [..., heads, 1 + patches, 1 + patches] of an encoder with a CLS token, {patches} "
                f"patches and {patches + 1} tokens; {name} is {list(maps.shape)}"
            )
    if patches < LEAST:
        raise RegardError(f"'paint' needs an encoder of {LEAST} patches or more, got {patches}")
    if not 0 <= ratio <= 1:
        raise RegardError(f"ratio must lie in [0, 1], got {ratio!r}")
    first, last = (maps[..., 0, 1:].sum(-2) for maps in (early, late))
    low, high = (torch.quantile(last, share, -1, keepdim=True) for share in (0.25, 0.75))
    summary = last > high + 1.5 * (high - low)
    best = first.topk(int(ratio * patches), -1).indices
    return torch.zeros_like(summary).scatter(-1, best, True) & ~summary, summary


def marked(tokens: TokenMap, local: Tensor, summary: Tensor) -> TokenMap:
    """`tokens` with the two sets, `[patches]` or `[spans, patches]` bool, of the images of `tokens.spans` in order.

    Raises:
        RegardError: an image has another number of tokens than there are patches.
    """
    found: Mapping[str, Tensor] = {name: torch.zeros_like(tokens.kinds, dtype=torch.bool) for name in (LOCAL, SUMMARY)}
    for name, told in ((LOCAL, local), (SUMMARY, summary)):
        told = told.expand(len(tokens.spans), -1)
        for span, patches in zip(tokens.spans, told, strict=True):
            if span.stop - span.start != len(patches):
                raise RegardError(f"set {name!r} is of {len(patches)} patches, and {span} has {span.stop - span.start}")
            found[name][span.row, span.start : span.stop] = patches.to(tokens.kinds.device)
    return replace(tokens, sets={**tokens.sets, **found})


def margins(scores: Tensor, gamma: Tensor) -> Tensor:
    """`gamma |S|` for `scores [B, H, R, S]` and `gamma`, which broadcasts to it; 0 where a key is not seen."""
    return gamma * scores.masked_fill(scores == -torch.inf, 0).abs()


@torch.no_grad()
def tell(model: nn.Module, inputs: Mapping[str, Any], tokens: TokenMap) -> TokenMap:
    """`tokens` with the two sets of every image, from a run of the model's own encoder.

    Args:
        model: a vision-language model.
        inputs: what it is given: `pixel_values [images, C, H, W]`, in the order of `tokens.spans`. Without, `tokens`
            comes back as it is.
        tokens: what the prompt's tokens are.

    Raises:
        RegardError: the encoder has no class token or one layer only, or image tokens are not its patches.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return tokens
    encoder = class_token.tower(model)
    layers = [] if isinstance(encoder, str) else class_token.attentions(encoder)
    if isinstance(encoder, str) or len(layers) < 2:
        why = encoder if isinstance(encoder, str) else f"that of {type(model).__name__} has one layer"
        raise RegardError(f"'paint' reads a class token in two layers, and {why}; {_BY_HAND}")
    if pixels.ndim != 4 or len(pixels) != len(tokens.spans):
        raise RegardError(
            f"'paint' finds its sets for images of one piece, and pixel_values {list(pixels.shape)} are not one for "
            f"each of {len(tokens.spans)} spans; {_BY_HAND}"
        )
    with class_token.watching([layers[0], layers[-2]]) as caught:
        encoder(pixels)
    early, late = (
        _probabilities(seen, int(layer.num_heads))  # pyright: ignore[reportArgumentType]
        for seen, layer in zip(caught, (layers[0], layers[-2]), strict=True)
    )
    return marked(tokens, *sets(early, late, early.shape[-1] - 1))


def _probabilities(seen: Mapping[str, Tensor], heads: int) -> Tensor:
    """`[images, heads, 1 + patches, 1 + patches]` of queries and keys with heads side by side."""
    q, k = (seen[name].unflatten(-1, (heads, -1)).transpose(1, 2).float() for name in ("q_proj", "k_proj"))
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)


def _emitting(step: Step) -> slice | None:
    return None if step.tokens is None else step.emitting


@torch.no_grad()
def _bias(heads: Tensor, gammas: Mapping[str, float], by_head: bool, reading: Reading) -> Tensor:
    tokens, scores = reading.step.said("paint"), reading.scores()
    gamma = scores.new_zeros(())
    for name, value in gammas.items():
        # A token of both sets is a summary.
        gamma = torch.where(reading.held(tokens.named(name, "paint"), False)[:, :, None], value, gamma)
    gamma = gamma * heads.to(gamma.device)[None, :, None, None]
    if by_head:
        visual = (reading.kinds("paint") == Kind.VISUAL)[:, :, None]
        mass = (reading.weights() * visual).sum(-1, keepdim=True)
        gamma = gamma * mass / mass.mean(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return margins(scores, gamma)
