"""What one layer of an attached model does differently: the bound mechanisms, in running order."""

from dataclasses import dataclass

from regard.core.pattern import Pattern
from regard.core.store import Codec


@dataclass(frozen=True)
class Slots:
    """The mechanisms bound to one layer.

    Sites open as mechanisms need them; each is one field here, neutral by default.

    Args:
        pattern: what each KV head may see, the model's own rule included (`masks`, `cache.keep`).
        key_codec, value_codec: one entry a KV head, None where stored as they come (`cache.encode`).
    """

    pattern: Pattern
    key_codec: tuple[Codec | None, ...]
    value_codec: tuple[Codec | None, ...]

    def __str__(self) -> str:
        """What runs, for `explain`: the pattern, then codecs, heads together where they agree."""
        parts = [] if self.pattern.is_causal else [str(self.pattern)]
        for name, codecs in (("keys", self.key_codec), ("values", self.value_codec)):
            told = ["as they come" if codec is None else codec.name for codec in codecs]
            if any(codecs):
                parts.append(f"{name} {told[0]}" if len(set(told)) == 1 else f"{name} {', '.join(told)}")
        return "; ".join(parts)
