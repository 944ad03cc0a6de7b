"""Intermediate representation injection (IRI): outputs of the strongest layers are added again to later ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Write
from regard.core.step import Step

CARD = Card(
    title="Causal Tracing of Object Representations in Large Vision Language Models: Mechanistic Interpretability "
    "and Hallucination Mitigation",
    arxiv="2511.05923",
    sheet=175,
    implements="Injection (IRI) at the last token, for attention and feed-forward outputs; the recovery rates it "
    "needs come from causal tracing on text (regard.calibrate.iri), not on images.",
    exact=False,
    saving="none",
    departures=(
        "At every step the last token: the last prompt row and all response rows (the paper does not say).",
        "What is injected is the output before any injection into its own layer (the paper does not say).",
        "In models with a norm behind a part, its output is what that norm gives: what joins the residual stream.",
        "Models with fewer layers than sources or targets take all of them.",
    ),
    oracles=(
        "strength 0 changes nothing, to the bit",
        "norms of what is added stay",
        "one row and one layer at a time, in a loop",
        "nothing is injected where every source lies behind every target",
        "a toy that copies a token in one layer: its recovery rate is above 0.8, all others below 0.2, and the "
        "injection raises the right logit",
    ),
    aliases=("fcct_iri",),
    whole_model=True,
    neutral={"attention_strength": 0.0, "feed_forward_strength": 0.0},
    example={"sources": 2, "targets": 3},
    options={
        "sources": Option(default=3, low=1, doc="layers with the highest rates, whose outputs are injected"),
        "targets": Option(default=10, low=1, doc="layers with the highest rates, which take what came before them"),
        "attention_strength": Option(
            kind="float",
            default=0.26,
            low=0.0,
            high=1.0,
            doc="of what is injected into attention outputs (the paper: 0.26, 0.20 or 0.15 by model)",
        ),
        "feed_forward_strength": Option(
            kind="float",
            default=0.16,
            low=0.0,
            high=1.0,
            doc="of what is injected into feed-forward outputs (the paper: 0.16, 0.10 or 0.08 by model)",
        ),
        "attention_rates": Option(
            kind="tensor",
            default=None,
            shape=("layers",),
            doc="[L] recovery rate of each layer's attention output at the last token",
        ),
        "feed_forward_rates": Option(
            kind="tensor",
            default=None,
            shape=("layers",),
            doc="[L] recovery rate of each layer's feed-forward output at the last token",
        ),
    },
)


def write(
    where: Where,
    *,
    sources: int,
    targets: int,
    attention_strength: float,
    feed_forward_strength: float,
    attention_rates: Tensor | None,
    feed_forward_rates: Tensor | None,
) -> Write | None:
    """What layer `where.layer` keeps for later layers, and takes from earlier ones.

    Raises:
        RegardError: rates are missing, not one a layer, or not finite.
    """
    strengths = {"attention": attention_strength, "feed_forward": feed_forward_strength}
    given = {"attention": attention_rates, "feed_forward": feed_forward_rates}
    takes, keeps, idle = {}, set(), True
    for part, strength in strengths.items():
        if strength == 0:
            continue
        plan = injections(_rates(where, part, given[part]), sources, targets, strength)
        idle &= not plan
        if where.layer in plan:
            takes[part] = plan[where.layer]
        if any(where.layer in weights for weights in plan.values()):
            keeps.add(part)
    if idle and any(strengths.values()) and where.layer == 0:
        return Write("iri: every source lies behind every target, nothing is injected", lambda part, x, step: x)
    if not takes and not keeps:
        return None

    def run(part: str, x: Tensor, step: Step) -> Tensor:
        rows = last_rows(step)
        if rows is None or not (part in takes or part in keeps):
            return x
        own = x[:, rows:]
        if part in keeps:
            step.shared[("iri", part, where.layer)] = own
        if part not in takes:
            return x
        kept = [(weight, step.shared[("iri", part, layer)]) for layer, weight in takes[part].items()]
        return torch.cat((x[:, :rows], inject(own, kept)), dim=1)

    return Write(_told(takes, keeps), run)


def injections(rates: Tensor, sources: int, targets: int, strength: float) -> dict[int, dict[int, float]]:
    """Target layer -> source layers before it, each with `strength` times its rate; targets that take nothing left out.

    Args:
        rates: `[L]` recovery rates; equal ones rank in the order of layers.
        sources: how many of the highest-ranking layers are injected.
        targets: how many of them take what came before them.
        strength: of all that is injected.
    """
    order = rates.argsort(descending=True, stable=True).tolist()
    plan = {}
    for target in sorted(order[:targets]):
        weights = {k: strength * float(rates[k]) for k in sorted(order[:sources]) if k < target}
        if weights:
            plan[target] = weights
    return plan


def inject(x: Tensor, kept: Sequence[tuple[float, Tensor]]) -> Tensor:
    """`x + sum_k weight_k kept_k`, each vector `[..., d]` at the norm it has in `x`; in x's dtype."""
    exact = torch.promote_types(x.dtype, torch.float32)
    was = now = x.to(exact)
    for weight, source in kept:
        now = now + weight * source.to(now)
    norm = now.norm(dim=-1, keepdim=True)
    scale = was.norm(dim=-1, keepdim=True) / norm.masked_fill(norm == 0, 1)
    # A sum that vanishes has no direction to give the norm to.
    return torch.where(norm == 0, was, now * scale).to(x.dtype)


def last_rows(step: Step) -> int | None:
    """The first row of this forward that is the prompt's last or a response row; None: there is none.

    Where the end of the prompt is not known there is none.
    """
    if step.prompt is None or step.stop < step.prompt:
        return None
    return max(step.prompt - 1 - step.start, 0)


def _rates(where: Where, part: str, given: Tensor | None) -> Tensor:
    if given is None or tuple(given.shape) != (where.layers,):
        found = "nothing" if given is None else str(list(given.shape))
        raise RegardError(
            f"'iri' needs {part}_rates of shape [layers] = [{where.layers}], got {found}; "
            f"regard.calibrate.iri finds them, {part}_strength 0 needs none"
        )
    if not bool(given.isfinite().all()):
        raise RegardError(f"'iri' has {part}_rates that are not finite numbers")
    return given.detach().cpu().double()


def _told(takes: Mapping[str, Mapping[int, float]], keeps: set[str]) -> str:
    said = []
    for part in ("attention", "feed_forward"):
        name = part.replace("_", "-")
        if part in takes:
            said.append(f"{name} takes that of layer {', '.join(map(str, takes[part]))}")
        if part in keeps:
            said.append(f"{name} is kept for later layers")
    return "iri: " + ", ".join(said)
