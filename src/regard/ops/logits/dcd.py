"""Decoupling contrastive decoding: a projector trained on rejected answers gives the view that is taken away."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import BranchSpec, Contrast, Image, Sight
from regard.ops.branching import weighted

CARD = Card(
    title="Decoupling Contrastive Decoding: Robust Hallucination Mitigation in Multimodal Large Language Models",
    arxiv="2504.08809",
    sheet=164,
    implements="Two projectors trained on chosen and on rejected answers (regard.calibrate.dcd), and decoding from "
    "their contrast; only the negative one too.",
    exact=False,
    saving="none",
    departures=(
        "The code is not public: alpha 1 and the cut at 0.1 follow visual contrastive decoding; encoder and language "
        "model are frozen in training.",
        "The negative view runs the encoder once more, with the other projector behind it.",
    ),
    oracles=(
        "equal projectors: the logits before the cut",
        "alpha 0 is the model with the positive projector",
        "two runs without a cache of models that have the projectors as their own",
        "each loss gives gradients to its own projector and to nothing else",
    ),
    whole_model=True,
    needs="pixels",
    neutral={"alpha": 0.0, "beta": 0.0},
    example={"alpha": 1.0, "beta": 0.0},
    options={
        "alpha": Option(kind="float", default=1.0, low=0.0, doc="how much of the negative view's logits is taken away"),
        "beta": Option(
            kind="float",
            default=0.1,
            low=0.0,
            high=1.0,
            doc="tokens below beta times the largest probability are cut; 0 cuts none",
        ),
        "positive": Option(
            kind="tensor",
            default=None,
            optional=True,
            doc="the projector of chosen answers, flat; none: the model's own",
        ),
        "negative": Option(kind="tensor", default=None, doc="the projector of rejected answers, flat"),
    },
)
# What families call the module between image encoder and language model.
PROJECTORS = ("multi_modal_projector", "connector", "merger")


def contrast(
    where: Where, *, alpha: float, beta: float, positive: Tensor | None, negative: Tensor | None
) -> Contrast | None:
    """A branch that sees the images through `negative`, the request through `positive`.

    Raises:
        RegardError: there is no negative projector, or one holds numbers that are not finite.
    """
    if alpha == 0 and beta == 0 and positive is None:
        return None
    if alpha > 0 and negative is None:
        raise RegardError("'dcd' needs a negative projector; regard.calibrate.dcd.fit trains it")
    for name, flat in (("positive", positive), ("negative", negative)):
        if flat is not None and not bool(flat.isfinite().all()):
            raise RegardError(f"'dcd' has a {name} projector whose weights are not finite numbers")

    def around(model: nn.Module, lent: Any) -> AbstractContextManager[None]:
        return swapped(projector(model), positive)

    def view(sight: Sight) -> list[Image]:
        with swapped(projector(sight.model), negative):
            return sight.encode()

    branches, weights = ((BranchSpec(view=view),), (1 + alpha, -alpha)) if alpha > 0 else ((), (1.0,))
    return Contrast("dcd", lambda z: weighted(z, weights, beta), branches, around=around)


def projector(model: nn.Module) -> nn.Module:
    """The module between image encoder and language model.

    Raises:
        RegardError: there is none of a known name.
    """
    for name, part in model.named_modules():
        if name.split(".")[-1] in PROJECTORS:
            return part
    raise RegardError(
        f"'dcd' looked for a projector in {type(model).__name__}, called {', '.join(PROJECTORS)}; found none"
    )


def flat(module: nn.Module) -> Tensor:
    """All parameters of `module` behind one another, `[n]`, a copy."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@contextmanager
def swapped(module: nn.Module, weights: Tensor | None) -> Iterator[None]:
    """Inside, `module` has `weights [n]` in place of its own; None: its own.

    Raises:
        RegardError: it has another number of weights.
    """
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters)
    if weights is None:
        yield
        return
    if weights.shape != (count,):
        raise RegardError(
            f"'dcd' has a projector of {list(weights.shape)} weights, and {type(module).__name__} has {count}"
        )
    own = [p.data for p in parameters]
    try:
        for p, part in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
            p.data = part.to(p).view_as(p)
        yield
    finally:
        for p, data in zip(parameters, own, strict=True):
            p.data = data
