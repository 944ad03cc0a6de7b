"""States that align with the first token's become sinks; a loss keeps them apart (decorrelation loss)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError

CARD = Card(
    title="Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech Recognition with LLMS",
    arxiv="2510.22603",
    sheet=72,
    implements="The decorrelation loss, and the tests for sinks and massive activations.",
    exact=False,
    saving="none",
    departures=(
        "Padding does not count; the reference has no mask for it.",
        "The threshold of sinks is inferred, that of massive activations is the common one.",
    ),
    oracles=(
        "torch's cosine similarity, squared and averaged in a loop; gradcheck",
        "all states alike: 1; orthogonal: 0; scale and sign of a state do not matter, nor does padding",
        "a sequence of the first token alone: 0, with zero gradients",
        "a small model with a planted sink: cosines below 0.1, its column halved, the loss within 2 %",
    ),
    aliases=("decorrelation",),
    options={"weight": Option(kind="float", default=1e4, low=0.0, doc="lambda, as released")},
)


def penalty(states: Sequence[Tensor], mask: Tensor, *, weight: float = 1e4) -> Tensor:
    """`weight * mean over layers, samples and tokens of cos^2` with the first token, to be added to cross-entropy.

    Args:
        states: `[B, T, d]` float with gradients each, `output_hidden_states` of a forward: embeddings, every layer,
            the last one. The first and the last are left out.
        mask: `[B, T]` bool or 0 and 1, what is no target and no padding: the first token, audio, video and prompt.
        weight: lambda.

    Returns:
        A number with gradients, 0 where no sample has more than its first token.

    Raises:
        RegardError: no layer lies between, shapes disagree, a sample has no first token, or a weight below 0.

    Source: arXiv 2510.22603; umbertocappellazzo/Llama-AVSR, models/modeling_AVSRLLM.py.
    """
    if len(states) < 3:
        raise RegardError(f"states must be embeddings, layers and the last layer: at least 3, got {len(states)}")
    if any(state.shape[:2] != mask.shape or state.ndim != 3 for state in states):
        shapes = sorted({tuple(state.shape) for state in states})
        raise RegardError(f"states must be [B, T, d] and the mask [B, T], got {shapes} and {list(mask.shape)}")
    if not weight >= 0:
        raise RegardError(f"the weight must be at least 0, got {weight}")
    counted = mask.bool()
    if not counted.any(1).all():
        empty = ", ".join(map(str, (~counted.any(1)).nonzero()[:, 0].tolist()))
        raise RegardError(f"samples {empty} have no first token: their masks are empty")
    first = counted.int().argmax(1)
    others = counted.scatter(1, first[:, None], False)
    share = others / others.sum(1, keepdim=True).clamp(min=1)
    return weight * torch.stack([(aligned(state, first) * share).sum(1).mean() for state in states[1:-1]]).mean()


def aligned(state: Tensor, first: Tensor) -> Tensor:
    """cos^2 of every token's state `[B, T, d]` with that of token `first [B]`: `[B, T]`; 0 for a state of zeros."""
    start = state.gather(1, first[:, None, None].expand(-1, 1, state.shape[2]))
    return F.cosine_similarity(state, start, dim=-1).square()


def sinks(columns: Tensor, threshold: float = 0.3) -> Tensor:
    """Which keys are sinks, bool: whose mean attention from later rows, `columns [..., T]`, is above a threshold."""
    return columns > threshold


def massive(state: Tensor, floor: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """Massive activations of a state `[..., T, d]`, bool: above `floor`, and above `ratio` medians of its sizes."""
    size = state.abs()
    return (size > floor) & (size > ratio * size.flatten(-2).median(-1).values[..., None, None])
