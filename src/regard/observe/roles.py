"""What heads do, read from two synthetic prompts: single probabilities at known places, from the log-sum-exp.

Prompt one is a row of random tokens and the same row again: an induction head looks at what came after the current
token the first time [Olsson et al. 2022], a previous-token head one back. Prompt two hides a few tokens (the needle)
in the first half of a long row of random ones and ends with the needle again, token by token: a retrieval head's
largest weight is on the token that comes next [Wu et al. 2024]. An induction head that reaches that far retrieves too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.families import Decoder
from regard.adapters.intercept import intercept
from regard.adapters.seam import Call, open_free
from regard.core.errors import RegardError, choose
from regard.core.token_map import Kind
from regard.observe.inputs import prepared
from regard.observe.reader import overheard
from regard.observe.record import Record

# A head has a role from this score on: mean probability at the places that define it; of `retrieval`, the share of the
# needle's tokens; of `vision`, the mean mass on visual tokens in rows after them (the least of [118]).
THRESHOLDS = {"previous": 0.4, "induction": 0.4, "retrieval": 0.5, "sink": 0.5, "local": 0.8, "vision": 0.2}
NEAR = 8  # keys that are local to a row, itself included
NEEDLE = 8


@dataclass(frozen=True, eq=False)
class Roles:
    """Scores of every head, 0 to 1.

    Args:
        scores: `[L, H]` float32 on the CPU, by role.
        thresholds: from which score on a head has the role.
    """

    scores: Mapping[str, Tensor]
    thresholds: Mapping[str, float]

    def of(self, role: str, least: float | None = None) -> list[tuple[int, int]]:
        """`(layer, head)` of the heads with this role, the highest score first; `least` in place of the threshold.

        Raises:
            RegardError: no such role, or "vision" where no record of an image was given.
        """
        score = self.scores[choose("role", role, self.scores)]
        least = self.thresholds[role] if least is None else least
        found = (score >= least).nonzero().tolist()
        return sorted(((layer, head) for layer, head in found), key=lambda place: -float(score[place]))

    def at(self, layer: int, head: int) -> tuple[str, ...]:
        """The roles of one head.

        Raises:
            RegardError: there is no such head.
        """
        check_heads([(layer, head)], *next(iter(self.scores.values())).shape)
        return tuple(role for role, score in self.scores.items() if score[layer, head] >= self.thresholds[role])


def roles(
    model: nn.Module,
    *,
    record: Record | None = None,
    length: int = 64,
    haystack: int = 256,
    batch: int = 4,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
) -> Roles:
    """Score every head of `model` for every role; two forwards of random tokens.

    Args:
        model: any model `regard.attach` takes, not attached; it is not changed.
        record: of a prompt with visual tokens, with the reading "masses" of its kinds; adds the role "vision".
        length: tokens that are repeated, all different.
        haystack: tokens in which the needle is hidden.
        batch: prompts of each kind.
        seed: of the tokens.
        thresholds: in place of some of `THRESHOLDS`.

    Raises:
        RegardError: a vocabulary too small, an unknown role, a record without visual tokens, or what attention beyond
            `record`'s raises.
    """
    for name in thresholds or {}:
        choose("role", name, THRESHOLDS)
    if length < 2 * NEAR or haystack < 4 * NEEDLE or batch < 1:
        raise RegardError(
            f"length must be at least {2 * NEAR}, haystack {4 * NEEDLE} and batch 1, got {length}, {haystack}, {batch}"
        )
    decoder, _ = open_free(model)
    drawn = torch.Generator().manual_seed(seed)
    ids = _tokens(decoder, batch, max(length, haystack + NEEDLE) + 1, drawn)
    repeated = torch.cat((ids[:, : length + 1], ids[:, 1 : length + 1]), 1)
    scores = _run(model, repeated, lambda look: _repeated(look, length))
    # The needle begins at another place in each row, in the first half, and is asked for at the end.
    needle, starts = ids[:, -NEEDLE:], torch.randint(1, haystack // 2 - NEEDLE, (batch,), generator=drawn)
    places = starts[:, None] + torch.arange(NEEDLE)
    hidden = torch.cat((ids[:, :haystack].scatter(1, places, needle), needle[:, :-1]), 1)
    rows = torch.arange(haystack, haystack + NEEDLE - 1)
    scores |= _run(model, hidden, lambda look: {"retrieval": look.largest(rows, places[:, 1:])})
    if record is not None:
        scores["vision"] = _vision(record)
    return Roles(scores, {**THRESHOLDS, **(thresholds or {})})


@contextmanager
def ablated(model: nn.Module, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Inside, the outputs of these `(layer, head)` are 0; queries, keys, caches and all else are the model's own.

    Raises:
        RegardError: a layer or head out of range, or the model is attached.
    """
    decoder, _ = open_free(model)
    check_heads(heads, decoder.layers, decoder.heads)

    def run(call: Call) -> Tensor:
        out = call.own()[0].transpose(1, 2)
        mine = [head for layer, head in heads if layer == call.seat.layer]
        return out.index_fill(1, torch.tensor(mine, device=out.device), 0) if mine else out

    with intercept(model, run):
        yield


