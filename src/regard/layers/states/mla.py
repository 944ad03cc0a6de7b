"""Latent attention (MLA): keys and values of all heads from one latent a token, as in DeepSeek-V2 and V3 ([087])."""

from typing import Protocol

import torch
from torch import Tensor, nn

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.layers.blocks.heads import Output, join, linear, size, split
from regard.layers.blocks.norms import RMSNorm
from regard.layers.blocks.positions import covering, same_sequence
from regard.ops.latent import attend
from regard.primitives.rotary import rotate


class Latents(Protocol):
    """What a request holds for latent attention; `primitives.memory.Memory` is one."""

    @property
    def seen(self) -> int:
        """Tokens that went by, padding included."""
        ...

    def latents(self, c: Tensor, kappa: Tensor) -> Tensor:
        """Append `c [B, 1, T, r]` and `kappa [B, 1, T, e]`; all that is held, `[B, 1, S, r + e]`."""
        ...

    def advance(self, tokens: int) -> None:
        """`tokens` more went by."""
        ...


class Mixer(nn.Module):
    """`y = W_o softmax(q k^T scale) v`, keys `[norm(c) U_h; turned(kappa)]`, values `norm(c) V_h`, `[c; kappa] = W x`.

    A request remembers `r + e` numbers a token; `ops.latent` chooses how they are read.

    Args:
        width: channels of the residual stream.
        heads: H.
        head_size: dn, of keys without their rotary part; None: `width / heads`.
        value_size: dv; None: dn.
        rank: r, of the latent; None: `4 dn`, as DeepSeek has it.
        rope_size: e, of the rotary key that all heads share; None: half of dn.
        q_rank: queries go through so many channels, with a norm; None: they do not.
        latent_norm: whether latents are normed ([094] leaves it out).
        base: of the rotary positions.
        interleaved: rotary pairs are neighbours, as in DeepSeek's weights, and not halves.
        scale: of the scores; None: `(dn + e) ** -0.5`.
        bias: of the projections to latents and of the output.
        eps: of the norms.

    Raises:
        RegardError: channels do not divide among the heads, a size is below 1, or the rotary size is odd.
    """

    holds = "latents"

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        value_size: int | None = None,
        rank: int | None = None,
        rope_size: int | None = None,
        q_rank: int | None = None,
        latent_norm: bool = True,
        base: float = 10000.0,
        interleaved: bool = False,
        scale: float | None = None,
        bias: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        d = size("heads", width, 1.0, heads) if head_size is None else head_size
        self.content, self.value = d, d if value_size is None else value_size
        self.rank = 4 * d if rank is None else rank
        self.rope = 2 * (d // 4) if rope_size is None else rope_size
        sizes = {"head_size": d, "value_size": self.value, "rank": self.rank, "q_rank": 1 if q_rank is None else q_rank}
        for name, given in sizes.items():
            if given < 1:
                raise RegardError(f"{name} must be 1 or more, got {given}")
        if self.rope < 0 or self.rope % 2:
            raise RegardError(f"rope_size must be even, 0 or more, got {self.rope}")
        self.width, self.heads, self.base, self.interleaved, self.scale = width, heads, base, interleaved, scale
        queries = heads * (d + self.rope)
        self.q_down = None if q_rank is None else linear(width, q_rank, bias)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank, eps=eps)
        self.q = linear(width if q_rank is None else q_rank, queries)
        self.down = linear(width, self.rank + self.rope, bias)
        self.norm = RMSNorm(self.rank, eps=eps) if latent_norm else None
        self.up = linear(self.rank, heads * (d + self.value))
        self.out = Output(heads * self.value, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Latents | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, width]`: `y [B, T, width]`.

        `mask` is bool and covers all tokens so far, `[B, seen + T]`: latents are read again by every query.
        """
        at = covering(x, self.width, memory, mask, cu_seqlens)
        here = at[:, -x.shape[1] :]
        q, (c, kappa) = self._queries(x, here), self._latent(x, here)
        if memory is None:
            latent = torch.cat((c, kappa), -1)
        else:
            latent = memory.latents(c, kappa)
            memory.advance(x.shape[1])
        pattern = None if cu_seqlens is None else Pattern.causal() & same_sequence(cu_seqlens, x.shape[1])
        # Autocast has rounded what linear layers gave, and knows nothing of a weight that is used as it is.
        held = (latent[:, 0], *(weight.to(q.dtype) for weight in self.projections()))
        q_at, k_at = (None, None) if mask is None else (here, at)
        out, _ = attend(q, *held, pattern=pattern, scale=self.scale, q_positions=q_at, k_positions=k_at)
        return self.out(join(out))

    def projections(self) -> tuple[Tensor, Tensor]:
        """U `[H, r, dn]` and V `[H, r, dv]`, views of one weight."""
        both = self.up.weight.view(self.heads, -1, self.rank).transpose(1, 2)
        return both[..., : self.content], both[..., self.content :]

    def _queries(self, x: Tensor, here: Tensor) -> Tensor:
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        content, rotary = split(self.q(x), self.heads).split((self.content, self.rope), -1)
        return torch.cat((content, self._turned(rotary, here)), -1)

    def _latent(self, x: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[B, 1, T, r]` and rotary keys `[B, 1, T, e]`."""
        c, kappa = self.down(x)[:, None].split((self.rank, self.rope), -1)
        return c if self.norm is None else self.norm(c), self._turned(kappa, here)

    def _turned(self, x: Tensor, here: Tensor) -> Tensor:
        """Queries and keys are permuted alike, so that pairs may be laid out as halves."""
        if self.interleaved:
            x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
        return rotate(x, here, self.base) if self.rope else x
