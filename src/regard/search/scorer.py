"""Measuring trials: briefly while searching, at length for the few that are measured again."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from regard.core.placement import Placement
from regard.measure.measure import Measurement, Setting, run, setting
from regard.measure.seconds import control
from regard.measure.text import Parts, Window, windows
from regard.search.plan import Plan


class Measures(Protocol):
    """What a search needs to know about placements. Any error a call raises is recorded as the trial's."""

    def __call__(self, placements: Sequence[Placement], *, final: bool) -> Measurement:
        """Measure `placements` at the trials' length, or at the final one."""
        ...

    def control(self) -> Any:
        """Dense timed against dense at the final length; None if it is not timed."""
        ...


class Scorer:
    """`Measures` on a real model; the dense side of each length is computed once and kept.

    Args:
        parts: the text, split (`measure.text.split`).
        plan: lengths, windows, repeats.
    """

    def __init__(self, model: Any, tokenizer: Any, parts: Parts, plan: Plan):
        self.model, self.tokenizer, self.parts, self.plan = model, tokenizer, parts, plan
        self._settings: dict[bool, Setting] = {}

    def windows(self, final: bool) -> list[Window]:
        """The windows measured on; those of the two lengths are disjoint."""
        plan = self.plan
        if final:
            context, count = plan.final_length - plan.continuation, plan.final_windows
            return windows(self.parts.final, context, plan.continuation, count, self.parts.offsets[2])
        return windows(self.parts.choosing, plan.context, plan.continuation, plan.windows, self.parts.offsets[1])

    def setting(self, final: bool) -> Setting:
        """The setting of one length."""
        if final not in self._settings:
            plan = self.plan
            wanted = {*plan.objectives, *(c.name for c in plan.constraints)}
            timed = final or bool(wanted & {"prefill", "decode"})
            self._settings[final] = setting(
                self.windows(final),
                plan.chunk,
                repeats=(plan.final_repeats if final else plan.repeats) if timed else 0,
                steps=min(plan.steps, plan.continuation),
                facts=plan.facts if final or "recall" in wanted else 0,
                tokenizer=self.tokenizer,
                seed=plan.seed,
            )
        return self._settings[final]

    def __call__(self, placements: Sequence[Placement], *, final: bool) -> Measurement:
        """Measure `placements`."""
        return run(self.model, placements, self.setting(final))

    def control(self) -> Any:
        """Dense against itself, timed as what is measured again."""
        told = self.setting(True)
        if told.timed is None:
            return None
        return control(self.model, told.timed, told.steps, told.repeats, warmup=0)


def cut(tokens: Tensor, plan: Plan) -> Parts:
    """Split `tokens [n]` as `plan` needs."""
    from regard.measure.text import split

    one = plan.context + plan.continuation
    return split(tokens, one * plan.windows, plan.final_length * plan.final_windows, plan.calibration_tokens)
