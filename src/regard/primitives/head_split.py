"""The head-split store: KV heads in groups, each group in a store of its own."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Decoding, Part, Store, View
from regard.primitives.buffer import Fixed


class HeadSplit:
    """Shows several stores as one layer.

    Args:
        groups: `(KV heads, store)` pairs; together they name every KV head once.

    Raises:
        RegardError: a head is missing or named twice.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[int], Store]]):
        self.heads = [tuple(heads) for heads, _ in groups]
        self.children = [store for _, store in groups]
        named = [head for heads in self.heads for head in heads]
        if not named or sorted(named) != list(range(len(named))):
            raise RegardError(f"head groups must name each of the {len(named)} KV heads once, got {self.heads}")
        self.state: dict[str, Tensor] = {}
        self._parts: tuple[Pattern, list[Pattern]] | None = None

    @property
    def length(self) -> int:
        """Arrivals of the request so far."""
        return self.children[0].length

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        return min(child.removable for child in self.children)

    def append(self, k: Tensor, v: Tensor, step: Step) -> "SplitView":
        """Write `k [B, Hk, T, D]`, `v [B, Hk, T, Dv]`, every group to its store.

        Raises:
            RegardError: `Hk` is not the number of heads in the groups.
        """
        count = sum(map(len, self.heads))
        if k.shape[1] != count:
            raise RegardError(f"{k.shape[1]} KV heads were written to a store split over {count}")
        views = [
            child.append(take(k, heads), take(v, heads), step)
            for heads, child in zip(self.heads, self.children, strict=True)
        ]
        return SplitView(self.heads, views, self.parts)

    def parts(self, pattern: Pattern) -> list[Pattern]:
        """`pattern` of each group's heads; remembered, since a layer asks with one pattern at every token."""
        if self._parts is None or self._parts[0] is not pattern:
            self._parts = pattern, [pattern.select_heads(heads) for heads in self.heads]
        return self._parts[1]

    def unfixed(self, step: Step) -> str | None:
        """Why `step` cannot be a fixed step, or None."""
        return next((why for child in self.children if (why := child.unfixed(step))), None)

    def fix(self, spare: int) -> int | None:
        """Lay out what is held for fixed steps: see `Store.fix`."""
        found = [child.fix(spare) for child in self.children]
        return min((room for room in found if room is not None), default=None)

    def put(self, k: Tensor, v: Tensor, step: Step, by: Decoding, heads: Tensor | None = None) -> "SplitFixed":
        """`append` of a fixed step, every group to its store. Heads are picked by the kernels themselves.

        Raises:
            RegardError: `Hk` is not the number of heads in the groups, or `heads` are picked of them.
        """
        if k.shape[1] != (count := sum(map(len, self.heads))) or heads is not None:
            raise RegardError(f"{k.shape[1]} KV heads were written to a store split over {count}")
        groups = [(child, _index(heads, k.device)) for heads, child in zip(self.heads, self.children, strict=True)]
        views = [child.put(k, v, step, by, own) for child, own in groups]
        return SplitFixed(self.heads, views, self.parts, v.shape[3])

    def passed(self) -> None:
        """A fixed step went by."""
        for child in self.children:
            child.passed()

    def versions(self) -> Iterator[int]:
        """Change with everything but fixed steps."""
        for child in self.children:
            yield from child.versions()

    def advance(self, step: Step) -> None:
        """The forward `step` went by and this layer ran none of its rows."""
        for child in self.children:
            child.advance(step)

    def record(self) -> None:
        """Keep from now on, until the next `crop`, all that a `crop` may bring back."""
        for child in self.children:
            child.record()

    def crop(self, length: int) -> None:
        """Forget arrivals from `length` on, in all groups or, if one cannot, in none.

        Raises:
            RegardError: what is needed before `length` was already evicted.
        """
        # The group that can give back least refuses first, before any other is cropped.
        for child in sorted(self.children, key=lambda child: child.removable):
            child.crop(length)

    def reorder(self, rows: Tensor) -> None:
        """Row `i` becomes the old row `rows[i]`; the number of rows may change."""
        for child in self.children:
            child.reorder(rows)
        self.state = {name: x.index_select(0, rows.to(x.device)) for name, x in self.state.items()}

    def reset(self) -> None:
        """Forget everything and release the memory."""
        for child in self.children:
            child.reset()
        self.state.clear()

    def storages(self) -> Iterator[Tensor]:
        """Every tensor that keeps memory alive."""
        for child in self.children:
            yield from child.storages()
        yield from self.state.values()

    def raw(self) -> Iterator[Tensor]:
        """Those of `storages` that hold keys or values as they come."""
        for child in self.children:
            yield from child.raw()

    @property
    def capacity(self) -> dict[str, int]:
        """Allocated token slots summed over heads, per kind of store."""
        total: Counter[str] = Counter()
        for child in self.children:
            total.update(child.capacity)
        return dict(total)


