"""HGRN-2 [133]: what a channel forgets is what it takes in, `k = 1 - alpha`, with a matrix for a state."""

from torch import Tensor, nn
from torch.nn import functional as F

from regard.layers.blocks.heads import Output, join, linear, size, split
from regard.layers.blocks.norms import RMSNorm, wide
from regard.layers.blocks.recur import check, recur
from regard.ops.states.hgrn2 import gate
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o RMSNorm(gla(silu(W_q x), 1 - alpha, W_i x))`, `alpha = bound + (1 - bound) sigmoid(W_f x)`.

    Args:
        width: channels of the residual stream.
        heads: H.
        expand_k: key channels of all heads over `width`; the paper has 128 a head.
        eps: of the norm, over all heads together.

    Raises:
        RegardError: channels do not divide among the heads.
    """

    # Products a token and layer, by [133] (see `models/cost.py`).
    cost = ("matrix", 7)

    def __init__(self, width: int, heads: int, *, expand_k: float = 1.0, eps: float = 1e-5):
        super().__init__()
        self.width, self.heads = width, heads
        d, e = size("keys", width, expand_k, heads), size("values", width, 1.0, heads)
        self.scale = d**-0.5
        self.bound_size = heads * d
        self.q, self.f, self.i = linear(width, heads * d), linear(width, heads * d), linear(width, heads * e)
        self.norm = RMSNorm(heads * e, eps=eps)
        self.out = Output(heads * e, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Memory | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bound: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, width]`, `mask [B, T]` bool (False: padding): `y [B, T, width]`.

        `bound [bound_size]`, in [0, 1), is the least that is remembered; None: 0.
        """
        check(x, self.width, memory, mask, cu_seqlens)
        decay = split(gate(wide(self.f(x)), bound), self.heads)
        q, v = F.silu(split(self.q(x), self.heads)), split(self.i(x), self.heads)
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        out = recur(q, -decay.expm1().to(q.dtype), v, decay=decay, scale=self.scale, **call)
        if memory is not None:
            memory.advance(x.shape[1])
        return self.out(self.norm(join(out)))
