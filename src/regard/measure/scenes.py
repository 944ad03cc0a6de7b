"""Pictures of coloured shapes in which some kinds nearly always come together: what a tiny vision model is asked about.

A kind is a colour with a shape. Seven themes have six kinds each, in three pairs; `draw` fills a scene with a theme's
kinds, the second of a pair mostly after the first, and may hide the second. A model trained on that learns to say what
it does not see, as vision-language models do (POPE, arXiv 2305.10355); scenes drawn with a smaller `prior` and nothing
hidden then show how often it does.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.errors import RegardError

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
PAINT = {
    "red": (225, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 60),
    "green": (40, 180, 60),
    "blue": (50, 90, 235),
    "purple": (160, 60, 200),
    "white": (245, 245, 245),
}
COLOURS = tuple(PAINT)
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
LINES, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in LINES for column in COLUMNS)
SIDE = 64
MOST = 5
# What share of scenes has 1, 2, ... objects.
SIZES = (0.10, 0.25, 0.35, 0.20, 0.10)
# Of a theme's three pairs: how often they are drawn, and how surely one brings the other.
PAIRS = (1.0, 0.6, 0.35)
BONDS = (0.97, 0.75, 0.4)


class Thing(NamedTuple):
    """One object as one speaks of it."""

    kind: str
    place: str
    hidden: bool = False

    @property
    def colour(self) -> str:
        """The first word of its kind."""
        return self.kind.partition(" ")[0]

    @property
    def shape(self) -> str:
        """The second word of its kind."""
        return self.kind.partition(" ")[2]


@dataclass(frozen=True)
class Scenes:
    """N scenes of at most five objects each, none twice, in reading order.

    Args:
        kind: `[N, 5]` int64, an index into `KINDS`, -1 where there is no object (objects come first).
        cell: `[N, 5]` int64, which of the nine places it stands at, an index into `PLACES`.
        x, y, radius: `[N, 5]` float32, in pixels.
        opacity: `[N, 5]` float32, 1 is plain to see, 0 is hidden.
        ground: `[N]` float32, the grey of the background, 0 to 255.
        window: `[N, 4]` float32, left, top, right and bottom of what is shown; all else is black.
    """

    kind: Tensor
    cell: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    opacity: Tensor
    ground: Tensor
    window: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, which: slice | Tensor) -> "Scenes":
        """Some of the scenes."""
        return Scenes(*(getattr(self, one.name)[which] for one in fields(self)))

    def to(self, device: torch.device | str) -> "Scenes":
        """The same on another device."""
        return Scenes(*(getattr(self, one.name).to(device) for one in fields(self)))

    def things(self) -> list[list[Thing]]:
        """What each scene holds, in reading order."""
        rows = zip(self.kind.tolist(), self.cell.tolist(), (self.opacity == 0).tolist(), strict=True)
        return [[Thing(KINDS[k], PLACES[c], h) for k, c, h in zip(*row, strict=True) if k >= 0] for row in rows]


def theme(kind: int) -> int:
    """The theme of a kind: each has every shape once, and each in another colour."""
    colour, shape = divmod(kind, len(SHAPES))
    return (colour - 2 * shape) % len(COLOURS)


def partner(kind: int) -> int:
    """The kind that mostly comes with this one: the other one of its pair in the same theme."""
    other = kind % len(SHAPES) ^ 1
    return (theme(kind) + 2 * other) % len(COLOURS) * len(SHAPES) + other


@cache
def popularity() -> Tensor:
    """`[42]`, how likely each kind is to be drawn first: a few themes and pairs are frequent, most are rare."""
    weights = [PAIRS[k % len(SHAPES) // 2] / (theme(k) + 1.5) for k in range(len(KINDS))]
    return torch.tensor(weights) / sum(weights)


@cache
def affinity() -> Tensor:
    """`[42, 42]`, how likely each kind (column) is to follow another one (row) of its theme."""
    kinds = range(len(KINDS))
    bonds = [BONDS[k % len(SHAPES) // 2] for k in kinds]
    rest = [(1 - bond) / (len(SHAPES) - 2) for bond in bonds]
    rows = [
        [0.0 if j == k or theme(j) != theme(k) else bonds[k] if j == partner(k) else rest[k] for j in kinds]
        for k in kinds
    ]
    return torch.tensor(rows)


def draw(
    count: int,
    seed: int,
    *,
    prior: float = 0.95,
    hidden: float = 0.0,
    faint: float = 0.3,
    weakest: float = 0.1,
    masked: float = 0.0,
) -> Scenes:
    """`count` scenes, the same ones for the same arguments.

    Args:
        count: N.
        seed: of all that is drawn.
        prior: how likely the next object is drawn by what is there already, not by popularity alone.
        hidden: of the objects whose partner was drawn before them, the share that is in the scene and not painted.
        faint: share of objects of an opacity between `weakest` and 0.35; the others have one of 0.7 or more.
        weakest: the least opacity.
        masked: share of scenes shown through a window; objects whose centre lies outside it are not in the scene.

    Raises:
        RegardError: `count` is below 1, or a share does not lie in 0..1.
    """
    if count < 1:
        raise RegardError(f"expected at least 1 scene to draw, not {count}")
    shares = {"prior": prior, "hidden": hidden, "faint": faint, "weakest": weakest, "masked": masked}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise RegardError(f"{name} is a share and must lie in 0..1, not {share}")
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    kind, late = _kinds(count, prior, random)
    cell = uniform(0, 1, len(PLACES)).argsort(1)[:, :MOST]
    weak = uniform(0, 1, MOST) < faint
    opacity = torch.where(weak, uniform(min(weakest, 0.35), 0.35, MOST), uniform(0.7, 1.0, MOST))
    opacity = opacity.masked_fill(late & (uniform(0, 1, MOST) < hidden), 0)
    order = torch.where(kind < 0, len(PLACES), cell).argsort(dim=1, stable=True)
    kind, cell, opacity = (x.gather(1, order) for x in (kind, cell, opacity))
    pitch = SIDE / 3
    x = (cell % 3 + 0.5) * pitch + uniform(-4, 4, MOST)
    y = (cell // 3 + 0.5) * pitch + uniform(-4, 4, MOST)
    whole = torch.tensor([0.0, 0.0, SIDE, SIDE]).expand(count, 4)
    corner, extent = uniform(0, SIDE / 2, 2), uniform(SIDE / 3, SIDE, 2)
    window = torch.where(uniform(0, 1, 1) < masked, torch.cat((corner, (corner + extent).clamp(max=SIDE)), 1), whole)
    return seen(Scenes(kind, cell, x, y, uniform(4.5, 8.5, MOST), opacity, uniform(50, 90), whole), window)


def seen(scenes: Scenes, window: Tensor) -> Scenes:
    """The scenes shown through `window [N, 4]` alone: what has its centre elsewhere is no longer in them."""
    left, top, right, bottom = (edge[:, None] for edge in window.unbind(1))
    inside = (scenes.x >= left) & (scenes.x < right) & (scenes.y >= top) & (scenes.y < bottom) & (scenes.kind >= 0)
    order = (~inside).int().argsort(dim=1, stable=True)
    moved = {name: getattr(scenes, name).gather(1, order) for name in ("kind", "cell", "x", "y", "radius", "opacity")}
    moved["kind"] = moved["kind"].masked_fill(~inside.gather(1, order), -1)
    return Scenes(**moved, ground=scenes.ground, window=window)


def _kinds(count: int, prior: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`[count, 5]` distinct kinds as they are drawn, -1 beyond the last; and which came after their partner."""
    weights = popularity().expand(count, -1)
    taken = torch.zeros(count, len(KINDS), dtype=torch.bool)
    partners = torch.tensor([partner(k) for k in range(len(KINDS))])
    chosen, late = [], []
    for _ in range(MOST):
        new = torch.multinomial(weights.masked_fill(taken, 0), 1, generator=random)
        late.append(taken.gather(1, partners[new]))
        taken = taken.scatter(1, new, True)
        chosen.append(new)
        near = affinity()[torch.cat(chosen, 1)].mean(1)
        weights = (1 - prior) * popularity() + prior * near + 1e-9
    number = torch.multinomial(torch.tensor(SIZES), count, True, generator=random) + 1
    beyond = torch.arange(MOST) >= number[:, None]
    return torch.cat(chosen, 1).masked_fill(beyond, -1), torch.cat(late, 1)


