"""What one layer of an attached model does differently: the bound mechanisms, in running order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Needs
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Codec

State = dict[str, Tensor]


def _as_it_is(x: Tensor, step: Step) -> Tensor:
    return x


def _nothing(step: Step) -> None: ...


@dataclass(frozen=True)
class Prepare:
    """Site `qkv`: queries, keys and values before their product, keys and values before they are stored.

    Each is `f(x [B, heads, T, D], step) -> x` and may look at nothing but its own token and its position.
    """

    name: str
    query: Callable[[Tensor, Step], Tensor] = _as_it_is
    key: Callable[[Tensor, Step], Tensor] = _as_it_is
    value: Callable[[Tensor, Step], Tensor] = _as_it_is


@dataclass(frozen=True)
class Mix:
    """Site `heads`: per-head outputs, `run(out [B, H, T, Dv], step, state) -> out`.

    `compares`: with those of the prompt without its image. `step.blind` runs that prompt's layers one by one beside
    the forward that completes the request's; `run` is asked there too, by a step without a token map.
    """

    name: str
    run: Callable[[Tensor, Step, State], Tensor]
    compares: bool = False


@dataclass(frozen=True)
class Reading:
    """What the rows of one layer are about to read, for the sites that choose by content.

    Args:
        query: `[B, H, R, D]`. key: `[B, Hk, S, D]`, in the basis of the queries, in order of arrival.
        positions: of the keys, `[1|B, S]`, or `[1|B, Hk, S]` where heads hold different keys; negative ones are
            padding, or slots that a head does not have.
        pattern, scale, softcap: as the layer attends.
        lse: `[B, H, R]` log-sum-exp of the scores; None before they were attended.
        step: the forward. state: the mechanism's own tensors, batch rows first; what it keeps by arrival it cuts
            to `step.start` itself before it reads, since a crop does not.
    """

    query: Tensor
    key: Tensor
    positions: Tensor
    pattern: Pattern
    scale: float
    softcap: float | None
    step: Step
    state: State
    lse: Tensor | None = None

    def of_rows(self, rows: slice, step: Step, lse: Tensor) -> "Reading":
        """The same of some rows of the forward: their step, and their `lse [B, H, R]`."""
        return replace(self, query=self.query[:, :, rows], step=step, lse=lse)

    @property
    def arrivals(self) -> Tensor:
        """Arrivals of the keys, `[B, 1|H, S]`, an entry a query head where heads hold different keys; -1: no key."""
        positions, padding = self.positions, self.step.padding
        batch, heads = self.query.shape[:2]
        if positions.ndim == 2:
            positions = positions[:, None]
        elif positions.shape[1] > 1:
            positions = positions.repeat_interleave(heads // positions.shape[1], 1)
        shift = 0 if padding is None else padding.to(positions.device)[:, None, None]
        return (positions + shift).masked_fill(positions < 0, -1).expand(batch, -1, -1)

    def kinds(self, stem: str) -> Tensor:
        """What the keys are, `[B, 1|H, S]` values of `Kind`, for mechanism `stem`.

        Raises:
            RegardError: nobody said what the tokens are.
        """
        arrivals = self.arrivals
        return self.step.said(stem).at(arrivals.flatten(1)).view(arrivals.shape)

    def held(self, told: Tensor, otherwise: float) -> Tensor:
        """`told [1|B, n]` or `[1|B, H, n]`, by arrival, of the keys: `[B, 1|H, S]`; `otherwise` for all others."""
        arrivals, n = self.arrivals, told.shape[-1]
        told = told[:, None] if told.ndim == 2 else told
        heads = max(told.shape[1], arrivals.shape[1])
        arrivals = arrivals.expand(-1, heads, -1)
        if not n:
            return torch.full_like(arrivals, otherwise, dtype=told.dtype)
        inside = (arrivals >= 0) & (arrivals < n)
        found = told.expand(len(arrivals), heads, n).gather(2, arrivals.clamp(0, n - 1))
        return torch.where(inside, found, torch.as_tensor(otherwise, dtype=told.dtype, device=told.device))

    def scores(self) -> Tensor:
        """Scaled and capped scores of the rows over the keys, `[B, H, R, S]` in float32 (float64); -inf: not seen."""
        exact = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        kv_heads, group = self.key.shape[1], self.query.shape[1] // self.key.shape[1]
        grouped = self.query.to(exact).unflatten(1, (kv_heads, group)).flatten(2, 3)
        scores = (grouped @ self.key.to(exact).transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        seen = self.pattern.allow(self.step.queries(self.key.device), self.positions)
        scores = scores.unflatten(2, (group, -1)).masked_fill(~seen[:, :, None], -torch.inf)
        return scores.flatten(1, 2)

    def weights(self) -> Tensor:
        """Probabilities of the rows over the keys, `[B, H, R, S]` in float32 (float64); a row without keys has none."""
        assert self.lse is not None
        return torch.exp(self.scores() - self.lse.masked_fill(self.lse == -torch.inf, 0)[..., None])


@dataclass(frozen=True)
class Chosen:
    """Keys that some rows attend to: `rows` of the forward, and `index [1|B, n]` into the keys, -1 for none.

    Rows in blocks of one length, each block with a list of its own, have `index [1|B, blocks, n]`. `own` says that
    every row of a block sees the whole list (no -1), and besides it its own block's keys up to itself, which the
    list leaves out: no mask is built then.
    """

    rows: slice
    index: Tensor
    own: bool = False

    def split(self, first: int) -> Iterator["Chosen"]:
        """The same, one list `[1|B, n]` a piece, nothing apart; `first` is the slot of the forward's first row."""
        if self.index.ndim == 2:
            yield self
            return
        blocks = self.index.shape[1]
        t = (self.rows.stop - self.rows.start) // blocks
        for i in range(blocks):
            rows, index = slice(self.rows.start + i * t, self.rows.start + (i + 1) * t), self.index[:, i]
            if self.own:
                own = torch.arange(first + rows.start, first + rows.stop, device=index.device)
                index = torch.cat((index, own.expand(len(index), -1)), 1)
            yield Chosen(rows, index)


