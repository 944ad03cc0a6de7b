"""The page of a Record: one HTML file in which every head can be opened and read, without a network.

A page has at most `BUDGET` bytes, whatever the model and the length:

- the template, the tokens' texts and the images as they are;
- per head a thumbnail of at most 32 x 32 bytes (the root of a share, in 255ths), the 16 keys given most (float32,
  with their arrivals), mean masses and mean entropy (float32);
- what is left goes to the maps, all heads alike: float16, and of a causal model only the keys that a row may see,
  with the masses and the entropy of each row. Where a record has more tiles than fit, neighbouring tiles are joined
  (sums over keys, means over rows), so that a tile still holds the share that its rows give to its keys.

At 32,768 tokens a model of 30 x 9 heads keeps all 128 x 128 tiles, one of 16 x 32 heads about 96 x 96.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pages import embed, fill
from regard.core.token_map import Kind, Span
from regard.observe.record import Record
from regard.observe.roles import Roles

BUDGET = 8_000_000
_THUMBNAIL = 32
# Keys of a head that are told exactly.
_KEYS = 16
# Fewer tiles a side show nothing.
_SMALLEST = 16
_IMAGE_SIDE = 448


def render(
    record: Record,
    names: Sequence[str],
    *,
    model: str = "model",
    roles: Roles | None = None,
    images: Sequence[Any] = (),
    row: int = 0,
    budget: int = BUDGET,
) -> str:
    """The page of batch row `row` of `record`.

    Args:
        record: with the readings "masses", "columns", "entropy", "maps" and "sinks".
        names: the texts of its tokens, by arrival.
        model: what the page calls the model.
        roles: of the model's heads, which the page marks; None: heads with a token sink are marked.
        images: PIL images, in the order of the prompt, shown under the attention that their tokens get.
        row: which row of the batch.
        budget: most bytes of the page.

    Returns:
        HTML. A value it shows is the record's to float16 (11 bits), and to float32 where the page says "exact".

    Raises:
        RegardError: names, images or `row` do not agree with the record; a reading is missing or not finite; the
            budget is too small for the model's heads.
    """
    record = record.cpu()
    if len(names) != record.length:
        raise RegardError(f"the record has {record.length} tokens, and there are {len(names)} names")
    if not 0 <= row < record.maps.shape[1]:
        raise RegardError(f"row {row} is not among the record's {record.maps.shape[1]}")
    readings = {name: getattr(record, name)[:, row].float() for name in ("maps", "masses", "entropy", "columns")}
    for name, value in readings.items():
        if not value.isfinite().all():
            layer, head = (~value.isfinite()).nonzero()[0, :2].tolist()
            raise RegardError(f"{name} of layer {layer} head {head} are not finite; does the model compute NaN?")
    kinds = record.tokens.at(torch.arange(record.length)[None])
    kinds = kinds[row % len(kinds)]
    layers, heads = readings["maps"].shape[:2]
    told = {"model": model, "layers": layers, "heads": heads, "length": record.length, "tokens": list(names)}
    # How many rows of a tile are no padding.
    real = torch.nn.functional.pad(record.real[row % len(record.real)].float().cumsum(0), (1, 0))
    rows = real[record.row_edges.cpu()].diff()
    told |= _of_tokens(record, kinds, row, images) | _of_heads(record, readings, rows / rows.sum(), roles, row)
    tiling = _Tiling.of(record.row_edges.cpu(), record.key_edges.cpu(), rows, readings["maps"])
    thumbnails = tiling.at(_THUMBNAIL)
    shares = thumbnails.of_maps(readings["maps"]).clamp(0, 1).sqrt()
    told |= {"thumbnails": thumbnails.told() | {"data": _text((shares * 255).round().to(torch.uint8))}}
    # The edges of the tiles, written as numbers.
    room = budget - len(_page(told).encode()) - 16 * sum(readings["maps"].shape[-2:])
    tiles = tiling.fitting(room, layers * heads, len(record.segments) + 1)
    told |= {"maps": tiles.told() | {"data": _text(tiles.blocks(readings))}}
    return _page(told)


def side(heads: int, names: Sequence[str], images: int = 0, budget: int = BUDGET) -> int:
    """How many tiles a side a page surely holds, of `heads` heads in all layers: what to ask `observe.record` for.

    A record of more is joined by `render`, to tiles that may differ in size.
    """
    count = torch.arange(1.0, 1 + len(names))
    room = 0.99 * budget - len(embed(names)) - 70_000 * (1 + images) - 1_000 * heads
    # Half a square of tiles, and a few segments a row; three float16 are eight letters.
    return max(int((heads * (count * (count + 1) / 2 + 7 * count) * 8 / 3 <= room).sum()), 1)


def spelled(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token of `ids` adds to the text, for `render`."""
    # Alone, many tokenizers decode a token without the space before it.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    known = tokenizer.decode(before)
    texts = {}
    for token in set(ids):
        both = tokenizer.decode([*before, token])
        texts[token] = both.removeprefix(known) if both.startswith(known) else tokenizer.decode([token])
    return [texts[token] for token in ids]


