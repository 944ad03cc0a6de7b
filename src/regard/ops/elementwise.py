"""The vector recurrence on the fastest path that computes exactly that: a kernel on a GPU, else plain torch."""

from torch import Tensor

from regard.core.errors import RegardError, choose
from regard.kernels import device
from regard.primitives import elementwise

BACKENDS = ("auto", "stepwise", "chunked", "triton")
FORMS = {"stepwise": elementwise.stepwise, "chunked": elementwise.recur}


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
        backend: "stepwise" (the definition), "chunked" (plain torch, any device), "triton" (a GPU, gradients once), or
            "auto": the kernel where it does not refuse, else chunks.

    Raises:
        RegardError: arguments do not belong together, or a named backend refuses them.
    """
    choose("backend", backend, BACKENDS)
    elementwise.check(forget, inputs, initial, reset)
    if backend in FORMS:
        return FORMS[backend](forget, inputs, initial=initial, reset=reset)
    refusal = _refuses(forget, inputs, initial, reset)
    if backend == "triton" and refusal is not None:
        raise RegardError(f"backend 'triton' refuses: {refusal}. Use backend='chunked' or 'auto'")
    if refusal is not None:
        return elementwise.recur(forget, inputs, initial=initial, reset=reset)
    from regard.kernels.states import elementwise as kernel

    return kernel.recur(forget, inputs, initial=initial, reset=reset)


def _refuses(forget: Tensor, inputs: Tensor, initial: Tensor | None, reset: int | None) -> str | None:
    """Why no kernel can do this, or None."""
    if refusal := device.refuses(inputs):
        return refusal
    from regard.kernels.states import elementwise as kernel

    return kernel.refuses(forget, inputs, initial=initial, reset=reset)
