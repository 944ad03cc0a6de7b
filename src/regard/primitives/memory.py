"""What one layer remembers of one request: named batch-first tensors, and how many tokens it has seen."""

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.core.errors import RegardError


class Memory:
    """Named tensors with batch rows first, and `seen`, the tokens (padding included) that went by.

    A mixer writes it: it reads with `get`, leaves what the next call needs with `set`, and counts with `advance`.
    Rows follow `reorder`, `repeat` and `select`. A recurrent state cannot forget single tokens, so `crop` refuses.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._held: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`, None before it was first set."""
        return self._held.get(name)

    def set(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor [B, ...]` under `name`.

        Raises:
            RegardError: its batch rows are not those of the tensors already held.
        """
        if tensor.dim() == 0:
            raise RegardError(f"memory {name!r} must have a batch dimension first, got a single number")
        rows = self.rows
        if rows is not None and tensor.shape[0] != rows and set(self._held) != {name}:
            raise RegardError(f"memory {name!r} has {tensor.shape[0]} batch rows, this request has {rows}")
        self._held[name] = tensor

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `keys [B, Hk, T, D]` and `values [B, Hk, T, Dv]` to those held; all of them, `[B, Hk, S, *]`."""
        return self._extend("keys", keys), self._extend("values", values)

    def latents(self, c: Tensor, kappa: Tensor) -> Tensor:
        """Append latents `c [B, 1, T, r]` with their rotary keys `kappa [B, 1, T, e]`; all, `[B, 1, S, r + e]`."""
        return self._extend("latents", torch.cat((c, kappa), dim=-1))

    def _extend(self, name: str, new: Tensor) -> Tensor:
        old = self.get(name)
        self.set(name, new if old is None else torch.cat((old, new), dim=2))
        return self._held[name]

    def advance(self, tokens: int) -> None:
        """`tokens` more went by.

        Raises:
            RegardError: `tokens` is negative.
        """
        if tokens < 0:
            raise RegardError(f"cannot go back {-tokens} tokens: a recurrent state does not hold what came before")
        self.seen += tokens

    @property
    def rows(self) -> int | None:
        """Batch rows of what is held, None while nothing is."""
        first = next(iter(self._held.values()), None)
        return None if first is None else first.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the live storages, each counted once whatever views share it."""
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.storages()}
        return sum(held.values())

    def storages(self) -> Iterator[Tensor]:
        """Every tensor that keeps memory alive."""
        return iter(self._held.values())

    def reorder(self, index: Tensor) -> None:
        """Row `i` becomes the old row `index[i]` (beams); the number of rows may change."""
        self._held = {name: held.index_select(0, index.to(held.device)) for name, held in self._held.items()}

    def repeat(self, times: int) -> None:
        """Each row becomes `times` rows, next to each other.

        Raises:
            RegardError: `times` is less than 1.
        """
        if times < 1:
            raise RegardError(f"rows can be repeated 1 or more times, got {times}")
        self._held = {name: held.repeat_interleave(times, dim=0) for name, held in self._held.items()}

    def select(self, index: Tensor) -> None:
        """Keep the rows `index` names (numbers or a bool mask)."""
        self.reorder(index.nonzero()[:, 0] if index.dtype == torch.bool else index)

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.seen = 0
        self._held = {}

    def crop(self, tokens: int) -> None:
        """Drop the last `tokens` tokens: 0 does nothing, any other number is refused.

        Raises:
            RegardError: `tokens` is not 0.
        """
        if tokens:
            raise RegardError(
                f"cannot remove the last {abs(tokens)} of {self.seen} tokens: a recurrent state holds their sum, "
                "not each of them; start the request again, or decode without drafts"
            )

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self._held.items())
        return f"Memory(seen={self.seen}{', ' if held else ''}{held})"
