"""Head search of ACT [065]: which heads gain when their sinks are damped.

One head at a time is calibrated, and kept if held-out text is then more likely than under the unedited model.
Heads without a sink in the text cannot change anything, so they are not tried.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapters.intercept import intercept
from regard.adapters.seam import Call, open_free
from regard.calibrate.common import Progress
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.placement import Placement
from regard.core.slots import Reading
from regard.core.step import Step
from regard.measure.replay import forward, installed, quiet
from regard.measure.text import Window
from regard.measure.text import windows as cut
from regard.ops.attention import attend
from regard.ops.probabilities import act


def fit(
    model: nn.Module,
    tokens: Tensor,
    *,
    progress: Progress | None = None,
    tasks: Sequence[Window] | None = None,
    layers: Sequence[int] | None = None,
    windows: int = 2,
    context: int = 192,
    continuation: int = 64,
    limit: int | None = 64,
    margin: float = 1e-4,
    beta: float = 0.4,
    theta: float = 0.1,
    relative: float | None = None,
) -> dict[str, Tensor]:
    """Search the heads to calibrate; returns `{"heads_mask": [L, H]}`, 1 for those that are kept, float32.

    A head costs one forward of each window. The paper scores accuracy on tasks and keeps the heads that beat the
    unedited model; here the score is the mean loss of the tokens after a prompt, in nats, so that small texts
    tell heads apart.

    Args:
        model: any model `regard.attach` takes, not attached; it is not changed.
        tokens: `[n]` held-out text.
        progress: told heads tried and heads in all.
        tasks: prompts (`context`) with the answers expected (`continuation`); None: windows of `tokens`.
        layers: where to look; None: all but the first two and the last, or all of a model of three layers or fewer.
        windows: how many windows of `tokens`.
        context: tokens of a window's prompt.
        continuation: tokens that are scored after it.
        limit: heads tried at most, those that give their sinks most attention; None: all that have a sink.
        margin: nats a token that a head must gain to be kept; above what rounding changes.
        beta: as the mechanism's option.
        theta: as the mechanism's option.
        relative: as the mechanism's option.

    Raises:
        RegardError: the text is too short, a layer is out of range, or an option is out of bounds.
    """
    held = cut(tokens, context, continuation, windows) if tasks is None else list(tasks)
    decoder, _ = open_free(model)
    chosen = _searched(decoder.layers, layers)
    options = {"beta": beta, "theta": theta, "relative": relative}
    with quiet(model):
        given = torch.stack([sink_mass(model, window.context, theta, relative) for window in held]).sum(0)
    tried = [(layer, head) for layer in chosen for head in given[layer].nonzero()[:, 0].tolist()]
    tried = sorted(tried, key=lambda place: -float(given[place]))[:limit]
    mask = torch.zeros(decoder.layers, decoder.heads)
    plain = loss(model, None, held)
    for done, place in enumerate(tried):
        alone = torch.zeros_like(mask)
        alone[place] = 1
        edited = [Placement("act", place[:1], "all", options, {"heads_mask": alone})]
        mask[place] = loss(model, edited, held) < plain - margin
        if progress is not None:
            progress(done + 1, len(tried))
    return {"heads_mask": mask}


def _searched(count: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(2, count - 1) if count > 3 else range(count))
    for layer in layers:
        if not 0 <= layer < count:
            raise RegardError(f"layer {layer} is out of range; this model has {count}")
    return tuple(layers)


def sink_mass(model: nn.Module, context: Tensor, theta: float, relative: float | None) -> Tensor:
    """Attention on sinks in the unedited model, summed over the rows of `context [C]`: `[L, H]`, 0 without a sink."""
    found: dict[int, Tensor] = {}

    def run(call: Call) -> Tensor:
        call.refuse_extras()
        q, k = call.query, call.key
        window = decoder.windows[call.seat.layer]
        pattern = Pattern.causal() if window is None else Pattern.window(window)
        out, lse = attend(q, k, call.value, pattern=pattern, scale=call.scale, softcap=call.softcap)
        step = Step(0, q.shape[2], 1, q.device)
        reading = Reading(q, k, step.queries(), pattern, call.scale, call.softcap, step, {}, lse)
        every = torch.ones(q.shape[1], dtype=torch.bool)
        sinks = act.segments(reading, chosen=every, theta=theta, relative=relative)
        mass = reading.state[act.MASS][0]
        found[call.seat.layer] = (mass * (0 if sinks is None else sinks[0, :, 0])).sum(-1)
        return out

    with intercept(model, run) as decoder:
        device = next(model.parameters()).device
        decoder.module(input_ids=context[None].to(device), use_cache=False)
    return torch.stack([found[layer].float().cpu() for layer in range(decoder.layers)])


def loss(model: Any, placements: Sequence[Placement] | None, windows: Sequence[Window]) -> float:
    """Mean loss, nats a token, of the windows' continuations as response rows; None: of the model as it is."""
    total, count = 0.0, 0
    with quiet(model), installed(model, placements) as handle:
        for window in windows:
            ids = torch.cat((window.context, window.continuation)).to(model.device)
            rows = len(window.continuation) + 1
            with nullcontext() if handle is None else handle.prompting(len(window.context)):
                logits = forward(model, ids[None], None, keep=rows).logits[0, -rows:-1].float()
            total += float(F.cross_entropy(logits, ids[1 - rows :], reduction="sum"))
            count += rows - 1
    return total / count
