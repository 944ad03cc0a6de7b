"""HGRN [133]: every channel a gated memory of its own, a vector for a state."""

from torch import Tensor, nn
from torch.nn import functional as F

from regard.layers.blocks.heads import Output, linear
from regard.layers.blocks.norms import RMSNorm, wide
from regard.layers.blocks.recur import check
from regard.ops.states.hgrn import gate, scan
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(RMSNorm(h) * silu(W_g x))`, `h_t = alpha h_{t-1} + (1 - alpha) silu(W_i x)`, alpha as in HGRN-2.

    Args:
        width: channels of the residual stream.
        heads: taken as of every mixer, without effect: each channel is a head.
        eps: of the norm.
    """

    # Products a token and layer, by [133] (see `models/cost.py`).
    cost = ("vector", 5)

    def __init__(self, width: int, heads: int, *, eps: float = 1e-5):
        super().__init__()
        self.width = self.bound_size = width
        self.i, self.f, self.gate = linear(width, width), linear(width, width), linear(width, width)
        self.norm = RMSNorm(width, eps=eps, gate="silu")
        self.out = Output(width, width, bias=False)

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

        `bound [width]`, in [0, 1), is the least that is remembered; None: 0.
        """
        check(x, self.width, memory, mask, cu_seqlens)
        state = memory.get("state") if memory is not None else None
        decay, taken = gate(wide(self.f(x)), bound), F.silu(self.i(x))
        h, state = scan(taken, decay, initial_state=state, mask=mask, cu_seqlens=cu_seqlens, check=False)
        if memory is not None:
            memory.set("state", state)
            memory.advance(x.shape[1])
        return self.out(self.norm(h, self.gate(x)))
