"""Local blocks and every v-th earlier block, phase by head (S2-Attention)."""

from dataclasses import dataclass

from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where
from regard.core.rules import Pair, Rule

CARD = Card(
    title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    arxiv="2407.17678",
    sheet=172,
    implements="The causal pattern with absolute phases, homogeneous or one phase a head, and dense heads; the "
    "bidirectional one as a function.",
    exact=False,
    saving="memory",
    departures=(
        "On a GPU its blocks are read by kernels over lists of 128 by 128; blocks of 64 waste part of what is read. "
        "Elsewhere a prefill gathers the blocks that each block of queries sees.",
        "Where KV heads are fewer than the stride, official phases leave blocks that no head sees: refused, or "
        "filled by giving each head several phases.",
        "The bidirectional form counts its stride from the end of the window, and shifts it by head as the causal one "
        "does (inferred); it cannot be attached.",
    ),
    oracles=(
        "stride 1, or a window of all blocks: dense causal attention",
        "heads together see every block exactly when their phases meet every residue",
        "allowed pairs equal a loop over blocks; density equals its count",
        "a block no longer needed is never needed again, and leaves the cache",
        "the cache holds local * block tokens and one of stride others, within a block",
    ),
    aliases=("s2_attention",),
    neutral={"stride": 1},
    example={"block": 2, "local": 2, "stride": 2},
    options={
        "block": Option(default=64, low=1, doc="tokens a block"),
        "local": Option(default=16, low=1, search=(2, 4, 8), doc="last blocks that every head sees, its own included"),
        "stride": Option(default=8, low=1, search=(2, 3, 4), doc="every how many-th earlier block a head sees"),
        "offset": Option(default=0, low=0, doc="shift of all phases, in blocks"),
        "homogeneous": Option(kind="bool", default=False, doc="the same phase for all heads"),
        "dense_heads": Option(default=0, low=0, doc="the last KV heads that see everything"),
        "holes": Option(
            kind="str",
            default="refuse",
            choices=("refuse", "fill", "leave"),
            search=("fill",),
            doc="where fewer phases than the stride leave blocks unseen: refuse, fill with more phases a head, leave",
        ),
    },
)


def allow(
    where: Where, *, block: int, local: int, stride: int, offset: int, homogeneous: bool, dense_heads: int, holes: str
) -> Pattern:
    """Block m sees block n <= m if `m - n < local` or `(n + phase) mod stride == 0`, phase by KV head.

    Raises:
        RegardError: more dense heads than KV heads, or blocks that no head would see.
    """
    if dense_heads > where.kv_heads:
        raise RegardError(f"'s2' has {dense_heads} dense heads, this model has {where.kv_heads} KV heads")
    if stride == 1:
        return Pattern.causal()
    sparse = where.kv_heads - dense_heads
    step = 0 if homogeneous else max(1, stride // where.heads)
    seen = [{(-(head * step + offset)) % stride} for head in range(sparse)]
    if sparse and len(missing := set(range(stride)) - set().union(*seen)) and not homogeneous and not dense_heads:
        if holes == "refuse":
            raise RegardError(
                f"'s2' with stride {stride} on {sparse} KV heads leaves {len(missing)} of {stride} blocks that no head "
                f"sees; take a stride up to {sparse}, or holes='fill' or 'leave'"
            )
        if holes == "fill":
            for turn, residue in enumerate(sorted(missing)):
                seen[turn % sparse].add(residue)
    near = Pattern.window(local, block)
    rules = [near | Pattern.phases(block, stride, residues) for residues in seen]
    return Pattern.stack_heads([*rules, *[Pattern.causal()] * dense_heads])


def bidirectional(
    heads: int,
    *,
    block: int = 64,
    local: tuple[int, int] = (16, 16),
    stride: int = 8,
    offset: int = 0,
    homogeneous: bool = False,
) -> Pattern:
    """Blocks near by on both sides, and every `stride`-th beyond them, counted from the query's own block.

    Args:
        heads: KV heads.
        block: tokens a block.
        local: blocks seen to the left and to the right, the query's own included in both.
        stride: of the blocks beyond, those whose distance past the window is 0 modulo it, less the head's phase.
        offset: shift of all phases, in blocks.
        homogeneous: the same phase for all heads.

    Returns:
        A two-sided Pattern of `heads` heads.

    Raises:
        RegardError: a number below 1, or a negative offset.
    """
    numbers = (("heads", heads, 1), ("block", block, 1), ("local", min(local), 1), ("stride", stride, 1))
    for name, value, low in (*numbers, ("offset", offset, 0)):
        if value < low:
            raise RegardError(f"'s2' needs {name} of at least {low}, got {value}")
    step = 0 if homogeneous else max(1, stride // heads)
    rules = [BothSides(block, local, stride, head * step + offset) for head in range(heads)]
    return Pattern.stack_heads(Pattern((rule,), cut=False) for rule in rules)


@dataclass(frozen=True)
class BothSides(Rule):
    """One head of `bidirectional`."""

    block: int
    local: tuple[int, int]
    stride: int
    phase: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether queries at `q` see keys at `k`, elementwise."""
        return self.cover(q, q, k, k)[0]

    def cover(self, q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> Pair:
        """Whether any, and whether all pairs of positions `q_low..q_high` and `k_low..k_high` are allowed."""
        left, right = self.local
        least, most = k_low // self.block - q_high // self.block, k_high // self.block - q_low // self.block
        near = (least < right) & (most > -left)
        behind = self._hit((1 - left - most).clamp(min=1), 1 - left - least)
        some = near | behind | self._hit((least - right + 1).clamp(min=1), most - right + 1)
        return some, some & ((least == most) | ((least > -left) & (most < right)))

    def _hit(self, first: Tensor, last: Tensor) -> Tensor:
        """Whether any of the distances `first..last` past the window falls on the stride."""
        multiples = (last + self.phase) // self.stride - (first - 1 + self.phase) // self.stride
        return (last >= first) & (multiples > 0)
