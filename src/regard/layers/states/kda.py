"""Kimi Delta Attention [089]: the delta rule with a forget gate for every key channel."""

import torch
from torch import Tensor, nn

from regard.layers.blocks.delta import DeltaInputs
from regard.layers.blocks.gates import decay_bias
from regard.layers.blocks.heads import LowRank, Output, join, size, split
from regard.layers.blocks.norms import RMSNorm, wide
from regard.layers.blocks.recur import check, recur
from regard.ops.states.kda import gate
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o(sigmoid(gate) * RMSNorm_head(kda(q, k, v)))` with q, k, v from short convolutions.

    Args:
        width: channels of the residual stream.
        heads: H; key heads.
        expand_k: key channels of all heads over `width`.
        expand_v: value channels of all heads over `width`.
        kernel: of the short convolutions.
        safe: bound the log-decay to (-5, 0) instead of softplus.
        negative_eigenvalues: write strengths up to 2 instead of 1.
        eps: of the head norm.

    Raises:
        RegardError: channels do not divide among the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        kernel: int = 4,
        safe: bool = False,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.heads, self.safe = width, heads, safe
        d, e = size("keys", width, expand_k, heads), size("values", width, expand_v, heads)
        self.scale = d**-0.5
        self.inputs = DeltaInputs(width, heads, heads, d, e, kernel, 2.0 if negative_eigenvalues else 1.0)
        self.decay = LowRank(width, d, heads * d)
        self.gate = LowRank(width, e, heads * e, bias=True)
        start = self.initial()
        self.a, self.bias = nn.Parameter(start["a"]), nn.Parameter(start["bias"])
        self.norm = RMSNorm(e, eps=eps, gate="sigmoid")
        self.out = Output(heads * e, width, bias=False)

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters that are not projections: log U(1, 16), and log-uniform steps."""
        return {
            "a": torch.empty(self.heads).uniform_(1, 16).log(),
            "bias": decay_bias(self.decay.up.out_features),
        }

    def decays(self, x: Tensor) -> Tensor:
        """Log-decays `[B, H, T, D]` in float32, at most 0."""
        raw = wide(split(self.decay(x), self.heads))
        bias = wide(self.bias).unflatten(0, (self.heads, -1))
        return gate(raw, wide(self.a), bias, bound=-5.0 if self.safe else None)

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
        return self.out(join(self.norm(out, split(self.gate(x), self.heads))))
