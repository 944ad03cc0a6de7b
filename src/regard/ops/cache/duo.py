"""Retrieval and streaming heads (DuoAttention): some KV heads keep everything, the others sink and recent."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where

CARD = Card(
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    arxiv="2410.10819",
    sheet=137,
    implements="Deployment with two caches, the choice of heads by gate, and the pieces of gate training: "
    "blend, loss and learning-rate schedule.",
    exact=False,
    saving="memory",
    departures=(
        "Heads are not reordered in the weights: the store splits them, so that the model stays as it is.",
        "Every chunk of a prefill is strict, the first one too; the official simple path runs it with full attention.",
        "Equal gates are told apart by layer, then head, instead of noise: exactly round(sparsity * L * Hk) heads "
        "stream.",
    ),
    oracles=(
        "sparsity 0 is the model's own attention, sparsity 1 StreamingLLM's mask",
        "all gates 1: distillation loss 0",
        "two caches, decoding, equal masked dense attention per head",
        "heads split in any order give the same output",
        "a toy layer with one retrieval head: its gate stays above 0.9, the others fall below 0.1 in 200 steps",
    ),
    aliases=("duo_attention", "duoattention"),
    whole_layers=True,
    neutral={"sparsity": 0.0},
    example={"sparsity": 0.5, "sink": 2, "recent": 5},
    options={
        "gates": Option(
            kind="tensor",
            default=None,
            shape=("layers", "kv_heads"),
            low=0.0,
            high=1.0,
            doc="[L, Hk] one gate a KV head, low gates stream",
        ),
        "sparsity": Option(
            kind="float",
            default=0.5,
            low=0.0,
            high=1.0,
            search=(0.25, 0.5, 0.75),
            doc="share of the model's KV heads that stream",
        ),
        "threshold": Option(
            kind="float",
            default=None,
            optional=True,
            low=0.0,
            high=1.0,
            doc="heads with a gate below it stream, whatever the sparsity says (the paper: 0.5); none: by sparsity",
        ),
        "sink": Option(default=128, low=0, search=(16, 64, 128), doc="first positions that streaming heads keep"),
        "recent": Option(default=256, low=1, search=(128, 256, 512), doc="last positions that streaming heads keep"),
    },
)


def keep(
    where: Where, *, gates: Tensor | None, sparsity: float, threshold: float | None, sink: int, recent: int
) -> Pattern:
    """What the KV heads of `where.layer` keep: everything, or `sink` first and `recent` last positions.

    Raises:
        RegardError: there are no gates though heads are to stream, `gates` is not `[L, Hk]` or not finite,
            or `recent` is below 1.
    """
    if recent < 1 or sink < 0:
        raise RegardError(f"'duo' needs recent >= 1 and sink >= 0, got recent={recent}, sink={sink}")
    if gates is None:
        if threshold is None and sparsity == 0:
            return Pattern.causal()
        raise RegardError("'duo' needs its gates, fitted by regard.calibrate.duo; sparsity 0 alone needs none")
    shape = (where.layers, where.kv_heads)
    if tuple(gates.shape) != shape:
        raise RegardError(f"'duo' has gates {list(gates.shape)}, this model needs [layers, KV heads] = {list(shape)}")
    if not bool(gates.isfinite().all()):
        raise RegardError("'duo' has gates that are not finite numbers")
    chosen = streaming_heads(gates, sparsity) if threshold is None else gates.detach().cpu() < threshold
    row = chosen[where.layer].tolist()
    if not any(row):
        return Pattern.causal()
    stream = Pattern.sink(sink) | Pattern.window(recent)
    return Pattern.stack_heads([stream if streams else Pattern.causal() for streams in row])


def streaming_heads(gates: Tensor, sparsity: float) -> Tensor:
    """Which heads stream: bool `[L, Hk]`, exactly `round(sparsity * L * Hk)` of them, those with the lowest gates.

    Equal gates stream in the order of layer, then head.
    """
    flat = gates.detach().cpu().flatten()
    count = round(sparsity * flat.numel())
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.argsort(stable=True)[:count]] = True
    return chosen.view(gates.shape)


def blend(gates: Tensor, full: Tensor, stream: Tensor) -> Tensor:
    """`alpha * full + (1 - alpha) * stream` of `[B, H, T, D]`; alpha: the layer's `gates [Hk]` cut to 0..1."""
    alpha = gates.clamp(0, 1).repeat_interleave(full.shape[1] // gates.shape[0])[:, None, None]
    return alpha * full + (1 - alpha) * stream


def distillation_loss(
    full: Tensor, blended: Tensor, gates: Tensor, *, answers: Tensor | None = None, weight: float = 0.05
) -> Tensor:
    """Mean square of `full - blended [B, T, D]` over answer tokens, plus `weight` times the mean gate.

    Args:
        full: last hidden states of the reference.
        blended: those of the blended pass.
        gates: `[L, Hk]`, clamped to 0..1.
        answers: bool `[B, T]`, the tokens that count; None: all.
        weight: what a gate costs.
    """
    square = (full - blended).square().mean(dim=-1)
    distilled = square.mean() if answers is None else square[answers].mean()
    return distilled + weight * gates.clamp(0, 1).mean()


def learning_rate(step: int, steps: int, peak: float = 0.02) -> float:
    """Linear up over the first fifth of `steps`, down over the last, never below a tenth of `peak`."""
    ramp = max(steps // 5, 1)
    return peak * min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))
