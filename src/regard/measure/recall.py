"""Recall of facts planted in real text: the loss that a mean over all tokens hides."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure.replay import installed, prefill, quiet, respond

# Names and words that small models know: the form is easy for dense on purpose, so that a miss is the method's.
NAMES = (
    "Alice", "Robert", "Maria", "Thomas", "Sarah", "Peter", "Emma", "George", "Julia", "Henry", "Laura", "Daniel",
    "Helen", "Martin", "Sophie", "Victor",
)  # fmt: skip
WORDS = (
    "violin", "dragon", "copper", "banana", "castle", "rabbit", "bridge", "pepper", "island", "rocket", "garden",
    "silver", "tiger", "window", "cotton", "anchor",
)  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A context with facts in it, and the questions asked of it.

    Args:
        context: `[C]` int64, the text with the facts planted.
        asked: `[N]` int64, the questions with their right answers, one after the other.
        answers: for each question the half-open range of its answer in `asked`.
        depths: for each question where its fact stands in the context, 0 (begin) to 1 (end).
    """

    context: Tensor
    asked: Tensor
    answers: tuple[tuple[int, int], ...]
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Recall:
    """What was recalled.

    Args:
        recalled: fraction of facts whose every answer token is the most likely one (so greedy
            decoding, given the questions before, writes exactly the answer).
        margin: mean over answer tokens of the right token's logit less the best other one's.
        dense_recalled, dense_margin: the same of the dense model.
        depths, hits, dense_hits: one entry a fact, ordered by depth.
    """

    recalled: float
    margin: float
    dense_recalled: float
    dense_margin: float
    length: int
    depths: tuple[float, ...]
    hits: tuple[bool, ...]
    dense_hits: tuple[bool, ...]


def plant(tokenizer: Any, tokens: Tensor, facts: int = 8, seed: int = 0) -> Planted:
    """Plant `facts` made-up facts at even depths of the real text `tokens [n]`, and ask for each once.

    The questions repeat the sentence up to its answer, in an order unlike the planted one.

    Raises:
        RegardError: `facts` is not between 1 and the number of names, or the text is too short.
    """
    if not 1 <= facts <= len(NAMES):
        raise RegardError(f"facts must be between 1 and {len(NAMES)}, not {facts}")
    if len(tokens) < 2 * facts:
        raise RegardError(f"planting {facts} facts needs at least {2 * facts} tokens of text, not {len(tokens)}")
    rng = random.Random(seed)
    names = rng.sample(NAMES, facts)
    words = rng.sample(WORDS, facts)

    def ids(text: str) -> Tensor:
        return torch.as_tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    # Question and fact are cut into the same pieces, so that the answer is a token-for-token copy.
    questions = [ids(f"\nThe favorite word of {name} is") for name in names]
    answers = [ids(f" {word}") for word in words]
    stop = ids(".\n")
    places = [round((i + 0.5) * len(tokens) / facts) for i in range(facts)]
    pieces: list[Tensor] = []
    depths, before = [], 0
    for place, question, answer in zip(places, questions, answers, strict=True):
        pieces += [tokens[before:place], question, answer, stop]
        depths.append(place / len(tokens))
        before = place
    context = torch.cat([*pieces, tokens[before:]])
    order = rng.sample(range(facts), facts)
    asked: list[Tensor] = []
    spans: dict[int, tuple[int, int]] = {}
    row = 0
    for i in order:
        spans[i] = (row + len(questions[i]), row + len(questions[i]) + len(answers[i]))
        asked += [questions[i], answers[i], stop]
        row = spans[i][1] + len(stop)
    return Planted(context, torch.cat(asked), tuple(spans[i] for i in range(facts)), tuple(depths))


def ask(model: Any, placements: Sequence[Placement] | None, planted: Planted, chunk: int = 32) -> list[list[float]]:
    """The margins of each fact's answer tokens; None as `placements` asks the dense model.

    Raises:
        RegardError: the method yields NaN.
    """
    with quiet(model), installed(model, placements) as handle:
        cache = prefill(model, handle, planted.context)
        logits = torch.cat(list(respond(model, handle, planted.asked, cache, chunk)))
    right = planted.asked.to(logits.device)
    margins = []
    for first, stop in planted.answers:
        rows, want = logits[first - 1 : stop - 1], right[first:stop, None]
        other = rows.scatter(-1, want, -torch.inf).amax(-1)
        margins.append((rows.gather(-1, want)[:, 0] - other).tolist())
    return margins


def recall(
    model: Any,
    placements: Sequence[Placement],
    planted: Planted,
    chunk: int = 32,
    reference: list[list[float]] | None = None,
) -> Recall:
    """Ask the attached model for the planted facts, beside dense (`reference`, if already asked)."""
    ours = ask(model, placements, planted, chunk)
    theirs = ask(model, None, planted, chunk) if reference is None else reference

    def hits(margins: list[list[float]]) -> tuple[bool, ...]:
        return tuple(all(m > 0 for m in fact) for fact in margins)

    def mean(margins: list[list[float]]) -> float:
        flat = [m for fact in margins for m in fact]
        return sum(flat) / len(flat)

    return Recall(
        recalled=sum(hits(ours)) / len(ours),
        margin=mean(ours),
        dense_recalled=sum(hits(theirs)) / len(theirs),
        dense_margin=mean(theirs),
        length=len(planted.context) + len(planted.asked),
        depths=planted.depths,
        hits=hits(ours),
        dense_hits=hits(theirs),
    )