@dataclass(frozen=True)
class Select:
    """Site `sparsity`: which keys are read at all, one list for all heads.

    `choose(reading)` returns pieces that together hold every row once, or None: all keys are read.
    """

    name: str
    choose: Callable[[Reading], Sequence[Chosen] | None]


@dataclass(frozen=True)
class Reweigh:
    """Site `probabilities`: gains on segments of the keys, with the masses that the segments have.

    `split(reading)` gives each key its segment, `[B, 1|H, 1|R, S]` of 0 to `segments - 1`, or None: nothing
    to do. `gains(masses [segments, B, H, R])` multiply the probabilities of each segment. Outputs become
    `sum_s gain_s mass_s out_s` of the segments' own attention, so no probability is ever built. `rows(step)` names
    the arrivals whose rows are split, which then come in blocks of few rows (None: no row); without it all rows come
    at once, and segments should not differ by row.
    """

    name: str
    segments: int
    split: Callable[[Reading], Tensor | None]
    gains: Callable[[Tensor], Tensor]
    rows: Callable[[Step], slice | None] | None = None


@dataclass(frozen=True)
class Rescore:
    """Site `scores`: what is added to the scores of some rows before the softmax.

    `rows(step)` names the arrivals whose rows are edited (None: none). `bias(reading)` gets a reading of some of
    these rows, with their lse, and returns `[1|B, 1|H, 1|R, S]`, -inf to hide a key, or None. Blocks of rows come in
    order. All biases of a layer are made from the scores as they are, and added up. To multiply probabilities by g and
    renormalise is to add log g.
    """

    name: str
    rows: Callable[[Step], slice | None]
    bias: Callable[[Reading], Tensor | None]


@dataclass(frozen=True)
class Watch:
    """Reads the residual stream as it enters the layer: `run(x [B, R, d], step, state)`, before its attention."""

    name: str
    run: Callable[[Tensor, Step, State], None]


@dataclass(frozen=True)
class Write:
    """Site `residual`: what a part of the layer adds to the residual stream, and the stream as it leaves the layer.

    `run(part, x [B, T, d], step)` returns it edited; `part` is "attention" or "feed_forward", before it is added, or
    "layer".
    """

    name: str
    run: Callable[[str, Tensor, Step], Tensor]


@dataclass(frozen=True)
class Rows:
    """Sites `depth` and `tokens`: which rows this layer runs; the others pass it by and leave nothing in its store.

    `choose(step)` returns `[1|B, T]` bool over this forward's rows, or None: all. Where the rows that run come
    first it may return their number (0: none) instead, which costs nothing to follow on any device. `check(step)`
    raises, before anything runs, where the forward cannot be served.
    """

    name: str
    choose: Callable[[Step], Tensor | int | None]
    check: Callable[[Step], None] = _nothing


@dataclass(frozen=True)
class Feed:
    """Site `depth`: which rows the feed-forward part runs; the others add nothing there.

    `choose(step)` returns `[B, R]` bool over the rows that the layer runs, the number of first rows that run
    (0: none), or None: all. Afterwards `seen(before, after, step)` is told the residual stream `[B, R, d]` before
    and after the part.
    """

    name: str
    choose: Callable[[Step], Tensor | int | None]
    seen: Callable[[Tensor, Tensor, Step], None]


