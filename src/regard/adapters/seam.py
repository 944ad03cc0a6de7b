"""The one name regard registers with transformers while any model is attached, and what stands behind it.

transformers asks two questions under one name: which mask (once a forward) and which attention (once a
layer). The mask answer is a light object that builds the model's own mask only if some layer still
runs the model's own attention; attached layers need no mask tensor at all.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from regard.adapters.families import Decoder, open_decoder
from regard.core.errors import RegardError

NAME = "regard"


@dataclass(eq=False)
class Seat:
    """One attention module of an attached model.

    Args:
        layer: its index.
        implementation: the attention its model had before.
        run: what answers in place of the model's own attention, `out [B, H, T, Dv]`; None: its own does.
    """

    layer: int
    implementation: str
    run: "Callable[[Call], Tensor] | None" = None


@dataclass(eq=False)
class Call:
    """One layer's question for attention, as transformers put it."""

    module: nn.Module
    seat: Seat
    query: Tensor
    key: Any
    value: Any
    mask: Any
    arguments: dict[str, Any]

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        scaling = self.arguments.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def softcap(self) -> float | None:
        """The soft cap on scores, where the model's own attention has one: sdpa drops it silently."""
        return None if self.seat.implementation == "sdpa" else self.arguments.get("softcap")

    def own(self) -> tuple[Tensor, Tensor | None]:
        """The model's own answer, `(out [B, T, H, Dv], weights or None)`."""
        mask, seat = self.mask, self.seat
        if isinstance(mask, Mask):
            mask = mask.dense(seat.implementation, self.query.device)
        attention = own_attention(self.module, seat.implementation)
        return attention(self.module, self.query, self.key, self.value, mask, **self.arguments)

    def refuse_extras(self, known: Collection[str] = ()) -> None:
        """Raise if the model asks for more than a mask of `CAUSAL` or of `known`, padding and a soft cap.

        Raises:
            RegardError: dropout, learned biases or sink logits, a prepared 4-D mask, or another mask.
        """
        if dropout := self.arguments.get("dropout"):
            raise RegardError(
                f"attention dropout {dropout} is not run by regard; set the model's attention_dropout to 0"
            )
        for name in ("position_bias", "s_aux"):
            if self.arguments.get(name) is not None:
                raise RegardError(f"layer {self.seat.layer} adds {name} to its scores, which is not opened yet")
        if isinstance(self.mask, Tensor):
            raise RegardError(
                f"a prepared 4-D attention mask reached layer {self.seat.layer}; pass a 2-D padding mask (and where "
                "attention is read or fitted, no images to a model that makes masks around its decoder, as Gemma 3)"
            )
        if isinstance(self.mask, Mask):
            self.mask.refuse_unknown(known, self.seat.layer)


# The masks that attached layers run, by how they are made.
CAUSAL = frozenset({"causal_mask_function", "and_masks(sliding_window_overlay, causal_mask_function)"})
# Here a block sees all of itself, however long it is.
WIDE = "or_masks(and_masks(sliding_window_overlay, causal_mask_function), blockwise_overlay)"
TWO_SIDED = frozenset(
    {
        "or_masks(causal_mask_function, blockwise_overlay)",
        "and_masks(or_masks(causal_mask_function, blockwise_overlay), sliding_window_overlay)",
        WIDE,
    }
)

_SEATS: WeakKeyDictionary[nn.Module, Seat] = WeakKeyDictionary()


class Mask:
    """The model's own mask, built when first asked for; `arguments` are transformers' own."""

    # transformers asks whether it is a padding mask.
    ndim = 4

    def __init__(self, arguments: dict[str, Any]):
        # transformers 5.17 keeps offsets as tensors after an assisted crop, and counts them up in place.
        self.arguments = {
            name: value.clone() if isinstance(value, Tensor) and value.ndim == 0 else value
            for name, value in arguments.items()
        }
        self._dense: Any = None
        self._built = False

    def dense(self, implementation: str, device: torch.device) -> Any:
        """What `implementation`'s own mask function returns, on `device`."""
        if not self._built:
            self._dense = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
            self._built = True
        return self._dense.to(device) if isinstance(self._dense, Tensor) else self._dense

    @cached_property
    def formula(self) -> str:
        """The transformers functions that it is made of, as they are nested."""
        return _formula(self.arguments["mask_function"])

    @property
    def padding(self) -> Tensor | None:
        """The 2-D padding mask that it was made with, `[B, S]`."""
        return self.arguments["attention_mask"]

    @property
    def blocks(self) -> Tensor | None:
        """The block of every arrival, `[B, n]`: those of one block see each other both ways, -1 is none."""
        return next(_found(self.arguments["mask_function"], "block_sequence_ids"), None)

    def refuse_unknown(self, known: Collection[str], layer: int | None = None) -> None:
        """Raise unless it is one of `known`, or of `CAUSAL`.

        Raises:
            RegardError: it is another.
        """
        if self.formula not in known and self.formula not in CAUSAL:
            who, what = "an attached model" if layer is None else f"layer {layer}", "causal and sliding masks"
            what += ", with blocks of tokens that see each other," if known else ""
            raise RegardError(f"{who} was given a mask made of {self.formula}; attached layers run {what} only")


