"""Forwards of one token in fixed shapes, so that a GPU replays them as one CUDA graph.

A decoded token is a thousand launches, and a host launches them more slowly than a GPU runs them. A *fixed step* is a
forward of one token in which nothing follows from a number that Python holds: stores write where `Step.at` says and
read buffers with room to spare (`Store.put`). So it can be recorded once and replayed while the request grows. Where
nothing can be recorded (a CPU) it is launched every time, with the same results.
"""

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from regard.adapters.bind import Bound
from regard.adapters.cache_layer import StoreCache, eager
from regard.adapters.requests import Requests
from regard.core.step import Step
from regard.kernels.graphs import Replay, own_stream
from regard.primitives.codes import span

# Slots that a full store gets when it has none left: each time costs a recording. Of long requests a share.
SPARE, SHARE = 512, 32
# What a decoder may be given besides its token; anything else that is not None or False is refused.
KNOWN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache", "return_dict")


def fixable(bound: Bound) -> str | None:
    """Why the mechanisms of `bound` cannot run in fixed steps, or None."""
    if bound.contrast is not None:
        return f"{bound.contrast.name!r} runs other branches beside each forward"
    for index, slots in enumerate(bound.slots):
        for edit in (edit for edits in slots.edits() for edit in edits) if slots is not None else ():
            return f"layer {index}: {edit.name!r} follows each token in Python"
        rules = () if slots is None else map(slots.pattern.head, range(len(slots.key_codec)))
        for rule in rules:
            if span(rule) is None:
                return f"layer {index}: the kernels that decode know windows with sinks, not {rule}"
    return None


