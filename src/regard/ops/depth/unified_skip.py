"""Unified layer skipping: response tokens run the first, the last and evenly spaced layers, the prompt all."""

import math

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose
from regard.core.placement import Where
from regard.core.slots import Rows
from regard.core.step import Step

CARD = Card(
    title="Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy",
    arxiv="2404.06954",
    sheet=55,
    implements="The kept layers of a target speed-up, prompts at full depth and responses at kept layers, and the "
    "fine-tuning that skipped models need.",
    exact=False,
    saving="memory",
    departures=(
        "Skipped layers hold no keys of response tokens; the released code copies a lower layer's there, unread.",
        "Speed-ups between whole numbers are allowed, so that models of few layers have one.",
        "The optional cosine term of the fine-tuning loss, off in the paper's runs, is replaced by distillation.",
    ),
    oracles=(
        "kept layers of (layers, speed-up) as the paper tabulates them",
        "the response forward is the model with identity layers, the prompt's hidden states are the model's own",
        "gradients of fine-tuning equal those of a plain masked definition",
    ),
    aliases=("unified_layer_skipping",),
    whole_layers=True,
    whole_model=True,
    neutral={"speed_up": 1.0},
    example={"speed_up": 1.5},
    options={
        "speed_up": Option(
            kind="float",
            default=2.0,
            low=1.0,
            search=(1.1, 1.2),
            doc="target speed-up of decoding: floor(layers / speed_up) layers are kept",
        ),
        "plan": Option(
            kind="str",
            default="even",
            choices=("even", "middle"),
            doc="even: kept layers are spread as in the paper; middle: the skipped ones are one run (a control)",
        ),
    },
)


def skip(where: Where, *, speed_up: float, plan: str) -> Rows | None:
    """Response rows pass a skipped layer by; prompt rows run it, as all rows do while the prompt's end is not known.

    Raises:
        RegardError: fewer than two layers would be kept, or the speed-up is not a number of at least 1.
    """
    if where.layer in kept_layers(where.layers, speed_up, plan):
        return None

    def prompt_rows(step: Step) -> int | None:
        if step.prompt is None or step.stop <= step.prompt:
            return None
        return max(step.prompt - step.start, 0)

    return Rows(f"prompt rows only ({plan} skipping {speed_up:g}x)", prompt_rows)


def kept_layers(layers: int, speed_up: float, plan: str = "even") -> tuple[int, ...]:
    """The layers that response tokens run, ascending: `floor(layers / speed_up)` of them.

    "even": the first, the last, and from the second on every `floor(layers / (n - 1))`-th until `n` are kept.
    "middle": the first half of `n` (rounded up) and the last.

    Raises:
        RegardError: `speed_up` is below 1 or no finite number, or leaves fewer than two layers; no such plan.
    """
    if not (math.isfinite(speed_up) and speed_up >= 1):
        raise RegardError(f"'unified_skip' needs a finite speed_up of at least 1, got {speed_up!r}")
    choose("plan of 'unified_skip'", plan, CARD.options["plan"].choices)
    # 33 / 1.1 is 29.999... in floating point.
    count = math.floor(layers / speed_up + 1e-9)
    if count == layers:
        return tuple(range(layers))
    if count < 2:
        raise RegardError(
            f"speed_up {speed_up:g} keeps {count} of {layers} layers, and 'unified_skip' needs the first and the last; "
            f"the largest speed_up of this model is {layers / 2:g}"
        )
    if plan == "middle":
        tail = count // 2
        return (*range(count - tail), *range(layers - tail, layers))
    every = layers // (count - 1)
    between = [layer for layer in range(1, layers - 1) if layer % every == 0]
    return (0, *between[: count - 2], layers - 1)