def _parts(function: Any) -> dict[str, Any]:
    """What `function` was made with, by name."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else {n: c.cell_contents for n, c in zip(code.co_freevars, cells, strict=True)}


def _formula(function: Any) -> str:
    parts = ", ".join(map(_formula, _parts(function).get("mask_functions", ())))
    name = getattr(function, "__qualname__", "?").split(".")[0]
    return f"{name}({parts})" if parts else name


def _found(function: Any, name: str) -> Iterator[Any]:
    """What `function`, or one that it is made of, calls `name`."""
    parts = _parts(function)
    if name in parts:
        yield parts[name]
    for part in parts.get("mask_functions", ()):
        yield from _found(part, name)


def _mask_function(**arguments: Any) -> Mask:
    # A model that makes masks around its decoder hands it this one, and the decoder asks for another.
    prepared = arguments.get("attention_mask")
    return prepared if isinstance(prepared, Mask) else Mask(arguments)


def _attention_function(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    seat = _SEATS.get(module)
    if seat is None:
        raise RegardError(
            f"{type(module).__name__} asks for attention {NAME!r} but belongs to no attached model "
            "(a deep copy of one?); detach before copying a model"
        )
    call = Call(module, seat, query, key, value, attention_mask, kwargs)
    if seat.run is None:
        return call.own()
    return seat.run(call).transpose(1, 2).contiguous(), None


def own_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function `module` itself would call under `implementation`."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise RegardError(f"{type(module).__name__} has no eager_attention_forward beside it; load the model with sdpa")


def open_free(model: nn.Module) -> tuple[Decoder, str]:
    """The opened decoder of a model that is not attached, and the name of its own attention.

    Raises:
        RegardError: the model is attached already, or was not recognised.
    """
    decoder = open_decoder(model)
    if any(part in _SEATS for part in decoder.attentions):
        raise RegardError(f"{type(model).__name__} is attached already; detach it first")
    return decoder, decoder.config._attn_implementation or "eager"


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward of `module` is given, by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


class Surgery:
    """Changes to a model's attributes and to the registries, undone in reverse order by `restore`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def seat(self, decoder: nn.Module, attentions: Sequence[nn.Module], seats: Sequence[Seat]) -> None:
        """Make `attentions` of `decoder` ask regard; the registry entries come with the first seat."""
        # A copy, because models may share one config object; not through the setter, because that would
        # switch sub-configs too.
        config: Any = copy.copy(decoder.config)
        config._attn_implementation_internal = NAME
        for module, place in zip(attentions, seats, strict=True):
            if not _SEATS:
                AttentionInterface.register(NAME, _attention_function)
                AttentionMaskInterface.register(NAME, _mask_function)
            _SEATS[module] = place
            self._undo.append(partial(_unseat, module))
            self.set(module, "config", config)
        self.set(decoder, "config", config)
        self.set(decoder, "__deepcopy__", _refuse_copy)

    def ask_for_masks(self, around: nn.Module, decoder: nn.Module) -> None:
        """Let `around`, which makes masks for the seated `decoder`, ask regard for them too."""
        config: Any = copy.copy(around.config)
        config.text_config = decoder.config
        self.set(around, "config", config)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set attribute `name` of `module` itself."""
        own = vars(module)
        self._undo.append(partial(own.__setitem__, name, own[name]) if name in own else partial(own.pop, name))
        own[name] = value

    def assign(self, parameter: nn.Parameter, made: Tensor) -> None:
        """Give `parameter` other numbers; its own are kept beside them until `restore`."""
        self._undo.append(partial(setattr, parameter, "data", parameter.data))
        parameter.data = made

    def hook(self, handle: Any) -> None:
        """Remember a torch hook, to be removed."""
        self._undo.append(handle.remove)

    def restore(self) -> None:
        """Undo everything."""
        while self._undo:
            self._undo.pop()()


def _refuse_copy(memo: dict[int, Any]) -> nn.Module:
    raise RegardError(
        "an attached model cannot be copied: the copy would ask for stores it does not have; detach first"
    )


def _unseat(module: nn.Module) -> None:
    del _SEATS[module]
    if not _SEATS:
        del AttentionInterface._global_mapping[NAME]
        del AttentionMaskInterface._global_mapping[NAME]
