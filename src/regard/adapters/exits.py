"""Early exits: the residual stream behind some layers, normed and read by the model's own head, in the same forward."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.cache_layer import eager
from regard.adapters.families import Decoder
from regard.adapters.seam import Surgery
from regard.core.errors import RegardError


class Exits:
    """Puts the rows of exits behind those that the decoder returns, so that the head's code reads all alike.

    Args:
        decoder: the opened model.
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._streams: dict[int, Tensor] = {}
        # Exits of the forward that runs, and which of its rows the head reads.
        self._wanted: tuple[Sequence[int], Any] | None = None

    def install(self, surgery: Surgery, layers: Iterable[int]) -> None:
        """Hook the decoder for exits behind `layers`, counted from 1.

        Raises:
            RegardError: the model was recognised by structure, which does not tell its last norm.
        """
        layers = sorted(layers)
        if not layers:
            return
        if self._decoder.names is None:
            raise RegardError(f"where the last norm of family {self._decoder.family} stands is not known")
        for layer in layers:
            surgery.hook(self._decoder.blocks[layer - 1].register_forward_hook(self._noting(layer)))
        surgery.hook(self._decoder.module.register_forward_hook(self._stack))

    def expect(self, language: nn.Module, exits: Sequence[int], given: dict[str, Any], keep: Any) -> Any:
        """The forward of `language` with `given` is to return logits of rows `keep`, and those of `exits` behind them.

        Returns `((), given)` with which it must be called, None: as it is.
        """
        if not exits:
            return None
        self._wanted = (exits, keep)
        keeps = "logits_to_keep" in inspect.signature(type(language).forward).parameters
        return (), given | ({"logits_to_keep": 0} if keeps else {})

    def forget(self) -> None:
        """The forward is over, or failed."""
        self._wanted = None
        self._streams.clear()

    def _noting(self, layer: int) -> Callable[..., None]:
        @eager
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if self._wanted is not None:
                self._streams[layer] = out[0] if isinstance(out, tuple) else out

        return hook

    @eager
    def _stack(self, module: nn.Module, args: Any, out: Any) -> Any:
        if self._wanted is None:
            return out
        exits, keep = self._wanted
        rows = keep if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
        assert self._decoder.names is not None
        norm = getattr(module, self._decoder.names.norm)
        last = out[0] if isinstance(out, tuple) else out.last_hidden_state
        stack = torch.cat((last[:, rows], *(norm(self._streams[layer][:, rows]) for layer in exits)), dim=1)
        if isinstance(out, tuple):
            return (stack, *out[1:])
        out.last_hidden_state = stack
        return out
