"""Gated Linear Attention [133]: a forget gate for every key channel, through a low-rank map."""

from torch import Tensor, nn

from regard.core.errors import RegardError
from regard.layers.blocks.heads import LowRank, Output, join, linear, size, split
from regard.layers.blocks.norms import RMSNorm, wide
from regard.layers.blocks.recur import check, recur
from regard.ops.states.gla import gate as forget
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(RMSNorm_head(gla(q, k, v)) * silu(W_g x))`, channels forgetting `sigmoid(W x)^(1 / divisor)`.

    Args:
        width: channels of the residual stream.
        heads: H.
        expand_k: key channels of all heads over `width`.
        expand_v: value channels of all heads over `width`.
        gate_rank: of the map to the forget gates.
        gate_divisor: of their logarithms.
        eps: of the head norm.

    Raises:
        RegardError: channels do not divide among the heads.
    """

    # Products a token and layer, by [133] (see `models/cost.py`).
    cost = ("matrix", 7)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_divisor: float = 16.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        if gate_rank < 1 or gate_divisor <= 0:
            raise RegardError(f"gate_rank must be 1 or more and gate_divisor above 0, got {gate_rank}, {gate_divisor}")
        self.width, self.heads, self.divisor = width, heads, gate_divisor
        d, e = size("keys", width, expand_k, heads), size("values", width, expand_v, heads)
        self.scale = d**-0.5
        self.q, self.k, self.v = linear(width, heads * d), linear(width, heads * d), linear(width, heads * e)
        self.decay = LowRank(width, gate_rank, heads * d, bias=True)
        self.gate = linear(width, heads * e)
        self.norm = RMSNorm(e, eps=eps, gate="silu")
        self.out = Output(heads * e, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Memory | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, width]`, `mask [B, T]` bool (False: padding): `y [B, T, width]`."""
        check(x, self.width, memory, mask, cu_seqlens)
        q, k, v, gate = (split(project(x), self.heads) for project in (self.q, self.k, self.v, self.gate))
        decay = forget(wide(split(self.decay(x), self.heads)), divisor=self.divisor)
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        out = recur(q, k, v, decay=decay, scale=self.scale, **call)
        if memory is not None:
            memory.advance(x.shape[1])
        return self.out(join(self.norm(out, gate)))
