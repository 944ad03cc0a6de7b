"""Local blocks and every v-th earlier block, phase by head (S2-Attention)."""

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Where

CARD = Card(
    title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    arxiv="2407.17678",
    sheet=172,
    implements="The causal pattern with absolute phases, homogeneous or one phase a head, and dense heads.",
    exact=False,
    saving="memory",
    departures=(
        "No block-sparse kernel yet: a prefill gathers the blocks that each block of queries sees.",
        "Where KV heads are fewer than the stride, official phases leave blocks that no head sees: refused, or "
        "filled by giving each head several phases.",
        "The bidirectional form is left out.",
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
