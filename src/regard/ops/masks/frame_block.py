"""All tokens of a video frame see each other, and share a second, temporal position (TC-LLaVA)."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card
from regard.core.errors import RegardError
from regard.core.pattern import Pattern

CARD = Card(
    title="TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with Temporal Considerations",
    arxiv="2409.03206",
    sheet=92,
    implements="The frame-wise block causal mask, temporal ids, and the positions that both rotations add up to.",
    exact=False,
    saving="none",
    departures=("The form of the mask and the factor 1 of temporal ids are inferred; no official code is known.",),
    oracles=(
        "a loop over pairs: j <= i, or both of one frame; one token a frame: causal",
        "gamma 0: the model's own positions; text alone: positions times 1 + gamma",
        "two rotations, by index and by temporal id, equal the one by their sum",
        "patches of a frame permuted: its outputs are permuted, later rows stay",
    ),
    aliases=("tc_llava",),
)


@dataclass(frozen=True, eq=False)
class Frames:
    """Keys up to `ends[q]`, the last token of the query's frame; beyond the table up to the query itself."""

    ends: Tensor

    def _end(self, q: Tensor) -> Tensor:
        ends = self.ends.to(q.device)
        return torch.where(q < len(ends), ends[q.clamp(0, len(ends) - 1)], q)

    def __call__(self, q: Tensor, k: Tensor, head: Tensor | None = None) -> Tensor:
        """Whether queries at `q` see keys at `k`, elementwise."""
        return k <= self._end(q)

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> tuple[Tensor, Tensor]:
        """Whether any, and whether all pairs of positions `q_low..q_high` and `k_low..k_high` are allowed."""
        return k_low <= self._end(q_high), k_high <= self._end(q_low)

    def __repr__(self) -> str:
        return f"frames over {len(self.ends)} tokens"


def pattern(frames: Tensor) -> Pattern:
    """A token sees all tokens up to its own, and the rest of its frame; text stays causal.

    Args:
        frames: integer `[T]`, the frame of every token, -1 for text; later tokens are text.

    Returns:
        A two-sided Pattern. A prompt may be cut into chunks between frames only.

    Raises:
        RegardError: `frames` is no vector of integers, falls, or has a frame in two pieces.
    """
    ids = _checked(frames)
    if not len(ids):
        return Pattern.causal()
    index = torch.arange(len(ids), device=ids.device)
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:-1] = (ids[1:] != ids[:-1]) | (ids[1:] < 0)
    stops = index[last]
    rule = Frames(stops[torch.searchsorted(stops, index)])
    return Pattern.predicate(rule, causal=False, cover=rule.cover)


def temporal_ids(frames: Tensor) -> Tensor:
    """The id of every token in time, int64 `[T]`: text counts up by one a token, a frame by one in all.

    Args:
        frames: as `pattern` takes them.

    Raises:
        RegardError: as `pattern`.
    """
    ids = _checked(frames)
    new = torch.ones_like(ids)
    new[1:] = ((ids[1:] != ids[:-1]) | (ids[1:] < 0)).long()
    return new.cumsum(0) - 1


def positions(frames: Tensor, *, gamma: float = 1.0, trained: int | None = None) -> Tensor:
    """`n + gamma t`, the position that rotation by index n and by `gamma` times the temporal id t comes to.

    Args:
        frames: as `pattern` takes them.
        gamma: weight of time; 0 leaves the model's own positions.
        trained: the longest text that the model was trained on; positions beyond it are warned of.

    Returns:
        float64 `[T]`, int64 for a whole `gamma`.

    Raises:
        RegardError: as `pattern`, or a negative `gamma`.
    """
    time = temporal_ids(frames)
    found = _joined(torch.arange(len(time), device=time.device), time, gamma)
    if trained is not None and len(found) and float(found[-1]) >= trained:
        warnings.warn(
            f"positions reach {float(found[-1]):g} of {trained} that the model was trained on; "
            f"text advances by {1 + gamma:g} a token",
            stacklevel=2,
        )
    return found


def next_position(frames: Tensor, index: int, *, gamma: float = 1.0) -> float:
    """The position of the token at `index`, generated after the tokens of `frames`: each advances by `1 + gamma`.

    Raises:
        RegardError: as `positions`, or an `index` among the tokens of `frames`.
    """
    time = temporal_ids(frames)
    if index < len(time):
        raise RegardError(f"index {index} is not past the {len(time)} tokens of the prompt")
    behind = int(time[-1]) + 1 - len(time) if len(time) else 0
    return _joined(torch.tensor(index), torch.tensor(index + behind), gamma).item()


def _joined(index: Tensor, time: Tensor, gamma: float) -> Tensor:
    if not gamma >= 0:
        raise RegardError(f"gamma must be at least 0, got {gamma}")
    return index + int(gamma) * time if gamma == int(gamma) else index + gamma * time.double()


def _checked(frames: Tensor) -> Tensor:
    """`frames`, or an error that names the first token at fault."""
    if frames.dim() != 1 or frames.is_floating_point() or frames.is_complex() or frames.dtype == torch.bool:
        raise RegardError(f"frames must be integers [T], -1 for text, got {frames.dtype} {list(frames.shape)}")
    ids = frames.long()
    shown = (ids >= 0).nonzero()[:, 0]
    steps = ids[shown].diff()
    if (at := (steps < 0).nonzero()[:, 0]).numel():
        i = int(shown[at[0] + 1])
        raise RegardError(
            f"frames must not fall: token {i} is of frame {int(ids[i])}, after frame {int(ids[shown[at[0]]])}"
        )
    if (at := ((steps == 0) & (shown.diff() > 1)).nonzero()[:, 0]).numel():
        i = int(shown[at[0] + 1])
        raise RegardError(f"frame {int(ids[i])} is in two pieces: text stands between its tokens, before token {i}")
    return ids
