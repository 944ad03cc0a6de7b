"""Latent (MLA) attention: keys and values of all heads are projections of one latent a token ([087], definition).

A token leaves `[c_j; kappa_j]`, a latent of `r` numbers and a rotary key of `e` that all heads share. Head h has
`U_h [r, dn]` and `V_h [r, dv]`: its key is `[c_j U_h; kappa_j]`, its value `c_j V_h`. So the scores can be had in two
ways, equal but for rounding:

    expanded   q . k = q^n . (c_j U_h) + rho . kappa_j           keys and values are made, once for all queries
    absorbed         = (U_h q^n) . c_j + rho . kappa_j           latents are read as they are, out = (sum_j p_j c_j) V_h

Expanding costs `S r (dn + dv)` products a head, once; absorbing `T r (dn + dv)`, and `2 r - dn - dv` more for each
query and key. With few queries absorbing is less work, and reads `r + e` numbers a token in place of `H (dn + e + dv)`.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.errors import choose as one_of
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.kernels import device
from regard.ops import attention
from regard.primitives.buffer import pick
from regard.primitives.latent import LatentShown

FORMS = ("auto", "expanded", "absorbed")
KERNEL = "triton"


@dataclass(frozen=True)
class Sizes:
    """How large a call is: the letters of the module, and `batch`."""

    batch: int
    heads: int
    queries: int
    keys: int
    rank: int
    rope: int
    content: int
    value: int

    def products(self, form: str) -> int:
        """Multiplications of one row of the batch when every query sees every key."""
        pairs, projected = self.heads * self.queries * self.keys, self.heads * self.rank * (self.content + self.value)
        if form == "expanded":
            return self.keys * projected + pairs * (self.content + self.rope + self.value)
        return self.queries * projected + pairs * (2 * self.rank + self.rope)

    @property
    def crossover(self) -> float:
        """Queries from which on expanding is less work; infinite where it never is.

        `S p / (p + S (2 r - dn - dv))` with `p = r (dn + dv)`: 171 for DeepSeek-V3 over many keys.
        """
        projected, more = self.rank * (self.content + self.value), 2 * self.rank - self.content - self.value
        below = projected + self.keys * more
        return self.keys * projected / below if below > 0 else float("inf")


def absorb(q: Tensor, keys_up: Tensor) -> Tensor:
    """Queries `q [B, H, T, dn + e]` in the space of latents, `[B, H, T, r + e]`; `keys_up [H, r, dn]`."""
    content = keys_up.shape[2]
    return torch.cat((torch.einsum("bhtd,hrd->bhtr", q[..., :content], keys_up), q[..., content:]), -1)


def expand(latent: Tensor, keys_up: Tensor, values_up: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[B, H, S, dn + e]` and values `[B, H, S, dv]` of `latent [B, S, r + e]`."""
    heads, rank = keys_up.shape[:2]
    c, kappa = latent[..., :rank], latent[..., rank:]
    k = torch.cat((torch.einsum("bsr,hrd->bhsd", c, keys_up), kappa[:, None].expand(-1, heads, -1, -1)), -1)
    return k, torch.einsum("bsr,hrd->bhsd", c, values_up)


