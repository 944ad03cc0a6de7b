"""Candidates that do not depend on what was said are rejected (SGRS, saliency-guided rejection sampling).

Hallucination Begins Where Saliency Drops (zhangbaijin/LVLMs-Saliency). The released sampler reads the row of the
candidate itself, which by causality no loss of it reaches; this reads the row that emits it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from regard.adapters import seam
from regard.adapters.families import Decoder
from regard.adapters.intercept import intercept
from regard.core.errors import RegardError
from regard.ops.saliency import layer_map, salient


@dataclass(frozen=True)
class Sampled:
    """What was generated.

    Args:
        ids: the new tokens.
        saliency: of every one of them; 1 for the first, which follows no output; None where alpha is 0.
        evaluations: how many candidates were examined for every one of them.
    """

    ids: tuple[int, ...]
    saliency: tuple[float | None, ...]
    evaluations: tuple[int, ...]


def generate(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    tokens: int,
    candidates: int = 5,
    draws: int = 3,
    alpha: float = 0.6,
    window: int = 5,
    layers: Sequence[int] = (6, 7, 8),
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Sampled:
    """Sample from the `candidates` likeliest tokens, and reject those of low saliency.

    A candidate's saliency is the mean, over `layers` and over the tokens generated before, of |A dL/dA| in the row
    that emits it, heads averaged and the row divided by its length, with L its negative log-probability. Up to `draws`
    candidates are drawn, each time among those left; one is accepted if its saliency is at least alpha times the mean
    of the last `window` accepted ones, or else the most salient of all is taken. A step costs one forward of one token
    with gradients, and a backward through it for every candidate that is examined.

    Args:
        model: a decoder-only model that is not attached, under any attention of its own.
        inputs: what its forward takes: `input_ids [1, n]`, and pixels with it where it sees.
        tokens: how many at most.
        candidates: K.
        draws: R.
        alpha: share of the recent saliency that is asked for; 0: plain sampling, with the same draws.
        window: W, accepted tokens that the mean is over.
        layers: whose attention counts.
        stop: tokens that end the answer.
        generator: of the draws, on the CPU.

    Raises:
        RegardError: a setting out of range, several or padded rows, gradients that cannot be had, or a model that is
            attached or not recognised.
    """
    rule = _Rule(candidates, draws, alpha, window)
    _check(inputs, tokens, rule)
    with intercept(model, run := _Row()) as decoder:
        run.layers = _layers(layers, decoder)
        run.windows = decoder.windows
        if alpha and (torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters())):
            raise RegardError("saliency needs gradients; leave torch.inference_mode(), or set alpha=0")
        if candidates > decoder.vocabulary:
            raise RegardError(f"candidates must be at most the vocabulary of {decoder.vocabulary}, got {candidates}")
        return _sample(model, inputs, run, tokens, rule, frozenset(stop), generator)


@dataclass(frozen=True)
class _Rule:
    candidates: int
    draws: int
    alpha: float
    window: int


class _Row:
    """Answers attention as the model does, and keeps what the saliency of the row that emits follows from."""

    def __init__(self) -> None:
        self.layers: frozenset[int] = frozenset()
        self.windows: tuple[int | None, ...] = ()
        self.listening = False
        self.calls: list[tuple[seam.Call, Tensor]] = []

    def __call__(self, call: seam.Call) -> Tensor:
        out = call.own()[0].transpose(1, 2)
        if not self.listening or call.seat.layer not in self.layers:
            return out
        call.refuse_extras()
        # The gradient by an added 0 is that by the output, also where all weights are frozen.
        zero = torch.zeros_like(out, requires_grad=True)
        self.calls.append((call, zero))
        return out + zero

    def maps(self, loss: Tensor) -> list[Tensor]:
        """The row's saliency for a loss, `[keys seen]` of every layer."""
        slopes = torch.autograd.grad(loss, [zero for _, zero in self.calls], retain_graph=True)
        found = []
        for (call, _), slope in zip(self.calls, slopes, strict=True):
            # A sliding layer may still hold keys that slid out of its window.
            seen = slice(-(self.windows[call.seat.layer] or call.key.shape[2]), None)
            key, value = call.key[:, :, seen].detach(), call.value[:, :, seen].detach()
            raw = salient(call.query.detach(), key, value, slope, scale=call.scale, softcap=call.softcap)
            found.append(layer_map(raw)[0, -1])
        return found


