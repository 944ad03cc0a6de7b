"""A marked span thinned out at a few layers by plain striding (attention-driven self-compression)."""

import itertools
import math

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Rows
from regard.core.step import Step

# The sheet's own arithmetic for 32 layers, scaled to the model's depth.
SCHEDULE = (6 / 32, 12 / 32, 20 / 32)

CARD = Card(
    title="Vision Token Reduction via Attention-Driven Self-Compression for Efficient Multimodal Large Language Models",
    arxiv=None,
    sheet=66,
    implements="The reduction: at chosen layers every s-th row of a span goes on, its positions kept, later layers "
    "hold the rows alive there.",
    exact=False,
    saving="memory",
    departures=(
        "The span of a text model is the prompt between its first and last tokens, unless rows are marked by hand.",
        "One-dimensional striding only: text has no grid.",
        "Training with the bottleneck is the user's: the model is differentiable while attached.",
    ),
    oracles=(
        "rows a layer follow the formula, and the cache holds their sum",
        "equal to a full forward in which dropped rows are hidden as keys from their layer on",
        "embeddings of dropped tokens get a gradient through the layers before",
    ),
    whole_model=True,
    neutral={"factors": "1"},
    example={"at": "1,2", "factors": "2", "start": 2, "tail": 3},
    options={
        "at": Option(
            kind="str",
            default=None,
            optional=True,
            doc="layers that thin the span out, increasing, as '6,12,20'; none: those of 32 layers, scaled",
        ),
        "factors": Option(
            kind="str",
            default="2",
            search=("2", "4"),
            doc="of how many rows one goes on: one number for all of these layers, or one for each",
        ),
        "start": Option(default=4, low=0, search=(4, 16), doc="first positions that are never dropped"),
        "tail": Option(default=64, low=1, search=(64, 256), doc="last prompt positions that are never dropped"),
    },
)


def drop(where: Where, *, at: str | None, factors: str, start: int, tail: int) -> Rows | None:
    """The rows of layer `where.layer`: outside the span all, of the span every `stride`-th.

    Raises:
        RegardError: layers that do not increase or do not exist, or factors that are not whole numbers.
    """
    stride = strides(where.layers, at, factors)[where.layer]
    if stride == 1:
        return None

    def choose(step: Step) -> Tensor | None:
        index = places(step, start, tail)
        return None if index is None else (index < 0) | (index % stride == 0)

    def check(step: Step) -> None:
        if step.marks is not None:
            _check_marks(step, step.marks, stride)

    return Rows(f"every {stride}th of a span", choose, check)


def strides(layers: int, at: str | None, factors: str) -> list[int]:
    """Of how many span rows one is alive in each layer: the product of the factors so far.

    Raises:
        RegardError: see `drop`.
    """
    scaled = [round(layers * share) for share in SCHEDULE]
    places = scaled if at is None else _numbers("at", at)
    told = _numbers("factors", factors)
    if any(factor < 1 for factor in told):
        raise RegardError(f"'adsc' needs factors of 1 or more, got {factors!r}")
    told = told * len(places) if len(told) == 1 else told
    if len(told) != len(places):
        raise RegardError(f"'adsc' has {len(told)} factors {factors!r} for {len(places)} layers; give one, or one each")
    if all(factor == 1 for factor in told):
        return [1] * layers
    if at is not None and any(a >= b for a, b in itertools.pairwise(places)):
        raise RegardError(f"'adsc' needs layers that increase, got at={at!r}")
    if not all(0 <= place < layers for place in places):
        raise RegardError(f"'adsc' has layers at={at!r}, this model has layers 0 to {layers - 1}")
    return [math.prod(f for place, f in zip(places, told, strict=True) if place <= layer) for layer in range(layers)]


def places(step: Step, start: int, tail: int) -> Tensor | None:
    """Which row of its span each row of this forward is, `[1|B, R]` from 0, -1 outside; None: no span row comes.

    Marked rows are the span; without marks it is the prompt from position `start` to `tail` before its end. Where
    nobody told the prompt's end, this forward is taken for the last of it.
    """
    if step.marks is not None:
        if step.start >= step.marks.shape[1]:
            return None
        arrivals, marks = step.arrivals, step.marks.to(step.device)
        batch = max(len(marks), len(arrivals))
        count = (marks.long().cumsum(1) - 1).expand(batch, -1)
        index = count.gather(1, arrivals.clamp(0, marks.shape[1] - 1).expand(batch, -1))
        return torch.where(step.marked, index, -1)
    end = (step.stop if step.prompt is None else step.prompt) - tail
    if step.start >= end:
        return None
    arrivals, positions = step.arrivals, step.queries()
    return torch.where((positions >= start) & (arrivals < end), positions - start, -1)


def _check_marks(step: Step, marks: Tensor, stride: int) -> None:
    prompt = marks.shape[1] if step.prompt is None else min(step.prompt, marks.shape[1])
    real = step.positions(torch.arange(prompt, device=marks.device)) >= 0
    inside = marks[:, :prompt] & real
    known = step.prompt is not None and step.prompt <= marks.shape[1]
    if known and bool((inside == real).all(1).any()):
        raise RegardError(f"'adsc' was given a span that covers the whole prompt of {prompt} tokens; leave its end out")
    few = [rows for rows in inside.sum(1).tolist() if 0 < rows < stride]
    if few:
        raise RegardError(f"'adsc' keeps every {stride}th row of a span of {few[0]}; mark more, or lower the factors")
    if bool((marks[:, :prompt] & ~real).any()):
        raise RegardError("'adsc' was given a span that reaches into the padding")


def _numbers(name: str, written: str) -> list[int]:
    try:
        return [int(part) for part in written.split(",")]
    except ValueError:
        raise RegardError(f"'adsc' needs {name} as whole numbers with commas between, got {written!r}") from None
