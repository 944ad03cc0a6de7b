"""From channels to heads and back, and the sizes of heads."""

from torch import Tensor, nn

from regard.core.errors import RegardError


def split(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H D]` as `[B, H, T, D]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """`[B, H, T, D]` as `[B, T, H D]`."""
    return x.transpose(1, 2).flatten(2)


def size(name: str, width: int, expand: float, heads: int) -> int:
    """Channels of a head when `expand * width` channels are dealt out to `heads`.

    Raises:
        RegardError: they do not come out even.
    """
    if heads < 1:
        raise RegardError(f"heads must be 1 or more, got {heads}")
    whole = width * expand
    if whole < 1 or whole != int(whole) or int(whole) % heads:
        near = max(1, round(whole / heads)) * heads
        raise RegardError(
            f"{name}: {expand:g} x width {width} = {whole:g} channels do not divide among {heads} heads; "
            f"the nearest that do are {near}"
        )
    return int(whole) // heads


def whole_groups(value_heads: int, heads: int) -> int:
    """Value heads per key head.

    Raises:
        RegardError: value heads are not a multiple of key heads.
    """
    if value_heads < 1 or value_heads % heads:
        raise RegardError(f"value heads must be a multiple of the {heads} key heads, got {value_heads}")
    return value_heads // heads


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A projection without bias, as all of these papers have."""
    return nn.Linear(inputs, outputs, bias=bias)


class LowRank(nn.Module):
    """A linear map through `rank` channels; the bias, if any, comes after both."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool = False):
        super().__init__()
        self.down, self.up = linear(inputs, rank), linear(rank, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return self.up(self.down(x))


class Output(nn.Linear):
    """The last projection of a mixer or a feed-forward part: a model may start it smaller than the others."""
