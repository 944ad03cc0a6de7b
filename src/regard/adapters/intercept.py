"""Answering every layer's attention oneself, for calibration and observation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from regard.adapters import seam
from regard.adapters.families import Decoder


@contextmanager
def intercept(model: nn.Module, run: Callable[[seam.Call], Tensor]) -> Iterator[Decoder]:
    """Inside, `run(call)` answers each layer's attention with `out [B, H, T, Dv]`, differentiable as it is.

    Args:
        model: a model that is not attached.
        run: gets the call (`call.seat.layer`, `call.query [B, H, T, D]`, `call.key`, `call.value`
            `[B, Hk, S, *]` after rotary positions, `call.scale`; `call.own()` is the model's own answer).

    Raises:
        RegardError: the model is attached already, or was not recognised.
    """
    decoder, implementation = seam.open_free(model)
    surgery = seam.Surgery()
    try:
        seats = [seam.Seat(index, implementation, run) for index in range(decoder.layers)]
        surgery.seat(decoder.module, decoder.attentions, seats)
        yield decoder
    finally:
        surgery.restore()
