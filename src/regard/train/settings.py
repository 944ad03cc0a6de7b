"""What a training run is: one frozen value, read from YAML or put together from flags, checked before it starts."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from regard.core.errors import RegardError, choose


def _setting(default: Any, doc: str, **bounds: Any) -> Any:
    """A field with its meaning and bounds: `low`, `high`, `above`, and `free` if it may change when a run goes on.

    (A text is compared by its tokens, wherever it lies.) A field that may be None has a `kind`.
    """
    return field(default=default, metadata={"doc": doc, **bounds})


@dataclass(frozen=True)
class Settings:
    """Data and optimisation of one run; `model` is recorded and compared, never read.

    Exactly one of `text` and `task` is named. A batch is `batch` rows of `length` tokens; the rate rises linearly for
    `warmup * steps` steps and falls as a cosine to `rate * floor` at the last one.

    Raises:
        RegardError: a value of another type or out of bounds, or settings that contradict each other.
    """

    text: str = _setting("", "UTF-8 file to train on", free=True)
    tokenizer: str = _setting("", "folder or hub name of a tokenizer; none: bytes are the tokens", free=True)
    task: str = _setting("", "synthetic task to train on")
    task_settings: Mapping[str, Any] = field(default_factory=dict, metadata={"doc": "settings of the task"})
    length: int = _setting(256, "tokens of a row", low=2)
    batch: int = _setting(32, "rows of a step", low=1)
    accumulate: int = _setting(1, "parts that a step's rows are run in", low=1)
    steps: int = _setting(1000, "optimiser steps", low=1)
    rate: float = _setting(1e-3, "largest learning rate", above=0)
    warmup: float = _setting(0.05, "share of the steps until the rate is reached", low=0, high=1)
    floor: float = _setting(0.0, "last rate, as a share of the largest", low=0, high=1)
    weight_decay: float = _setting(0.1, "of matrices; norms, biases and gates' scalars have none", low=0)
    beta1: float = _setting(0.9, "decay of AdamW's mean gradient", low=0, high=0.9999)
    beta2: float = _setting(0.95, "decay of AdamW's mean squared gradient", low=0, high=0.99999)
    clip: float = _setting(1.0, "largest norm of the gradient; 0 clips nothing", low=0)
    bf16: bool = _setting(False, "run the model in bfloat16 (autocast); weights stay float32")
    graphs: bool | None = _setting(
        None, "replay steps as a CUDA graph; left out: where they can be", free=True, kind=bool
    )
    seed: int = _setting(0, "of rows and of dropout", low=0)
    evaluate: int = _setting(100, "steps between two measurements on held-out rows", low=1)
    held_out: int = _setting(64, "rows measured on: of the text's last tenth, or fresh ones of a task", low=1)
    target: float = _setting(2.0, "stop at this accuracy of a task; above 1: never", above=0)
    checkpoint: int = _setting(100, "steps between two checkpoints", low=1, free=True)
    model: Mapping[str, Any] = field(default_factory=dict, metadata={"doc": "what the model was built from"})

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        if bool(self.text) == bool(self.task):
            said = f"both text {self.text!r} and task {self.task!r}" if self.text else "neither"
            raise RegardError(f"name either a text or a task to train on, not {said}")
        for name in ("tokenizer",) if self.task else ("task_settings",):
            if getattr(self, name):
                raise RegardError(
                    f"{name} {getattr(self, name)!r} means nothing for a {'task' if self.task else 'text'}"
                )
        if self.batch % self.accumulate:
            raise RegardError(f"a batch of {self.batch} rows cannot be run in {self.accumulate} equal parts")

    @classmethod
    def of(cls, **words: Any) -> "Settings":
        """Settings from names and values.

        Raises:
            RegardError: an unknown name; what the settings refuse themselves.
        """
        names = [one.name for one in dataclasses.fields(cls)]
        return cls(**{choose("training setting", name, names): value for name, value in words.items()})

    def to_json(self) -> dict[str, Any]:
        """All of them, plain."""
        return dataclasses.asdict(self)

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising - 1)
        return self.rate * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def read(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, name by name; check it with `Settings.of`.

    Raises:
        RegardError: the file cannot be read, is not plain YAML, or is not a list of names and values.
    """
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RegardError(f"settings file {str(path)!r} cannot be read: {why}") from error
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said):
        raise RegardError(f"settings file {str(path)!r} must hold lines NAME: VALUE, not {said!r}")
    return said


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The settings in which a run of `mine` cannot go on from one of `theirs`, each with both values."""
    free = {one.name for one in dataclasses.fields(Settings) if one.metadata.get("free")}
    left, right = _flat(mine), _flat(theirs)
    names = [name for name in {**left, **right} if name not in free and left.get(name) != right.get(name)]
    return [f"{name} was {right.get(name)!r}, now {left.get(name)!r}" for name in names]


def _flat(words: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in words.items():
        found |= {f"{name}.{inner}": x for inner, x in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _checked(one: dataclasses.Field, value: Any) -> Any:
    """`value` as the type of field `one`, within its bounds."""
    if one.default is dataclasses.MISSING:
        if not isinstance(value, Mapping):
            raise RegardError(f"setting {one.name} ({one.metadata['doc']}) must hold names and values, not {value!r}")
        return dict(value)
    kind = type(one.default)
    if one.default is None:
        if value is None:
            return value
        kind = one.metadata["kind"]
    whole_for_real = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if type(value) is not kind and not whole_for_real:
        # YAML reads 1e-3, without a dot, as a word.
        written = " (write it with a dot, as in 1.0e-3)" if kind is float and isinstance(value, str) else ""
        raise RegardError(f"setting {one.name} ({one.metadata['doc']}) must be {kind.__name__}, not {value!r}{written}")
    bounds = one.metadata
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value) or value < bounds.get("low", value) or value > bounds.get("high", value):
            wanted = " and ".join(f"at {k} {bounds[b]}" for k, b in (("least", "low"), ("most", "high")) if b in bounds)
            raise RegardError(f"setting {one.name} ({bounds['doc']}) must be {wanted or 'finite'}, not {value}")
        if "above" in bounds and not value > bounds["above"]:
            raise RegardError(f"setting {one.name} ({bounds['doc']}) must be above {bounds['above']}, not {value}")
    return float(value) if whole_for_real else value