def attend(
    q: Tensor,
    latent: Tensor,
    keys_up: Tensor,
    values_up: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    padding: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    empty: str = "zero",
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query over latents, with the log-sum-exp of the scores.

    Args:
        q: `[B, H, T, dn + e]`, the rotary part last and already turned.
        latent: `[B, S, r + e]`, normed, the rotary part last and already turned.
        keys_up: U, `[H, r, dn]`.
        values_up: V, `[H, r, dv]`.
        scale: of the scores; None: `(dn + e) ** -0.5`.
        padding: `[B]` whole numbers, left padding of each row: positions are right-aligned ones less that. Not
            together with positions.
        form: "expanded", "absorbed", or "auto": whichever is less work (`Sizes.crossover`).
        backend: "triton" (the decode kernel, absorbed; a GPU, no gradients), one of `regard.attend`, or "auto".
        pattern: as in `regard.attend`, of `H` key heads; one that differs among heads can only be expanded.
        bias: as in `regard.attend`, as are the next four.
        causal: see there.
        softcap: see there.
        q_positions: see there.
        k_positions: see there; those that differ among heads can only be expanded.
        empty: see there.

    Returns:
        out `[B, H, T, dv]` in q's dtype, lse `[B, H, T]` in float32 (float64 for float64); gradients flow through
        both, but not through the kernel.

    Raises:
        RegardError: sizes, heads or dtypes disagree, or what was named refuses the call; the message says why.
    """
    one_of("choice for empty rows", empty, ("zero", "raise"))
    sizes = _check(q, latent, keys_up, values_up, padding, q_positions, k_positions)
    padding = None if padding is None else padding.to(q.device)
    call: dict[str, Any] = {"pattern": pattern, "bias": bias, "causal": causal, "softcap": softcap}
    call |= {"q_positions": q_positions, "k_positions": k_positions}
    form, backend, _ = choose(q, latent, keys_up, values_up, **call, padding=padding, form=form, backend=backend)
    scale = float((sizes.content + sizes.rope) ** -0.5) if scale is None else scale
    if backend == KERNEL:
        return _decode(q, latent, keys_up, values_up, scale, padding, empty)
    call |= {"scale": scale, "empty": empty, "backend": backend, **_places(sizes, padding, q_positions, k_positions)}
    if form == "expanded":
        return attention.attend(q, *expand(latent, keys_up, values_up), **call)
    held = latent[:, None]
    out, lse = attention.attend(absorb(q, keys_up), held, held[..., : sizes.rank], **call)
    return torch.einsum("bhtr,hrd->bhtd", out, values_up), lse


def choose(
    q: Tensor,
    latent: Tensor,
    keys_up: Tensor,
    values_up: Tensor,
    *,
    pattern: Pattern | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
    softcap: float | None = None,
    padding: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[str, str, str]:
    """What `attend` would run, and why: `(form, backend, reason)`.

    Raises:
        RegardError: no such form or backend, or one that was named refuses the call.
    """
    one_of("form", form, FORMS)
    if backend != KERNEL and backend not in attention.BACKENDS:
        one_of("backend", backend, (*attention.BACKENDS, KERNEL))
    sizes = _check(q, latent, keys_up, values_up, padding, q_positions, k_positions)
    bound = _bound_to_heads(pattern, k_positions)
    if bound and (form == "absorbed" or backend == KERNEL):
        raise RegardError(f"absorbed attention refuses: {bound}. Use form='expanded' and a backend of regard.attend")
    if form == "expanded" and backend == KERNEL:
        raise RegardError("the decode kernel is of the absorbed form; leave form='expanded' or backend='triton' out")
    why = "asked for"
    if form == "auto":
        less = min(("absorbed", "expanded"), key=sizes.products)
        form, why = less, f"it is less work below {sizes.crossover:.0f} queries, more from there on"
        if bound or backend == KERNEL:
            form, why = ("expanded", bound) if bound else ("absorbed", "the form of the kernel")
    if form == "expanded" or backend not in ("auto", KERNEL):
        return form, backend, why
    plain = bias is None and softcap is None and q_positions is None and k_positions is None
    causal = sizes.queries == 1 if pattern is None and not causal else pattern is None or pattern.is_causal
    reason = _kernel_refuses(q, latent, keys_up, values_up, plain and causal)
    if backend == KERNEL and reason is not None:
        raise RegardError(f"backend {KERNEL!r} refuses: {reason}. Use backend='auto'")
    return form, "auto" if reason is not None else KERNEL, why


def read(
    view: LatentShown,
    q: Tensor,
    keys_up: Tensor,
    values_up: Tensor,
    *,
    pattern: Pattern | None = None,
    step: Step,
    index: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of `q [B, H, T, dn + e]` over what a latent store holds: `(out [B, H, T, dv], lse)`.

    The store knows no heads: whoever reads it brings the projections. `View.attend` itself takes absorbed queries and
    gives sums of latents, as of any store with one key head.

    Args:
        view: what `append` of `primitives.latent.Latent` returned.
        q: as `attend`, as are the next three.
        keys_up: see there.
        values_up: see there.
        pattern: see there.
        step: the forward that `q` belongs to.
        index: `[1|B, n]`, read those tokens only (-1: none).
        options: of `attend`: `scale`, `bias`, `softcap`, `form`, `backend`.

    Raises:
        RegardError: as `attend`.
    """
    latent = view.latent
    if index is None and step.rows is None:
        return attend(q, latent, keys_up, values_up, pattern=pattern, padding=step.padding, **options)
    k_positions = view.places(step, q.device)
    if index is not None:
        latent = pick(latent, index.clamp(min=0), 1)
        k_positions = pick(k_positions, index.clamp(min=0), 1).masked_fill(index < 0, -1)
    options |= {"q_positions": step.queries(q.device), "k_positions": k_positions}
    return attend(q, latent, keys_up, values_up, pattern=pattern, **options)


def _places(
    sizes: Sizes, padding: Tensor | None, q_positions: Tensor | None, k_positions: Tensor | None
) -> dict[str, Tensor | None]:
    """Positions as `regard.attend` takes them; under padding right-aligned ones less that."""
    if padding is None:
        return {"q_positions": q_positions, "k_positions": k_positions}
    first = min(sizes.keys - sizes.queries, 0)
    here = torch.arange(first, sizes.keys, device=padding.device)[None] - padding[:, None]
    return {"q_positions": here[:, -sizes.queries :], "k_positions": here[:, here.shape[1] - sizes.keys :]}


def _bound_to_heads(pattern: Pattern | None, k_positions: Tensor | None) -> str | None:
    """Why all heads cannot read the latents as one key head, or None."""
    if pattern is not None and pattern.heads not in (None, 1):
        return f"the pattern differs among {pattern.heads} heads"
    if k_positions is not None and k_positions.dim() == 3 and k_positions.shape[1] > 1:
        return f"positions differ among {k_positions.shape[1]} heads"
    return None


def _kernel_refuses(q: Tensor, latent: Tensor, keys_up: Tensor, values_up: Tensor, plain: bool) -> str | None:
    """Why the decode kernel cannot do this call, or None. The kernel's module imports Triton, so it comes last."""
    if not plain:
        return "the decode kernel is causal over tokens in their order: no other pattern, bias, softcap or positions"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, latent, keys_up, values_up)):
        return "the decode kernel has no gradients"
    if not 1 <= q.shape[2] <= latent.shape[1]:
        return f"the decode kernel takes 1 query or more and no more than keys, not {q.shape[2]} of {latent.shape[1]}"
    if why := device.refuses(q):
        return why
    return _kernel().refuses(q, latent, rank=keys_up.shape[1])


