"""The settings of a search, checked once."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from regard.core.errors import RegardError, choose
from regard.search.constraints import Constraint, objectives, parse_all


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a search measures and when it stops.

    Args:
        objectives: scores to trade off (`measure.SCORES`).
        constraints: bounds the chosen row must meet.
        trials: trials in all, dense not counted. seconds: wall time of the trials, None: no bound.
        context, continuation, windows: prefilled and scored tokens of a trial's windows, and how many.
        chunk: continuation tokens a forward.
        repeats, steps: timing pairs of a trial that is timed, and tokens decoded in each.
        final_length, final_windows, final_repeats, final_members: total tokens, windows and timing pairs
            at the final length, and how many rows are measured there.
        attributions: how many recipes less one mechanism a run measures, to say what each mechanism brings.
        facts: facts planted to measure recall. calibration_tokens: kept for fitting, at least.
        sampler: `tpe` or `nsga2`. seed: of everything random.
    """

    objectives: tuple[str, ...] = ("kl", "bytes")
    constraints: tuple[Constraint, ...] = ()
    trials: int = 24
    seconds: float | None = None
    context: int = 896
    continuation: int = 128
    windows: int = 2
    chunk: int = 32
    repeats: int = 2
    steps: int = 16
    final_length: int = 3000
    final_windows: int = 2
    final_repeats: int = 2
    final_members: int = 4
    attributions: int = 12
    facts: int = 6
    calibration_tokens: int = 1024
    sampler: str = "tpe"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"trials": 1, "context": 1, "continuation": 2, "windows": 1, "chunk": 1, "repeats": 1, "steps": 1}
        least |= {"final_windows": 1, "final_repeats": 1, "final_members": 0, "attributions": 0, "facts": 0}
        least |= {"calibration_tokens": 2, "final_length": self.continuation + 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise RegardError(f"{name} must be a whole number of at least {low}, not {value!r}")
        if self.seconds is not None and not self.seconds > 0:
            raise RegardError(f"seconds must be positive, not {self.seconds!r}")
        choose("sampler", self.sampler, ("tpe", "nsga2"))

    @classmethod
    def of(cls, **written: Any) -> "Plan":
        """A plan from what a user wrote; objectives and constraints as text.

        Raises:
            RegardError: an unknown setting, or a value that cannot be.
        """
        for name in written:
            choose("search setting", name, [f.name for f in fields(cls)])
        if "objectives" in written:
            names = written["objectives"]
            names = names.split(",") if isinstance(names, str) else names
            written["objectives"] = tuple(objectives([n.strip() for n in names]))
        if "constraints" in written:
            written["constraints"] = tuple(parse_all(written["constraints"] or ()))
        return cls(**written)

    def fixed(self) -> dict[str, Any]:
        """What a resumed study must agree on: all but budgets, and what is done after the trials."""
        free = {"trials", "seconds", "final_members", "attributions", "seed", "sampler"}
        told = {k: v for k, v in asdict(self).items() if k not in free}
        return told | {"constraints": [str(c) for c in self.constraints]}
