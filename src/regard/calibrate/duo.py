"""Gate training of DuoAttention [137]: which KV heads must see everything.

The frozen model runs once as it is and once with every head's output blended between full and
streaming attention; only the gates learn. The text is real, with passkeys hidden in it that the end
asks for, so that heads which fetch from afar show.
"""

import torch
from torch import Tensor, nn

from regard.adapters.intercept import intercept
from regard.adapters.seam import Call
from regard.calibrate.common import Progress, frozen
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.attention import attend
from regard.ops.cache.duo import blend, distillation_loss, learning_rate


def fit(
    model: nn.Module,
    tokens: Tensor,
    *,
    progress: Progress | None = None,
    steps: int = 20,
    length: int = 512,
    sink: int = 16,
    recent: int = 64,
    peak: float | None = None,
    weight: float = 0.05,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train one gate a KV head; returns `{"gates": [L, Hk]}` in 0..1, float32.

    The paper trains 2,000 steps at 1,000 tokens and more with a peak rate of 0.02. The defaults here take
    about a minute for a 135M model on two cores: few steps, each as much larger as they are fewer.

    Args:
        model: any model `regard.attach` takes; its weights are not changed.
        tokens: `[n]` real text to hide passkeys in.
        progress: told steps done and steps in all.
        steps: optimiser steps, one text each.
        length: tokens of a text.
        sink: first positions a streaming head sees.
        recent: last positions a streaming head sees.
        peak: top learning rate; None: as large as needed to bring a useless gate from 1 to 0.
        weight: what a gate costs.
        seed: of the passkeys.

    Raises:
        RegardError: the text is shorter than `length`, or `length` leaves nothing for streaming to miss.
    """
    if len(tokens) < length:
        raise RegardError(f"fitting 'duo' needs {length} tokens of text, got {len(tokens)}")
    if sink + recent >= length // 2:
        raise RegardError(f"sink {sink} + recent {recent} see too much of {length} tokens to tell heads apart")
    rate = max(0.02, 1.6 / steps) if peak is None else peak
    drawn = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    teacher = _Blend(Pattern.sink(sink) | Pattern.window(recent))
    with frozen(model), intercept(model, teacher.run) as decoder:
        gates = torch.ones(decoder.layers, decoder.kv_heads, requires_grad=True)
        optimiser = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = learning_rate(step, steps, rate)
            text, answers = passkeys(tokens, length, drawn)
            full, blended = teacher.both(decoder.module, text[None].to(device), gates)
            loss = distillation_loss(full, blended, gates, answers=answers[None].to(device), weight=weight)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            if progress is not None:
                progress(step + 1, steps)
    return {"gates": gates.detach().clone()}


class _Blend:
    """Answers every layer's attention: first as the model does, remembered, then blended by the gates."""

    def __init__(self, stream: Pattern):
        self.stream = stream
        self.full: dict[int, Tensor] = {}
        self.gates: Tensor | None = None

    def both(self, decoder: nn.Module, ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states `[B, T, d]` of the model as it is, and blended by `gates [L, Hk]`."""
        self.full, self.gates = {}, None
        with torch.no_grad():
            full = decoder(input_ids=ids, use_cache=False).last_hidden_state
        self.gates = gates
        return full, decoder(input_ids=ids, use_cache=False).last_hidden_state

    def run(self, call: Call) -> Tensor:
        layer = call.seat.layer
        if self.gates is None:
            self.full[layer] = call.own()[0].transpose(1, 2)
            return self.full[layer]
        out, _ = attend(call.query, call.key, call.value, pattern=self.stream, scale=call.scale, softcap=call.softcap)
        return blend(self.gates[layer].to(out), self.full[layer], out)


def passkeys(
    tokens: Tensor, length: int, drawn: torch.Generator, *, count: int = 6, key: int = 4, answer: int = 12
) -> tuple[Tensor, Tensor]:
    """A text of `length` tokens with `count` passkeys hidden in it and asked for at its end.

    A passkey is `key` tokens that name it and `answer` tokens that follow, all random from the text's own
    vocabulary; a question is the name again, its answer the rest. Returns the text `[length]` and which of
    its tokens predict an answer, bool `[length]`.
    """
    size = key + answer
    body = length - 2 * count * size
    if body < count:
        count = max(1, length // (4 * size))
        body = length - 2 * count * size
    start = int(torch.randint(0, len(tokens) - body + 1, (1,), generator=drawn))
    filler = tokens[start : start + body]
    words = tokens.unique()
    hidden = words[torch.randint(0, len(words), (count, size), generator=drawn)]
    depths = (torch.rand(count, generator=drawn) * 0.9 + 0.05).mul(body).long().sort().values.tolist()
    pieces, at = [], 0
    for depth, secret in zip(depths, hidden, strict=True):
        pieces += [filler[at:depth], secret]
        at = depth
    pieces.append(filler[at:])
    order = torch.randperm(count, generator=drawn)
    text = torch.cat([*pieces, hidden[order].flatten()])
    answers = torch.zeros(len(text), dtype=torch.bool)
    # The token before one of the answer is what predicts it.
    answers[-count * size :].view(count, size)[:, key - 1 : -1] = True
    return text, answers
