"""Copying: every token again after a lag (RAT, arXiv 2507.04416), and a whole row backwards (Kimi Linear, 2510.26692).

The papers name the tasks, not their rows; these are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.measure.tasks.task import Rows, Task


@dataclass(frozen=True)
class Copy(Task):
    """Random tokens; from position `lag` on, the token that stood `lag` earlier is to be said.

    Args:
        length: tokens of a row, more than `lag`.
        vocabulary: at least 2.
        lag: at least 1.

    Raises:
        RegardError: a setting outside these bounds.
    """

    name: ClassVar[str] = "copy"

    length: int = 128
    vocabulary: int = 64
    lag: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.lag < self.length:
            raise RegardError(
                f"the lag of copy must be between 1 and its length - 1 = {self.length - 1}, got {self.lag}"
            )
        if self.vocabulary < 2:
            raise RegardError(f"the vocabulary of copy must be at least 2, got {self.vocabulary}")

    def make(self, count: int, generator: torch.Generator) -> Rows:
        """`count` rows; `length - lag` answers each."""
        size, where = (count, self.length), generator.device
        inputs = torch.randint(self.vocabulary, size, generator=generator, device=where)
        places = torch.arange(self.lag, self.length, device=where).expand(count, -1)
        return Rows(inputs, places, inputs[:, : -self.lag])

    def solve(self, inputs: Tensor) -> Tensor:
        """The row, shifted."""
        return inputs.roll(self.lag, 1)


@dataclass(frozen=True)
class ReverseCopy(Task):
    """Half a row of random tokens, 0, and the same tokens backwards: each is to be said before it comes.

    Args:
        length: even; half of it are tokens to copy (128: the 64 of Kimi Linear).
        vocabulary: at least 3, 0 among them.

    Raises:
        RegardError: a setting outside these bounds.
    """

    name: ClassVar[str] = "reverse_copy"

    length: int = 128
    vocabulary: int = 64

    def __post_init__(self) -> None:
        if self.length < 2 or self.length % 2:
            raise RegardError(f"the length of reverse_copy must be even and at least 2, got {self.length}")
        if self.vocabulary < 3:
            raise RegardError(f"the vocabulary of reverse_copy must be at least 3, got {self.vocabulary}")

    def make(self, count: int, generator: torch.Generator) -> Rows:
        """`count` rows; `length / 2` answers each."""
        half, where = self.length // 2, generator.device
        tokens = torch.randint(1, self.vocabulary, (count, half), generator=generator, device=where)
        answers = tokens.flip(1)
        inputs = torch.cat((tokens, torch.zeros_like(tokens[:, :1]), answers[:, :-1]), 1)
        return Rows(inputs, torch.arange(half, self.length, device=where).expand(count, -1), answers)

    def solve(self, inputs: Tensor) -> Tensor:
        """The first half backwards, where the second half asks."""
        half = self.length // 2
        return torch.cat((torch.zeros_like(inputs[:, :half]), inputs[:, :half].flip(1)), 1)
