"""What a fixed step reads: buffers with room to spare, of which a number on the device says how much is held."""

from dataclasses import dataclass

from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Codec, Decode, Fields
from regard.primitives import codes


@dataclass(frozen=True, eq=False)
class Fixed:
    """The View of a fixed step (`Step.at`): fields `[B, Hk, S, *]`, whatever of them is held.

    Args:
        decode: called as `regard.ops.decode.decode`.
        lengths: `[B]` slots that are held, the first ones; None: all, as far as `positions` says.
        positions: of the slots, `[1|B, S]`, negative: not a key; None: consecutive, ending with the query.
    """

    decode: Decode
    key_fields: Fields
    value_fields: Fields
    key_codec: Codec | None
    value_codec: Codec | None
    lengths: Tensor | None
    positions: Tensor | None

    @property
    def size(self) -> int:
        """Slots that it shows, held or not."""
        return self.key_fields[0].shape[2]

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
        """Attention of `q [B, H, 1, D]`: `(out [B, H, 1, Dv], lse [B, H, 1])`.

        Raises:
            RegardError: `index` or `bias` is given, or the pattern is no window with a sink.
        """
        band = codes.span(pattern)
        if index is not None or bias is not None or band is None:
            raise self._refused(f"pattern {pattern!r}" if band is None else "a list of keys or a bias")
        where = {"lengths": self.lengths, "positions": self.positions}
        key, value = self.key_codec, self.value_codec
        if softcap is None and (key or value):
            call = {"key": key, "value": value, "pattern": pattern, "step": step, "scale": scale}
            read = codes.read(q, self.key_fields, self.value_fields, **call, **where)
            if read is not None:
                return read
        out, lse = self.decode(
            q if key is None else key.query(q),
            self.key_fields[0] if key is None else key.decode(self.key_fields, q.dtype),
            self.value_fields[0] if value is None else value.decode(self.value_fields, q.dtype),
            q_positions=None if self.positions is None else step.queries(q.device),
            sink=band[0],
            recent=band[1],
            scale=scale,
            softcap=softcap,
            check=False,
            **where,
        )
        return out if value is None else value.output(out), lse

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
        """Refused.

        Raises:
            RegardError: always.
        """
        raise self._refused("lists of keys")

    def keys(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: how many there are is not known here.

        Raises:
            RegardError: always.
        """
        raise self._refused("the keys themselves")

    def _refused(self, what: str) -> RegardError:
        return RegardError(f"a fixed step reads windows with sinks over all that is held; it was asked for {what}")
