"""Each query its own inverse temperature, each value its own scale (Selective Attention)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Prepare
from regard.core.step import Step

CARD = Card(
    title="Selective Attention: Enhancing Transformer through Principled Context Control",
    arxiv="2411.12892",
    sheet=68,
    implements="The temperature of queries by position (the official code's two forms) and by token, and the scale "
    "of values by token.",
    exact=False,
    saving="none",
    departures=(
        "Folded into queries and values, so that any attention kernel computes it.",
        "The token part reads projected vectors after rotary positions, where the seam lies.",
        "The scale of values is 1 + tanh of its map: at zero weights nothing changes.",
    ),
    oracles=(
        "scaling queries and values equals the eager form of the paper",
        "the first token is not scaled by position",
        "sharper queries never raise the entropy of a row",
        "decoding token by token equals the parallel form",
    ),
    aliases=("selective_attention",),
    neutral={"beta": None},
    example={"beta": 0.3},
    options={
        "beta": Option(
            kind="float",
            default=2.0,
            low=-20.0,
            high=20.0,
            optional=True,
            doc="temperature by position, larger is gentler in form 'exp'; none: no position part",
        ),
        "betas": Option(
            kind="tensor",
            default=None,
            shape=("layers",),
            low=-20.0,
            high=20.0,
            doc="[L] a beta for each layer, fitted under the same form; replaces beta; none: beta everywhere",
        ),
        "form": Option(
            kind="str",
            default="exp",
            choices=("exp", "linear"),
            doc="'exp': 1 + exp(-exp(beta)) log n; 'linear': 1 + beta log n; n counts visible positions from 1",
        ),
        "query_map": Option(
            kind="tensor",
            default=None,
            shape=("layers", "head_dim"),
            low=-1.0,
            high=1.0,
            doc="[L, D] map of a query to its temperature's token part; none: no token part",
        ),
        "value_map": Option(
            kind="tensor",
            default=None,
            shape=("layers", "head_dim"),
            low=-1.0,
            high=1.0,
            doc="[L, D] map of a value to its scale; none: values as they come",
        ),
    },
)


def prepare(
    where: Where,
    *,
    beta: float | None,
    betas: Tensor | None,
    form: str,
    query_map: Tensor | None,
    value_map: Tensor | None,
) -> Prepare | None:
    """Scale queries by `tau_position + tanh(query_map . q)` and values by `1 + tanh(value_map . v)`.

    Raises:
        RegardError: `betas` is not `[L]`, or a map is not `[L, D]`.
    """
    _check_shapes(where, betas, query_map, value_map)
    rate = beta if betas is None else betas[where.layer]
    if rate is None and query_map is None and value_map is None:
        return None

    def query(q: Tensor, step: Step) -> Tensor:
        scale = temperature(step.queries(q.device) + 1, rate, form)[:, None, :, None].to(q.dtype)
        if query_map is not None:
            scale = scale + token_part(q, query_map[where.layer])
        return _placed(q, scale, where)

    def value(v: Tensor, step: Step) -> Tensor:
        return v if value_map is None else _placed(v, 1 + token_part(v, value_map[where.layer]), where)

    told = "selective" + ("" if rate is None else f" beta {float(torch.as_tensor(rate).detach()):.3g}")
    return Prepare(told, query=query, value=value)


def _check_shapes(where: Where, betas: Tensor | None, query_map: Tensor | None, value_map: Tensor | None) -> None:
    a_layer, a_map = ("[layers]", (where.layers,)), ("[layers, head dimension]", (where.layers, where.head_dim))
    for name, given, (axes, shape) in (
        ("betas", betas, a_layer),
        ("query_map", query_map, a_map),
        ("value_map", value_map, a_map),
    ):
        if given is not None and tuple(given.shape) != shape:
            raise RegardError(f"'selective' has {name} {list(given.shape)}, this model needs {axes} = {list(shape)}")


def temperature(n: Tensor, beta: float | Tensor | None, form: str = "exp") -> Tensor:
    """`tau(n)` of the `n`-th position (from 1; padding counts as the first), float32; 1 where there is no beta."""
    log = n.clamp(min=1).float().log()
    if beta is None:
        return torch.ones_like(log)
    rate = torch.as_tensor(beta, device=n.device).float()
    return 1 + (torch.exp(-torch.exp(rate)) if form == "exp" else rate) * log


def token_part(x: Tensor, weight: Tensor) -> Tensor:
    """`tanh(x . weight)`: one number a token and head, `[B, heads, T, 1]`, from `x [B, heads, T, D]`."""
    return torch.tanh(x @ weight.to(x))[..., None]


def _placed(x: Tensor, scale: Tensor, where: Where) -> Tensor:
    """`x` scaled in the placed heads only."""
    if len(where.placed) == where.kv_heads:
        return x * scale
    rows = where.rows(x.shape[1])
    chosen = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    chosen[rows] = True
    return torch.where(chosen[:, None, None], x * scale, x)
