"""Decoder layers that run some rows only, or whose parts are edited before they join the residual stream."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.cache_layer import StoreLayer, eager
from regard.adapters.families import Decoder
from regard.adapters.requests import Requests
from regard.adapters.seam import Surgery
from regard.core.slots import Feed, Rows
from regard.core.step import Step
from regard.primitives.buffer import pick

PARTS = ("attention", "feed_forward")


def open_block(surgery: Surgery, decoder: Decoder, index: int, requests: Requests) -> None:
    """Put what the slots of layer `index` say of it as a whole into its modules."""
    block, slots = decoder.blocks[index], requests.slots[index]
    assert slots is not None
    if slots.watch:
        surgery.hook(block.register_forward_pre_hook(_watching(index, requests), with_kwargs=True))
    if slots.write:
        for part in PARTS:
            hook = _writing(part, index, requests)
            surgery.hook(decoder.part(index, f"{part}_out").register_forward_hook(hook))
    if slots.feed:
        _feed(surgery, decoder, index, requests)
    if slots.rows:
        surgery.set(block, "forward", _some_rows(block.forward, index, requests))
    if slots.write:
        surgery.set(block, "forward", _leaving(block.forward, index, requests))


def _watching(index: int, requests: Requests) -> Callable[..., None]:
    @eager
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        layer = requests.layer(index)
        assert layer.step is not None
        x = args[0] if args else kwargs["hidden_states"]
        for edit in layer.slots.watch:
            edit.run(x, layer.step, layer.store.state)

    return hook


def _writing(part: str, index: int, requests: Requests) -> Callable[..., Any]:
    @eager
    def hook(module: nn.Module | None, args: Any, out: Any) -> Any:
        layer = requests.layer(index)
        step = layer.step
        assert step is not None
        x = out[0] if isinstance(out, tuple) else out
        for edit in layer.slots.write:
            x = edit.run(part, x, step)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return hook


def _leaving(whole: Callable[..., Any], index: int, requests: Requests) -> Callable[..., Any]:
    """A layer's forward with its output edited; no hook, so that all of a layer is in its forward."""
    edited = _writing("layer", index, requests)

    def run(*args: Any, **kwargs: Any) -> Any:
        return edited(None, args, whole(*args, **kwargs))

    return run


