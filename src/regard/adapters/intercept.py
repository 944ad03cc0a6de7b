"""Answering every layer's attention oneself, for calibration and observation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from regard.adapters import seam
from regard.adapters.families import Decoder, looks_ahead
from regard.core.errors import RegardError


@contextmanager
def intercept(model: nn.Module, run: Callable[[seam.Call], Tensor]) -> Iterator[Decoder]:
    """Inside, `run(call)` answers each layer's attention with `out [B, H, T, Dv]`, differentiable as it is.

    Args:
        model: a model that is not attached.
        run: gets the call (`call.seat.layer`, `call.query [B, H, T, D]`, `call.key`, `call.value`
            `[B, Hk, S, *]` after rotary positions, `call.scale`; `call.own()` is the model's own answer).

    Raises:
        RegardError: the model is attached already, was not recognised, or is not causal.
    """
    decoder, implementation = seam.open_free(model)
    if looks_ahead(decoder.config):
        raise RegardError(
            f"{type(model).__name__} lets tokens of its prompt see later ones (use_bidirectional_attention); what "
            "reads attention, or is fitted on it, takes causal models"
        )
    surgery = seam.Surgery()
    try:
        seats = [seam.Seat(index, implementation, run) for index in range(decoder.layers)]
        surgery.seat(decoder.module, decoder.attentions, seats)
        yield decoder
    finally:
        surgery.restore()