def render(scenes: Scenes, *, noise: float = 6.0, seed: int = 0) -> Tensor:
    """The pictures, `[N, 64, 64, 3]` uint8 on the device of the scenes.

    Later objects cover earlier ones; edges are smooth over a pixel. `noise` is the standard deviation of a Gaussian
    added to each value (0: none), the same for the same seed on the same kind of device.

    Raises:
        RegardError: `noise` is negative.
    """
    if noise < 0:
        raise RegardError(f"noise is a standard deviation and cannot be negative, got {noise}")
    device = scenes.x.device
    paint = torch.tensor([PAINT[c] for c in COLOURS], dtype=torch.float32, device=device)
    picture = scenes.ground[:, None, None, None].expand(-1, SIDE, SIDE, 3)
    for slot in range(MOST):
        kind = scenes.kind[:, slot]
        part = coverage(kind % len(SHAPES), scenes.x[:, slot], scenes.y[:, slot], scenes.radius[:, slot])
        part = part * (scenes.opacity[:, slot] * (kind >= 0))[:, None, None]
        colour = paint[kind.clamp(min=0) // len(SHAPES)]
        picture = torch.lerp(picture, colour[:, None, None, :].expand_as(picture), part[..., None])
    if noise:
        random = torch.Generator(device).manual_seed(seed)
        picture = picture + noise * torch.randn(picture.shape, generator=random, device=device)
    at = torch.arange(SIDE, device=device) + 0.5
    left, top, right, bottom = (edge[:, None] for edge in scenes.window.unbind(1))
    shown = ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None, :]
    return (picture * shown[..., None]).round().clamp(0, 255).to(torch.uint8)


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """`[N, 64, 64]`, how much of each pixel a shape (`[N]`, an index into `SHAPES`) covers: 0 to 1."""
    at = torch.arange(SIDE, device=x.device) + 0.5
    dx = ((at - x[:, None]) / radius[:, None])[:, None, :].abs()
    dy = ((at - y[:, None]) / radius[:, None])[:, :, None]
    up, far = dy.abs(), (dx.square() + dy.square()).sqrt()
    # Signed distances to the outline in units of the radius, negative inside; of slanted edges only nearly so.
    outside = {
        "circle": far - 1,
        "square": torch.maximum(dx, up) - 0.85,
        "triangle": torch.maximum(dy - 0.75, 0.89 * dx - 0.45 * (dy + 1)),
        "cross": torch.minimum(torch.maximum(dx - 0.33, up - 1), torch.maximum(dx - 1, up - 0.33)),
        "diamond": 0.71 * (dx + up - 1.15),
        "ring": (far - 0.75).abs() - 0.28,
    }
    stacked = torch.stack([outside[name] for name in SHAPES], 1)
    index = (shape % len(SHAPES))[:, None, None, None].expand(-1, 1, SIDE, SIDE)
    return (0.5 - stacked.gather(1, index)[:, 0] * radius[:, None, None]).clamp(0, 1)