def _feed(surgery: Surgery, decoder: Decoder, index: int, requests: Requests) -> None:
    """The feed-forward part on some rows; what it added is told afterwards."""
    block, part = decoder.blocks[index], decoder.part(index, "feed_forward")
    whole, inner = block.forward, part.forward
    # Granite scales what it adds.
    scale = getattr(block, "residual_multiplier", 1.0)
    added: list[Tensor] = []

    @eager
    def feed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = requests.layer(index)
        step = layer.step
        assert step is not None
        runs = together(layer.slots.feed, step)
        if runs is None:
            return inner(x, *args, **kwargs)
        if not isinstance(runs, Tensor) and not runs:
            return torch.zeros_like(x)
        at = as_mask(runs, step).expand(x.shape[:2]).flatten().nonzero()[:, 0]
        if not len(at):
            return torch.zeros_like(x)
        flat = x.flatten(0, 1)
        out = inner(flat.index_select(0, at)[None], *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return torch.zeros_like(flat).index_copy(0, at, out[0]).view_as(x)

    @eager
    def run(*args: Any, **kwargs: Any) -> Any:
        out = whole(*args, **kwargs)
        after = out[0] if isinstance(out, tuple) else out
        layer = requests.layer(index)
        assert layer.step is not None
        before = after - scale * added.pop()
        for edit in layer.slots.feed:
            edit.seen(before, after, layer.step)
        return out

    def catch(module: nn.Module, args: Any, out: Any) -> None:
        added[:] = [out[0] if isinstance(out, tuple) else out]

    surgery.set(part, "forward", feed)
    surgery.set(block, "forward", run)
    surgery.hook(decoder.part(index, "feed_forward_out").register_forward_hook(catch))


def _some_rows(whole: Callable[..., Any], index: int, requests: Requests) -> Callable[..., Any]:
    """A layer's forward on the rows that run: gather, compute, scatter."""

    @eager
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        step, layer = requests.step, requests.layer(index)
        assert step is not None
        runs = together(layer.slots.rows, step)
        if runs is None:
            return whole(hidden, *args, **kwargs)
        if not isinstance(runs, Tensor):
            return _first_rows(whole, layer, step, runs, hidden, args, kwargs)
        at = offsets(runs)
        if not at.shape[1]:
            layer.store.advance(step)
            return hidden
        layer.step = step.only((at + step.start).masked_fill(at < 0, -1))
        kwargs = {name: _narrow(name, value, at.clamp(min=0)) for name, value in kwargs.items()}
        out = whole(pick(hidden, at.clamp(min=0), 1), *args, **kwargs)
        if isinstance(out, tuple):
            return (_put(hidden, out[0], at), *out[1:])
        return _put(hidden, out, at)

    return run


def _first_rows(
    whole: Callable[..., Any],
    layer: StoreLayer,
    step: Step,
    count: int,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A layer's forward on the first `count` rows: to the layer a shorter forward, known without asking the device."""
    if not count:
        layer.store.advance(step)
        return hidden
    layer.step = replace(step, width=count)
    kwargs = {name: _shorten(name, value, count) for name, value in kwargs.items()}
    out = whole(hidden[:, :count], *args, **kwargs)
    layer.store.advance(step)
    if isinstance(out, tuple):
        return (torch.cat((out[0], hidden[:, count:]), dim=1), *out[1:])
    return torch.cat((out, hidden[:, count:]), dim=1)


def together(edits: Sequence[Rows | Feed], step: Step) -> Tensor | int | None:
    """The rows of `step` that all of `edits` let run: `[1|B, R]` bool, the number of first rows, or None: all."""
    width = _width(step)
    said = [runs for edit in edits if (runs := edit.choose(step)) is not None]
    masks = [runs for runs in said if isinstance(runs, Tensor)]
    count = min((runs for runs in said if not isinstance(runs, Tensor)), default=width)
    if not masks or not count:
        return None if count >= width else count
    runs = torch.stack(torch.broadcast_tensors(*masks)).all(0)
    if count < width:
        runs = runs & as_mask(count, step)
    return None if bool(runs.all()) else runs


def as_mask(runs: Tensor | int, step: Step) -> Tensor:
    """What `together` returned as `[1|B, R]` bool."""
    return runs if isinstance(runs, Tensor) else (torch.arange(_width(step), device=step.device) < runs)[None]


def _width(step: Step) -> int:
    """Rows of `step` that run, `R`."""
    return step.width if step.rows is None else step.rows.shape[1]


def offsets(runs: Tensor) -> Tensor:
    """Where `runs [1|B, T]` is true, in order: `[1|B, n]`, -1 where a row has fewer than others."""
    count = runs.sum(1)
    order = torch.where(runs, torch.arange(runs.shape[1], device=runs.device), runs.shape[1]).sort(1).values
    at = order[:, : int(count.max())]
    return at.masked_fill(at == runs.shape[1], -1)


def _narrow(name: str, value: Any, at: Tensor) -> Any:
    """A keyword of a layer that speaks of rows, for the rows `at [1|B, n]` only."""
    if name == "position_embeddings":
        return tuple(pick(x, at, 1) for x in value)
    if name == "position_ids" and isinstance(value, Tensor):
        return pick(value, at, 1) if value.ndim == 2 else torch.stack([pick(x, at, 1) for x in value])
    return value


def _shorten(name: str, value: Any, count: int) -> Any:
    """A keyword of a layer that speaks of rows, for the first `count` rows only."""
    if name == "position_embeddings":
        return tuple(x[:, :count] for x in value)
    return value[..., :count] if name == "position_ids" and isinstance(value, Tensor) else value


def _put(hidden: Tensor, part: Tensor, at: Tensor) -> Tensor:
    """`hidden [B, T, d]` with rows `at [1|B, n]` replaced by `part [B, n, d]`."""
    if at.shape[0] == 1:
        return hidden.index_copy(1, at[0], part)
    batch, width = hidden.shape[:2]
    flat = at + torch.arange(batch, device=at.device)[:, None] * width
    real = at >= 0
    return hidden.flatten(0, 1).index_copy(0, flat[real], part[real]).view_as(hidden)