# Features of one image as the language model takes them: `[n, d]`, and those that deeper layers add, `[n, d]` each.
Image = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sight:
    """The images of a request that a model encoded together, and what it made of them.

    Args:
        model: the language model, with its encoder.
        given: what the encoder was given, by name: `pixel_values` and what describes them.
        images: what it made of them, in the prompt's order.
        encode: the encoder and projector themselves; `encode(pixel_values=...)` with other arguments in place of some.
        caught: what `Contrast.around` yielded.
        lent: what the user gave with `handle.lending`, None: nothing.
        times: how often each image of the user's request comes in a row: older `generate` repeats them for its beams.
    """

    model: nn.Module
    given: Mapping[str, Any]
    images: Sequence[Image]
    encode: Callable[..., list[Image]]
    caught: Any
    lent: Any
    times: int


Around = Callable[[nn.Module, Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class BranchSpec:
    """One more branch of a request: it is fed the same emitted tokens, and differs from the request as said here.

    Args:
        prompt: `f(ids [B, N], mask [B, N])` makes its prompt and mask, of any length, padded on the left, int64, the
            mask 0 at padding; None: the request's own. Not asked where the user gives it (`handle.branching`).
        view: what it sees in place of the request's images, one for each; an image of fewer tokens than the request's
            leaves that many out of the prompt. None: the same. With a view, text alone is refused.
        around: `f(model, lent)` is entered while the branch runs (other weights).
        check: `f(model, lent)` raises, before the request's prompt is complete, where the branch cannot run.
        exits: layers, counted from 1, after which its stream leaves early: more logits of the same forward.
    """

    prompt: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    view: Callable[[Sight], Sequence[Image]] | None = None
    around: Around | None = None
    check: Callable[[nn.Module, Any], None] | None = None
    exits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contrast:
    """Site `logits`: branches of a request, and how their logits are combined.

    Args:
        name: of the mechanism.
        combine: `f(z)` returns the logits that are used in place of the request's own, of the last prompt row and all
            response rows. `z` holds the request's own `[B, R, V]` and those of its `exits`, then those of each branch
            in the same way; the same row of all follows the same emitted tokens.
        branches: besides the request.
        around: `f(model, lent)` is entered while the request's own images are encoded.
        exits: of the request itself, as in `BranchSpec`.
    """

    name: str
    combine: Callable[[Sequence[Tensor]], Tensor]
    branches: tuple[BranchSpec, ...]
    around: Around | None = None
    exits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slots:
    """The mechanisms bound to one layer.

    Sites open as mechanisms need them; each is one field here, neutral by default.

    Args:
        pattern: what each KV head may see, the model's own rule included (`masks`, `cache.keep`).
        key_codec, value_codec: one entry a KV head, None where stored as they come (`cache.encode`).
        prepare, rescore, reweigh, mix, watch, write, rows, feed: in the recipe's order; `rows` hold together, and so
            do the biases of `rescore`.
        select: at most one.
        needs: mechanisms that have to be told what the tokens are, and what of them.
    """

    pattern: Pattern
    key_codec: tuple[Codec | None, ...]
    value_codec: tuple[Codec | None, ...]
    prepare: tuple[Prepare, ...] = ()
    select: tuple[Select, ...] = ()
    rescore: tuple[Rescore, ...] = ()
    reweigh: tuple[Reweigh, ...] = ()
    mix: tuple[Mix, ...] = ()
    watch: tuple[Watch, ...] = ()
    write: tuple[Write, ...] = ()
    rows: tuple[Rows, ...] = ()
    feed: tuple[Feed, ...] = ()
    needs: tuple[tuple[str, Needs], ...] = ()

    def __str__(self) -> str:
        """What runs, for `explain`: the pattern, then codecs, heads together where they agree."""
        parts = [] if self.pattern.is_causal else [str(self.pattern)]
        for name, codecs in (("keys", self.key_codec), ("values", self.value_codec)):
            told = ["as they come" if codec is None else codec.name for codec in codecs]
            if any(codecs):
                parts.append(f"{name} {told[0]}" if len(set(told)) == 1 else f"{name} {', '.join(told)}")
        parts += [edit.name for edits in self.edits() for edit in edits]
        return "; ".join(parts)

    def edits(self) -> tuple[tuple[Any, ...], ...]:
        """What each site but the pattern's and the codecs' brings, in running order."""
        keys = (self.rows, self.prepare, self.select, self.rescore, self.reweigh)
        return *keys, self.mix, self.watch, self.write, self.feed