@dataclass(frozen=True)
class _Tiles:
    """How the tiles of a record are joined: `rows [n + 1]` and `keys [m + 1]` are their edges, as arrivals.

    `over_rows [n, R]` takes means, `over_keys [C, m]` sums, `seen [n, m]` are the tiles that are kept: the first few
    of every row.
    """

    rows: Tensor
    keys: Tensor
    over_rows: Tensor
    over_keys: Tensor
    seen: Tensor

    def told(self) -> dict[str, list[int]]:
        """Where they are, and how many of each row are kept."""
        return {"rows": self.rows.tolist(), "keys": self.keys.tolist(), "kept": self.seen.sum(1).tolist()}

    def of_maps(self, maps: Tensor) -> Tensor:
        """`maps [L, H, R, C]` -> `[L * H, tiles kept]`."""
        return (self.over_rows @ maps @ self.over_keys)[..., self.seen].flatten(0, 1)

    def blocks(self, readings: dict[str, Tensor]) -> Tensor:
        """A head's maps, then masses and entropy by row: `[L * H, size]` float16."""
        masses = (self.over_rows @ readings["masses"]).flatten(0, 1).flatten(1)
        entropy = (self.over_rows @ readings["entropy"][..., None])[..., 0].flatten(0, 1)
        blocks = torch.cat([self.of_maps(readings["maps"]), masses, entropy], 1).to(torch.float16)
        return torch.nn.functional.pad(blocks, (0, -blocks.shape[1] % 3))


