"""Weights in another basis: the same model, which no longer averages with its siblings (MergeLock)."""

from dataclasses import replace

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.projections import Projections

CARD = Card(
    title="Model Unmerging: Making Your Models Unmergeable for Secure Model Sharing",
    arxiv="2509.01548",
    sheet=27,
    implements="Random invertible changes of basis inside the products of queries with keys and of values with the "
    "output projection.",
    exact=True,
    saving="none",
    departures=(
        "One basis a KV head, shared by the query heads that read it; the sampling law is inferred: singular values "
        "log-uniform between 1 / condition and condition.",
        "Under rotary positions the basis of queries and keys is a scaled turn of each rotated pair: nothing else "
        "commutes with every rotation.",
        "It does not hold against someone who has the base model or any sibling: least squares against its weights "
        "finds the bases (benchmarks/cases/mergelock.py does it).",
    ),
    oracles=(
        "products of projections unchanged head by head",
        "logits equal to 1e-5 (float32) and 1e-10 (float64) in every family it accepts",
        "a generic basis under rotary positions changes scores",
        "locking twice composes; condition 1 keeps norms",
        "a merge of tuned siblings keeps their accuracy, and falls below chance with one of them locked",
    ),
    whole_layers=True,
    neutral={"parts": "none"},
    example={"parts": "vo", "seed": 1},
    options={
        "parts": Option(
            kind="str",
            default="both",
            choices=("both", "qk", "vo", "none"),
            doc="queries and keys, values and output, or both; models that normalise queries and keys take vo alone",
        ),
        "condition": Option(kind="float", default=10.0, low=1.0, high=1e4, doc="largest stretch of a basis"),
        "seed": Option(default=0, low=0, doc="of the bases; whoever knows it can undo them"),
    },
)


def edit(where: Where, projections: Projections, *, parts: str, condition: float, seed: int) -> Projections | None:
    """Turn the layer's projections into random bases.

    Raises:
        RegardError: queries and keys are normalised after projection, and `parts` is not "vo".
    """
    if parts == "none":
        return None
    if parts != "vo" and projections.normed:
        raise RegardError("'mergelock' cannot turn queries and keys that are normalised after projection; parts='vo'")
    drawn = torch.Generator().manual_seed(seed * 1_000_003 + where.layer)
    made, group = projections, where.heads // where.kv_heads
    if parts != "vo":
        bases = torch.stack([commuting(where.head_dim, made.rotary, condition, drawn) for _ in range(where.kv_heads)])
        made = turn_qk(made, bases.to(made.q), group)
    if parts != "qk":
        bases = torch.stack([invertible(where.head_dim, condition, drawn) for _ in range(where.kv_heads)])
        made = turn_vo(made, bases.to(made.v), group)
    return made


def turn_qk(made: Projections, bases: Tensor, group: int) -> Projections:
    """`q A`, `k A^-T` for row vectors, with one `A` of `bases [Hk, D, D]` a KV head."""
    back = torch.linalg.inv(bases).mT
    of_query = bases.repeat_interleave(group, 0)
    return replace(
        made,
        q=of_query.mT @ made.q,
        k=back.mT @ made.k,
        q_bias=_bias(made.q_bias, of_query),
        k_bias=_bias(made.k_bias, back),
    )


def turn_vo(made: Projections, bases: Tensor, group: int) -> Projections:
    """`v C`, `C^-1 o` for row vectors, with one `C` of `bases [Hk, D, D]` a KV head."""
    back = torch.linalg.inv(bases).repeat_interleave(group, 0)
    out = torch.einsum("chd,hed->che", made.o, back)
    return replace(made, v=bases.mT @ made.v, o=out, v_bias=_bias(made.v_bias, bases))


def _bias(bias: Tensor | None, bases: Tensor) -> Tensor | None:
    return None if bias is None else torch.einsum("hd,hde->he", bias, bases)


def invertible(size: int, condition: float, drawn: torch.Generator) -> Tensor:
    """`U diag(s) V^T`, float64, with log-uniform singular values in `[1 / condition, condition]`."""
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=drawn, dtype=torch.float64))[0] for _ in range(2))
    spread = torch.rand(size, generator=drawn, dtype=torch.float64) * 2 - 1
    return u @ torch.diag(condition**spread) @ v.T


def commuting(size: int, rotary: int, condition: float, drawn: torch.Generator) -> Tensor:
    """An invertible matrix that commutes with turns of channel pairs `(i, i + rotary / 2)`; generic beyond `rotary`."""
    made = torch.zeros(size, size, dtype=torch.float64)
    half = torch.arange(rotary // 2)
    angle = torch.rand(rotary // 2, generator=drawn, dtype=torch.float64) * 2 * torch.pi
    scale = condition ** (torch.rand(rotary // 2, generator=drawn, dtype=torch.float64) * 2 - 1)
    made[half, half] = made[half + rotary // 2, half + rotary // 2] = scale * angle.cos()
    made[half, half + rotary // 2], made[half + rotary // 2, half] = scale * angle.sin(), -scale * angle.sin()
    if rotary < size:
        made[rotary:, rotary:] = invertible(size - rotary, condition, drawn)
    return made
