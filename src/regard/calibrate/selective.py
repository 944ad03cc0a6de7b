"""Fitting Selective Attention [068]: temperatures and value scales, by next-token loss on text.

The official code trains one scalar a layer, optionally with everything else frozen; so do these few
numbers here, with the token maps beside them. Part of the text is held out, and the numbers that do
best there are kept: those of the start, if nothing did better.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.adapters.intercept import intercept
from regard.adapters.seam import Call
from regard.calibrate.common import Best, Progress, check_ids, check_least, check_rates, frozen, logits
from regard.core.errors import RegardError, choose
from regard.core.placement import Where
from regard.core.step import Step
from regard.ops.qkv.selective import prepare

# Where training begins in each form, next to no temperature (official code), and its rate over many steps.
START = {"exp": 2.0, "linear": 1e-5}
# Windows held out at most: more would cost as much as the training.
HELD_OUT = 4


def fit(
    model: nn.Module,
    tokens: Tensor,
    *,
    progress: Progress | None = None,
    steps: int = 20,
    length: int = 512,
    form: str = "exp",
    maps: bool = True,
    rate: float | None = None,
    map_rate: float = 1e-3,
    every: int = 5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train `{"betas": [L], "query_map": [L, D], "value_map": [L, D]}`, float32; place them under the same `form`.

    The official code trains betas with Adam at 1e-2 through a whole fine-tuning. The defaults here are few steps,
    each as much larger as they are fewer.

    Args:
        model: a language model that `regard.attach` takes; its weights are not changed.
        tokens: `[n]` text, cut into windows of `length`; a fifth of them, at most four, are held out.
        progress: told steps done and steps in all.
        steps: optimiser steps, one window each.
        length: tokens of a window; only what is this long teaches how far temperature must rise.
        form: "exp" or "linear", as on the card.
        maps: also the token parts; False: betas alone.
        rate: Adam's rate for betas; None: 1e-2, and as large as needed to bring `exp`'s 2 to 0 in `steps`.
        map_rate: Adam's rate for the maps.
        every: steps between two looks at the held-out windows.
        seed: of the windows' order.

    Raises:
        RegardError: the text is shorter than two windows or not token ids, a setting is out of range, or the
            model gives no logits.
    """
    form = choose("form of 'selective'", form, START)
    check_least(1, steps=steps, every=every)
    check_least(2, length=length)
    if rate is None:
        rate = max(0.01, START["exp"] / steps) if form == "exp" else 0.01
    check_rates(rate=rate, map_rate=map_rate)
    with frozen(model), intercept(model, run := _Tempered(form)) as decoder:
        check_ids("the text to fit 'selective' on", tokens, decoder.config.vocab_size)
        train, held = _cut(tokens, length, seed)
        run.where = Where(0, decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_dim)
        run.fitted = fitted = _begun(run.where, form, maps)
        groups = [{"params": [t], "lr": rate if name == "betas" else map_rate} for name, t in fitted.items()]
        optimiser, best = torch.optim.Adam(groups), Best()
        best.offer(_held_out(model, held), fitted)
        for step in range(steps):
            optimiser.zero_grad()
            _loss(model, train[step % len(train)]).backward()
            optimiser.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                best.offer(_held_out(model, held), fitted)
            if progress is not None:
                progress(step + 1, steps)
    return best.taken()


class _Tempered:
    """Answers every layer's attention as the model does, from queries and values scaled by `fitted`."""

    where: Where
    fitted: dict[str, Tensor]

    def __init__(self, form: str):
        self.form = form

    def __call__(self, call: Call) -> Tensor:
        call.refuse_extras()
        where = replace(self.where, layer=call.seat.layer, placed=tuple(range(self.where.kv_heads)))
        maps = {name: self.fitted.get(name) for name in ("query_map", "value_map")}
        edit = prepare(where, beta=None, betas=self.fitted["betas"], form=self.form, **maps)
        assert edit is not None
        batch, _, width, _ = call.query.shape
        step = Step(0, width, batch, call.query.device)
        scaled = replace(call, query=edit.query(call.query, step), value=edit.value(call.value, step))
        return scaled.own()[0].transpose(1, 2)


def _begun(where: Where, form: str, maps: bool) -> dict[str, Tensor]:
    """What is trained, where training begins."""
    begun = {"betas": torch.full((where.layers,), START[form])}
    if maps:
        begun |= {name: torch.zeros(where.layers, where.head_dim) for name in ("query_map", "value_map")}
    return {name: tensor.requires_grad_(True) for name, tensor in begun.items()}


def _cut(tokens: Tensor, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows `[n, length]` to train on, in random order, and those at the end of the text to judge by."""
    count = len(tokens) // length
    if count < 2:
        raise RegardError(
            f"fitting 'selective' needs {2 * length} tokens of text (a window of {length} to train on and one to "
            f"judge by), got {len(tokens)}; give more text or a smaller length"
        )
    windows = tokens[: count * length].view(count, length)
    train = count - max(1, min(HELD_OUT, count // 5))
    order = torch.randperm(train, generator=torch.Generator().manual_seed(seed))
    return windows[:train][order], windows[train:]


def _loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean next-token loss of one window `[T]`, nats."""
    predicted = logits(model, window[None])[0, :-1]
    return F.cross_entropy(predicted, window[1:].to(predicted.device))


@torch.no_grad()
def _held_out(model: nn.Module, windows: Tensor) -> float:
    return sum(float(_loss(model, window)) for window in windows) / len(windows)
