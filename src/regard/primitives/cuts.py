"""How blocks are cut: masks of blocks as rows of `bounds` or `bits`, equal ones once."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = -1
# Said of blocks that turn out to be empty, of which no list tells.
EMPTY = -(2**31)
# Pairs looked at together: 64 MiB of positions.
LIMIT = 2**23
# Blocks are listed twice instead of needing bits, if it is one in so many at most.
TWICE = 8

Places = tuple[Tensor, ...]
# `masks(start, stop) -> (mask [E, M, N], loose [E, M])`: who sees whom in blocks start..stop-1, and rows that may see
# anything because they are not stored.
Masks = Callable[[int, int], tuple[Tensor, Tensor]]


def cuts(masks: Masks, count: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`(part [count], bounds [P, M, 2], bits [P, M, N / 32])` of `count` blocks, looked at in slices.

    `part` is WHOLE, EMPTY, `p >= 0` for row p of `bounds`, or `-2 - p` for row p of `bits`.
    """
    M, N = size
    parts: list[Tensor] = []
    bounds = [torch.zeros(0, M, 2, dtype=torch.int16, device=device)]
    bits = [torch.zeros(0, M, N // 32, dtype=torch.int32, device=device)]
    step = max(1, LIMIT // (M * N))
    for start in range(0, count, step):
        part, some_bounds, some_bits = _slice(*masks(start, min(start + step, count)))
        parts.append(_shifted(part, sum(map(len, bounds)), sum(map(len, bits))))
        bounds.append(some_bounds)
        bits.append(some_bits)
    part = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=device)
    return once(part, torch.cat(bounds), torch.cat(bits))


def _slice(mask: Tensor, loose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N = mask.shape[-1]
    low, high = _ends(mask)
    seen = mask.sum(-1)
    run = (high - low == seen).all(-1)
    whole, empty = ((seen == N) | loose).all(-1), (seen == 0).all(-1)
    spans, others = (run & ~whole & ~empty).nonzero()[:, 0], (~run & ~whole).nonzero()[:, 0]
    bounds, bits = torch.stack((low[spans], high[spans]), -1), pack(mask[others])
    part = torch.where(whole, WHOLE, EMPTY)
    part[spans] = torch.arange(len(spans), device=mask.device)
    part[others] = -2 - torch.arange(len(others), device=mask.device)
    return once(part, bounds, bits)


def _ends(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry that is True along the last dimension, and the one after the last; 0 and 0 where none is."""
    j = torch.arange(mask.shape[-1], device=mask.device)
    high = torch.where(mask, (j + 1).to(torch.int16), 0).amax(-1)
    low = torch.where(mask, j.to(torch.int16), mask.shape[-1]).amin(-1).where(high > 0, 0)
    return low, high


def pack(mask: Tensor) -> Tensor:
    """Bool `[..., N]` as int32 words `[..., N / 32]`: bit `j % 32` of word `j // 32` is entry j."""
    place = torch.arange(32, device=mask.device)
    return (mask.unflatten(-1, (-1, 32)).long() << place).sum(-1).int()


def unpack(words: Tensor) -> Tensor:
    """The mask that `pack` packed."""
    place = torch.arange(32, device=words.device)
    return ((words[..., None] >> place) & 1).bool().flatten(-2)


def _shifted(part: Tensor, bounds: int, bits: int) -> Tensor:
    """`part` where so many rows of `bounds` and `bits` come before those that it speaks of."""
    return torch.where(part >= 0, part + bounds, torch.where((part < WHOLE) & (part > EMPTY), part - bits, part))


def joined(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Parts over tables of their own as parts over one `bounds`, which has a row at least, and one `bits`."""
    bounds, bits = torch.cat([b for _, b, _ in found]), torch.cat([b for _, _, b in found])
    parts, before, words = [], 0, 0
    for part, b, w in found:
        parts.append(_shifted(part, before, words))
        before, words = before + len(b), words + len(w)
    part, bounds, bits = once(torch.cat(parts), bounds, bits)
    # No row of bits says to a kernel, without a look at the device, that no block needs them.
    bounds = bounds if len(bounds) else bounds.new_zeros(1, *bounds.shape[1:])
    return list(part.split([len(p) for p in parts])), bounds, bits


def doubled(
    ats: Sequence[Places], parts: Sequence[Tensor], bounds: Tensor, bits: Tensor
) -> tuple[list[Places], list[Tensor], Tensor, Tensor]:
    """Entries at `ats`, `parts` without bits, where few need them and each is two runs a row: listed twice, once a run.

    A kernel compiled for bits pays for them in every block that is cut.
    """
    words = [part < WHOLE for part in parts]
    few = len(bits) and TWICE * sum(int(word.sum()) for word in words) <= sum(map(len, parts))
    runs = _two_runs(unpack(bits)) if few else None
    if runs is None:
        return list(ats), list(parts), bounds, bits
    made_at, made = [], []
    for at, part, word in zip(ats, parts, words, strict=True):
        first = len(bounds) - 2 - part[word]
        made.append(torch.cat((part.masked_scatter(word, first), first + len(bits))))
        made_at.append(tuple(torch.cat((x, x[word])) for x in at))
    part, bounds, bits = once(torch.cat(made), torch.cat((bounds, *runs)), bits[:0])
    return made_at, list(part.split([len(p) for p in made])), bounds, bits


def _two_runs(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bounds `[P, M, 2]` of the first and of the second run of True in every row; None where a row has more."""
    starts = mask & ~F.pad(mask, (1, 0))[..., :-1]
    run = starts.cumsum(-1)
    if bool((run > 2).any()):
        return None
    first, second = (torch.stack(_ends(mask & (run == n)), -1) for n in (1, 2))
    return first, second


def once(part: Tensor, bounds: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with equal rows of `bounds` and of `bits` once."""
    (bounds, span), (bits, word) = distinct(bounds), distinct(bits)
    part = part.clone()
    of_span, of_word = part >= 0, (part < WHOLE) & (part > EMPTY)
    part[of_span] = span[part[of_span]]
    part[of_word] = -2 - word[-2 - part[of_word]]
    return part, bounds, bits


def distinct(table: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of `table [P, ...]`, and which of them each row is `[P]`.

    Rows are told apart by 64-bit sums, which sort faster than rows; were two different rows to share one, all would be
    compared entry by entry.
    """
    if len(table) < 2:
        return table, torch.zeros(len(table), dtype=torch.long, device=table.device)
    words = table.flatten(1).contiguous()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, words.shape[1:], generator=generator).to(table.device) | 1
    inverse, first = classes((words * weights).sum(1))
    if torch.equal(words[first[inverse]], words):
        return table[first], inverse
    return table.unique(dim=0, return_inverse=True)


def classes(code: Tensor) -> tuple[Tensor, Tensor]:
    """Which class of equal entries each entry of `code [E]` is in, and an entry of each class."""
    _, inverse, counts = code.unique(return_inverse=True, return_counts=True)
    first = torch.empty_like(counts)
    first[inverse] = torch.arange(len(code), device=code.device)
    return inverse, first
