"""What one forward pass is, told to every layer and store by the adapter; never guessed from shapes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.token_map import TokenMap
from regard.core.two_sided import TwoSided


@dataclass
class Step:
    """One forward of `width` new tokens over a request that already holds `start` arrivals.

    Args:
        start: arrivals seen before this forward, in every row.
        width: new tokens `T`.
        batch: rows `B`.
        device: where the new tokens live.
        padding: `[B]` int64 left padding of each row, None when no row is padded.
        prompt: arrivals below this are prompt rows, the others response rows; None: all are prompt.
        marks: `[1|B, n]` bool, arrivals that the user marked (an image, a document); None: nothing is marked.
        tokens: what the request's tokens are; None: nobody said, and in a second branch nobody does.
        two_sided: spans of this forward's rows that see later tokens of theirs, by position.
        rows: arrivals `[1|B, R]` of the rows that a layer runs, ascending, -1 where a batch row has fewer than
            others; None: all of this forward. Only a layer that runs some rows has its own Step.
        at: `[1]` int64, `start` on the device, in a fixed step: a forward of one token whose work may be recorded and
            done again later, so that nothing in it may follow from `start` itself. None: any other forward.
        shared: scratch that the layers of this forward share ([090], [067]); dropped after it.
        blind: `blind(layer, told)` runs the prompt without its image up to and with `layer`, `told` in its scratch,
            and returns that scratch; None: this forward does not bring the prompt's end, or nobody compares.
    """

    start: int
    width: int
    batch: int
    device: torch.device
    padding: Tensor | None = None
    prompt: int | None = None
    marks: Tensor | None = None
    tokens: TokenMap | None = None
    two_sided: tuple[TwoSided, ...] = ()
    rows: Tensor | None = None
    at: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    blind: Callable[[int, dict[Any, Any]], dict[Any, Any]] | None = None

    @property
    def stop(self) -> int:
        """Arrivals after this forward."""
        return self.start + self.width

    @property
    def arrivals(self) -> Tensor:
        """Arrivals of the rows that run, `[1|B, R]`."""
        if self.at is not None:
            return self.at[None]
        return torch.arange(self.start, self.stop, device=self.device)[None] if self.rows is None else self.rows

    def only(self, rows: Tensor) -> "Step":
        """The same forward for a layer that runs the rows of arrivals `rows [1|B, R]`."""
        return replace(self, rows=rows)

    def positions(self, arrivals: Tensor) -> Tensor:
        """Positions of `arrivals [S]` or `[1|B, S]`: `[1, S]`, or `[B, S]` under padding; negative for padding."""
        arrivals = arrivals[None] if arrivals.ndim == 1 else arrivals
        if self.padding is None:
            return arrivals
        positions = arrivals - self.padding.to(arrivals.device)[:, None]
        return positions if self.rows is None else positions.masked_fill(arrivals < 0, -1)

    def queries(self, device: torch.device | None = None) -> Tensor:
        """Positions of the rows that run, `[1|B, R]`."""
        return self.positions(self.arrivals.to(device or self.device))

    def said(self, stem: str) -> TokenMap:
        """The token map, which mechanism `stem` needs.

        Raises:
            RegardError: there is none.
        """
        if self.tokens is None:
            raise RegardError(f"{stem!r} needs to know what the tokens are: run inside handle.reading(token_map)")
        return self.tokens

    @property
    def answer(self) -> int | None:
        """Where the answer begins: where the prompt ends, else the token map; None: nobody said."""
        if self.prompt is None and self.tokens is not None:
            return self.tokens.length
        return self.prompt

    @property
    def emitting(self) -> slice | None:
        """Arrivals whose rows emit the answer: the prompt's last and all after it; None: nobody said which."""
        return None if self.answer is None else slice(max(self.answer - 1, 0), None)

    def within(self, arrivals: slice) -> tuple[slice, Tensor | None]:
        """Where rows of `arrivals` lie among those that run, and `[B, R]` bool which these are (None: all there).

        Batch rows of which a layer runs different rows may have others in between.
        """
        first, last = arrivals.start or 0, self.stop if arrivals.stop is None else arrivals.stop
        if self.rows is None:
            start = min(max(first - self.start, 0), self.width)
            return slice(start, min(max(last - self.start, start), self.width)), None
        mine = (self.rows >= first) & (self.rows < last)
        found = mine.any(0).nonzero()[:, 0]
        rows = slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
        return rows, mine[:, rows]

    @property
    def response(self) -> Tensor:
        """`[1|B, R]` bool: which of the rows that run belong to the response."""
        arrivals = self.arrivals
        return arrivals >= self.prompt if self.prompt is not None else torch.zeros_like(arrivals, dtype=torch.bool)

    @property
    def marked(self) -> Tensor:
        """`[1|B, R]` bool: which of the rows that run the user marked."""
        arrivals = self.arrivals
        if self.marks is None:
            return torch.zeros_like(arrivals, dtype=torch.bool)
        marks = self.marks.to(arrivals.device)
        inside = (arrivals >= 0) & (arrivals < marks.shape[1])
        batch = max(marks.shape[0], arrivals.shape[0])
        at = arrivals.clamp(0, marks.shape[1] - 1).expand(batch, -1)
        return inside & marks.expand(batch, -1).gather(1, at)
