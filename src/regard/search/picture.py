"""What each KV head of each layer holds under some placements: the table behind the report's picture."""

from collections.abc import Sequence
from typing import Any

from regard.core.placement import Placement


def holdings(model: Any, placements: Sequence[Placement]) -> list[list[dict[str, Any]]]:
    """`[L][Hk]` entries `{"sink", "recent", "key", "value"}`; `recent` None: everything is kept.

    `key` and `value` name the codec; None where numbers are stored as they come.
    """
    from regard.adapters.bind import bind
    from regard.adapters.families import open_decoder

    decoder = open_decoder(model)
    table = []
    for slots in bind(placements, decoder).slots:
        row = []
        for head in range(decoder.kv_heads):
            if slots is None:
                row.append({"sink": 0, "recent": None, "share": 0, "key": None, "value": None})
                continue
            reach = slots.pattern.reach()
            sink, recent, phases = reach[head if len(reach) > 1 else 0]
            key, value = slots.key_codec[head], slots.value_codec[head]
            row.append(
                {
                    "sink": sink,
                    "recent": recent,
                    "share": sum(len(residues) / stride for _, stride, residues in phases),
                    "key": key.name if key else None,
                    "value": value.name if value else None,
                }
            )
        table.append(row)
    return table
