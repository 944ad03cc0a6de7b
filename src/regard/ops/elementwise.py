"""The vector recurrence on the fastest path that computes exactly that: `primitives/elementwise.py`, or a kernel."""

from torch import Tensor

from regard.core.errors import choose
from regard.primitives import elementwise

BACKENDS = ("auto", "torch")


def recur(
    forget: Tensor,
    inputs: Tensor,
    *,
    initial: Tensor | None = None,
    reset: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h_t = forget_t * h_{t-1} + inputs_t`; arguments, results and errors of `primitives.elementwise.recur`.

    Args:
        forget: `[..., T, D]`.
        inputs: `[..., T, D]`.
        initial: `[..., D]`; None: zero.
        reset: the state starts at zero at every multiple of it.
        backend: "auto" or "torch".
    """
    choose("backend", backend, BACKENDS)
    return elementwise.recur(forget, inputs, initial=initial, reset=reset)
