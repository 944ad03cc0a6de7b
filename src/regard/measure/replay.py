"""Feeding a window through a model exactly as a served request sees it: prefill, then rows on the same cache."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.placement import Placement


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the model's training flag is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def installed(model: Any, placements: Sequence[Placement] | None) -> Iterator[Any]:
    """The handle of `placements` on `model`; None for the model's own attention, untouched."""
    if placements is None:
        yield None
        return
    from regard.adapters.install import install

    with install(model, list(placements)) as handle:
        yield handle


def prefill(model: Any, handle: Any, context: Tensor, chunk: int | None = None) -> Any:
    """Run `context [C]` as the whole prompt, `chunk` tokens a forward (None: all at once); the request's cache."""
    cache = None
    with nullcontext() if handle is None else handle.prompting(len(context)):
        for piece in context.to(model.device)[None].split(chunk or len(context), dim=1):
            cache = forward(model, piece, cache, keep=1).past_key_values
    return cache


def forward(model: Any, ids: Tensor, cache: Any, keep: int = 0) -> Any:
    """One forward of `ids [1, T]` on `cache`; logits of the last `keep` rows only, where the model can (0: all)."""
    given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if keep and "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = keep
    out = model(input_ids=ids, use_cache=True, **given)
    if out.past_key_values is None:
        raise RegardError(f"{type(model).__name__} returns no cache; quality is measured on the cached path only")
    return out


def respond(model: Any, handle: Any, continuation: Tensor, cache: Any, chunk: int) -> Iterator[Tensor]:
    """Feed `continuation [N]` teacher-forced as response rows; yield float32 logits `[chunk, vocabulary]`.

    Raises:
        RegardError: `chunk` is below 1, or logits hold NaN.
    """
    if chunk < 1:
        raise RegardError(f"chunk must be at least 1, not {chunk}")
    row = 0
    for piece in continuation.to(model.device).split(chunk):
        with handle.responding() if handle is not None else nullcontext():
            logits = forward(model, piece[None], cache).logits[0].float()
        if bool(torch.isnan(logits).any()):
            bad = row + int(torch.isnan(logits).any(-1).nonzero()[0])
            who = "the attached model" if handle is not None else "the dense model"
            raise RegardError(f"{who} yields NaN at row {bad} of the continuation")
        row += len(piece)
        yield logits
