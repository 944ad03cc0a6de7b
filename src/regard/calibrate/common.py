"""What fits share: the model frozen, its logits, checks of what they are given, and the best tensors so far."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from regard.core.errors import RegardError

Progress = Callable[[int, int], None]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight of `model` learns inside, and it evaluates; both are put back."""
    learning = [p for p in model.parameters() if p.requires_grad]
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for part, training in modes.items():
            part.training = training


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits `[B, T, vocabulary]`, float32, of `ids [B, T]`, wherever `model` lives.

    Raises:
        RegardError: the model has no language-model head.
    """
    out = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    if getattr(out, "logits", None) is None:
        raise RegardError(f"{type(model).__name__} gives no logits; fit on the model with its language-model head")
    return out.logits.float()


def check_ids(what: str, ids: Tensor, vocabulary: int) -> None:
    """Raise unless `ids` is a row of token ids.

    Raises:
        RegardError: it is not `[n]` integers with n >= 1, or one lies outside the vocabulary.
    """
    whole = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex())
    if not whole or ids.ndim != 1 or not len(ids):
        told = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else repr(ids)
        raise RegardError(f"{what} must be token ids, [n] integers with n >= 1, got {told}")
    for worst in (int(ids.min()), int(ids.max())):
        if not 0 <= worst < vocabulary:
            raise RegardError(f"{what} holds token {worst}; this model's vocabulary is 0 to {vocabulary - 1}")


def check_least(least: int, **numbers: int) -> None:
    """Raise unless all are at least `least`.

    Raises:
        RegardError: names the first that is not.
    """
    for name, number in numbers.items():
        if number < least:
            raise RegardError(f"{name} must be at least {least}, got {number!r}")


def check_rates(**numbers: float) -> None:
    """Raise unless all are above zero and finite.

    Raises:
        RegardError: names the first that is not.
    """
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise RegardError(f"{name} must be above 0, got {number!r}")


class Best:
    """The tensors with the lowest held-out loss of those offered."""

    def __init__(self) -> None:
        self.loss = math.inf
        self._tensors: dict[str, Tensor] = {}

    def offer(self, loss: float, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies of `tensors` if none before had a loss as low."""
        if loss < self.loss:
            self.loss = loss
            self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def taken(self) -> dict[str, Tensor]:
        """What was kept.

        Raises:
            RegardError: no loss was a finite number.
        """
        if not self._tensors:
            raise RegardError("no held-out loss was a finite number, not even before the first step")
        return self._tensors
