"""Task embeddings blended into per-head outputs at the last prompt token (Soft Injection)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Mix, State
from regard.core.step import Step

CARD = Card(
    title="Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning",
    arxiv="2507.20906",
    sheet=28,
    implements="Injection at the last prompt token with one mixing weight a layer and head, and the mean of "
    "per-head outputs that is injected.",
    exact=False,
    saving="none",
    departures=("Where the prompt ends is told by the adapter, for all rows alike: prompts are padded on the left.",),
    oracles=(
        "weight 0 leaves outputs bit-identical, weight 1 replaces them by the task embedding",
        "only the last prompt token changes; generated tokens see it through the cache",
        "linear in the weight",
    ),
    neutral={"strength": 0.0},
    example={"strength": 1.0},
    options={
        "strength": Option(kind="float", default=1.0, low=0.0, high=1.0, doc="multiplies every mixing weight"),
        "task": Option(
            kind="tensor",
            default=None,
            shape=("layers", "heads", "head_dim"),
            low=-1.0,
            high=1.0,
            doc="[L, H, D] mean output of every head at the last token of solved examples",
        ),
        "weights": Option(
            kind="tensor", default=None, shape=("layers", "heads"), low=0.0, high=1.0, doc="[L, H] mixing weights"
        ),
    },
)


def mix(where: Where, *, strength: float, task: Tensor | None, weights: Tensor | None) -> Mix | None:
    """Blend `task` into the heads of the last prompt token: `(1 - a) z + a t`.

    Raises:
        RegardError: a fitted tensor is missing or not of this model's shape.
    """
    if strength == 0:
        return None
    wanted = {"task": (where.layers, where.heads, where.head_dim), "weights": (where.layers, where.heads)}
    for (name, shape), given in zip(wanted.items(), (task, weights), strict=True):
        if given is None or tuple(given.shape) != shape:
            found = "nothing: fit it with regard.calibrate.soft_injection" if given is None else str(list(given.shape))
            raise RegardError(f"'soft_injection' needs {name} of shape {list(shape)}, got {found}")
    assert task is not None
    assert weights is not None
    chosen = torch.zeros(where.heads)
    chosen[where.rows(where.heads)] = strength
    share, embedding = chosen * weights[where.layer].float(), task[where.layer]

    def run(out: Tensor, step: Step, state: State) -> Tensor:
        return inject(out, share, embedding, step)

    return Mix("soft injection", run)


def inject(out: Tensor, share: Tensor, task: Tensor, step: Step) -> Tensor:
    """`out [B, H, T, D]` with the row of the last prompt token blended: `out + share (task - out)`.

    Args:
        out: outputs of this forward's rows.
        share: `[H]` mixing weights.
        task: `[H, D]`.
        step: says where the prompt ended; where that is unknown, nothing is done.
    """
    if step.prompt is None or not step.start <= step.prompt - 1 < step.stop:
        return out
    last = (step.arrivals.to(out.device) == step.prompt - 1)[:, None, :, None]
    blended = out + share.to(out)[:, None, None] * (task.to(out)[:, None] - out)
    return torch.where(last, blended, out)
