"""Multi-query associative recall (MQAR): key-value pairs, then the keys again; each must bring its value.

Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927, and its released generator.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.measure.tasks.task import Rows, Task, distinct

# Rows of the vocabulary's size that the solver holds at once.
SOLVED_AT_ONCE = 1024


@dataclass(frozen=True)
class Mqar(Task):
    """`pairs` keys with their values, `passes` times over, then every key once, at gaps drawn from a power law.

    Keys are the lower half of the vocabulary without 0, values the upper half. Gaps are drawn without replacement with
    probabilities in proportion to `(gap + 1)^(power - 1)`; a query stands two tokens times its gap after the pairs, and
    its value, which never follows it in the row, is to be said at the query. Elsewhere stands 0, or with `fill` a
    token drawn from the whole vocabulary.

    Args:
        length: tokens of a row, even.
        vocabulary: more than `length`.
        pairs: n, with `2 n passes + 2 n <= length`.
        power: a, above 0; 1 makes all gaps equally likely.
        passes: how often the pairs are said; they are tiled (the released code fails for more than one).
        fill: no zeros.

    Raises:
        RegardError: a setting outside these bounds.
    """

    name: ClassVar[str] = "mqar"

    length: int = 256
    vocabulary: int = 8192
    pairs: int = 16
    power: float = 0.01
    passes: int = 1
    fill: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.passes < 1:
            raise RegardError(f"mqar needs at least 1 pair and 1 pass, not pairs {self.pairs}, passes {self.passes}")
        if self.length % 2:
            raise RegardError(f"the length of mqar must be even, since queries stand at even places; got {self.length}")
        if self.vocabulary <= self.length:
            raise RegardError(f"the vocabulary of mqar must exceed its length {self.length}; got {self.vocabulary}")
        need = 2 * self.pairs * (self.passes + 1)
        if need > self.length:
            most = self.length // (2 * (self.passes + 1))
            raise RegardError(
                f"{self.pairs} pairs said {self.passes} times and asked once need a length of {need}, not "
                f"{self.length}; at most {most} pairs fit"
            )
        if not self.power > 0:
            raise RegardError(f"the power of mqar must be above 0, got {self.power}")

    @property
    def said(self) -> int:
        """Tokens of the pairs, all passes: where the first query may stand."""
        return 2 * self.pairs * self.passes

    @property
    def chances(self) -> np.ndarray:
        """The probability of every gap, `[gaps]` float64."""
        weights = self.power * np.arange(1, (self.length - self.said) // 2 + 1) ** (self.power - 1)
        return weights / weights.sum()

    def make(self, count: int, generator: torch.Generator) -> Rows:
        """`count` rows of the same distribution as `released`, all at once; not its very numbers."""
        half, where = self.vocabulary // 2, generator.device
        keys = 1 + distinct(count, self.pairs, half - 1, generator)
        values = half + distinct(count, self.pairs, self.vocabulary - half, generator)
        chances = torch.as_tensor(self.chances, dtype=torch.float32).to(where, non_blocking=True)
        # The first of competing exponential clocks are draws without replacement, in order.
        clocks = torch.empty(count, len(chances), device=where).exponential_(generator=generator) / chances
        gaps = clocks.topk(self.pairs, largest=False).indices
        rows = self._rows(keys, values, gaps)
        if self.fill:
            noise = torch.randint(self.vocabulary, rows.inputs.shape, generator=generator, device=where)
            rows.inputs.copy_(torch.where(rows.inputs == 0, noise, rows.inputs))
        return rows

    def released(self, count: int, seed: int) -> Rows:
        """`count` rows as the released generator makes them from `seed`, bit by bit (some 20 s for 100,000).

        What `fill` puts in is not: the released code draws it from torch's global generator. Here it comes from the
        same stream as the rest.
        """
        stream, half = np.random.RandomState(seed), self.vocabulary // 2

        def draw(choices: np.ndarray, chances: np.ndarray | None = None) -> Tensor:
            drawn = [stream.choice(choices, self.pairs, replace=False, p=chances) for _ in range(count)]
            return torch.from_numpy(np.array(drawn, dtype=np.int64).reshape(count, self.pairs))

        keys, values = draw(np.arange(1, half)), draw(np.arange(half, self.vocabulary))
        chances = self.chances
        rows = self._rows(keys, values, draw(np.arange(len(chances)), chances))
        if self.fill:
            noise = torch.from_numpy(stream.randint(self.vocabulary, size=rows.inputs.shape))
            rows.inputs.copy_(torch.where(rows.inputs == 0, noise, rows.inputs))
        return rows

    def _rows(self, keys: Tensor, values: Tensor, gaps: Tensor) -> Rows:
        inputs = keys.new_zeros(len(keys), self.length)
        inputs[:, : self.said] = torch.stack((keys, values), -1).flatten(1).tile(1, self.passes)
        places = self.said + 2 * gaps
        return Rows(inputs.scatter_(1, places, keys), places, values)

    def solve(self, inputs: Tensor) -> Tensor:
        """A dictionary made of the first pass: the value of every key of `inputs [N, L]`, 0 at other tokens."""
        found = []
        for part in inputs.split(SOLVED_AT_ONCE):
            book = part.new_zeros(len(part), self.vocabulary)
            book.scatter_(1, part[:, 0 : 2 * self.pairs : 2], part[:, 1 : 2 * self.pairs : 2])
            found.append(book.gather(1, part))
        return torch.cat(found)
