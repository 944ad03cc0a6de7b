"""What reading one token costs by the model of [133]: mixers only, without their projections."""

from collections.abc import Iterable

from regard.core.errors import RegardError
from regard.layers import mixers
from regard.models.layouts import SOFTMAX


def per_token(mixer: str, *, width: int, heads: int, length: int) -> float:
    """Operations for one token in one layer after `length` tokens.

    Softmax attention: `2 T D`. A vector state: `5 D`. A matrix state: `k D^2 / H`, k = 5 where decays are fixed
    (RetNet), 7 where channels are gated (GLA, HGRN-2), 8 under the delta rule (DeltaNet, Gated DeltaNet).

    Raises:
        RegardError: no such mixer, or one that [133] gives no cost for.
    """
    if mixer == SOFTMAX:
        return 2.0 * length * width
    cost = getattr(mixers.load(mixer), "cost", None)
    if cost is None:
        raise RegardError(f"the analysis of hybrids [133] gives no cost for mixer {mixer!r}")
    kind, products = cost
    return float(products * width) if kind == "vector" else products * width**2 / heads


def decoder(names: Iterable[str], *, width: int, heads: int, length: int) -> float:
    """`per_token` over all layers of a decoder."""
    return sum(per_token(name, width=width, heads=heads, length=length) for name in names)
