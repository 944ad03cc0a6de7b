"""A few blocks exactly, the middling ones by linear attention, the rest not at all (SLA, sparse-linear attention)."""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose
from regard.core.shapes import group_size
from regard.kernels import device
from regard.ops import blocks as block_lists
from regard.ops.routing import Routing, pooled, spread
from regard.primitives.reference import reference

CARD = Card(
    title="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    arxiv="2509.24006",
    sheet=47,
    implements="The operator, forward and backward: routing by pooled blocks, exact attention over critical blocks, "
    "linear attention over the others, in the three semantics that were released.",
    exact=False,
    saving="compute",
    departures=(
        "Keys are not centred before pooling: it shifts all scores of a block of queries alike and chooses the same.",
        "The shares of critical and negligible blocks (5 % and 10 %) are recalled from the paper, not read in code.",
    ),
    oracles=(
        "all blocks critical: torch's SDPA; zero projection: block-sparse attention alone",
        "each part equals its dense masked definition; chosen blocks summed equal the total less the others",
        "blocks of one token: routing by token; the last block is averaged over its true length",
        "gathered blocks and kernels equal the definition, gradients included",
    ),
    options={
        "critical": Option(kind="float", default=0.05, low=0.0, high=1.0, doc="share of key blocks read exactly"),
        "negligible": Option(kind="float", default=0.1, low=0.0, high=1.0, doc="share left out (semantics 'paper')"),
        "rows": Option(default=64, low=1, doc="tokens of a block of queries (the paper: 64 or 128)"),
        "keys": Option(default=64, low=1, doc="tokens of a block of keys"),
        "scale": Option(kind="float", default=None, optional=True, doc="of the exact scores; none: D ** -0.5"),
        "semantics": Option(
            kind="str",
            default="paper",
            choices=("paper", "rest", "all"),
            doc="what linear attention reads: the blocks between, all that are not critical (first release), or "
            "all, with 1e-5 added to its denominator (current release)",
        ),
        "features": Option(kind="str", default="softmax", choices=("softmax", "elu", "relu"), doc="of q and k"),
    },
)
BACKENDS = ("auto", "dense", "gather", "block")
FLOOR = 1e-5  # of the denominator, in the current release
FEATURES = {"softmax": lambda x: torch.softmax(x, -1), "elu": lambda x: F.elu(x) + 1, "relu": torch.relu}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    critical: float = 0.05,
    negligible: float = 0.1,
    rows: int = 64,
    keys: int = 64,
    semantics: str = "paper",
    features: str = "softmax",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`O = O_sparse + O_linear W^T + b`, without causality.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`.
        v: `[B, Hk, S, Dv]`.
        weight: `W [Dv, Dv]`, shared by heads; the paper begins with 0.
        bias: `b [Dv]`, or None.
        critical: share of a query block's key blocks that are read exactly, rounded down.
        negligible: share that is left out, rounded down (semantics "paper" only).
        rows: tokens of a block of queries.
        keys: tokens of a block of keys.
        semantics: "paper", "rest" or "all" (see the card).
        features: of queries and keys in the linear part: "softmax" (over channels), "elu" (plus 1) or "relu".
        scale: of the exact scores; None: `D ** -0.5`.
        backend: "dense" (the definition, N x S), "gather" (any device), "block" (kernels) or "auto".

    Returns:
        `[B, H, N, Dv]` in q's dtype. The routing carries no gradient.

    Raises:
        RegardError: shapes disagree, no block would be critical, or shares add up to more than 1.

    Source: SLA (2509.24006), section 4; thu-ml/SLA for "rest" and "all".
    """
    size = (rows, keys)
    _check(q, k, v, weight, bias, size)
    if semantics not in CARD.options["semantics"].choices:
        choose("semantics", semantics, CARD.options["semantics"].choices)
    if features not in FEATURES:
        choose("features", features, tuple(FEATURES))
    if backend not in BACKENDS:
        choose("backend", backend, BACKENDS)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    routing = route(q, k, critical=critical, negligible=negligible if semantics == "paper" else 0.0, size=size)
    exact = sparse(q, k, v, routing, size=size, scale=factor, backend=backend)
    if semantics == "all" and backend in ("auto", "block") and _kernel_refuses(q, k, v) is None:
        return _Linear.apply(q, k, v, weight, exact, bias, features)  # type: ignore[return-value]
    smooth = linear(q, k, v, routing, weight.to(q.dtype), size=size, semantics=semantics, features=features)
    return exact + smooth if bias is None else exact + smooth + bias.to(q.dtype)


@torch.no_grad()
def route(q: Tensor, k: Tensor, *, critical: float, negligible: float, size: tuple[int, int]) -> Routing:
    """Rank the key blocks of each block of queries: the first `critical` of them, the last `negligible`.

    The rank is that of the product of mean query and mean key. The device is not waited for.

    Raises:
        RegardError: no block would be critical, or the shares add up to more than 1.
    """
    blocks = -(-k.shape[2] // size[1])
    most, least = int(critical * blocks), int(negligible * blocks)
    if critical + negligible > 1:
        raise RegardError(f"critical and negligible blocks add up to more than all: {critical} + {negligible} > 1")
    if most < 1:
        raise RegardError(
            f"critical={critical} of {blocks} key blocks is none; it must be at least {1 / blocks:.4f}, "
            f"or blocks smaller than {size[1]}"
        )
    scores = pooled(q, size[0]) @ pooled(k, size[1]).repeat_interleave(group_size(q, k), 1).mT
    if least == 0:
        first = scores.topk(most, -1, sorted=False).indices
        return Routing(first.sort(-1).values, first[..., :0], blocks)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return Routing(order[..., :most].sort(-1).values, order[..., blocks - least :], blocks)


def sparse(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, *, size: tuple[int, int], scale: float, backend: str
) -> Tensor:
    """Softmax attention over the critical blocks alone, `[B, H, N, Dv]`."""
    if backend == "dense":
        wide = spread(routing.table(), size, (q.shape[2], k.shape[2]))
        group = group_size(q, k)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return reference(q, k, v, mask=wide, scale=scale)[0]
    why = block_lists.refuses(q, k, v, size=size)
    if why is None and backend != "gather":
        kernel = import_module("regard.kernels.attention.block")
        return kernel.attend(q, k, v, routing.listed(size, (q.shape[2], k.shape[2])), scale=scale)[0]
    if backend == "block":
        raise RegardError(f"backend 'block' refuses: {why}. Use backend='gather' or 'auto'")
    return routing.gathered(q, k, v, size=size, scale=scale)


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing | None,
    weight: Tensor,
    *,
    size: tuple[int, int],
    semantics: str,
    features: str,
) -> Tensor:
    """`phi(q) sum_j h_j / (phi(q) . sum_j z_j) W^T` with `h = phi(k)^T v`, `z = sum phi(k)` of the blocks that count.

    No routing is needed where all count.

    Returns:
        `[B, H, N, Dv]`, 0 where no block counts.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    a, b = FEATURES[features](q), FEATURES[features](k)
    group = group_size(q, k)
    if semantics == "all":
        # Projected before the queries read it: one product with all tokens less.
        h, z = b.mT @ v @ weight.mT, b.sum(2, dtype=exact)
        h, z = (x.repeat_interleave(group, 1) for x in (h, z))
        return ((a @ h) / ((a @ z.to(a.dtype)[..., None]).to(exact) + FLOOR)).to(q.dtype)
    assert routing is not None
    counted = routing.table(between=True)
    b, v = (F.pad(x, (0, 0, 0, -k.shape[2] % size[1])).unflatten(2, (-1, size[1])) for x in (b, v))
    h, z = b.mT @ v, b.sum(3, dtype=exact)
    h, z = (x.repeat_interleave(group, 1) for x in (h, z))
    total = (counted.to(h.dtype) @ h.flatten(3)).unflatten(3, h.shape[3:])
    mass = counted.to(z.dtype) @ z
    rows = F.pad(a, (0, 0, 0, -q.shape[2] % size[0])).unflatten(2, (-1, size[0]))
    below = (rows @ mass.to(a.dtype)[..., None]).to(exact).clamp(min=torch.finfo(exact).tiny)
    smooth = (rows @ total / below).to(q.dtype).flatten(2, 3)[:, :, : q.shape[2]]
    return smooth @ weight.mT


def _kernel_refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels of the linear part over all tokens cannot do this call, or None."""
    if why := device.refuses(q):
        return why
    return import_module("regard.kernels.sparsity.sla").refuses(q, k, v)


class _Linear(torch.autograd.Function):
    """`exact + linear(...) + bias` with semantics "all", by kernels; gradients by the definition."""

    @staticmethod
    def forward(ctx: Any, q, k, v, weight, exact, bias, features):
        ctx.save_for_backward(q, k, v, weight, bias)
        ctx.features = features
        kernel = import_module("regard.kernels.sparsity.sla")
        return kernel.linear(q, k, v, weight, exact, bias, features=features, floor=FLOOR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):
        *given, bias = ctx.saved_tensors
        q, k, v, weight = leaves = [x.detach().requires_grad_() for x in given]
        with torch.enable_grad():
            call = {"size": (1, 1), "semantics": "all", "features": ctx.features}
            out = linear(q, k, v, None, weight.to(q.dtype), **call)
        grads = torch.autograd.grad(out, leaves, dout)
        dbias = None if bias is None else dout.sum((0, 1, 2)).to(bias.dtype)
        return *grads, dout, dbias, None


def _check(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> None:
    """Raise RegardError for arguments that do not belong together."""
    shapes = [list(x.shape) for x in (q, k, v)]
    four = q.dim() == k.dim() == v.dim() == 4 and not any(0 in shape for shape in shapes)
    if not (four and q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]):
        raise RegardError(f"q [B, H, N, D], k [B, Hk, S, D] and v [B, Hk, S, Dv] disagree or are empty: got {shapes}")
    group_size(q, k)
    wide = v.shape[3]
    if weight.shape != (wide, wide) or (bias is not None and bias.shape != (wide,)):
        got = list(weight.shape), None if bias is None else list(bias.shape)
        raise RegardError(f"weight and bias must be [{wide}, {wide}] and [{wide}], got {got[0]} and {got[1]}")
    if min(size) < 1:
        raise RegardError(f"blocks need at least one token, got size {size}")