class FixedSteps:
    """The fixed steps of one handle: one request's at a time, begun anew when its stores were changed otherwise.

    Args:
        requests: of the handle.
        module: the decoder.
        bound: what is attached to it.
    """

    def __init__(self, requests: Requests, module: nn.Module, bound: Bound):
        self._requests, self._module, self._never = requests, module, fixable(bound)
        self._replay: Replay | None = None
        self._cache: ReferenceType[StoreCache] | None = None
        # What must be as it was when the recording was begun, and arrivals until which there is room.
        self._shapes: tuple[Any, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._until = 0
        # What a step that was launched returned, and of what type it was.
        self._out: ModelOutput | None = None
        self._type: type[ModelOutput] = ModelOutput
        # For `explain`.
        self._begun, self._because, self._passed_by = 0, "", ""

    def __str__(self) -> str:
        """What happens to forwards of one token, for `explain`."""
        if self._never:
            return f"as any other ({self._never})"
        told = ["in fixed steps, replayed as a CUDA graph"]
        if self._replay is not None and self._replay.why:
            told = [f"in fixed steps, launched every time ({self._replay.why})"]
        if self._begun:
            told.append(f"begun {self._begun} times, last because {self._because}")
        if self._passed_by:
            told.append(f"the last one that was not: {self._passed_by}")
        return "; ".join(told)

    def remove(self) -> None:
        """Let go of the graph and its memory."""
        self._replay = self._cache = None
        self._versions = ()

    def running(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of the decoder, in fixed steps where it can be; what it is given has names."""

        @eager
        def run(**given: Any) -> Any:
            step, cache = self._requests.step, self._requests.cache
            assert step is not None
            assert cache is not None
            why = self._unfit(given, step) or self._ready(forward, given, step, cache)
            if why is None:
                return self._taken(given, step, cache)
            if step.width == 1:
                self._passed_by = why
            return forward(**given)

        return run

    def _unfit(self, given: dict[str, Any], step: Step) -> str | None:
        """Why this forward is no fixed step, as far as it shows without its request."""
        if self._never or step.width != 1:
            return self._never or f"{step.width} tokens at once"
        if torch.is_grad_enabled():
            return "gradients are on"
        if torch.is_autocast_enabled(step.device.type):
            return "autocast is on"
        positions = given.get("position_ids")
        if not isinstance(positions, Tensor) or positions.shape[-1] != 1:
            return "no position_ids were given for the token"
        if given.get("use_cache") is False or given.get("return_dict") is False:
            return "use_cache or return_dict is False"
        other = [
            name for name, value in given.items() if name not in KNOWN and value is not None and value is not False
        ]
        return f"{', '.join(other)} was given" if other else None

    def _ready(self, forward: Callable[..., Any], given: dict[str, Any], step: Step, cache: StoreCache) -> str | None:
        """Begin anew if the last step's graph is none of this one; or why that cannot be."""
        tensors = (*_inputs(given), *(() if step.padding is None else (step.padding,)))
        shapes = (*((x.shape, x.dtype) for x in tensors), torch.is_inference_mode_enabled())
        changed = self._changed(shapes, step, cache)
        if changed is None:
            return None
        self.remove()
        stores = [layer.store for layer in cache.store_layers()]
        if len({p.device for p in self._module.parameters()} | {step.device}) > 1:
            return "the model lies on several devices"
        for index, store in enumerate(stores):
            why = store.unfixed(step)
            if why is None and store.length != step.start:
                why = f"it holds {store.length} arrivals of {step.start}"
            if why is not None:
                return f"layer {index}: {why}"
        rooms = [store.fix(max(SPARE, step.start // SHARE)) for store in stores]
        self._until = min((room for room in rooms if room is not None), default=-1)
        self._shapes, self._versions = shapes, _versions(cache)
        self._cache = ref(cache, self._gone)
        self._replay = Replay(self._work(forward, _name(given)), step.device, None)
        self._begun, self._because = self._begun + 1, changed
        return None

    def _changed(self, shapes: tuple[Any, ...], step: Step, cache: StoreCache) -> str | None:
        if self._cache is None or self._cache() is not cache:
            return "a request came to its first answer"
        if shapes != self._shapes:
            return "rows, dtypes or padding changed"
        if _versions(cache) != self._versions:
            return "stores were changed otherwise (more tokens at once, a crop, reordered rows)"
        if 0 <= self._until <= step.start:
            return "a store was full"
        return None

    def _gone(self, cache: ReferenceType[StoreCache]) -> None:
        if self._cache is cache:
            self.remove()

    def _work(self, forward: Callable[..., Any], name: str) -> Callable[..., Tensor]:
        """The step itself, over tensors alone."""

        def work(token: Tensor, positions: Tensor, at: Tensor, *padding: Tensor) -> Tensor:
            step, cache = self._requests.step, self._requests.cache
            assert step is not None
            before = step.padding
            step.at, step.padding = at, (padding[0] if padding else None)
            try:
                # No mask: padding says all of it, and a graph would go on reading this forward's.
                out = forward(**{name: token}, position_ids=positions, past_key_values=cache, use_cache=True)
            finally:
                step.at, step.padding = None, before
                step.shared.clear()
            self._out, self._type = out, type(out)
            return out.last_hidden_state

        return work

    def _taken(self, given: dict[str, Any], step: Step, cache: StoreCache) -> ModelOutput:
        """One fixed step, counted."""
        replay = self._replay
        assert replay is not None
        at = torch.full((1,), step.start, device=step.device)
        inputs = (*_inputs(given), at, *(() if step.padding is None else (step.padding,)))
        try:
            if replay.graph is not None:
                hidden = replay(*inputs)
            else:
                with own_stream(step.device, kept=True) as apart, apart:
                    hidden = replay(*inputs)
        finally:
            out, self._out = self._out, None
        for layer in cache.store_layers():
            layer.store.passed()
        if out is None or replay.graph is not None:
            return self._type(last_hidden_state=hidden, past_key_values=cache)
        more = [name for name in out if name not in ("last_hidden_state", "past_key_values")]
        if more:
            self._never = f"the decoder also returns {', '.join(more)}"
            self.remove()
        return out


def _name(given: dict[str, Any]) -> str:
    return "input_ids" if given.get("input_ids") is not None else "inputs_embeds"


def _inputs(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The token and its positions."""
    return given[_name(given)], given["position_ids"]


def _versions(cache: StoreCache) -> tuple[int, ...]:
    return tuple(version for layer in cache.store_layers() for version in layer.store.versions())
