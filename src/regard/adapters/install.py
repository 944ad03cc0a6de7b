"""Installing placements into a model, and undoing it without a trace."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils.generic import ModelOutput

from regard import catalog
from regard.adapters import seam
from regard.adapters.bind import Bound, bind
from regard.adapters.blind import Blind
from regard.adapters.blocks import open_block
from regard.adapters.branches import Branches
from regard.adapters.cache_layer import StoreView, eager
from regard.adapters.families import Decoder
from regard.adapters.graphs import FixedSteps, fixable
from regard.adapters.memory import live_bytes
from regard.adapters.requests import Requests
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.core.slots import Contrast, Slots
from regard.core.token_map import TokenMap
from regard.primitives import codes


def install(
    model: nn.Module,
    placements: Sequence[Placement],
    fits: Callable[[Decoder], None] | None = None,
    *,
    graphs: bool = False,
) -> "Handle":
    """Put `placements` into `model`; everything is checked before the model is touched.

    Args:
        model: any transformers model with one causal decoder inside.
        placements: what goes where.
        fits: a further check of the opened decoder, which raises if the model is the wrong one.
        graphs: replay forwards of one token (`adapters/graphs.py`).

    Returns:
        A Handle, also a context manager, whose `detach` leaves the model as it was.

    Raises:
        RegardError: the model or a placement cannot be served; the model is untouched.
    """
    decoder, implementation = seam.open_free(model)
    if fits is not None:
        fits(decoder)
    for part in decoder.attentions:
        seam.own_attention(part, implementation)
    bound, recipe = bind(placements, decoder), digest(placements)
    if graphs and fixable(bound) is None and None in bound.slots:
        # Caches of all layers on stores are not those of some.
        bound, recipe = bound.whole(decoder), f"{recipe} with graphs"
    if bound:
        _refuse_prompt_learning(model)
    return Handle(model, decoder, bound, implementation, recipe, graphs)


def _refuse_prompt_learning(model: nn.Module) -> None:
    for part in model.modules():
        adapter = getattr(part, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise RegardError(
                f"PEFT's {adapter.peft_type.value} puts tokens of its own before every prompt, which is not opened "
                "yet; adapters that change weights (LoRA and its kin) are"
            )


def digest(placements: Iterable[Placement]) -> str:
    """A short name of what `placements` say, trained tensors included; equal placements have equal digests."""
    told = hashlib.sha256()
    for place in placements:
        told.update(repr((place.stem, place.layers, place.heads, sorted(place.options.items()))).encode())
        for name, tensor in sorted(place.tensors.items()):
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            told.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + flat.numpy().tobytes())
    return told.hexdigest()[:12]


class Handle:
    """An attached model. Leaving the `with` block, or `detach()`, leaves the model as it was.

    Caches made while attached belong to its recipe: they cannot be read under another one.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, bound: Bound, implementation: str, recipe: str, graphs: bool = False
    ):
        self.model, self.decoder, self.slots, self.digest = model, decoder, bound.slots, recipe
        self._implementation, self._bound = implementation, bound
        self._requests = Requests(decoder, decoder.config, bound.slots, recipe)
        self._branches: Branches | None = None
        self._steps = FixedSteps(self._requests, decoder.module, bound) if graphs else None
        self._blind = Blind.of(decoder, self._requests)
        # Whether the forward that runs was to leave no cache: it runs on one all the same.
        self._unasked = False
        self._surgery = seam.Surgery()
        try:
            self._install()
        except BaseException:
            self._surgery.restore()
            raise

    def _install(self) -> None:
        surgery, module = self._surgery, self.decoder.module
        runs = [None if slots is None else _from_store for slots in self.slots]
        seats = [seam.Seat(index, self._implementation, run) for index, run in enumerate(runs)]
        surgery.seat(module, self.decoder.attentions, seats)
        for parameter, made in self._bound.weights:
            surgery.assign(parameter, made)
        for index, slots in enumerate(self.slots):
            if slots is not None:
                open_block(surgery, self.decoder, index, self._requests)
        if self._bound:
            if self.decoder.around is not None:
                surgery.ask_for_masks(self.decoder.around, module)
            surgery.hook(module.register_forward_pre_hook(self._before, with_kwargs=True))
            if self._bound.contrast is not None:
                self._open_logits(self._bound.contrast)
            surgery.hook(module.register_forward_hook(self._after, always_call=True))
            if self._steps is not None:
                surgery.set(module, "forward", self._steps.running(module.forward))
                surgery.hook(self._steps)
            for part in self._generating():
                surgery.set(part, "generate", self._requests.generating(part.generate))
                prepare = part._prepare_cache_for_generation
                surgery.set(part, "_prepare_cache_for_generation", self._requests.preparing(prepare))

    def _generating(self) -> list[Any]:
        """The modules inside (PEFT may wrap them) that generate."""
        return [
            p for p in self.model.modules() if hasattr(p, "generate") and hasattr(p, "_prepare_cache_for_generation")
        ]

    def _open_logits(self, contrast: Contrast) -> None:
        # The outermost of the model's own: PEFT's wrappers generate too, but return what this one makes.
        language = next((part for part in self.model.modules() if isinstance(part, GenerationMixin)), None)
        if not isinstance(language, nn.Module):
            raise RegardError(f"{contrast.name!r} edits logits, and {type(self.model).__name__} has no language head")
        self._branches = Branches(contrast, language, self.decoder, self._requests)
        self._branches.install(self._surgery)

    def detach(self) -> None:
        """Leave the model as it was before.

        Raises:
            RegardError: it is detached already.
        """
        if not self._surgery:
            raise RegardError(f"{type(self.model).__name__} is not attached; it was detached already")
        self._surgery.restore()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self._surgery.restore()

    @property
    def nbytes(self) -> int:
        """Bytes of the live storages of every cache made under this handle and still alive."""
        return sum(live_bytes(cache) for cache in self._requests.caches)

    def responding(self) -> AbstractContextManager[None]:
        """Rows of forwards inside are response rows, as those that `generate` adds are; others are prompt rows."""
        return self._requests.responding()

    def prompting(self, length: int) -> AbstractContextManager[None]:
        """Requests inside have a prompt of `length` arrivals (`generate` tells this by itself)."""
        return self._requests.prompting(length)

    def marking(self, marks: Tensor | tuple[int, int]) -> AbstractContextManager[None]:
        """Requests inside have rows marked, for mechanisms of site `tokens`.

        Args:
            marks: `[1|B, n]` bool by arrival, or positions `(start, stop)`, the same in every row.

        Raises:
            RegardError: they are neither.
        """
        return self._requests.marking(marks)

    def reading(self, tokens: TokenMap) -> AbstractContextManager[None]:
        """Requests inside have tokens of these kinds, for mechanisms that steer by kind.

        Args:
            tokens: `[1|B, n]`, from `regard.adapters.tokens.read` or made by hand.

        Raises:
            RegardError: it is no TokenMap.
        """
        return self._requests.reading(tokens)

    def branching(self, ids: Tensor, mask: Tensor | None = None) -> AbstractContextManager[None]:
        """Requests whose prompt ends inside have a second branch with the prompt `ids`, for site `logits`.

        It stands for what the recipe's mechanism would make of the request's own prompt, its cue included. A branch
        that began inside goes on outside, until the request has a new prompt.

        Args:
            ids: `[B, N]` token ids, one row for each of the request; `N` need not be the request's length.
            mask: `[B, N]`, 0 where `ids` is padded, on the left; None: nowhere.

        Raises:
            RegardError: no mechanism of this recipe runs a branch; `ids` is empty, longer than the model's context,
                or holds ids outside its vocabulary; `mask` is not left padding.
        """
        if self._branches is None:
            self._refuse_branching()
            return nullcontext()
        return self._branches.giving(ids, mask)

    def lending(self, thing: Any) -> AbstractContextManager[None]:
        """Branches of requests inside use `thing`, where their mechanism asks for more than tokens.

        Args:
            thing: what the mechanism's card says: pixels of another view, scores of patches, another model.

        Raises:
            RegardError: no mechanism of this recipe runs a branch.
        """
        if self._branches is None:
            self._refuse_branching()
            return nullcontext()
        return self._branches.lending(thing)

    def _refuse_branching(self) -> None:
        if not self._bound.branching:
            stems = ", ".join(stem for stem, entry in catalog.entries().items() if "contrast" in entry.verbs)
            raise RegardError(f"no mechanism of this recipe runs a second branch; those that do: {stems}")

    def explain(self) -> str:
        """What runs in each layer, equal layers together."""
        lines = [f"{type(self.model).__name__}: family {self.decoder.family}, own attention {self._implementation}"]
        if self._bound.contrast is not None:
            lines.append(f"logits: {self._bound.contrast.name}")
        if self._steps is not None:
            lines.append(f"forwards of one token: {self._steps}")
        said = [
            f"own attention ({self._implementation})" if slots is None else self._told(slots) for slots in self.slots
        ]
        start = 0
        for stop in range(1, len(said) + 1):
            if stop == len(said) or said[stop] != said[start]:
                span = f"layer {start}" if stop - start == 1 else f"layers {start}-{stop - 1}"
                lines.append(f"{span}: {said[start]}")
                start = stop
        return "\n".join(lines)

    def _told(self, slots: Slots) -> str:
        """A layer's Slots, and how short forwards read what it holds in codes."""
        weight = next(self.model.parameters())
        q = weight.new_empty(1, self.decoder.heads, 1, self.decoder.head_dim)
        read = {
            codes.told(q, self.decoder.kv_heads, slots.pattern.head(head), key, value): None
            for head, (key, value) in enumerate(zip(slots.key_codec, slots.value_codec, strict=True))
            if key or value
        }
        return "; ".join([str(slots) or "causal attention over a full store", *read])

    @eager
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = seam.named(module, args, kwargs)
        if given.get("output_attentions"):
            raise RegardError("output_attentions asks for weights, which attached layers never build")
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise RegardError("gradient checkpointing runs layers twice, which stores cannot; switch it off")
        if _packed(given):
            raise RegardError(
                "position_ids jump inside a row (packed sequences), which stores cannot tell apart; "
                "give each sequence a row of its own"
            )
        self._unasked = given.get("use_cache") is False and given.get("past_key_values") is None
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        given["past_key_values"] = self._requests.begin(
            tokens, given.get("past_key_values"), given.get("attention_mask")
        )
        if self._blind is not None:
            self._blind.follow(given)
        return (), given

    @eager
    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        self._requests.end()
        if self._unasked and isinstance(out, ModelOutput):
            # `generate` would go on with it.
            return type(out)(**{name: part for name, part in out.items() if name != "past_key_values"})
        return out


def _packed(given: dict[str, Any]) -> bool:
    """Whether transformers would take rows apart: positions that jump, without a mask and without a cache."""
    positions = given.get("position_ids")
    if given.get("attention_mask") is not None or given.get("past_key_values") is not None:
        return False
    return positions is not None and positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any())


@eager
def _from_store(call: seam.Call) -> Tensor:
    if not isinstance(call.key, StoreView):
        raise RegardError(f"layer {call.seat.layer} got keys around its store; a mechanism there would be bypassed")
    call.refuse_extras(seam.TWO_SIDED)
    return call.key.attend(call.query, scale=call.scale, softcap=call.softcap)
