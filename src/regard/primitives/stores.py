"""Which store a layer gets, from what its heads may see and how they are written."""

from collections.abc import Sequence

from regard.core.errors import RegardError
from regard.core.pattern import Pattern, Reach
from regard.core.store import Codec, Store
from regard.primitives.buffer import Attend
from regard.primitives.full import Full
from regard.primitives.head_split import HeadSplit
from regard.primitives.ragged import Ragged
from regard.primitives.ring import Ring


def build(
    pattern: Pattern,
    key_codec: Sequence[Codec | None],
    value_codec: Sequence[Codec | None],
    kv_heads: int,
    attend: Attend,
    *,
    ragged: bool = False,
) -> Store:
    """A store for `kv_heads` heads: a Ring where the reach is bounded, a Ragged where it has holes, a Full otherwise.

    Heads with equal `(reach, key codec, value codec)` share a store; one group needs no HeadSplit.

    Args:
        pattern: what the heads may see; shared by all, or one entry a KV head.
        key_codec: one entry a KV head, None where keys are stored as they come.
        value_codec: the same for values.
        kv_heads: heads of the layer.
        attend: attention, called as `regard.attend`.
        ragged: rows may pass the layer by; then a Ragged in either case.

    Raises:
        RegardError: the pattern is two-sided, or the number of heads of it or of the codecs is not `kv_heads`.
    """
    if pattern.heads not in (None, kv_heads) or len(key_codec) != kv_heads or len(value_codec) != kv_heads:
        raise RegardError(
            f"{kv_heads} KV heads, but the pattern has {pattern.heads}, "
            f"the codecs {len(key_codec)} (keys) and {len(value_codec)} (values)"
        )
    reach = pattern.reach() * (kv_heads if pattern.heads is None else 1)
    groups: dict[tuple[Reach, Codec | None, Codec | None], list[int]] = {}
    for head, key in enumerate(zip(reach, key_codec, value_codec, strict=True)):
        groups.setdefault(key, []).append(head)
    children = [(heads, _child(*key, attend, ragged)) for key, heads in groups.items()]
    return children[0][1] if len(children) == 1 else HeadSplit(children)


def _child(reach: Reach, key: Codec | None, value: Codec | None, attend: Attend, ragged: bool) -> Store:
    if ragged or reach.phases:
        return Ragged(attend, reach, key, value)
    if reach.recent is None:
        return Full(attend, key, value)
    return Ring(attend, reach.sink, reach.recent, key, value)