def check_heads(heads: Sequence[tuple[int, int]], layers: int, count: int) -> None:
    """Raise RegardError for a layer or head that the model does not have."""
    for layer, head in heads:
        for what, number, most in (("layer", layer, layers), ("head", head, count)):
            if not 0 <= number < most:
                raise RegardError(f"{what} {number} is out of range; this model has {most}")


def _tokens(decoder: Decoder, batch: int, count: int, drawn: torch.Generator) -> Tensor:
    """`[batch, count]` ids: the one that texts begin with, then others, no two alike in a row."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = [getattr(decoder.config, name, None) for name in names]
    known = torch.ones(decoder.vocabulary, dtype=torch.bool)
    for ids in special:
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if token is not None and 0 <= token < len(known):
                known[token] = False
    usable = known.nonzero()[:, 0]
    if len(usable) < count:
        raise RegardError(
            f"{count} different tokens are needed, and the vocabulary has {len(usable)} besides special ones; take a "
            "shorter length and haystack"
        )
    rows = torch.stack([usable[torch.randperm(len(usable), generator=drawn)[:count]] for _ in range(batch)])
    if isinstance(special[0], int):
        rows[:, 0] = special[0]
    return rows


class _Look:
    """Probabilities of one layer at single places.

    Args:
        call: the layer's.
        lse: `[B, H, T]`.
    """

    def __init__(self, call: Call, lse: Tensor):
        self.call, self.lse = call, lse

    def _logs(self, rows: Tensor, keys: Tensor | None) -> Tensor:
        """Log-probabilities: at one key a row (`rows [n]`, `keys [n]`), `[B, H, n]`; of all keys, `[B, H, n, S]`."""
        call, group = self.call, self.call.query.shape[1] // self.call.key.shape[1]
        q = call.query[:, :, rows].float()
        k = (call.key if keys is None else call.key[:, :, keys]).float().repeat_interleave(group, 1)
        scores = q @ k.mT if keys is None else (q * k).sum(-1)
        scores = scores * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        lse = self.lse[:, :, rows]
        return scores - (lse[..., None] if keys is None else lse)

    def mean(self, rows: Tensor, offsets: Sequence[int]) -> Tensor:
        """Probability on the keys `offsets` back, their sum, mean over rows: `[H]`."""
        rows = rows.to(self.lse.device)
        return sum(self._logs(rows, rows - offset).exp() for offset in offsets).mean((0, 2))  # type: ignore[union-attr]

    def key(self, rows: Tensor, key: int) -> Tensor:
        """Probability on one key, mean over rows: `[H]`."""
        return self._logs(rows.to(self.lse.device), torch.full_like(rows, key).to(self.lse.device)).exp().mean((0, 2))

    def largest(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Share of rows whose largest probability is at `keys [B, n]`: `[H]`."""
        rows, keys = rows.to(self.lse.device), keys.to(self.lse.device)
        later = torch.arange(self.call.key.shape[2], device=rows.device) > rows[:, None]
        found = self._logs(rows, None).masked_fill(later, -torch.inf).argmax(-1)
        return (found == keys[:, None]).float().mean((0, 2))


def _repeated(look: _Look, length: int) -> dict[str, Tensor]:
    """Scores of the prompt `first, row, row`."""
    second = torch.arange(length + 1, 2 * length + 1)
    return {
        "previous": look.mean(second, [1]),
        "induction": look.mean(second[:-1], [length - 1]),
        "sink": look.key(second, 0),
        "local": look.mean(second, range(NEAR)),
    }


def _run(model: nn.Module, ids: Tensor, read: Callable[[_Look], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`read` of every layer, `[L, H]` float32 on the CPU by name."""
    found: list[dict[str, Tensor]] = []

    def run(call: Call) -> Tensor:
        out, lse = overheard(call, decoder.windows[call.seat.layer], real)
        found.append(read(_Look(call, lse)))
        return out.transpose(1, 2)

    given, real = prepared(model, ids)
    with torch.no_grad(), intercept(model, run) as decoder:
        called: Any = model
        called(**given)
    return {name: torch.stack([layer[name] for layer in found]).float().cpu() for name in found[0]}


def _vision(record: Record) -> Tensor:
    """Mean mass on visual tokens of the rows after the last of them, over all prompts: `[L, H]`."""
    if "visual" not in record.segments:
        raise RegardError(f"the record has no segment 'visual'; its segments are {', '.join(record.segments)}")
    visual = record.tokens.of(Kind.VISUAL)
    last = visual.shape[1] - visual.flip(1).long().argmax(1)
    after = record.row_edges[:-1].to(last.device) >= last[:, None]
    after = after.expand(record.masses.shape[1], -1)
    if not bool(after.any()):
        raise RegardError(
            "no tile of rows lies after the visual tokens; record with a larger size, or those rows alone"
        )
    mass = record.masses[..., record.segments.index("visual")]
    weight = after.to(mass)[:, None]
    return ((mass * weight).sum((1, 3)) / weight.sum()).float().cpu()
