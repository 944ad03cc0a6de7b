"""Visual attention redistribution (VAR): heads that look at the image move attention from sinks to its other tokens."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Reading, Reweigh, State, Watch
from regard.core.step import Step
from regard.core.token_map import Kind
from regard.ops.massive import magnitudes

CARD = Card(
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    arxiv=None,
    sheet=118,
    implements="Sinks by massive activations where the stream enters a layer, the test of heads and rows, and their "
    "gains. The paper leaves out the first two layers and the last: say so in the placement's layers.",
    exact=False,
    saving="none",
    departures=(
        "With several images, rows behind the last one are edited.",
        "Without dimensions, those are taken that are massive at the row's first token (inferred).",
    ),
    oracles=(
        "the paper's edit of a built map, head by head and row by row",
        "rows sum to 1; the order among other image tokens, and among text, stays",
        "a planted token with a massive activation is the only visual sink, whatever the stream's scale",
    ),
    needs="image",
    neutral={"keep": 1.0},
    example={"tau": 1.6, "rho": 1.0, "least": 0.0},
    options={
        "keep": Option(
            kind="float", default=0.6, low=0.0, high=1.0, search=(0.4, 0.6, 0.8), doc="what a sink keeps of its weight"
        ),
        "tau": Option(kind="float", default=20.0, low=0.0, high=1e6, doc="a massive activation, in root mean squares"),
        "rho": Option(
            kind="float", default=0.5, low=0.0, high=1.0, doc="most of visual attention that may lie on visual sinks"
        ),
        "least": Option(kind="float", default=0.2, low=0.0, high=1.0, doc="least visual attention of a head and row"),
        "dimensions": Option(
            kind="str",
            default=None,
            optional=True,
            doc="hidden dimensions that tell sinks, as '1415,2533' for Llama-2-7B; none: massive at the first token",
        ),
    },
)

# Whether the prompt's tokens are sinks, by arrival, and the dimensions that are massive at each row's first token.
SINKS, MASSIVE = "var sinks", "var massive"
REST, OTHER, VISUAL, TARGETS = range(4)


def reweigh(
    where: Where, *, keep: float, tau: float, rho: float, least: float, dimensions: str | None
) -> Reweigh | None:
    """Gains `keep` on sinks, and on the image's other tokens what makes up for it, where a head looks at the image."""
    _dimensions(dimensions, where)
    if keep == 1:
        return None
    heads = torch.zeros(where.heads, dtype=torch.bool)
    heads[where.rows(where.heads)] = True
    told = partial(gains, keep=keep, rho=rho, least=least, heads=heads)
    return Reweigh(f"var: keep {keep:g}", 4, segments, told, _behind)


def watch(where: Where, *, keep: float, tau: float, rho: float, least: float, dimensions: str | None) -> Watch | None:
    """Finds sinks among the prompt's tokens where the residual stream enters the layer.

    Raises:
        RegardError: `dimensions` are not whole numbers, or one that the stream does not have.
    """
    known = _dimensions(dimensions, where)
    return None if keep == 1 else Watch("var: watches massive activations", partial(_find, known, tau))


def gains(masses: Tensor, *, keep: float, rho: float, least: float, heads: Tensor | None = None) -> Tensor:
    """Gains `[4, B, H, R]` for masses of other keys, other sinks, visual sinks, and the image's other tokens.

    1 for all where a row of a head looks at the image with less than `least`, or of that more than `rho` at sinks,
    where there is no visual sink, or no attention on the image's other tokens; and outside `heads [H]`.
    """
    _, other, visual, targets = masses
    tiny = torch.finfo(masses.dtype).tiny
    seen = visual + targets
    moved = (seen >= least) & (visual <= rho * seen) & (visual > 0) & (targets > tiny)
    if heads is not None:
        moved = moved & heads.to(moved.device)[None, :, None]
    up = 1 + (1 - keep) * (other + visual) / targets.masked_fill(targets <= tiny, 1)
    sinks = torch.full_like(up, keep)
    found = torch.stack((torch.ones_like(up), sinks, sinks, up))
    return torch.where(moved, found, 1)


def segments(reading: Reading) -> Tensor | None:
    """0 rest, 1 other sinks, 2 visual sinks, 3 the image's other tokens: `[B, 1|H, R, S]`, 0 in rows before it."""
    if SINKS not in reading.state:
        return None
    step = reading.step
    tokens = step.said("var")
    visual, sinks = reading.kinds("var") == Kind.VISUAL, reading.held(reading.state[SINKS], False)
    told = torch.where(visual, torch.where(sinks, VISUAL, TARGETS), torch.where(sinks, OTHER, REST))[:, :, None]
    image = tokens.of(Kind.VISUAL).long()
    last = (image * torch.arange(tokens.length, device=image.device)).amax(1, keepdim=True)
    behind = (step.arrivals.to(image.device) > last)[:, None, :, None]
    return told * behind


def _behind(step: Step) -> slice | None:
    """Arrivals behind the image of the row where it ends first."""
    tokens = step.tokens
    if tokens is None:
        return None
    ends = (tokens.of(Kind.VISUAL).long() * torch.arange(tokens.length, device=tokens.kinds.device)).amax(1)
    return slice(int(ends.min()) + 1, None)


@torch.no_grad()
def _find(dimensions: Sequence[int], tau: float, x: Tensor, step: Step, state: State) -> None:
    """Keep which tokens of the prompt are sinks, after what a crop left."""
    stop = min(step.stop, step.answer or step.stop)
    if step.start >= stop:
        return
    large = magnitudes(x[:, : stop - step.start]) > tau
    first = step.queries(x.device)[:, : stop - step.start] == 0
    if dimensions:
        told = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        told[list(dimensions)] = True
        state[MASSIVE] = told.expand(len(x), -1).clone()
    elif step.start == 0:
        state[MASSIVE] = (large & first[..., None]).any(1)
    else:
        state[MASSIVE] = state[MASSIVE] | (large & first[..., None]).any(1)
    found = (large & state[MASSIVE][:, None]).any(-1)
    past = state[SINKS][:, : step.start] if SINKS in state else found[:, :0]
    state[SINKS] = torch.cat((past, found), 1)


def _dimensions(told: str | None, where: Where) -> Sequence[int]:
    parts = [] if told is None else [part.strip() for part in told.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RegardError(f"'var' needs dimensions such as '1415,2533', got {told!r}")
    found = [int(part) for part in parts]
    worst = max(found, default=0)
    if found and worst >= where.width:
        raise RegardError(f"'var' has dimension {worst}, this model's stream has dimensions 0 to {where.width - 1}")
    return found