@dataclass(frozen=True)
class _Tiling:
    """The tiles of a record, to be joined to fewer; `weights [R]` are the rows of a tile that are no padding."""

    rows: Tensor
    keys: Tensor
    weights: Tensor
    causal: bool

    @classmethod
    def of(cls, rows: Tensor, keys: Tensor, weights: Tensor, maps: Tensor) -> "_Tiling":
        """Those of `maps`, which are causal where no row gives anything to a later key."""
        return cls(rows, keys, weights, not maps[..., ~_seen(rows, keys, True)].any())

    def at(self, side: int) -> _Tiles:
        """At most `side` tiles a side."""
        over_rows = _groups(len(self.rows) - 1, side) * self.weights
        over_rows = over_rows / over_rows.sum(1, keepdim=True).clamp(min=1)
        over_keys = _groups(len(self.keys) - 1, side).T
        rows, keys = _joined(self.rows, side), _joined(self.keys, side)
        return _Tiles(rows, keys, over_rows, over_keys, _seen(rows, keys, self.causal))

    def fitting(self, room: int, heads: int, more: int) -> _Tiles:
        """The most tiles for which maps of `heads` heads, and `more` numbers a row, take at most `room` bytes."""
        for side in range(max(len(self.rows), len(self.keys)) - 1, 0, -1):
            rows, keys = _joined(self.rows, side), _joined(self.keys, side)
            size = int(_seen(rows, keys, self.causal).sum()) + more * (len(rows) - 1)
            # Three float16 are eight letters.
            if heads * -(-size // 3) * 8 <= room:
                if side < min(_SMALLEST, len(self.keys) - 1):
                    break
                return self.at(side)
        raise RegardError(f"{max(room, 0)} bytes do not hold maps of {heads} heads; raise the budget of the page")


def _joined(edges: Tensor, side: int) -> Tensor:
    tiles = len(edges) - 1
    return edges[torch.arange(min(tiles, side) + 1) * tiles // min(tiles, side)]


def _groups(tiles: int, side: int) -> Tensor:
    """`[groups, tiles]`: 1 where a tile is in a group, as `_joined` makes them."""
    edges = _joined(torch.arange(tiles + 1), side)
    of = torch.searchsorted(edges, torch.arange(tiles), right=True) - 1
    return torch.nn.functional.one_hot(of, len(edges) - 1).T.float()


def _seen(rows: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """`[n, m]`: which tiles of keys begin before a tile of rows ends."""
    return (keys[:-1] < rows[1:, None]) | (not causal)


def _of_tokens(record: Record, kinds: Tensor, row: int, images: Sequence[Any]) -> dict[str, Any]:
    """What the tokens are, where images lie, and the images."""
    spans = [span for span in record.tokens.spans if span.row == row % record.tokens.rows]
    placed = [_placed(span, number) for number, span in enumerate(spans)]
    if len(images) > len({span["image"] for span in placed}):
        raise RegardError(f"{len(images)} images are given for {len(placed)} spans of image tokens")
    return {
        "kinds": kinds.tolist(),
        "kind_names": {int(kind): kind.name.lower() for kind in Kind},
        "spans": placed,
        "images": [_embedded(image) for image in images],
        "massive": [layer[row].nonzero()[:, 0].tolist()[:_KEYS] for layer in record.sinks().massive],
    }


def _placed(span: Span, number: int) -> dict[str, Any]:
    image = getattr(span, "image", None)
    return {
        "start": span.start,
        "stop": span.stop,
        "grid": span.grid,
        "kind": span.kind,
        "image": number if image is None else image,
        "box": getattr(span, "box", None),
        "separators": getattr(span, "separators", 0),
    }


def _embedded(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    file = io.BytesIO()
    # Small pictures are drawn, large ones photographs.
    small.save(file, *(("PNG",) if max(image.size) <= 128 else ("JPEG",)))
    kind = "png" if max(image.size) <= 128 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _of_heads(
    record: Record, readings: dict[str, Tensor], rows: Tensor, roles: Roles | None, row: int
) -> dict[str, Any]:
    """Per head: means over `rows [R]`, which sum to 1, the keys given most, and roles."""
    masses, entropy = rows @ readings["masses"], readings["entropy"] @ rows
    top = readings["columns"].topk(min(_KEYS, record.length), -1)
    sinks = record.sinks().token[:, row]
    heads = [(layer, head) for layer in range(masses.shape[0]) for head in range(masses.shape[1])]
    if roles is None:
        named, scores = ["sink"], {}
        marks = [["sink"] if sinks[layer, head].any() else [] for layer, head in heads]
    else:
        named, marks = list(roles.scores), [list(roles.at(*head)) for head in heads]
        scores = {name: [round(score, 4) for score in value.flatten().tolist()] for name, value in roles.scores.items()}
    return {
        "segments": list(record.segments),
        "means": _text(torch.cat([masses, entropy[..., None]], -1).float()),
        "keys": {
            "count": top.values.shape[-1],
            "shares": _text(top.values.float()),
            "arrivals": _text(top.indices.int()),
            "sinks": _text(sinks.gather(-1, top.indices).to(torch.uint8)),
        },
        "roles": {"names": named, "marks": [[named.index(name) for name in mark] for mark in marks], "scores": scores},
    }


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _page(told: dict[str, Any]) -> str:
    title = f"{told['model'].rstrip('/').rpartition('/')[2]} · regard look"
    return fill("regard.observe", "look", title=title, brand="look", data=told)
