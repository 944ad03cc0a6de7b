"""What a synthetic task is, and which there are: every `Task` in a file of this folder, known by its `name`."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.core.errors import RegardError, choose


@dataclass(frozen=True)
class Rows:
    """Rows of a task and what a model should say where.

    Args:
        inputs: `[N, L]` int64 tokens.
        places: `[N, n]` int64, where a row is asked something: the answer is predicted at that very token.
        answers: `[N, n]` int64, the right tokens there.
    """

    inputs: Tensor
    places: Tensor
    answers: Tensor

    @property
    def labels(self) -> Tensor:
        """`[N, L]` int64: the answer at every place that asks, -100 elsewhere; not shifted."""
        return torch.full_like(self.inputs, -100).scatter_(1, self.places, self.answers)

    def score(self, said: Tensor) -> Tensor:
        """The fraction of each row's answers that are right, `[N]` float32, of predictions `said [N, n]`."""
        return (said == self.answers).float().mean(1)


@dataclass(frozen=True)
class Task(ABC):
    """A task and its settings; the rows follow from them and from a generator's state alone."""

    name: ClassVar[str]

    length: int
    vocabulary: int

    @abstractmethod
    def make(self, count: int, generator: torch.Generator) -> Rows:
        """`count` fresh rows, on the generator's device."""

    @abstractmethod
    def solve(self, inputs: Tensor) -> Tensor:
        """What to say at each of `inputs [N, L]`, `[N, L]`, from the inputs alone; anything where nothing is asked."""


@functools.cache
def known() -> dict[str, type[Task]]:
    """The tasks by name."""
    package = importlib.import_module("regard.measure.tasks")
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    kinds = {kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)}
    return {kind.name: kind for kind in kinds if issubclass(kind, Task) and kind is not Task}


def build(name: str, **settings: Any) -> Task:
    """The task `name` with `settings`; what is left out is at its default.

    Raises:
        RegardError: no such task or setting, or a value of another type than the default's; what a task refuses itself.
    """
    kind = known()[choose("task", name, known())]
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for setting, value in settings.items():
        default = defaults[choose(f"setting of task {name}", setting, defaults)]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise RegardError(f"setting {setting} of task {name} must be {type(default).__name__}, not {value!r}")
    return kind(**settings)


def distinct(rows: int, count: int, below: int, generator: torch.Generator) -> Tensor:
    """`[rows, count]` whole numbers from 0 on, distinct in a row and in random order, on the generator's device.

    Floyd's algorithm, all rows at once: `count` steps whatever `below` is. On a GPU, where launching those takes
    longer than numbers do, the places of the largest of `below` random ones.
    """
    where = generator.device
    if where.type == "cuda":
        return torch.rand(rows, below, generator=generator, device=where).topk(count).indices
    chosen = torch.empty(count, rows, dtype=torch.int64, device=where)
    for index, last in enumerate(range(below - count, below)):
        drawn = torch.randint(last + 1, (rows,), generator=generator, device=where)
        chosen[index] = torch.where((chosen[:index] == drawn).any(0), last, drawn)
    order = torch.rand(rows, count, generator=generator, device=where).argsort(1)
    return chosen.T.gather(1, order)
