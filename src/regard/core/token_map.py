"""What the tokens of a request are: padding, template, question, image, answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from regard.core.errors import RegardError


class Kind(IntEnum):
    """What a token is."""

    PADDING = -1
    FIRST = 0  # the first real token of a row
    TEMPLATE = 1  # what the chat template adds
    QUERY = 2  # the user's text
    VISUAL = 3  # of an image or a clip
    GENERATED = 4


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Span:
    """One image or clip, or a tile or a frame of one: arrivals `start` to `stop - 1` of `row`.

    Args:
        row, start, stop: where it is.
        grid: (frames, rows, columns) of its tokens in order, None where they form no grid (a class token, a
            resampler's queries).
        kind: "image" or "video".
        image: which image or clip of its row it shows, where an image may have several spans; None: nobody said.
        box: which part, as shares (top, left, bottom, right) of what the processor cut up; None: not known.
        separators: how many of the grid's last columns end a row of it, and show nothing.
    """

    row: int
    start: int
    stop: int
    grid: tuple[int, int, int] | None = None
    kind: str = "image"
    image: int | None = None
    box: Box | None = None
    separators: int = 0


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The kinds of a request's tokens, by arrival; what comes after them is generated.

    Args:
        kinds: `[1|B, n]` int8, values of `Kind`.
        spans: images, clips and their parts, by row and then by start.
        sets: named sets of tokens that a mechanism asks for, `[1|B, n]` bool each.

    Raises:
        RegardError: kinds of another shape or value, a span outside the row, over padding, over another span, or
            whose grid has another number of tokens; a set of another shape.
    """

    kinds: Tensor
    spans: tuple[Span, ...] = ()
    sets: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kinds.ndim != 2 or self.kinds.dtype != torch.int8:
            raise RegardError(f"kinds must be int8 [rows, arrivals], got {self.kinds.dtype} {list(self.kinds.shape)}")
        known = range(min(Kind), max(Kind) + 1)
        if self.kinds.numel() and not (int(self.kinds.min()) in known and int(self.kinds.max()) in known):
            raise RegardError(f"kinds go from {min(known)} to {max(known)}, got {self.kinds.unique().tolist()}")
        rows, n = self.kinds.shape
        before = Span(-1, 0, 0)
        for span in self.spans:
            if not 0 <= span.row < rows or not 0 <= span.start < span.stop <= n:
                raise RegardError(f"{span} is outside {rows} rows of {n} arrivals")
            if (span.row, span.start) < (before.row, before.stop):
                raise RegardError(f"{span} begins before {before} ends; spans go by row, then by start, apart")
            if (self.kinds[span.row, span.start : span.stop] == Kind.PADDING).any():
                raise RegardError(f"{span} lies over padding")
            if span.grid is not None and span.grid[0] * span.grid[1] * span.grid[2] != span.stop - span.start:
                raise RegardError(f"a grid of {span.grid} has another number of tokens than {span}")
            before = span
        for name, told in self.sets.items():
            if told.dtype != torch.bool or told.shape not in ((1, n), (rows, n)):
                raise RegardError(f"set {name!r} must be bool [1 or {rows}, {n}], got {told.dtype} {list(told.shape)}")

    @classmethod
    def of_text(cls, mask: Tensor, spans: Sequence[Span] = ()) -> "TokenMap":
        """A map without a template: the first real token, `spans` of images, and a question.

        Args:
            mask: `[B, n]`, 0 at padding.
            spans: images and clips.
        """
        real = mask.bool()
        kinds = torch.where(real, Kind.QUERY, Kind.PADDING).to(torch.int8)
        kinds[real & (real.long().cumsum(1) == 1)] = Kind.FIRST
        for span in spans:
            kinds[span.row, span.start : span.stop] = Kind.VISUAL
        return cls(kinds, tuple(spans))

    @property
    def rows(self) -> int:
        """Batch rows, 1 where all are alike."""
        return self.kinds.shape[0]

    @property
    def length(self) -> int:
        """Arrivals it speaks of."""
        return self.kinds.shape[1]

    @cached_property
    def images(self) -> Tensor:
        """`[1|B, n]`: which image of its row a token shows, by its span, or by the spans' order; -1 outside all."""
        found = torch.full(self.kinds.shape, -1, dtype=torch.long, device=self.kinds.device)
        count = [0] * self.rows
        for span in self.spans:
            found[span.row, span.start : span.stop] = count[span.row] if span.image is None else span.image
            count[span.row] += 1
        return found

    @cached_property
    def padding(self) -> Tensor:
        """`[1|B]` int64: padding tokens on the left."""
        return self.of(Kind.PADDING).long().cumprod(1).sum(1)

    @cached_property
    def padded(self) -> bool:
        """Whether a row is padded on the left."""
        return bool(self.padding.any())

    def of(self, *kinds: Kind) -> Tensor:
        """`[1|B, n]` bool: tokens of one of these kinds."""
        return torch.isin(self.kinds, torch.tensor(kinds, dtype=torch.int8, device=self.kinds.device))

    def require(self, kind: Kind, stem: str) -> None:
        """Raise RegardError, naming `stem` as who needs it, where some row has no token of `kind`."""
        missing = [row for row, found in enumerate(self._found) if kind not in found]
        if missing:
            where = "" if self.rows == 1 else f" in rows {', '.join(map(str, missing))}"
            raise RegardError(f"{stem!r} needs {kind.name.lower()} tokens, and the token map has none{where}")

    @cached_property
    def _found(self) -> list[set[int]]:
        """The kinds of each row."""
        return [set(kinds) for kinds in self.kinds.tolist()]

    def named(self, name: str, stem: str) -> Tensor:
        """Set `name`, `[1|B, n]` bool.

        Raises:
            RegardError: there is none; `stem` needs it.
        """
        if name not in self.sets:
            known = ", ".join(map(repr, self.sets)) or "none"
            raise RegardError(f"{stem!r} needs a token map with a set {name!r}; this one has {known}")
        return self.sets[name]

    def at(self, arrivals: Tensor) -> Tensor:
        """Kinds of `arrivals [1|B, S]`, `[1|B, S]` int8: negative ones are padding, later ones generated."""
        arrivals = arrivals.to(self.kinds.device)
        batch = max(self.rows, arrivals.shape[0])
        inside = (arrivals >= 0) & (arrivals < self.length)
        known = self.kinds.expand(batch, -1).gather(1, arrivals.clamp(0, self.length - 1).expand(batch, -1))
        other = torch.where(arrivals < 0, Kind.PADDING, Kind.GENERATED).to(torch.int8)
        return torch.where(inside, known, other)

    def repeat(self, times: int) -> "TokenMap":
        """Each row `times` times, as `generate` repeats them for beams."""
        spans = [replace(span, row=span.row * times + i) for span in self.spans for i in range(times)]
        sets = {name: told.repeat_interleave(times, 0) for name, told in self.sets.items()}
        kinds = self.kinds.repeat_interleave(times, 0)
        return TokenMap(kinds, tuple(sorted(spans, key=lambda s: (s.row, s.start))), sets)

    def to(self, device: torch.device) -> "TokenMap":
        """The same on `device`."""
        if self.kinds.device == device:
            return self
        return TokenMap(self.kinds.to(device), self.spans, {name: told.to(device) for name, told in self.sets.items()})
