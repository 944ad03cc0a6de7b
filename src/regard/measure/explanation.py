"""How much of what an encoder-decoder reads its cross-attention explains: occlusion, correlation, deletion.

Cross-Attention is Half Explanation in Speech-to-Text Models; the saliency is that of hlt-mt/FBK-fairseq
(examples/speech_to_text/occlusion_explanation). Segments come from the caller: superpixels of a spectrogram, or tiles.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import RegardError, choose

Score = Callable[[Tensor], Tensor]
# What of an encoder-decoder may be occluded: embeddings of text, a spectrogram, or what the encoder wrote.
GIVEN = ("inputs_embeds", "input_features", "encoder_outputs")


@dataclass(frozen=True, eq=False)
class Agreement:
    """Correlation of saliency and attention.

    Args:
        heads: `[L, H]`, of single heads.
        layers: `[L]`, of the mean over heads.
        columns: `[H]`, of the mean over layers.
        both: of the mean over heads and layers.
        skipped: rows of saliency or of maps that are constant, so that they have no correlation.
    """

    heads: Tensor
    layers: Tensor
    columns: Tensor
    both: float
    skipped: int


def tiles(shape: Sequence[int], size: Sequence[int]) -> Tensor:
    """Segments of `shape` cells in boxes of `size`, int64 `[*shape]`: a plain stand-in for superpixels."""
    number = torch.zeros(*shape, dtype=torch.long)
    for axis, (cells, side) in enumerate(zip(shape, size, strict=True)):
        along = (torch.arange(cells) // side).view([-1 if i == axis else 1 for i in range(len(shape))])
        number = number * -(-cells // side) + along
    return number


def masks(count: int, segments: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """Random choices of segments to occlude, bool `[count, segments]`, each segment with probability `share`."""
    return torch.rand(count, segments, generator=torch.Generator().manual_seed(seed)) < share


@torch.no_grad()
def saliency(score: Score, x: Tensor, segments: Tensor, chosen: Tensor, batch: int = 64) -> Tensor:
    """The relevance of every cell for every token: the mean KL divergence over the masks that occlude the cell.

    Args:
        score: takes `[n, *x.shape]` and gives log-probabilities `[n, T, V]` of the forced tokens.
        x: `[*cells, ...]`; an occluded segment is set to 0.
        segments: int64 `[*cells]`, 0 to `n - 1`.
        chosen: bool `[N, n]`, what every mask occludes (`masks`).
        batch: masks at once; the result does not depend on it, rounding aside.

    Returns:
        float64 `[T, *cells]`, 0 for a cell that no mask occludes.

    Raises:
        RegardError: shapes disagree, or a log-probability is NaN.
    """
    if x.shape[: segments.ndim] != segments.shape:
        raise RegardError(f"segments are {list(segments.shape)}, and the input begins with {list(x.shape)}")
    if chosen.ndim != 2 or int(segments.min()) < 0 or int(segments.max()) >= chosen.shape[1]:
        raise RegardError(f"masks are {list(chosen.shape)}, and segments go from 0 to {int(segments.max())}")
    plain = _finite(score(x[None]))[0]
    total = torch.zeros(len(plain), chosen.shape[1], dtype=torch.float64, device=x.device)
    for part in chosen.to(x.device).split(batch):
        hidden = part[:, segments.to(x.device)]
        hidden = hidden.view(*hidden.shape, *[1] * (x.ndim - segments.ndim))
        away = divergence(plain, _finite(score(x.masked_fill(hidden, 0))))
        total += away.mT @ part.double()
    often = chosen.sum(0).to(x.device).clamp(min=1)
    return (total / often)[:, segments.to(x.device)]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities: `sum p (log p - log q)` over the last axis, float64, at least 0."""
    p = p.double()
    # What has no probability adds nothing, whatever q says of it.
    apart = (p - q.double()).masked_fill(p == -torch.inf, 0)
    return (p.exp() * apart).sum(-1).clamp(min=0)