def _sample(
    model: nn.Module,
    inputs: dict[str, Tensor],
    run: _Row,
    tokens: int,
    rule: _Rule,
    stop: frozenset[int],
    generator: torch.Generator | None,
) -> Sampled:
    device = inputs["input_ids"].device
    cache: Any = DynamicCache(config=cast(Any, model.config))
    recent: deque[float] = deque(maxlen=rule.window)
    ids, told, evaluations = [], [], []
    while len(ids) < tokens:
        given: dict[str, Any] = {"input_ids": torch.tensor([[ids[-1]]], device=device)} if ids else inputs
        graph = bool(rule.alpha and ids)
        run.listening, run.calls = graph, []
        with torch.set_grad_enabled(graph):
            logits = model(**given, past_key_values=cache, use_cache=True).logits[0, -1].float()
            log_probs = logits.log_softmax(-1)
        if not logits.isfinite().all():
            raise RegardError(f"the logits of token {len(ids)} are not finite")
        best = log_probs.detach().topk(rule.candidates)
        saliency = _examine(run, log_probs, best.indices, len(ids)) if graph else lambda c: 1.0
        floor = rule.alpha * sum(recent) / len(recent) if recent else 0.0
        chosen, value, count = _choose(best.values.exp().cpu(), saliency, floor, rule.draws, generator)
        ids.append(int(best.indices[chosen]))
        told.append(value if rule.alpha else None)
        evaluations.append(count if graph else 0)
        recent.append(value)
        _forget_graph(cache)
        if ids[-1] in stop:
            break
    return Sampled(tuple(ids), tuple(told), tuple(evaluations))


def _choose(
    probabilities: Tensor,
    saliency: Callable[[int], float],
    floor: float,
    draws: int,
    generator: torch.Generator | None,
) -> tuple[int, float, int]:
    """The candidate taken, its saliency, and how many were examined."""
    left, found = probabilities.clone(), {}
    for _ in range(min(draws, len(left))):
        drawn = int(torch.multinomial(left, 1, generator=generator))
        found[drawn] = saliency(drawn)
        if found[drawn] >= floor:
            return drawn, found[drawn], len(found)
        left[drawn] = 0
        if not left.any():
            break
    for other in range(len(left)):
        if other not in found:
            found[other] = saliency(other)
    best = max(found, key=lambda c: (found[c], -c))
    return best, found[best], len(found)


def _examine(run: _Row, log_probs: Tensor, ids: Tensor, outputs: int) -> Callable[[int], float]:
    """The saliency of a candidate by its number: one backward through the row that emits it."""

    def saliency(candidate: int) -> float:
        with torch.enable_grad():
            rows = run.maps(-log_probs[ids[candidate]])
        # The last `outputs` keys; those that slid out of a layer's window count as 0.
        return sum(float(row[-outputs:].sum()) for row in rows) / (outputs * len(rows))

    return saliency


def _forget_graph(cache: Any) -> None:
    """Keys and values written with gradients on must not carry the graph into the next step."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def _layers(layers: Sequence[int], decoder: Decoder) -> frozenset[int]:
    wrong = [layer for layer in layers if not 0 <= layer < decoder.layers]
    if wrong or not layers:
        raise RegardError(
            f"layers must name some of 0..{decoder.layers - 1}, got {', '.join(map(str, wrong)) or 'none'}"
        )
    return frozenset(layers)


def _check(inputs: dict[str, Tensor], tokens: int, rule: _Rule) -> None:
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
        shape = "none" if ids is None else list(ids.shape)
        raise RegardError(f"SGRS takes one row: input_ids must be [1, n], got {shape}")
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.bool().all():
        raise RegardError("SGRS takes one row without padding, and its attention_mask has zeros")
    counts = {"tokens": tokens, "candidates": rule.candidates, "draws": rule.draws, "window": rule.window}
    for name, value in counts.items():
        if value < 1:
            raise RegardError(f"{name} must be at least 1, got {value}")
    if not 0 <= rule.alpha < float("inf"):
        raise RegardError(f"alpha must be a number from 0 up, got {rule.alpha}")