class SplitView:
    """The View of a HeadSplit: each group's queries go to its own view."""

    def __init__(
        self, heads: Sequence[tuple[int, ...]], views: Sequence[View], parts: Callable[[Pattern], list[Pattern]]
    ):
        self.heads, self.views, self.parts = heads, views, parts

    @property
    def size(self) -> int:
        """Keys that it shows: as many as the fullest group."""
        return max(view.size for view in self.views)

    def keys(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """`q` and the keys `[B, Hk, S, D]` in one basis a head, positions `[1|B, Hk, S]`.

        Heads that hold fewer keys than others have zeros at the end, at position -1.
        """
        shown = [view.keys(mine, step) for mine, view in zip(self._queries(q), self.views, strict=True)]
        size = max(key.shape[2] for _, key, _ in shown)
        batch = max(len(positions) for *_, positions in shown)
        keys, places = [], []
        for heads, (_, key, positions) in zip(self.heads, shown, strict=True):
            lack = size - key.shape[2]
            keys.append(pad(key, (0, 0, 0, lack)))
            places.append(pad(positions, (0, lack), value=-1)[:, None].expand(batch, len(heads), -1))
        order = [head for heads in self.heads for head in heads]
        back = sorted(range(len(order)), key=order.__getitem__)
        query = self._restored([query for query, *_ in shown])
        return query, take(torch.cat(keys, 1), back), take(torch.cat(places, 1), back)

    def _mine(self, group: int) -> list[tuple[int, ...]]:
        """The query heads of each group of KV heads, `group` for every KV head."""
        return [tuple(head * group + i for head in heads for i in range(group)) for heads in self.heads]

    def _queries(self, q: Tensor) -> list[Tensor]:
        """Each group's heads of `q [B, H, T, D]`."""
        return [take(q, mine) for mine in self._mine(q.shape[1] // sum(map(len, self.heads)))]

    def _restored(self, parts: Sequence[Tensor]) -> Tensor:
        """What groups made for their query heads, `[B, *, ...]` each, in the order of heads."""
        x = torch.cat(list(parts), dim=1)
        order = [head for mine in self._mine(x.shape[1] // sum(map(len, self.heads))) for head in mine]
        return take(x, sorted(range(len(order)), key=order.__getitem__))

    def attend_blocks(
        self,
        q: Tensor,
        index: Tensor,
        *,
        own: slice | None,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Refused: groups of heads hold different keys.

        Raises:
            RegardError: always.
        """
        raise self._no_list()

    def _no_list(self) -> RegardError:
        return RegardError(f"heads hold different keys, in groups {self.heads}; there is no one list of them")

    def attend(
        self,
        q: Tensor,
        *,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
        index: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of `q [B, H, T, D]`, `Hk` dividing `H`: `(out [B, H, T, Dv], lse [B, H, T])`.

        Raises:
            RegardError: `index` is given, which speaks of one list of keys.
        """
        if index is not None:
            raise self._no_list()
        outs, lses = [], []
        mine = self._mine(q.shape[1] // sum(map(len, self.heads)))
        for heads, view, part in zip(mine, self.views, self.parts(pattern), strict=True):
            own = None
            if bias is not None:
                own = bias if bias.shape[1] == 1 else take(bias, heads)
                own = own[..., : view.size]
            call = {"pattern": part, "step": step, "scale": scale, "softcap": softcap, "bias": own}
            out, lse = view.attend(take(q, heads), **call)
            outs.append(out)
            lses.append(lse)
        return self._restored(outs), self._restored(lses)


class SplitFixed(SplitView):
    """The View of a HeadSplit in a fixed step: each group's view answers in its places of one output.

    Args:
        width: of a value, `Dv`.
    """

    def __init__(
        self,
        heads: Sequence[tuple[int, ...]],
        views: Sequence[View],
        parts: Callable[[Pattern], list[Pattern]],
        width: int,
    ):
        super().__init__(heads, views, parts)
        self.width = width

    def attend(self, q: Tensor, *, pattern: Pattern, **call: Any) -> tuple[Tensor, Tensor]:
        """Attention of `q [B, H, 1, D]`: `(out [B, H, 1, Dv], lse [B, H, 1])`; see `Fixed.attend`."""
        group = q.shape[1] // sum(map(len, self.heads))
        out, lse = (
            q.new_empty(*q.shape[:3], self.width),
            q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
        )
        for heads, view, part in zip(self.heads, self.views, self.parts(pattern), strict=True):
            assert isinstance(view, Fixed)
            view.attend(q, pattern=part, part_of=Part(_index(heads, q.device), group, out, lse), **call)
        return out, lse


def take(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads `heads` of `x [B, H, ...]`, in that order; a view where they are consecutive."""
    first = heads[0]
    if list(heads) == list(range(first, first + len(heads))):
        return x if len(heads) == x.shape[1] else x[:, first : first + len(heads)]
    return x.index_select(1, _index(tuple(heads), x.device))


@functools.cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """`heads` on the device, kept for good: to send them there would wait for it, and graphs read them there."""
    # One made in inference mode could not be saved for a gradient later.
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)
