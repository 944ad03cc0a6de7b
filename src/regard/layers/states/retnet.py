"""RetNet [133]: linear attention whose heads forget at fixed rates, with rotary positions."""

from torch import Tensor, nn

from regard.layers.blocks.heads import Output, join, linear, size, split
from regard.layers.blocks.norms import RMSNorm, exact
from regard.layers.blocks.positions import positions
from regard.layers.blocks.recur import check, recur
from regard.ops.states.retnet import decays
from regard.primitives.memory import Memory
from regard.primitives.rotary import rotate


class Mixer(nn.Module):
    """`y = W_o(RMSNorm_head(retention(q, k, v)) * silu(W_g x))`, head h forgetting `1 - 2^(-5 - h)` a token.

    Args:
        width: channels of the residual stream.
        heads: H.
        expand_k: key channels of all heads over `width`.
        expand_v: value channels of all heads over `width`.
        base: of the rotary positions.
        eps: of the head norm.

    Raises:
        RegardError: channels do not divide among the heads.
    """

    # Products a token and layer, by [133] (see `models/cost.py`).
    cost = ("matrix", 5)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        base: float = 10000.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.heads, self.base = width, heads, base
        d, e = size("keys", width, expand_k, heads), size("values", width, expand_v, heads)
        self.scale = d**-0.5
        self.q, self.k = linear(width, heads * d), linear(width, heads * d)
        self.v, self.gate = linear(width, heads * e), linear(width, heads * e)
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
        at = positions(x.shape[1], x.device, memory, mask)
        q, k = (rotate(split(project(x), self.heads), at, self.base) for project in (self.q, self.k))
        v, gate = split(self.v(x), self.heads), split(self.gate(x), self.heads)
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        out = recur(q, k, v, decay=decays(self.heads, x.device).to(exact(v.dtype)), scale=self.scale, **call)
        if memory is not None:
            memory.advance(x.shape[1])
        return self.out(join(self.norm(out, gate)))
