"""LOL: contrast with an amateur at the last layer and at a lower one, and with what an instruction adds."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import BranchSpec, Contrast
from regard.ops.branching import plausible

CARD = Card(
    title="Lower Layer Matters: Alleviating Hallucination via Multi-Layer Fusion Contrastive Decoding with "
    "Truthfulness Refocused",
    arxiv="2408.08769",
    sheet=177,
    implements="Contrast with an amateur at the last and at one lower layer, plus what an instruction adds; the "
    "amateur is another model of the same layout, an adapter, or the model's own early exit (DoLa).",
    exact=False,
    saving="none",
    departures=(
        "No code is public, and the abstract gives no formula: weights, layer and the form of the sum are inferred.",
        "The instruction is token ids, put in behind the first tokens of the prompt.",
    ),
    oracles=(
        "omega 0 and no instruction: log-probabilities of transformers' guidance processor at scale 1 + a",
        "an amateur that is the model: its own log-probabilities",
        "the last layer as the lower one: (1 + omega) times the contrast",
        "an exit at the last layer gives the model's own logits",
        "three runs without a cache, exits from their hidden states",
    ),
    whole_model=True,
    neutral={"strength": 0.0, "refocus": 0.0, "beta": 0.0},
    example={"amateur": "exit", "beta": 0.0},
    options={
        "amateur": Option(
            kind="str",
            default="model",
            choices=("model", "adapter", "exit"),
            doc="what is contrasted with: a model of the same layout (handle.lending), an adapter, the own lower layer",
        ),
        "adapter": Option(kind="str", default="default", doc="name of a loaded PEFT adapter that is switched off"),
        "strength": Option(kind="float", default=1.0, low=0.0, doc="weight a of the contrast with the amateur"),
        "omega": Option(kind="float", default=0.5, low=0.0, doc="weight of the lower layer within it"),
        "refocus": Option(kind="float", default=0.5, low=0.0, doc="weight lambda of what the instruction adds"),
        "beta": Option(
            kind="float",
            default=0.1,
            low=0.0,
            high=1.0,
            doc="tokens below beta times the largest probability are cut; 0 cuts none",
        ),
        "layer": Option(
            default=None, low=1, optional=True, doc="the lower layer, counted from 1; none: a quarter of the depth"
        ),
        "instruction": Option(kind="tokens", default=(), doc="asks for truth; empty: nothing is refocused"),
        "lead": Option(default=1, low=0, doc="prompt tokens that stay before the instruction (a first token)"),
    },
)


def contrast(
    where: Where,
    *,
    amateur: str,
    adapter: str,
    strength: float,
    omega: float,
    refocus: float,
    beta: float,
    layer: int | None,
    instruction: tuple[int, ...],
    lead: int,
) -> Contrast | None:
    """An amateur's branch, and one that is told the instruction.

    Raises:
        RegardError: the model has no such layer.
    """
    layer = max(1, where.layers // 4) if layer is None else layer
    if layer > where.layers:
        raise RegardError(f"'lol' has layer={layer}, and this model layers 1 to {where.layers}")
    told = refocus > 0 and bool(instruction)
    if strength == 0 and not told and beta == 0:
        return None
    own = strength > 0 and amateur == "exit"
    other = strength > 0 and amateur != "exit"
    exits = (layer,) if own or (other and omega > 0) else ()
    branches = []
    if other:
        enter = _Adapter(adapter) if amateur == "adapter" else _Model()
        branches.append(BranchSpec(around=enter.around, check=enter.check, exits=exits))
    if told:
        branches.append(BranchSpec(prompt=lambda ids, mask: instructed(ids, mask, instruction, lead)))

    def combine(z: Sequence[Tensor]) -> Tensor:
        rest = list(z)
        last = rest.pop(0)
        lower = rest.pop(0) if exits else None
        amateurs = (rest.pop(0), rest.pop(0) if exits else None) if other else (None, None)
        if own:
            # The own exit stands for the amateur's last layer.
            amateurs, lower = (lower, None), None
        weights = (strength, omega, refocus)
        return fused(last, lower, *amateurs, rest.pop(0) if told else None, weights, beta)

    return Contrast("lol", combine, tuple(branches), exits=exits)


def fused(
    last: Tensor,
    lower: Tensor | None,
    amateur: Tensor | None,
    amateur_lower: Tensor | None,
    told: Tensor | None,
    weights: tuple[float, float, float],
    beta: float,
) -> Tensor:
    """`log p + a (D_N + omega D_l) + lambda R` of logits `[..., V]`, in their dtype; -inf where the cut falls.

    Args:
        last: of the model at its last layer.
        lower: of the model at a lower layer.
        amateur: of the amateur at its last layer; None: no term `D_N = log p - log p_amateur`.
        amateur_lower: of the amateur at the lower layer; None: no such term there.
        told: of the model under the instruction; None: no such term.
        weights: a, omega and lambda.
        beta: of the cut, on `last`.
    """
    exact = torch.promote_types(last.dtype, torch.float32)

    def log(z: Tensor) -> Tensor:
        return z.to(exact).log_softmax(-1)

    (a, omega, refocus), p = weights, log(last)
    out = p
    if amateur is not None:
        out = out + a * (p - log(amateur))
    if lower is not None and amateur_lower is not None:
        out = out + a * omega * (log(lower) - log(amateur_lower))
    if told is not None:
        out = out + refocus * (log(told) - p)
    return plausible(out, p, beta).to(last.dtype)


def instructed(ids: Tensor, mask: Tensor, instruction: tuple[int, ...], lead: int) -> tuple[Tensor, Tensor]:
    """`ids`, `mask [B, N]` padded on the left, with `instruction` behind the first `lead` tokens of every row.

    Raises:
        RegardError: a row has fewer than `lead` tokens.
    """
    shortest = int(mask.sum(1).min())
    if lead > shortest:
        raise RegardError(f"'lol' has lead={lead}, and a prompt of {shortest} tokens; lead must not be longer")
    at = mask.shape[1] - mask.sum(1) + lead
    count, width = len(instruction), ids.shape[1] + len(instruction)
    place = torch.arange(width, device=ids.device).expand(ids.shape[0], -1)
    inside = (place >= at[:, None]) & (place < at[:, None] + count)
    source = torch.where(place < at[:, None], place, place - count).clamp(min=0)
    new = ids.new_tensor(instruction)[(place - at[:, None]).clamp(0, count - 1)]
    return torch.where(inside, new, ids.gather(1, source)), mask.gather(1, source).masked_fill(inside, 1)


class _Model:
    """The amateur is another model of the same layout, whose weights stand in while its branch runs."""

    def check(self, model: nn.Module, lent: Any) -> None:
        if not isinstance(lent, nn.Module):
            raise RegardError(
                "'lol' needs an amateur: handle.lending(model), an adapter (amateur='adapter'), or 'exit'"
            )
        own, other = (dict(part.named_parameters()) for part in (model, lent))
        odd = sorted(own.keys() ^ other.keys()) or [n for n, p in own.items() if p.shape != other[n].shape]
        if odd:
            shapes = " and ".join(str(list(x[odd[0]].shape)) if odd[0] in x else "none" for x in (own, other))
            raise RegardError(
                f"'lol' needs an amateur of this model's layout and vocabulary; {odd[0]} is {shapes} in the two"
            )
        for name, p in own.items():
            if (p.dtype, p.device) != (other[name].dtype, other[name].device):
                raise RegardError(
                    f"'lol' needs an amateur in {p.dtype} on {p.device}; its {name} is {other[name].dtype} on "
                    f"{other[name].device}"
                )

    @contextmanager
    def around(self, model: nn.Module, lent: Any) -> Iterator[None]:
        self.check(model, lent)
        other, own = dict(lent.named_parameters()), {name: p.data for name, p in model.named_parameters()}
        try:
            for name, p in model.named_parameters():
                p.data = other[name].data
            yield
        finally:
            for name, p in model.named_parameters():
                p.data = own[name]


class _Adapter:
    """The amateur is an adapter on the model itself, switched on while its branch runs."""

    def __init__(self, name: str):
        self._name = name

    def _layers(self, model: nn.Module) -> list[Any]:
        parts: list[Any] = [part for part in model.modules() if hasattr(part, "enable_adapters")]
        return [part for part in parts if self._name in getattr(part, "r", getattr(part, "scaling", {}))]

    def check(self, model: nn.Module, lent: Any) -> None:
        layers = self._layers(model)
        if not layers:
            raise RegardError(f"'lol' found no adapter {self._name!r} on {type(model).__name__}")
        if any(not part.disable_adapters and self._name in part.active_adapters for part in layers):
            raise RegardError(
                f"adapter {self._name!r} of 'lol' is on in the model itself; run inside model.disable_adapter()"
            )

    def around(self, model: nn.Module, lent: Any) -> AbstractContextManager[None]:
        return self._on(model)

    @contextmanager
    def _on(self, model: nn.Module) -> Iterator[None]:
        before = [(part, part.disable_adapters, list(part.active_adapters)) for part in self._layers(model)]
        trained = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for part, _, _ in before:
                part.enable_adapters(True)
                part.set_adapter(self._name)
            yield
        finally:
            for part, off, active in before:
                part.set_adapter(active)
                part.enable_adapters(not off)
            for p, wanted in trained:
                p.requires_grad_(wanted)
