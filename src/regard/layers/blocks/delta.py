"""What mixers of the delta rule share: queries, keys and values from short convolutions, and write strengths."""

import torch
from torch import Tensor, nn

from regard.layers.blocks.conv import ShortConv
from regard.layers.blocks.heads import linear, split
from regard.layers.blocks.norms import l2, wide
from regard.primitives.memory import Memory


class DeltaInputs(nn.Module):
    """q, k: SiLU(conv(W x)) of unit length per head; v: SiLU(conv(W x)); beta: sigmoid(W x) ([089], [133]).

    Args:
        width: channels of the residual stream.
        heads: Hk, of keys.
        value_heads: H, of values.
        key_size: D.
        value_size: Dv.
        kernel: of the convolutions.
        most: the largest write strength: 1, or 2 so that transitions may have negative eigenvalues.
    """

    def __init__(
        self, width: int, heads: int, value_heads: int, key_size: int, value_size: int, kernel: int, most: float
    ):
        super().__init__()
        keys, values = heads * key_size, value_heads * value_size
        self.heads, self.value_heads, self.most = heads, value_heads, most
        self.q, self.k, self.v = linear(width, keys), linear(width, keys), linear(width, values)
        self.q_conv = ShortConv(keys, kernel, "q_conv")
        self.k_conv = ShortConv(keys, kernel, "k_conv")
        self.v_conv = ShortConv(values, kernel, "v_conv")
        self.beta = linear(width, value_heads)

    def forward(
        self, x: Tensor, *, memory: Memory | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x [B, T, width]`: q, k `[B, Hk, T, D]`, v `[B, H, T, Dv]`, beta `[B, H, T]` in float32."""
        call = {"memory": memory, "mask": mask, "cu_seqlens": cu_seqlens}
        q = split(self.q_conv(self.q(x), **call), self.heads)
        k = split(self.k_conv(self.k(x), **call), self.heads)
        v = split(self.v_conv(self.v(x), **call), self.value_heads)
        return l2(q), l2(k), v, self.most * torch.sigmoid(wide(self.beta(x))).transpose(1, 2)
