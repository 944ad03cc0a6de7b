"""How much images and text attend to each other, held to a target by layer during training (AIA)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose

CARD = Card(
    title="Architecture Decoupling Is Not All You Need For Unified Multimodal Model",
    arxiv="2511.22663",
    sheet=161,
    implements="Interaction intensities, the stepwise targets of both tasks, and the Huber loss towards them.",
    exact=False,
    saving="none",
    departures=(
        "The weight has no default: the paper's text says 40, its ablation 50, the released code 5 and 10.",
        "Layer boundaries of the targets are those of the paper's table; Emu3 and Janus-Pro differ by one.",
    ),
    oracles=(
        "per layer torch's HuberLoss; no gradient at the target, never more than delta",
        "uniform causal attention in closed form, keys of everything 1",
        "masses and explicit probabilities agree in value and gradient; weight 0: the gradients of the plain loss",
        "a tiny model of two tasks comes within delta in most layers, its loss within 2 %",
    ),
    aliases=("attention_interaction_alignment",),
    options={
        "task": Option(
            kind="str",
            default="generation",
            choices=("generation", "understanding"),
            doc="image rows to text keys, or text rows to image keys",
        ),
    },
)
# Task -> (last layer, tolerance delta, target T); the last step has no end.
TARGETS = {
    "generation": ((9, 0.2, 0.4), (24, 0.1, 0.4), (None, 0.05, 0.2)),
    "understanding": ((9, 0.05, 0.1), (19, 0.05, 0.15), (30, 0.05, 0.3), (None, 0.05, 0.2)),
}


def penalty(
    intensities: Tensor,
    weight: float,
    targets: Tensor | None = None,
    active: Tensor | None = None,
    *,
    task: str = "generation",
) -> Tensor:
    """`weight * mean over layers and samples of Huber(I - T)`, to be added to the loss of the next token.

    Args:
        intensities: `[L]` or `[B, L]` float with gradients, of `intensity` for every layer.
        weight: lambda; there is no default (see the card).
        targets: `[L, 2]`, delta and T of every layer; None: `table(task, L)`.
        active: `[B]` bool or 0 and 1, samples that count; the mean is still over all, as released.
        task: which targets, where none are given.

    Raises:
        RegardError: fewer targets than layers, a delta that is not positive, a weight below 0, intensities outside
            0..1, or flags of another batch.

    Source: AIA (2511.22663), section 4; zhengdian1/AIA, models/modeling_vlm.py.
    """
    choose("task", task, TARGETS)
    rows = intensities[None] if intensities.ndim == 1 else intensities
    if rows.ndim != 2:
        raise RegardError(f"intensities must be [L] or [B, L], got {list(intensities.shape)}")
    layers = rows.shape[1]
    steps = table(task, layers) if targets is None else torch.as_tensor(targets)
    if steps.ndim != 2 or steps.shape[1] != 2 or len(steps) < layers:
        raise RegardError(f"targets must be (delta, T) for each of {layers} layers, got {list(steps.shape)}")
    delta, target = steps[:layers].to(rows).T
    # Written so that NaN fails too; rounding may pass 1 by a little.
    if not ((rows.detach() >= 0) & (rows.detach() <= 1.001)).all():
        raise RegardError("intensities are masses of attention, in 0..1")
    if not weight >= 0 or not (delta > 0).all():
        raise RegardError(
            f"the weight cannot be negative and deltas must be above 0, got {weight} and {delta.tolist()}"
        )
    error = (rows - target).abs()
    huber = torch.where(error <= delta, error.square() / 2, delta * error - delta.square() / 2)
    if active is not None:
        if active.shape != rows.shape[:1]:
            raise RegardError(f"flags must be [{len(rows)}], one a sample, got {list(active.shape)}")
        huber = huber * active[:, None].to(huber)
    return weight * huber.mean()


def table(task: str, layers: int) -> Tensor:
    """The published steps, float32 `[layers, 2]`: delta and T.

    Raises:
        RegardError: no such task.
    """
    steps = TARGETS[choose("task", task, TARGETS)]
    told = [next((d, t) for last, d, t in steps if last is None or layer <= last) for layer in range(layers)]
    return torch.tensor(told)


def intensity(mass: Tensor, rows: Tensor) -> Tensor:
    """The mean over heads and rows of the mass on the other modality's keys, `[B]` with gradients.

    Args:
        mass: `[B, H, T]`, of every row's attention: the share on text keys (generation) or on image keys
            (understanding). From log-sum-exps of segments, or sums of probabilities.
        rows: bool `[B, T]`: image tokens (generation) or text tokens, all segments together (understanding).

    Raises:
        RegardError: shapes disagree, or a sample has no such row.
    """
    if mass.ndim != 3 or rows.shape != (mass.shape[0], mass.shape[2]):
        raise RegardError(
            f"masses must be [B, H, T] and rows bool [B, T], got {list(mass.shape)} and {list(rows.shape)}"
        )
    count = rows.sum(1)
    if not count.all():
        empty = ", ".join(map(str, (count == 0).nonzero()[:, 0].tolist()))
        raise RegardError(f"samples {empty} have no rows of the asking modality")
    return F.normalize(rows.to(mass), p=1, dim=1).mul(mass.mean(1)).sum(1)