def _kernel() -> Any:
    return import_module("regard.kernels.attention.latent")


def _decode(
    q: Tensor, latent: Tensor, keys_up: Tensor, values_up: Tensor, scale: float, padding: Tensor | None, empty: str
) -> tuple[Tensor, Tensor]:
    starts = None if padding is None else padding.to(q.device, torch.int32)
    out, lse = _kernel().decode(absorb(q, keys_up), latent, rank=keys_up.shape[1], scale=scale, starts=starts)
    if empty == "raise":
        attention.raise_if_empty(lse)
    return torch.einsum("bhtr,hrd->bhtd", out, values_up), lse


def _check(
    q: Tensor,
    latent: Tensor,
    keys_up: Tensor,
    values_up: Tensor,
    padding: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
) -> Sizes:
    """Raise RegardError for arguments that do not belong together, else say how large they are."""
    given = {"q": q, "latent": latent, "keys_up": keys_up, "values_up": values_up}
    legend = ("q [B, H, T, dn + e]", "latent [B, S, r + e]", "keys_up [H, r, dn]", "values_up [H, r, dv]")
    got = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items())
    if tuple(x.dim() for x in given.values()) != (4, 3, 3, 3) or q.shape[0] != latent.shape[0]:
        raise RegardError(f"{', '.join(legend)} disagree: got {got}")
    heads, rank, content = keys_up.shape
    if not q.shape[1] == heads == values_up.shape[0]:
        raise RegardError(
            f"{q.shape[1]} query heads, but keys_up is of {heads} and values_up of {values_up.shape[0]}: got {got}"
        )
    rope = latent.shape[2] - rank
    if values_up.shape[1] != rank or rope < 0 or q.shape[3] != content + rope:
        raise RegardError(
            f"a latent of {latent.shape[2]} numbers is r + e = {rank} + {rope} for this keys_up, so that q must have "
            f"dn + e = {content + rope} and values_up r = {rank} rows: got {got}"
        )
    kinds = {name: x.dtype for name, x in given.items()}
    if len(set(kinds.values())) > 1 or not q.is_floating_point():
        raise RegardError(f"q, latent and the projections must be of one float dtype, got {kinds}")
    if padding is not None and (padding.shape != q.shape[:1] or padding.is_floating_point()):
        raise RegardError(f"padding must be [{q.shape[0]}] whole numbers, got {padding.dtype} {list(padding.shape)}")
    if padding is not None and not (q_positions is None and k_positions is None):
        raise RegardError("padding says the positions of all tokens; pass it or q_positions and k_positions, not both")
    return Sizes(q.shape[0], heads, q.shape[2], latent.shape[1], rank, rope, content, values_up.shape[2])
