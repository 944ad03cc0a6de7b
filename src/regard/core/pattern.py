"""Which keys a query may see: a per-head relation between positions, composed with `&`, `|`, `~`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.reach import FOR_EVER, Reach
from regard.core.rules import (
    CUT,
    UNCUT,
    Every,
    Phased,
    Predicate,
    Rule,
    Sink,
    Window,
    both,
    either,
    outside,
    recut,
    uncut,
    within,
)
from regard.core.tables import Listed, Same, Table, versions

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Pattern", "Reach"]


def _integers(tensor: Tensor, what: str) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise RegardError(f"{what} must be integers, got {tensor.dtype}")
    return tensor.long()


def _per_head(table: Tensor, what: str) -> tuple[tuple[Tensor, ...], int | None]:
    """`table [heads, M, N]` or `[M, N]` as one matrix a head, and the number of heads (None: shared)."""
    if table.dim() not in (2, 3) or 0 in table.shape:
        raise RegardError(f"{what} must be a non-empty [rows, n] or [heads, rows, n], got {list(table.shape)}")
    return (table.unbind(0), table.shape[0]) if table.dim() == 3 else ((table,), None)


@dataclass(frozen=True, repr=False)
class Pattern:
    """A relation query position -> key position. Build it with the constructors below.

    It is cut at `0 <= p_k <= p_q` unless it was built two-sided (`full`, `prefix`, or `causal=False`). `a & b` is cut
    if either is, `a | b` and a stack of heads if all are, and `~a` as `a` is.

    Args:
        rules: one rule a KV head, or a single one for all heads.
        heads: number of KV heads, None where all heads share the rule.
        cut: False for a two-sided pattern: its rules then say all, and only negative positions are out.

    Equal patterns allow the same; the reverse holds only as far as the structure shows it (tensors are
    compared by identity), which is enough to group heads.
    """

    rules: tuple[Rule, ...]
    heads: int | None = None
    cut: bool = True

    @staticmethod
    def causal() -> "Pattern":
        """`p_k <= p_q`."""
        return Pattern((CUT,))

    @staticmethod
    def full() -> "Pattern":
        """Every pair; two-sided."""
        return Pattern((UNCUT,), cut=False)

    @staticmethod
    def window(n: int, block: int = 1) -> "Pattern":
        """The last `n` positions, the query's own included: `p_q - p_k < n`.

        Args:
            n: how many.
            block: count in blocks of so many positions: `p_q // block - p_k // block < n`.

        Raises:
            RegardError: `n < 1` or `block < 1`.
        """
        if int(n) != n or n < 1:
            raise RegardError(f"a window needs at least 1 position (the query's own), got {n}")
        if int(block) != block or block < 1:
            raise RegardError(f"a window of blocks needs blocks of at least 1 position, got {block}")
        return Pattern((Window(int(n), int(block)),))

    @staticmethod
    def sink(n: int) -> "Pattern":
        """The first `n` positions: `p_k < n`.

        Raises:
            RegardError: `n < 0`.
        """
        if int(n) != n or n < 0:
            raise RegardError(f"a sink needs 0 positions or more, got {n}")
        return Pattern((Sink(int(n)),))

    @staticmethod
    def prefix(n: int) -> "Pattern":
        """The first `n` positions see each other both ways, later ones causally; two-sided.

        Raises:
            RegardError: `n < 0`.
        """
        (sink,) = Pattern.sink(n).rules
        return Pattern((either(CUT, sink, UNCUT),), cut=False) if n else Pattern.causal()

    @staticmethod
    def dilated(n: int, stride: int) -> "Pattern":
        """Every `stride`-th of the last `n * stride` positions, `n` in all and the query's own first.

        Raises:
            RegardError: `n < 1` or `stride < 1`.
        """
        if int(stride) != stride or stride < 1:
            raise RegardError(f"a dilated window needs a stride of at least 1, got {stride}")
        window = Pattern.window(n * int(stride))
        return window if stride == 1 else window & Pattern((Every(int(stride)),))

    @staticmethod
    def document(ids: Tensor, causal: bool = True) -> "Pattern":
        """Positions of one document see each other: `ids[p_q] == ids[p_k]`; nothing beyond `ids`.

        Args:
            ids: integer `[T]`, the document of every position.
            causal: False: two-sided.

        Raises:
            RegardError: `ids` is not of integers or of another shape.
        """
        if ids.dim() != 1 or not len(ids):
            raise RegardError(f"documents must be a non-empty [T], got {list(ids.shape)}")
        return Pattern((Same(_integers(ids, "documents")),), cut=causal)

    @staticmethod
    def phases(block: int, stride: int, residues: Iterable[int]) -> "Pattern":
        """Every `stride`-th block of `block` positions: those whose number is one of `residues` modulo `stride`.

        Raises:
            RegardError: `block` or `stride` below 1, or a residue outside `0..stride-1`.
        """
        chosen = tuple(sorted(set(residues)))
        if block < 1 or stride < 1 or any(not 0 <= residue < stride for residue in chosen):
            raise RegardError(
                f"phases need block >= 1, stride >= 1 and residues below stride, got {block}, {stride}, {chosen}"
            )
        return Pattern((Phased(block, stride, chosen),))

    @staticmethod
    def predicate(
        fn: Callable[[Tensor, Tensor, Tensor], Tensor],
        heads: int | None = None,
        reach: Reach | Sequence[Reach] | None = None,
        causal: bool = True,
        cover: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> "Pattern":
        """`fn(q_pos, k_pos, head) -> bool`, elementwise over broadcastable integer tensors.

        Args:
            fn: must work on scalar tensors too, where `to_block_mask` is to work. It must go on giving the same
                answers: block lists are kept, and made anew only where a tensor that `fn` closes over was written to.
            heads: number of KV heads where `fn` uses `head` (a 0-d tensor); None: it is told head 0.
            reach: the author's promise, one for all heads or one a head; None: for ever.
            causal: False: two-sided.
            cover: the author's promise about ranges of positions (>= 0, ends included, broadcastable), for all heads:
                `cover(q_low, q_high, k_low, k_high) -> (some, all)` says whether any pair may be allowed and whether
                all are. Block lists are then made without asking `fn` about blocks that it settles.

        Raises:
            RegardError: fewer than 1 head, a number of reaches other than `heads`, or a reach of a two-sided pattern.
        """
        if heads is not None and heads < 1:
            raise RegardError(f"a predicate needs at least 1 head, got {heads}")
        if reach is not None and not causal:
            raise RegardError("a reach says what later queries need of the past; a two-sided predicate has none")
        count = heads or 1
        reaches = [reach or FOR_EVER] * count if reach is None or isinstance(reach, Reach) else list(reach)
        if len(reaches) != count:
            raise RegardError(f"{len(reaches)} reaches for a predicate of {count} heads")
        return Pattern(tuple(Predicate(fn, h, r, cover) for h, r in enumerate(reaches)), heads, causal)

    @staticmethod
    def blocks(table: Tensor, size: int, causal: bool = True) -> "Pattern":
        """`table[p_q // size, p_k // size]`, `table` bool `[Mb, Nb]` or `[heads, Mb, Nb]`; nothing outside it.

        `causal` False: two-sided.

        Raises:
            RegardError: `table` is not bool or of another shape, or `size < 1`.
        """
        if size < 1:
            raise RegardError(f"a block needs at least 1 position, got size {size}")
        if table.dtype != torch.bool:
            raise RegardError(f"a block or dense table must be bool, got {table.dtype}")
        tables, heads = _per_head(table, "a block or dense table")
        return Pattern(tuple(Table(t, size) for t in tables), heads, causal)

    @staticmethod
    def indices(index: Tensor, causal: bool = True) -> "Pattern":
        """Query position `i` sees the key positions in `index[i]`; -1 is unused, rows beyond `index` are empty.

        Args:
            index: integer `[Tq, n]` or `[heads, Tq, n]`, in any order.
            causal: False: two-sided.

        Raises:
            RegardError: `index` is not of integers or of another shape.
        """
        tables, heads = _per_head(_integers(index, "key positions"), "an index")
        return Pattern(tuple(Listed(t.sort(dim=-1).values) for t in tables), heads, causal)

    @staticmethod
    def dense(mask: Tensor, causal: bool = True) -> "Pattern":
        """`mask[p_q, p_k]`, bool `[Tq, Tk]` or `[heads, Tq, Tk]`; nothing outside it.

        `causal` False: two-sided.

        Raises:
            RegardError: `mask` is not bool or of another shape.
        """
        return Pattern.blocks(mask, 1, causal)

    @staticmethod
    def stack_heads(patterns: Iterable["Pattern"]) -> "Pattern":
        """One pattern a KV head, in order; query head `h` uses entry `h // (H // Hk)`.

        Raises:
            RegardError: no pattern, or one that already has several heads.
        """
        stacked = list(patterns)
        for i, pattern in enumerate(stacked):
            if len(pattern.rules) != 1:
                raise RegardError(f"entry {i} of stack_heads has {pattern.heads} heads of its own; pass one a head")
        if not stacked:
            raise RegardError("stack_heads needs at least one pattern")
        cut = all(pattern.cut for pattern in stacked)
        return Pattern._of(tuple(p._rules(cut)[0] for p in stacked), len(stacked), cut)

    @staticmethod
    def _of(rules: tuple[Rule, ...], heads: int | None, cut: bool) -> "Pattern":
        """Cut where every rule shows that it lies inside the causal cut, so that equal relations compare equal."""
        if not cut and all(map(within, rules)):
            rules, cut = tuple(map(recut, rules)), True
        return Pattern(rules, heads, cut)

    def _rules(self, cut: bool) -> tuple[Rule, ...]:
        """The rules as a pattern that is `cut` or is not has them."""
        if self.cut == cut:
            return self.rules
        return tuple(map(recut if cut else uncut, self.rules))

    def __and__(self, other: "Pattern") -> "Pattern":
        return self._zip(other, both, self.cut or other.cut)

    def __or__(self, other: "Pattern") -> "Pattern":
        return self._zip(other, either, self.cut and other.cut)

    def __invert__(self) -> "Pattern":
        """The complement, inside the causal cut where there is one."""
        top = CUT if self.cut else UNCUT
        return Pattern._of(tuple(outside(rule, top) for rule in self.rules), self.heads, self.cut)

    def _zip(self, other: "Pattern", join: Callable[[Rule, Rule, Rule], Rule], cut: bool) -> "Pattern":
        if self.heads is not None and other.heads is not None and self.heads != other.heads:
            raise RegardError(f"patterns of {self.heads} and {other.heads} heads do not combine")
        heads = self.heads if self.heads is not None else other.heads
        top = CUT if cut else UNCUT
        mine, theirs = (p._rules(cut) * ((heads or 1) if p.heads is None else 1) for p in (self, other))
        rules = tuple(join(a, b, top) for a, b in zip(mine, theirs, strict=True))
        return Pattern._of(rules, heads, cut)

    def __repr__(self) -> str:
        if not self.cut:
            told = repr(Pattern(self.rules, self.heads))
            return told if self.is_full else f"{told} (two-sided)"
        if len(self.rules) == 1:
            return repr(self.rules[0])
        parts, start = [], 0
        for h in range(1, len(self.rules) + 1):
            if h == len(self.rules) or self.rules[h] != self.rules[start]:
                label = f"head {start}" if h == start + 1 else f"heads {start}-{h - 1}"
                parts.append(f"{label}: {self.rules[start]!r}")
                start = h
        return "; ".join(parts)

    @property
    def is_causal(self) -> bool:
        """True iff it allows exactly `p_k <= p_q`, as far as the structure shows it (no tensor is read)."""
        return self.cut and all(rule == CUT for rule in self.rules)

    @property
    def is_full(self) -> bool:
        """True iff it allows every pair, as far as the structure shows it (no tensor is read)."""
        return not self.cut and all(rule == UNCUT for rule in self.rules)

    def head(self, h: int) -> "Pattern":
        """The pattern of KV head `h`, with `heads` None.

        Raises:
            RegardError: there is no such head.
        """
        if self.heads is None:
            return self
        if not 0 <= h < self.heads:
            raise RegardError(f"head {h} of a pattern of {self.heads} heads")
        return Pattern._of((self.rules[h],), None, self.cut)

    def select_heads(self, index: Sequence[int] | Tensor) -> "Pattern":
        """The pattern of the KV heads in `index`, in that order; itself where all heads share one rule."""
        if self.heads is None:
            return self
        return Pattern.stack_heads(self.head(int(h)) for h in index)

    def reach(self) -> tuple[Reach, ...]:
        """One a KV head, one in all where `heads` is None: which keys later queries may still need.

        Sound, not always tight: tables, indices and predicates without a promise are needed for ever.

        Raises:
            RegardError: the pattern is two-sided.
        """
        if not self.cut:
            raise RegardError(
                f"pattern {self!r} lets queries see later positions, so it does not say what they still need; caches "
                "and recipes take patterns cut at p_k <= p_q: build it with causal=True, or use it & Pattern.causal()"
            )
        return tuple(rule.reach for rule in self.rules)

    def relations(self) -> tuple[Rule, ...]:
        """One rule a KV head that says all, the causal cut too; one in all where `heads` is None."""
        return self._rules(cut=False)

    def versions(self) -> tuple[int | None, ...]:
        """What changes when a tensor that the pattern reads is written to; None where torch does not say."""
        return tuple(version for rule in self.rules for version in versions(rule))

    def allow(self, q_pos: Tensor, k_pos: Tensor, heads: int | None = None) -> Tensor:
        """Who sees whom: bool `[1|B, 1|heads, Tq, Tk]`; 1 head where neither the pattern nor `k_pos` has several.

        Args:
            q_pos: integer `[1|B, Tq]`.
            k_pos: integer `[1|B, Tk]`, or `[1|B, Hk, Tk]` where heads hold different keys.
            heads: heads wanted, a multiple of the pattern's (each is repeated for its group); None: as many.

        Negative positions are neither seen nor see.

        Raises:
            RegardError: the head counts disagree, or a position tensor has another shape.
        """
        if q_pos.dim() != 2 or k_pos.dim() not in (2, 3):
            raise RegardError(f"positions must be [B, Tq] and [B, Tk], got {list(q_pos.shape)}, {list(k_pos.shape)}")
        held = k_pos.shape[1] if k_pos.dim() == 3 else 1
        if held > 1 and len(self.rules) > 1 and held != self.heads:
            raise RegardError(f"a pattern of {self.heads} heads over keys of {held} heads")
        count = max(held, len(self.rules))
        if heads is not None and heads % count:
            raise RegardError(f"{count} heads of the pattern or its keys do not divide {heads} heads")
        q = q_pos[:, None, :, None]
        k = (k_pos if k_pos.dim() == 3 else k_pos[:, None])[:, :, None, :]
        mask = self._seen(q, k)
        if count == 1 or heads is None or heads == count:
            return mask
        return mask.repeat_interleave(heads // count, dim=1)

    def _seen(self, q: Tensor, k: Tensor) -> Tensor:
        """`allow` for `q [b, 1, Tq, 1]` and `k [b, 1|Hk, 1, Tk]`; each distinct rule is evaluated once."""
        cut = (k <= q) & (k >= 0) if self.cut else (q >= 0) & (k >= 0)
        first = self.rules[0]
        if all(rule == first for rule in self.rules):
            mask = cut if first == (CUT if self.cut else UNCUT) else cut & first(q, k)
            return mask.expand(-1, max(len(self.rules), mask.shape[1]), -1, -1)
        batch, _, rows, columns = cut.shape
        mask = cut.new_empty(batch, len(self.rules), rows, columns)
        shared = k.shape[1] == 1
        done: dict[Rule, int] = {}
        for h, rule in enumerate(self.rules):
            if shared and rule in done:
                mask[:, h] = mask[:, done[rule]]
                continue
            done[rule] = h
            one = slice(None) if shared else slice(h, h + 1)
            mask[:, h : h + 1] = cut[:, one] & rule(q, k[:, one])
        return mask

    def density(self, T: int, heads: int = 1) -> float:
        """Fraction of the `T (T + 1) / 2` causal pairs of `T` positions that are allowed, mean over heads.

        Of a two-sided pattern: of all `T * T` pairs. Evaluated in blocks of queries: no `T x T` mask is built.
        """
        if heads > 1 and heads % len(self.rules):
            raise RegardError(f"a pattern of {self.heads} heads does not divide {heads} heads")
        k, allowed = torch.arange(T)[None], 0
        for start in range(0, T, 256):
            seen = k[:, : start + 256] if self.cut else k
            allowed += int(self.allow(torch.arange(start, min(start + 256, T))[None], seen).sum())
        return allowed / (len(self.rules) * (T * (T + 1) / 2 if self.cut else T * T))

    def to_dense(self, Tq: int, Tk: int | None = None, heads: int | None = None) -> Tensor:
        """Bool `[heads, Tq, Tk]` (1 head where shared and `heads` is None) for positions `0..Tk-1`.

        The queries are the last `Tq` of `Tk` positions; `Tk` None is `Tq`.
        """
        Tk = Tq if Tk is None else Tk
        mask = self.allow(torch.arange(Tk - Tq, Tk)[None], torch.arange(Tk)[None], heads)[0]
        return mask.expand(heads or mask.shape[0], -1, -1)

    def to_block_mask(
        self,
        Tq: int,
        Tk: int | None = None,
        heads: int | None = None,
        *,
        device: torch.device | str = "cpu",
        block_size: int = 128,
    ) -> "BlockMask":
        """FlexAttention's `BlockMask` for the last `Tq` of `Tk` positions, the same for all batch rows.

        `heads` are query heads, a multiple of the pattern's; None: the pattern's own.

        Raises:
            RegardError: the head counts disagree.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        Tk = Tq if Tk is None else Tk
        count = heads or len(self.rules)
        if count % len(self.rules):
            raise RegardError(f"a pattern of {self.heads} heads does not divide {heads} heads")
        group, offset, rules = count // len(self.rules), Tk - Tq, self.relations()

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            q = q_idx + offset
            seen = rules[-1](q, kv_idx)
            for i in range(len(rules) - 2, -1, -1):
                seen = torch.where(h // group == i, rules[i](q, kv_idx), seen)
            return seen & (q >= 0)

        flex_heads = None if len(rules) == 1 else count
        return create_block_mask(mask_mod, None, flex_heads, Tq, Tk, device=str(device), BLOCK_SIZE=block_size)
