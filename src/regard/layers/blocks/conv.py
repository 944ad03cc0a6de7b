"""The short causal convolution before a recurrence, over batches with padding, packed sequences and single tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import RegardError
from regard.primitives.memory import Memory


class ShortConv(nn.Module):
    """A depthwise causal convolution with SiLU: `y_t = silu(sum_i w_i x_{t - K + 1 + i})` ([089], [133]).

    A request remembers its last `K - 1` inputs. Padding is not there at all: real tokens on both sides of it are
    neighbours, and its own output is 0. Packed sequences each begin with nothing before them.

    Args:
        channels: C.
        kernel: K.
        name: under which its inputs are remembered.
        silu: False: the sum itself ([153]).
    """

    def __init__(self, channels: int, kernel: int, name: str, *, silu: bool = True):
        super().__init__()
        if kernel < 1:
            raise RegardError(f"the kernel of a short convolution is 1 or more, got {kernel}")
        self.channels, self.kernel, self.name, self.silu = channels, kernel, name, silu
        self.weight = nn.Parameter(self.initial()["weight"])

    def initial(self) -> dict[str, Tensor]:
        """Starting values of the parameters: uniform, of variance 1 / 3K, as torch starts a depthwise convolution."""
        bound = 1 / math.sqrt(self.kernel)
        return {"weight": torch.empty(self.channels, 1, self.kernel).uniform_(-bound, bound)}

    def forward(
        self,
        x: Tensor,
        *,
        memory: Memory | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, C]`, `mask [B, T]` bool: `y [B, T, C]`."""
        if cu_seqlens is not None:
            return self._out(self._packed(x, cu_seqlens))
        if mask is None:
            return self._out(self._run(x, memory, None))
        if x.shape[1] == 1:
            return self._out(self._run(x, memory, mask.sum(1)) * mask[..., None])
        # Real tokens first, in their order, then back: so padding on either side and in the middle is skipped.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[..., None]
        y = self._run(x.take_along_dim(order, dim=1), memory, mask.sum(1))
        back = torch.zeros_like(y).scatter(1, order.expand_as(y), y)
        return self._out(back * mask[..., None])

    def _out(self, y: Tensor) -> Tensor:
        return F.silu(y) if self.silu else y

    def _run(self, x: Tensor, memory: Memory | None, lengths: Tensor | None) -> Tensor:
        """The plain convolution of `x`, whose rows have `lengths [B]` real tokens (None: all)."""
        before = self.kernel - 1
        past = memory.get(self.name) if memory is not None else None
        if past is None:
            past = x.new_zeros(x.shape[0], before, self.channels)
        whole = torch.cat((past.to(x.dtype), x), dim=1)
        if memory is not None:
            if lengths is None:
                last = whole[:, whole.shape[1] - before :].clone()
            else:
                at = lengths[:, None, None] + torch.arange(before, device=x.device)[:, None]
                last = whole.take_along_dim(at, dim=1)
            memory.set(self.name, last)
        if x.shape[1] == 1:
            return (whole * self.weight[:, 0].T.to(whole.dtype)).sum(1, keepdim=True)
        weight = self.weight.to(whole.dtype)
        return F.conv1d(whole.transpose(1, 2), weight, groups=self.channels).transpose(1, 2)

    def _packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Each tap is cut where it would reach into the sequence before."""
        tokens = x.shape[1]
        at = torch.arange(tokens, device=x.device)
        cut = cu_seqlens.to(x.device)
        inside = at - cut[torch.searchsorted(cut, at, right=True) - 1]
        weight = self.weight[:, 0].to(x.dtype)
        y = x * weight[:, -1]
        for back in range(1, min(self.kernel, tokens)):
            seen = (inside[back:] >= back)[None, :, None]
            y = y + F.pad(x[:, :-back] * seen * weight[:, -1 - back], (0, 0, back, 0))
        return y
