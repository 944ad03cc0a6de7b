"""Gated DeltaNet [133]: the delta rule with a scalar forget gate for every head and token."""

import torch
from torch import Tensor, nn

from regard.layers.blocks.delta import DeltaInputs
from regard.layers.blocks.gates import decay_bias
from regard.layers.blocks.heads import Output, join, linear, size, split, whole_groups
from regard.layers.blocks.norms import RMSNorm, wide
from regard.layers.blocks.recur import check, recur
from regard.ops.states.gated_delta_net import gate as forget
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(RMSNorm_head(gated_delta(q, k, v)) * silu(W_g x))` with q, k, v from short convolutions.

    Args:
        width: channels of the residual stream.
        heads: Hk; key heads.
        value_heads: H, a multiple of `heads`; None: `heads`.
        expand_k: key channels of all key heads over `width`.
        expand_v: value channels of all value heads over `width`.
        kernel: of the short convolutions.
        gate: whether the output is gated.
        negative_eigenvalues: write strengths up to 2 instead of 1.
        eps: of the head norm.

    Raises:
        RegardError: channels do not divide among the heads, or value heads are not a multiple of key heads.
    """

    # Products a token and layer, by [133] (see `models/cost.py`).
    cost = ("matrix", 8)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        value_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        kernel: int = 4,
        gate: bool = True,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.value_heads = width, heads if value_heads is None else value_heads
        whole_groups(self.value_heads, heads)
        d, e = size("keys", width, expand_k, heads), size("values", width, expand_v, self.value_heads)
        self.scale = d**-0.5
        most = 2.0 if negative_eigenvalues else 1.0
        self.inputs = DeltaInputs(width, heads, self.value_heads, d, e, kernel, most)
        self.decay = linear(width, self.value_heads)
        start = self.initial()
        self.a, self.bias = nn.Parameter(start["a"]), nn.Parameter(start["bias"])
        self.gate = linear(width, self.value_heads * e) if gate else None
        self.norm = RMSNorm(e, eps=eps, gate="silu")
        self.out = Output(self.value_heads * e, width, bias=False)

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters that are not projections: log U(0, 16), and log-uniform steps."""
        # Away from 0, whose logarithm would never be learned.
        return {
            "a": torch.empty(self.value_heads).uniform_(0.01, 16).log(),
            "bias": decay_bias(self.value_heads),
        }

    def decays(self, x: Tensor) -> Tensor:
        """Log-decays `[B, H, T]` in float32, at most 0."""
        return forget(wide(self.decay(x)).transpose(1, 2), wide(self.a), wide(self.bias))

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
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        q, k, v, beta = self.inputs(x, **call)
        out = recur(q, k, v, decay=self.decays(x), beta=beta, delta=True, scale=self.scale, **call)
        if memory is not None:
            memory.advance(x.shape[1])
        return self.out(join(self.norm(out, None if self.gate is None else split(self.gate(x), self.value_heads))))
