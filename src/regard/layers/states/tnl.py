"""TransNormerLLM [003]: lightning attention, heads forgetting at fixed rates that fade with depth, gated and normed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import choose
from regard.layers.blocks import norms
from regard.layers.blocks.heads import LowRank, Output, join, linear, size, split
from regard.layers.blocks.positions import LRPE, positions
from regard.layers.blocks.recur import check, recur
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(gate * norm(lightning(silu(q), silu(k), v)))`, the norm over all heads together.

    Args:
        width: channels of the residual stream.
        heads: H.
        layer: number of the layer, from 0.
        layers: of the decoder.
        lrpe: learned relative positions; None: in layer 0 only.
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
        lrpe: bool | None = None,
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
        self.lrpe = LRPE(heads, d) if (layer == 0 if lrpe is None else lrpe) else None
        self.norm = norms.norm(norm, heads * d, eps)
        self.out = Output(heads * d, width, bias=False)

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
        if self.lrpe is not None:
            at = positions(x.shape[1], x.device, memory, mask)
            q, k = self.lrpe(q, at), self.lrpe(k, at)
        kind, layer, layers = self.schedule
        decay = -slopes(self.heads, layer=layer, layers=layers, schedule=kind, device=x.device)
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        out = self.norm(join(recur(q, k, v, decay=decay, **call)))
        if memory is not None:
            memory.advance(x.shape[1])
        gate = self.gate(x)
        return self.out((gate if self.gating == "linear" else torch.sigmoid(gate)) * out)


def slopes(heads: int, *, layer: int, layers: int, schedule: str, device: torch.device) -> Tensor:
    """STAND-IN."""

    def power(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    low = 1 << (heads.bit_length() - 1)
    made = power(heads) if low == heads else power(low) + power(2 * low)[0::2][: heads - low]
    if schedule == "fla":
        made, fade = [8 * h / heads for h in range(heads)], 1 - layer / layers
    elif schedule == "minimax":
        fade = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    else:
        fade = 1 - layer / max(layers - 1, 1) + 1e-5
    return torch.tensor(made, device=device) * fade
