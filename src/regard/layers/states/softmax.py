"""Causal softmax attention, the layer that hybrids keep: rotary positions or none, a sliding window or none."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.layers.blocks.heads import Output, join, linear, size, split, whole_groups
from regard.ops.attention import attend
from regard.primitives.rotary import rotate


class Keys(Protocol):
    """What a request holds for softmax attention; `primitives.memory.Memory` is one."""

    @property
    def seen(self) -> int:
        """Tokens that went by, padding included."""
        ...

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, Hk, T, *]`; return what this forward's queries read, the last T of them its own."""
        ...

    def advance(self, tokens: int) -> None:
        """`tokens` more went by."""
        ...


class Mixer(nn.Module):
    """`y = W_o softmax(q k^T / sqrt(D)) v`, causal.

    Args:
        width: channels of the residual stream.
        heads: H; query heads.
        kv_heads: a divisor of H; None: H.
        head_size: D; None: `width / heads`.
        rope: rotary positions ([089] leaves them out beside recurrent layers).
        base: of the rotary positions.
        window: positions a query sees, its own included; None: all.
        dropout: of the weights, while training.

    Raises:
        RegardError: channels do not divide among the heads, or heads among the KV heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope: bool = True,
        base: float = 10000.0,
        window: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if window is not None and window < 1:
            raise RegardError(f"a window is 1 or more positions, got {window}")
        d = size("heads", width, 1.0, heads) if head_size is None else head_size
        self.kv_heads = heads if kv_heads is None else kv_heads
        if not 1 <= self.kv_heads <= heads:
            raise RegardError(f"KV heads must be 1 to {heads}, got {kv_heads}")
        whole_groups(heads, self.kv_heads)
        if rope and d % 2:
            raise RegardError(f"rotary positions need an even head size, got {d}; pass rope=False or other heads")
        self.width, self.heads, self.rope, self.base = width, heads, rope, base
        self.window, self.dropout = window, dropout
        self.q = linear(width, heads * d)
        self.k, self.v = linear(width, self.kv_heads * d), linear(width, self.kv_heads * d)
        self.out = Output(heads * d, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Keys | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, width]`: `y [B, T, width]`.

        `mask` is bool and covers all keys so far, `[B, seen + T]`: unlike a recurrence, attention reads them again.
        """
        seen = 0 if memory is None else memory.seen
        at = self._positions(x, seen, memory, mask, cu_seqlens)
        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        if self.rope:
            here = at[:, -x.shape[1] :]
            q, k = rotate(q, here, self.base), rotate(k, here, self.base)
        if memory is not None:
            k, v = memory.update(k, v)
            memory.advance(x.shape[1])
        return self.out(join(self._attend(q, k, v, at, mask, cu_seqlens)))

    def _positions(
        self, x: Tensor, seen: int, memory: Keys | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Positions `[1|B, seen + T]` of all keys, padding not counted and itself -1."""
        rows, tokens = x.shape[:2]
        if x.dim() != 3 or x.shape[-1] != self.width:
            raise RegardError(f"a mixer of width {self.width} takes [B, T, {self.width}], got {list(x.shape)}")
        if cu_seqlens is not None and (memory is not None or mask is not None or rows != 1):
            raise RegardError("packed sequences lie in one row, whole and without padding: no memory, no mask")
        if mask is None:
            return torch.arange(seen + tokens, device=x.device)[None]
        if mask.dtype != torch.bool or mask.shape != (rows, seen + tokens):
            raise RegardError(
                f"mask must be bool [{rows}, {seen + tokens}], all keys so far (True: a token), "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        return torch.where(mask, mask.long().cumsum(1) - 1, -1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        pattern = Pattern.causal() if self.window is None else Pattern.window(self.window)
        drop = self.dropout if self.training else 0.0
        if drop:
            return self._dropping(q, k, v, at, cu_seqlens, pattern, drop)
        if cu_seqlens is not None:
            pattern = pattern & _same_sequence(cu_seqlens, q.shape[2])
        if mask is None:
            return attend(q, k, v, pattern=pattern)[0]
        # A layer with a window holds the last keys only.
        return attend(q, k, v, pattern=pattern, q_positions=at[:, -q.shape[2] :], k_positions=at[:, -k.shape[2] :])[0]

    def _dropping(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, cu_seqlens: Tensor | None, pattern: Pattern, drop: float
    ) -> Tensor:
        """With dropout of the weights, which `attend` does not have: torch's own attention under a dense mask."""
        q_at, k_at = at[:, -q.shape[2] :], at[:, -k.shape[2] :]
        if cu_seqlens is not None:
            pattern = pattern & _same_sequence(cu_seqlens, q.shape[2])
        if len(at) == 1 and q.shape[2] == k.shape[2] and pattern.is_causal:
            seen, causal = None, True
        else:
            # Padding sees nothing: without a key of its own its softmax would be NaN.
            seen, causal = pattern.allow(q_at, k_at, self.kv_heads), False
            seen = seen | (q_at < 0)[:, None, :, None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=drop, is_causal=causal, enable_gqa=self.kv_heads != self.heads
        )


def _same_sequence(cu_seqlens: Tensor, tokens: int) -> Pattern:
    """Pairs of positions in the same packed sequence."""
    number = torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device), right=True)
    return Pattern.document(number)
