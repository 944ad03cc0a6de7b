"""TransNormerLLM [003]: lightning attention, heads forgetting at fixed rates that fade with depth, gated and normed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import choose
from regard.layers.blocks.heads import LowRank, Output, join, linear, size, split
from regard.layers.blocks.norms import exact, wide
from regard.layers.blocks.norms import norm as make_norm
from regard.layers.blocks.positions import positions
from regard.layers.blocks.recur import check, recur
from regard.ops.states.tnl import lrpe, lrpe_start, slopes
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(gate * norm(lightning(silu(q), silu(k), v)))`, the norm over all heads together.

    Args:
        width: channels of the residual stream.
        heads: H.
        layer: number of the layer, from 0.
        layers: of the decoder.
        positions: learned relative positions; None: in layer 0 only.
        gate: `linear` (u = W_u x), `sigmoid` (of W_u x) or `low_rank` (sigmoid, through one head's channels).
        norm: `srms` (without weights), `rms` or `layer`.
        value_silu: SiLU on the values too (the kernel repository's example layer, MiniMax).
        schedule: of the slopes: `tnl`, `fla` or `minimax`.
        eps: of the norm.

    Raises:
        RegardError: channels do not divide among the heads, or no such gate, norm or schedule.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        positions: bool | None = None,
        gate: str = "linear",
        norm: str = "srms",
        value_silu: bool = False,
        schedule: str = "tnl",
        eps: float = 1e-6,
    ):
        super().__init__()
        d = size("heads", width, 1.0, heads)
        self.width, self.heads, self.value_silu = width, heads, value_silu
        self.gating = choose("gate", gate, ("linear", "sigmoid", "low_rank"))
        self.schedule = (choose("schedule of slopes", schedule, ("tnl", "fla", "minimax")), layer, layers)
        self.qkv = linear(width, 3 * heads * d)
        self.gate = LowRank(width, d, heads * d) if gate == "low_rank" else linear(width, heads * d)
        self.theta = nn.Parameter(lrpe_start(heads, d)) if (layer == 0 if positions is None else positions) else None
        self.norm = make_norm(norm, heads * d, eps)
        self.out = Output(heads * d, width, bias=False)

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters that are not projections."""
        return {} if self.theta is None else {"theta": lrpe_start(*self.theta.shape[::2])}

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
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k, v = F.silu(q), F.silu(k), F.silu(v) if self.value_silu else v
        if self.theta is not None:
            at = positions(x.shape[1], x.device, memory, mask)
            q, k = (lrpe(part, wide(self.theta), at) for part in (q, k))
        kind, layer, layers = self.schedule
        decay = -slopes(self.heads, layer, layers, kind, device=x.device).to(exact(v.dtype))
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        out = self.norm(join(recur(q, k, v, decay=decay, **call)))
        if memory is not None:
            memory.advance(x.shape[1])
        gate = self.gate(x)
        return self.out((gate if self.gating == "linear" else torch.sigmoid(gate)) * out)
