"""The latent store: one latent and one rotary key a token, shared by all heads ([087], [125])."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.step import Step
from regard.core.store import Codec, Fields
from regard.primitives.buffer import Attend, Container, Shown
from regard.primitives.full import Full


@dataclass(frozen=True, eq=False)
class LatentShown(Shown):
    """The View of a latent store: one key head of `r + e` numbers whose first `r` are the value.

    `attend` takes absorbed queries `[B, H, T, r + e]` and gives sums of latents `[B, H, T, r]`. With projections at
    hand, `ops.latent.read` does both and takes the cheaper way.
    """

    @property
    def latent(self) -> Tensor:
        """All that is held, `[B, S, r + e]`."""
        return self.key_fields[0][:, 0]

    @property
    def rank(self) -> int:
        """Numbers of a latent, r."""
        return self.value_fields[0].shape[-1]

    def places(self, step: Step, device: torch.device) -> Tensor:
        """Positions `[1|B, S]` of what is held."""
        return self._places(step, device)


class Latent(Full):
    """Keeps `(r + e)` numbers a token, once for all heads.

    Args:
        attend: attention, called as `regard.attend`; given here because primitives lie below `ops`.
        key_codec, value_codec: None; there is one tensor, which is key and value at once.

    Raises:
        RegardError: a codec was given.
    """

    kind = "latent"

    def __init__(self, attend: Attend, key_codec: Codec | None = None, value_codec: Codec | None = None):
        for codec in (key_codec, value_codec):
            if codec is not None:
                raise RegardError(
                    f"a latent store takes no codec, got {codec.name!r}: latents are read by absorbed queries as they "
                    "are, and a latent is already the compressed form of all heads"
                )
        super().__init__(attend)
        self.rank = 0

    def unfixed(self, step: Step) -> str | None:
        """Why `step` cannot be a fixed step."""
        return Container.unfixed(self, step)

    def append(self, k: Tensor, v: Tensor, step: Step) -> LatentShown:
        """Write latents `k [B, 1, T, r]` and rotary keys `v [B, 1, T, e]`; the View shows all arrivals.

        Gradients flow through those of this forward; what was written earlier is detached.

        Raises:
            RegardError: more than one head, a rank, rotary size or dtype other than those held, or a gap in arrivals.
        """
        shown = super().append(k, v, step)
        assert isinstance(shown, LatentShown)
        return shown

    def write(self, k: Tensor, v: Tensor, step: Step) -> Fields:
        """The one field of `k [B, 1, T, r]`, `v [B, 1, T, e]`, not yet stored."""
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] != 1:
            raise RegardError(
                "a latent store takes latents [B, 1, T, r] and rotary keys [B, 1, T, e], one for all heads; "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        if k.dtype != v.dtype:
            raise RegardError(f"latents are {k.dtype}, their rotary keys {v.dtype}")
        for held in self.buffer.fields:
            if (self.rank, held.shape[3]) != (k.shape[3], k.shape[3] + v.shape[3]):
                raise RegardError(
                    f"r + e = {k.shape[3]} + {v.shape[3]} were written to a latent store of {self.rank} + "
                    f"{held.shape[3] - self.rank}"
                )
            if held.dtype != k.dtype:
                raise RegardError(f"{k.dtype} was written to a latent store of {held.dtype}")
        fields = super().write(torch.cat((k, v), -1), k[..., :0], step)
        self.rank = k.shape[3]
        return fields[:1]

    def shown(self, fields: Fields, k: Tensor, v: Tensor, positions: Tensor | None) -> LatentShown:
        """The View of the one field, whose last tokens are `k`, `v`."""
        held = fields[0]
        live = held[:, :, held.shape[2] - k.shape[2] :]
        values = held[..., : self.rank]
        return LatentShown(self.run, fields, (values,), None, None, (live, live[..., : self.rank]), positions)

    def raw(self) -> Iterator[Tensor]:
        """What is held, as it came."""
        yield from self.buffer.fields
