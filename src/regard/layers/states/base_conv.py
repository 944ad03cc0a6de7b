"""BaseConv [153]: a gated short convolution, which sees the last few tokens and recalls nothing by itself.

Below another mixer it lets a token know the one before it, so that the layer above can tie values to their keys.
"""

from torch import Tensor, nn

from regard.layers.blocks.conv import ShortConv
from regard.layers.blocks.heads import linear
from regard.layers.blocks.recur import check
from regard.primitives.memory import Memory


class Mixer(nn.Module):
    """`y = conv(x) * (W x + b) + x`, the convolution depthwise and causal.

    Args:
        width: channels of the residual stream.
        heads: taken as of every mixer, without effect: each channel is a head.
        kernel: tokens that the convolution sees.

    Raises:
        RegardError: a kernel below 1.
    """

    def __init__(self, width: int, heads: int, *, kernel: int = 3):
        super().__init__()
        self.width = width
        self.conv = ShortConv(width, kernel, "conv", silu=False)
        self.gate = linear(width, width, bias=True)

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
        y = self.conv(x, memory=memory, mask=mask, cu_seqlens=cu_seqlens)
        if memory is not None:
            memory.advance(x.shape[1])
        return y * self.gate(x) + x
