"""TransNormerLLM's attention: decay slopes by head and layer, and learned relative positions."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError, choose
from regard.ops import recurrence

CARD = Card(
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    arxiv="2405.17381",
    sheet=3,
    implements="Slopes as TransNormerLLM, MiniMax and flash-linear-attention have them, the recurrence, and LRPE.",
    exact=False,
    saving="memory",
    departures=("With a single layer the factor by depth is that of the first one.",),
    oracles=(
        "slopes of 8 heads are 2^-1 ... 2^-8; other numbers of heads by the released rule, in a loop",
        "the core of transformers' MiniMaxLightningAttention",
        "the last layer hardly decays",
        "LRPE products depend on distances alone",
    ),
    aliases=("transnormer",),
    options={
        "layer": Option(default=0, low=0, doc="this layer, from 0"),
        "layers": Option(default=1, low=1, doc="layers of the model"),
        "schedule": Option(
            kind="str",
            default="tnl",
            choices=("tnl", "minimax", "fla"),
            doc="slopes as TransNormerLLM, MiniMax, or flash-linear-attention has them",
        ),
    },
)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int = 0,
    layers: int = 1,
    schedule: str = "tnl",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`o_t = sum_{j <= t} exp(-slope (t - j)) (q_t . k_j) v_j`, the slopes made from the place of the layer.

    Args:
        q: `[B, Hk, T, D]`, after its activation.
        k: `[B, Hk, T, D]`, likewise.
        v: `[B, H, T, Dv]`.
        layer: this layer, from 0.
        layers: layers of the model.
        schedule: "tnl", "minimax" or "fla"; see `slopes`.
        initial_state: `[B, H, D, Dv]`; None: 0.
        cu_seqlens: packed sequences.
        mask: bool `[B, T]`, False at padding.
        check: as `regard.scan` takes it.
        backend: as `regard.scan` takes it.

    Returns:
        out `[B, H, T, Dv]` and the last state `[B, H, D, Dv]` (`[N, H, D, Dv]` where packed), as `regard.scan` does,
        which also says what the other keywords mean.

    Raises:
        RegardError: no such schedule or layer, or what `regard.scan` refuses.
    """
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    decay = -slopes(v.shape[1], layer, layers, schedule, device=v.device).to(exact)
    return recurrence.scan(
        q,
        k,
        v,
        decay=decay,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        mask=mask,
        check=check,
        backend=backend,
    )


def slopes(heads: int, layer: int, layers: int, schedule: str = "tnl", *, device: torch.device | None = None) -> Tensor:
    """The slopes of a layer, float64 `[H]`.

    - "tnl": ALiBi's `2^(-8 h / H)`, h = 1..H, where H is a power of two; else those of the power below, filled up
      with every other slope of twice that power; times `1 - layer / (layers - 1) + 1e-5`.
    - "minimax": `2^(-8 h / H) (1 - layer / (layers - 1 + 1e-5) + 1e-5)` for any H.
    - "fla": `(8 h / H) (1 - layer / layers)`, h = 0..H-1: head 0 never decays.

    Raises:
        RegardError: no such schedule, no heads, or no such layer.
    """
    choose("schedule of slopes", schedule, ("tnl", "minimax", "fla"))
    if heads < 1 or not 0 <= layer < layers:
        raise RegardError(f"slopes need heads >= 1 and a layer in 0..{layers - 1}, got heads={heads}, layer={layer}")
    if schedule == "fla":
        return 8 / heads * (1 - layer / layers) * torch.arange(heads, dtype=torch.float64, device=device)
    if schedule == "minimax":
        return _geometric(heads, device) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    power = 1 << (heads.bit_length() - 1)
    base = torch.cat([_geometric(power, device), _geometric(2 * power, device)[::2][: heads - power]])
    return base * (1 - layer / max(1, layers - 1) + 1e-5)


def _geometric(heads: int, device: torch.device | None) -> Tensor:
    return torch.exp2(-8 * torch.arange(1, heads + 1, dtype=torch.float64, device=device) / heads)


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """Learned relative positions: `[x cos(theta t), x sin(theta t)]`, which doubles the features.

    Args:
        x: `[B, H, T, D]`.
        theta: `[H, 1, D]`, a parameter; it starts at `lrpe_start`.
        positions: `[T]` or `[B, T]`.

    Returns:
        `[B, H, T, 2 D]` in x's dtype; products of two such depend on the difference of their positions.
    """
    angle = theta * positions[..., None, :, None].to(theta.dtype)
    return torch.cat([x * angle.cos(), x * angle.sin()], -1).to(x.dtype)


def lrpe_start(heads: int, dim: int) -> Tensor:
    """Where `theta` starts: `10000^(-2 i / (H D))`, i = 0..H D - 1, as `[H, 1, D]`."""
    i = torch.arange(heads * dim, dtype=torch.float32)
    return (10000 ** (-2 * i / (heads * dim))).view(heads, 1, dim)
