"""Attention sinks and a sliding window (StreamingLLM)."""

from regard.core.card import Card, Option
from regard.core.pattern import Pattern
from regard.core.placement import Where

CARD = Card(
    title="Efficient Streaming Language Models with Attention Sinks",
    arxiv="2309.17453",
    sheet=None,
    implements="The attention of section 3.2: the first tokens and a sliding window, in a cache of constant size.",
    exact=False,
    saving="memory",
    departures=(
        "Keys keep their original rotary positions; the paper numbers positions inside the cache, "
        "which lets a model run past its trained length. Here it does not.",
        "Under left padding the sinks are each row's first real tokens.",
    ),
    oracles=(
        "window None is the model's own attention",
        "the allowed pairs are j <= i and (j < sink or i - j < window), in a loop",
        "the ring store equals a dense masked reference",
    ),
    aliases=("streaming_llm", "attention_sinks", "streamingllm"),
    neutral={"window": None},
    example={"sink": 2, "window": 5},
    options={
        "sink": Option(default=4, low=0, high=4096, search=(4, 16, 64), doc="first positions that every query may see"),
        "window": Option(
            default=256,
            low=1,
            optional=True,
            search=(128, 256, 512),
            doc="last positions a query may see, its own included; none: all",
        ),
    },
)


def allow(where: Where, *, sink: int, window: int | None) -> Pattern:
    """The first `sink` positions and the last `window`, the query's own included; `window` None: all."""
    if window is None:
        return Pattern.causal()
    return Pattern.sink(sink) | Pattern.window(window)
