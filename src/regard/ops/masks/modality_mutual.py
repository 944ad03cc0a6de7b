"""Image tokens read the question that follows them (AKI, modality-mutual attention)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.card import Card
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives import spans
from regard.primitives.spans import Span

CARD = Card(
    title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
    arxiv="2503.02597",
    sheet=93,
    implements="The mask, the spans it needs from types of tokens, and the check that no loss is on what was readable.",
    exact=False,
    saving="none",
    departures=(
        "Several images each read the question of their own turn (inferred).",
        "Keys and values of images depend on the question: they serve no other question, and no later turn.",
    ),
    oracles=(
        "a loop over pairs: j <= i, or i in the image and j in its question",
        "an empty question: causal",
        "columns of the question are those of a prefix, but for its own rows",
        "decoding from a cache equals one masked forward of a Llama",
    ),
    aliases=("aki", "mma"),
)

OTHER, IMAGE, QUESTION = 0, 1, 2
Turn = tuple[Span, Span]


def pattern(turns: Sequence[Turn]) -> Pattern:
    """A token sees all tokens up to its own; those of an image also see its question.

    Args:
        turns: `(image, question)` each, spans `(start, stop)` of positions. An empty question leaves the turn causal.

    Returns:
        A two-sided Pattern. Prefill a turn at once; generated tokens are causal rows.

    Raises:
        RegardError: a span is ill-formed or overlaps another, or a question does not stand behind its image.
    """
    allowed = Pattern.causal()
    for image, question in _checked(turns):
        allowed = allowed | spans.rectangle(image, question)
    return allowed


def turns(types: Tensor, mask: Tensor | None = None) -> tuple[Turn, ...]:
    """The turns of a batch, from the types of its tokens.

    Args:
        types: integer `[B, T]`: `IMAGE`, `QUESTION` or `OTHER`. A question is the first run of its tokens behind it.
        mask: bool `[B, T]`, False at padding, on either side; None: there is none.

    Returns:
        As `pattern` takes them, in positions: padding does not count.

    Raises:
        RegardError: an image with no question behind it, or rows whose turns differ (a Pattern is the same for all
            rows of a batch); names the row.
    """
    if types.dim() != 2 or (mask is not None and mask.shape != types.shape):
        raise RegardError(
            f"types and mask must be [B, T], got {list(types.shape)}, {None if mask is None else list(mask.shape)}"
        )
    found: list[tuple[Turn, ...]] = []
    for row in range(len(types)):
        real = types[row] if mask is None else types[row][mask[row].bool()]
        images, questions = spans.runs(real == IMAGE), spans.runs(real == QUESTION)
        pairs = []
        for i, image in enumerate(images):
            stop = images[i + 1][0] if i + 1 < len(images) else spans.END
            behind = [q for q in questions if image[1] <= q[0] < stop]
            if not behind:
                raise RegardError(f"row {row}: no question stands behind the image at {image}")
            pairs.append((image, behind[0]))
        found.append(tuple(pairs))
        if found[row] != found[0]:
            raise RegardError(f"rows 0 and {row} have turns {found[0]} and {found[row]}; batch rows of equal turns")
    return found[0] if found else ()


def check_labels(labels: Tensor, turns: Sequence[Turn], mask: Tensor | None = None, ignored: int = -100) -> None:
    """Raise where a loss is on tokens of a question: rows before them could read them.

    Args:
        labels: integer `[B, T]`, the token itself at every place, `ignored` where there is no loss.
        turns: as `pattern` takes them.
        mask: bool `[B, T]`, False at padding; None: there is none.
        ignored: the label without a loss.

    Raises:
        RegardError: such a label; names the first row and position.
    """
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    at = real.long().cumsum(1) - 1
    for image, (start, stop) in _checked(turns):
        if image[0] == image[1]:
            continue
        read = real & (at >= start) & (at < stop) & (labels != ignored)
        if (where := read.nonzero()).numel():
            row, column = where[0].tolist()
            raise RegardError(
                f"row {row} has a loss on position {int(at[row, column])} of the question {(start, stop)}, which its "
                f"image reads; label questions {ignored}"
            )


def _checked(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    spans.ordered("images and questions", [span for turn in turns for span in turn])
    for image, question in turns:
        if question[0] < image[1]:
            raise RegardError(f"the question {tuple(question)} does not stand behind its image {tuple(image)}")
    return tuple(((a, b), (c, d)) for (a, b), (c, d) in turns)
