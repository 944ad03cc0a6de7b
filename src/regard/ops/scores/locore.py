"""Local coherence (LocoRE): rows of the answer look harder at what was just said."""

import math
from functools import partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.placement import Where
from regard.core.slots import Reading, Rescore
from regard.core.step import Step

CARD = Card(
    title="Hallucination Begins Where Saliency Drops",
    arxiv=None,
    sheet=112,
    implements="LocoRE: attention to the last tokens of the answer times 1 + beta, every row renormalised.",
    exact=False,
    saving="none",
    departures=(
        "The window counts the row's own token, the last one that was emitted.",
        "Sizes and renormalising are taken from summaries: the paper's code leaves LocoRE out.",
    ),
    oracles=("the weights times 1 + beta, renormalised, in a loop", "an additive bias of log(1 + beta)"),
    neutral={"beta": 0.0},
    example={"beta": 1.0},
    options={
        "window": Option(default=5, low=1, search=(5, 10), doc="last tokens of the answer that are looked at harder"),
        "beta": Option(kind="float", default=0.1, low=0.0, high=1e6, search=(0.1, 0.3), doc="by how much"),
    },
)


def rescore(where: Where, *, window: int, beta: float) -> Rescore | None:
    """A bias of `log(1 + beta)` on the last `window` tokens of the answer, for the rows of the answer."""
    if beta == 0:
        return None
    heads = torch.zeros(where.heads, dtype=torch.bool)
    heads[where.rows(where.heads)] = True
    return Rescore(f"locore: {window} tokens, beta {beta:g}", answers, partial(bias, heads, window, math.log1p(beta)))


def answers(step: Step) -> slice | None:
    """Arrivals of the answer."""
    return None if step.answer is None else slice(step.answer, None)


def bias(heads: Tensor, window: int, more: float, reading: Reading) -> Tensor:
    """`more [B, H, R, S]` on the keys of the answer that lie less than `window` arrivals back; 0 in other heads."""
    keys, rows = reading.arrivals[:, :, None], reading.step.arrivals.to(reading.key.device)[:, None, :, None]
    near = (keys >= (reading.step.answer or 0)) & (keys <= rows) & (rows - keys < window)
    near = near & heads.to(near.device)[None, :, None, None]
    return reading.query.new_zeros(near.shape).masked_fill(near, more)
