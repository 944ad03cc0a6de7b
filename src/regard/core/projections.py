"""The weights of one attention layer, by head, whatever the model calls and fuses them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """What a `parameters` mechanism edits. Row vectors: `query = q x + q_bias` for `x [d]`.

    Args:
        q: `[H, D, d]`. k: `[Hk, D, d]`. v: `[Hk, D, d]`. o: `[d, H, D]`.
        q_bias, k_bias, v_bias: `[H or Hk, D]`, None where the model has none.
        rotary: leading channels of a head that rotary positions turn, channel `i` with `i + rotary / 2`.
        normed: whether queries and keys are normalised after projection.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    rotary: int
    normed: bool
