"""No attention among visual tokens: they are keys and values of the text alone (SAISA)."""

from collections.abc import Sequence
from itertools import product

from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.primitives import spans
from regard.primitives.spans import Span

CARD = Card(
    title="SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency",
    arxiv="2502.02458",
    sheet=53,
    implements="The mask (NAAViT), with visual rows removed or without the visual keys they would see.",
    exact=False,
    saving="compute",
    departures=("The projectors that give every layer its visual keys and values are left out.",),
    oracles=(
        "a loop over pairs of positions, for each kind of visual row",
        "rows of text equal torch's attention with an explicit mask",
        "no visual tokens: causal; text before the image does not depend on it",
    ),
    aliases=("saisa",),
    options={
        "rows": Option(
            kind="str",
            default="none",
            choices=("none", "text", "self"),
            doc="what visual rows see: nothing, the text before them, or that and themselves",
        ),
    },
)


def pattern(visual: Sequence[Span], *, rows: str = "none") -> Pattern:
    """Text is causal; visual tokens see no visual token but, with "self", themselves.

    Args:
        visual: spans `(start, stop)` of positions, one an image.
        rows: what visual rows see. Under "none" they are empty: the attention of a layer adds nothing to them.

    Returns:
        A causal Pattern.

    Raises:
        RegardError: a span is ill-formed or overlaps another, or an unknown kind of rows.
    """
    if rows not in CARD.options["rows"].choices:
        raise RegardError(f"rows of 'naavit' must be one of {', '.join(CARD.options['rows'].choices)}, got {rows!r}")
    images = spans.ordered("visual tokens", visual)
    allowed = Pattern.causal()
    if rows == "none":
        for image in images:
            allowed = allowed & ~spans.rectangle(image, (0, spans.END))
        return allowed
    for image, other in product(images, images):
        if other <= image:
            allowed = allowed & ~spans.rectangle(image, other)
    return allowed | Pattern.window(1) if rows == "self" else allowed


def visual_spans(flags: Tensor, images: int = 1) -> tuple[Span, ...]:
    """The spans of visual tokens.

    Args:
        flags: bool `[T]`, True at visual tokens, without padding.
        images: how many runs they form.

    Raises:
        RegardError: they form another number of runs: an image is in pieces, or images stand side by side.
    """
    found = spans.runs(flags)
    if len(found) != images:
        raise RegardError(
            f"{images} images expected, but visual tokens form {len(found)} runs: {found}; write their spans"
        )
    return tuple(found)