def agreement(relevance: Tensor, maps: Tensor) -> Agreement:
    """Pearson's r of relevance and of cross-attention, by target token, averaged over the tokens.

    Args:
        relevance: `[T, S]`, of `saliency`, mean over frequencies if it has them. It is pooled to S' frames.
        maps: `[L, H, T, S']`, cross-attention.

    Raises:
        RegardError: T differs, or S is no multiple of S'.
    """
    if maps.ndim != 4 or relevance.ndim != 2 or maps.shape[2] != len(relevance):
        raise RegardError(
            f"relevance must be [T, S], maps [L, H, T, S'], got {list(relevance.shape)} {list(maps.shape)}"
        )
    frames, pooled = maps.shape[3], relevance
    if relevance.shape[1] % frames:
        raise RegardError(f"{relevance.shape[1]} frames of relevance cannot be pooled to {frames} of the encoder")
    pooled = relevance.unflatten(1, (frames, -1)).mean(-1)
    maps = maps.double()
    single = correlation(pooled, maps)
    means = [correlation(pooled, x) for x in (maps.mean(1), maps.mean(0), maps.mean((0, 1)))]
    layers, columns, both = (row.nanmean(-1) for row in means)
    return Agreement(single.nanmean(-1), layers, columns, float(both), int(single.isnan().sum()))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r over the last axis, NaN where a row is constant."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    # Rounding leaves a constant row a trace of itself.
    size = [x.norm(dim=-1).masked_fill(x.norm(dim=-1) < 1e-12, math.nan) for x in (a, b)]
    return (a * b).sum(-1) / (size[0] * size[1])


@torch.no_grad()
def deletion(
    quality: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor, step: float = 0.05
) -> tuple[Tensor, float]:
    """The quality after the most relevant cells are set to 0, step by step, and the area under its curve.

    Args:
        quality: takes `[n, *x.shape]`, gives `[n]`.
        x: `[*cells, ...]`.
        relevance: `[*cells]`.
        step: share of the cells that goes each time.

    Returns:
        `[1 / step + 1]` qualities, from the whole input to nothing, and the area over shares 0 to 1.

    Raises:
        RegardError: shapes disagree, or the step is not in (0, 1].
    """
    if x.shape[: relevance.ndim] != relevance.shape or not 0 < step <= 1:
        raise RegardError(f"relevance is {list(relevance.shape)} of {list(x.shape)}, and step {step} must be in (0, 1]")
    order = relevance.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    shares = torch.linspace(0, 1, round(1 / step) + 1, dtype=torch.float64, device=x.device)
    hidden = rank.view_as(relevance)[None] < (shares * len(order)).round().view(-1, *[1] * relevance.ndim)
    hidden = hidden.view(*hidden.shape, *[1] * (x.ndim - relevance.ndim))
    curve = torch.cat([quality(part) for part in x.masked_fill(hidden, 0).split(1)])
    return curve, float(torch.trapezoid(curve.double(), shares))


def forced(model: nn.Module, targets: Tensor, given: str) -> Score:
    """The `score` of an encoder-decoder: log-probabilities of its own output, said again.

    Args:
        model: in eval mode.
        targets: `[T]` int64, what its decoder is given.
        given: what is occluded: "inputs_embeds" `[S, d]`, "input_features" (a spectrogram, as the model takes it), or
            "encoder_outputs" `[S', d]`.

    Raises:
        RegardError: the model has no encoder, or takes no such thing.
    """
    _refuse_decoder_only(model)
    choose("given", given, GIVEN)

    def score(x: Tensor) -> Tensor:
        held = (x,) if given == "encoder_outputs" else x
        out = model(**{given: held}, decoder_input_ids=targets.expand(len(x), -1).to(x.device), use_cache=False)
        return out.logits.log_softmax(-1)

    return score


@torch.no_grad()
def cross_attention(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-attention of one input, `[L, H, T, S']`, of a model under eager attention: rows sum to 1.

    Raises:
        RegardError: the model has no encoder, or another attention hides the probabilities.
    """
    _refuse_decoder_only(model)
    config: Any = model.config
    if config._attn_implementation != "eager":
        raise RegardError(
            f"attention {config._attn_implementation!r} hides its probabilities; "
            "load the model with attn_implementation='eager'"
        )
    out = model(**inputs, decoder_input_ids=targets[None], output_attentions=True, use_cache=False)
    return torch.cat(list(out.cross_attentions))


def _refuse_decoder_only(model: nn.Module) -> None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RegardError(f"{type(model).__name__} has no encoder; cross-attention needs an encoder-decoder")


def _finite(log_probs: Tensor) -> Tensor:
    if log_probs.isnan().any():
        raise RegardError("the model's log-probabilities hold NaN")
    return log_probs
