"""DeltaNet [133]: every key overwrites, by a learned share, the value it had; nothing else is forgotten."""

from torch import Tensor, nn

from regard.layers.blocks.delta import DeltaInputs
from regard.layers.blocks.heads import Output, join, linear, size, split
from regard.layers.blocks.norms import RMSNorm
from regard.layers.blocks.recur import check, recur
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = W_o RMSNorm_head(delta(q, k, v))` with q, k, v from short convolutions.

    Args:
        width: channels of the residual stream.
        heads: H.
        expand_k: key channels of all heads over `width`.
        expand_v: value channels of all heads over `width`.
        kernel: of the short convolutions.
        gate: whether the output is also multiplied by `silu(W_g x)`.
        negative_eigenvalues: write strengths up to 2 instead of 1.
        eps: of the head norm.

    Raises:
        RegardError: channels do not divide among the heads.
    """

    # Products a token and layer, by [133] (see `models/cost.py`).
    cost = ("matrix", 8)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        kernel: int = 4,
        gate: bool = False,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.heads = width, heads
        d, e = size("keys", width, expand_k, heads), size("values", width, expand_v, heads)
        self.scale = d**-0.5
        self.inputs = DeltaInputs(width, heads, heads, d, e, kernel, 2.0 if negative_eigenvalues else 1.0)
        self.gate = linear(width, heads * e) if gate else None
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
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        q, k, v, beta = self.inputs(x, **call)
        out = recur(q, k, v, beta=beta, delta=True, scale=self.scale, **call)
        if memory is not None:
            memory.advance(x.shape[1])
        return self.out(join(self.norm(out, None if self.gate is None else split(self.gate(x), self.heads))))
