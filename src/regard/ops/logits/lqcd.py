"""Leading-query contrastive decoding: what a leading cue adds to the logits is taken away again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import BranchSpec, Contrast
from regard.ops.branching import packed, weighted

CARD = Card(
    title="Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models",
    arxiv="2408.11261",
    sheet=186,
    implements="Decoding from the contrast of a neutral and a leading prompt, with the plausibility cut on the neutral "
    "one; the leading prompt from a cue, the neutral one by taking the cue out, or either given as it is.",
    exact=False,
    saving="none",
    departures=(
        "The paper's code is not public: alpha 1, the cut and its beta 0.1 follow visual contrastive decoding.",
        "Prompts are token ids; a cue is inserted or taken out as ids, never by rewriting text.",
        "Both branches see the same images.",
    ),
    oracles=(
        "without the cut, log-probabilities are those of transformers' guidance processor at scale 1 + alpha",
        "alpha 0 is neutral decoding; equal prompts leave the distribution before the cut as it is",
        "prompts of different length, padded: logits of two runs without a cache",
        "a toy classifier flips under its cue until alpha passes the threshold that evidence and cue set, never after",
    ),
    whole_model=True,
    neutral={"alpha": 0.0},
    example={"alpha": 1.0, "beta": 0.0, "cue": (5, 17, 40, 62)},
    options={
        "alpha": Option(kind="float", default=1.0, low=0.0, doc="how much of the leading logits is taken away"),
        "beta": Option(
            kind="float",
            default=0.1,
            low=0.0,
            high=1.0,
            doc="tokens below beta times the neutral prompt's largest probability are cut; 0 cuts none",
        ),
        "cue": Option(
            kind="tokens",
            default=None,
            optional=True,
            doc="what makes a prompt leading; none: handle.branching gives the other prompt",
        ),
        "tail": Option(default=0, low=0, doc="prompt tokens that stay behind an inserted cue (a chat turn's end)"),
        "given": Option(
            kind="str",
            default="neutral",
            choices=("neutral", "leading"),
            doc="which of the two prompts the model is given; the branch reads the other",
        ),
    },
)


def contrast(
    where: Where, *, alpha: float, beta: float, cue: tuple[int, ...] | None, tail: int, given: str
) -> Contrast | None:
    """A branch that reads the leading prompt (or, where that one is given, the neutral prompt)."""
    if alpha == 0:
        return None

    def branch(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if cue is None:
            raise RegardError("'lqcd' has no cue to make the other prompt with; give it one, or use handle.branching")
        if given == "leading":
            return remove(ids, mask, cue)
        return insert(ids, mask, cue, tail)

    def combine(z: Sequence[Tensor]) -> Tensor:
        neutral, leading = z if given == "neutral" else reversed(z)
        return combined(neutral, leading, alpha, beta)

    return Contrast("lqcd", combine, (BranchSpec(prompt=branch),))


def combined(neutral: Tensor, leading: Tensor, alpha: float, beta: float) -> Tensor:
    """`(1 + alpha) neutral - alpha leading`, of logits `[..., V]`; -inf where the cut falls.

    The cut keeps what the neutral prompt finds plausible: `neutral >= max(neutral) + log(beta)`.
    """
    return weighted((neutral, leading), (1 + alpha, -alpha), beta)


def insert(ids: Tensor, mask: Tensor, cue: tuple[int, ...], tail: int) -> tuple[Tensor, Tensor]:
    """`ids`, `mask [B, N]` padded on the left, with `cue` put in before the last `tail` tokens of every row.

    Raises:
        RegardError: a row has fewer than `tail` tokens.
    """
    shortest = int(mask.sum(1).min())
    if tail > shortest:
        raise RegardError(f"'lqcd' has tail={tail}, and a prompt of {shortest} tokens; tail must not be longer")
    at = ids.shape[1] - tail
    added = ids.new_tensor(cue).expand(ids.shape[0], -1)
    return (
        torch.cat((ids[:, :at], added, ids[:, at:]), dim=1),
        torch.cat((mask[:, :at], mask.new_ones(added.shape), mask[:, at:]), dim=1),
    )


def remove(ids: Tensor, mask: Tensor, cue: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`ids`, `mask [B, N]` without the last `cue` of each row, padded on the left; a row without it stays."""
    kept = mask.bool() & ~torch.stack([_last(row, real, cue) for row, real in zip(ids, mask.bool(), strict=True)])
    return packed(ids, kept)


def _last(row: Tensor, real: Tensor, cue: tuple[int, ...]) -> Tensor:
    """Where `cue` last stands among the tokens `row [N]` that are `real [N]`, as bool `[N]`; nowhere: all False."""
    found, width = torch.zeros_like(real), len(cue)
    if 0 < width <= len(row):
        same = (row.unfold(0, width, 1) == row.new_tensor(cue)).all(1) & real.unfold(0, width, 1).all(1)
        for start in same.nonzero()[-1:].flatten().tolist():
            found[start : start + width] = True
    return found
