"""One prefill of a model as it is, and what its attention did, at any length: nothing of T x T is ever built.

Every layer runs its own attention. Its log-sum-exp is overheard, and one more product of queries and keys, tile by
tile, gives what tiles of rows give to every key (`ops/totals.py`); all readings are sums of that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.intercept import intercept
from regard.adapters.seam import open_free
from regard.core.errors import RegardError, choose
from regard.core.token_map import Kind, TokenMap
from regard.observe.inputs import prepared
from regard.observe.reader import READINGS, Reader
from regard.ops.massive import TAU
from regard.ops.totals import edges

__all__ = ["READINGS", "Record", "Sinks", "record"]

THETA = 0.1  # of [065]
LEAST = 8


@dataclass(frozen=True)
class Sinks:
    """Tokens that draw attention or carry massive activations.

    Args:
        token: bool `[L, B, H, T]`: keys that the rows of a head give more than theta on average [065].
        massive: bool `[L, B, T]`: tokens whose hidden state, entering the layer, is ruled by few dimensions [118].
        visual: bool `[L, B, T]`: the visual ones of `massive`.
    """

    token: Tensor
    massive: Tensor
    visual: Tensor


@dataclass(frozen=True, eq=False)
class Record:
    """What one prefill showed; tensors are float32 (float64 for float64) on the model's device.

    `L` layers, `H` query heads, `T` arrivals with padding; tile r of R holds the rows `row_edges[r]` to
    `row_edges[r + 1] - 1`, tile c of C the keys between `key_edges`. Where `T <= size` a tile is one token.

    Args:
        tokens: what the tokens are.
        real: bool `[1|B, T]`; False: padding.
        segments: names along the last dimension of `masses`.
        row_edges: `[R + 1]` arrivals.
        key_edges: `[C + 1]` arrivals.
        logits: of the last row, `[B, V]`, the model's own; None: it gives none.
        held: the readings by name; the properties below read them.
    """

    tokens: TokenMap
    real: Tensor
    segments: tuple[str, ...]
    row_edges: Tensor
    key_edges: Tensor
    logits: Tensor | None
    held: Mapping[str, Tensor]

    @property
    def masses(self) -> Tensor:
        """`[L, B, H, R, n]`: share of the attention of a tile's rows that goes to each of `segments`, their mean."""
        return self._reading("masses")

    @property
    def columns(self) -> Tensor:
        """`[L, B, H, T]`: what a key is given, mean over the rows that see it; 0 where none does."""
        return self._reading("columns")

    @property
    def entropy(self) -> Tensor:
        """`[L, B, H, R]`: nats, mean over a tile's rows."""
        return self._reading("entropy")

    @property
    def maps(self) -> Tensor:
        """`[L, B, H, R, C]`: sum over a tile's keys, mean over its rows: rows sum to 1, to 0 where all is padding."""
        return self._reading("maps")

    @property
    def peaks(self) -> Tensor:
        """`[L, B, T]`: largest entry of the hidden state that enters the layer, in its root mean square."""
        return self._reading("peaks")

    @property
    def stream(self) -> Tensor:
        """`[L, B, T]`: norm of the hidden state that enters the layer."""
        return self._reading("stream")

    @property
    def values(self) -> Tensor:
        """`[L, B, Hk, T]`: norm of the values."""
        return self._reading("values")

    @property
    def length(self) -> int:
        """Arrivals, padding included."""
        return self.real.shape[1]

    def _reading(self, name: str) -> Tensor:
        if name not in self.held:
            which = {"peaks": "sinks", "stream": "norms", "values": "norms"}.get(name, name)
            raise RegardError(f"{name} was not read: ask for it with readings=(..., {which!r})")
        return self.held[name]

    def sinks(self, theta: float = THETA, tau: float = TAU, least: int = LEAST) -> Sinks:
        """Sinks by what they are given and by what they carry; needs the reading "sinks".

        Args:
            theta: mean attention that makes a key a sink.
            tau: entry of the hidden state, in its root mean square, that makes a token a massive one; no state of
                `d` entries has one above `sqrt(d)`.
            least: keys that fewer rows see are no token sinks: the last row gives itself much in any text.
        """
        given = self.columns > theta
        massive = self.peaks > tau
        seen = self.held["seen"] >= least
        visual = self.tokens.of(Kind.VISUAL).to(massive.device)
        return Sinks(given & seen[:, :, None], massive & self.real, massive & visual)

    def thumbnails(self, row: int = 0) -> Tensor:
        """`maps` of one batch row, `[L, H, R, C]` on the CPU.

        Raises:
            RegardError: no such row.
        """
        _inside("batch row", row, self.maps.shape[1])
        return self.maps[:, row].cpu()

    def head(self, layer: int, head: int, row: int = 0) -> dict[str, Tensor]:
        """All readings of one head, by name, without their first three dimensions.

        Raises:
            RegardError: layer, head or batch row out of range.
        """
        found = {}
        for name in ("masses", "columns", "entropy", "maps"):
            if name in self.held:
                layers, rows, heads = self.held[name].shape[:3]
                _inside("layer", layer, layers)
                _inside("head", head, heads)
                _inside("batch row", row, rows)
                found[name] = self.held[name][layer, row, head]
        return found

    def cpu(self) -> "Record":
        """The same on the CPU."""
        held = {name: tensor.cpu() for name, tensor in self.held.items()}
        logits = None if self.logits is None else self.logits.cpu()
        return replace(self, tokens=self.tokens.to(torch.device("cpu")), real=self.real.cpu(), logits=logits, held=held)


def _inside(what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise RegardError(f"{what} {number} is out of range; there are {count}")


def record(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    tokens: TokenMap | None = None,
    segments: Mapping[str, Tensor] | None = None,
    readings: Sequence[str] = READINGS,
    size: int = 128,
    rows: tuple[int, int] | None = None,
    dims: Sequence[int] | None = None,
) -> Record:
    """Run `model` once on `inputs` as it is, and read what its attention does.

    Logits and cache are those of a plain forward. A fused attention costs one more product of queries and keys and no
    memory of T x T; eager and others that tell no log-sum-exp are attended to twice.

    Args:
        model: any model `regard.attach` takes, not attached; it is not changed.
        inputs: ids `[B, T]`, or what a processor made (`input_ids` or `inputs_embeds`, `attention_mask`, pixels, ...).
        tokens: what the tokens are; None: a first token and text.
        segments: bool `[1|B, T]` by name, for `masses`; None: the kinds that there are, and each image of several.
        readings: some of `READINGS`.
        size: tiles along rows and along keys, at most; peak memory is `16 * max(2**22, B * size * T * H / Hk)` bytes.
        rows: first arrival that is read, and the one after the last; None: all. The last 64 rows of any prompt, each
            for itself: `rows=(T - 64, T)` and a size of 64.
        dims: where massive activations are looked for; None: in all dimensions.

    Returns:
        A `Record`.

    Raises:
        RegardError: an unknown reading, sizes that disagree, a segment over padding, rows out of range or of padding
            alone, NaN (which layer), or attention that is more than causal with a window and padding.
    """
    wanted = frozenset(choose("reading", name, READINGS) for name in readings)
    if size < 1:
        raise RegardError(f"size must be at least 1, got {size}")
    decoder, _ = open_free(model)
    given, real = prepared(model, inputs)
    tokens = _tokens(tokens, real)
    named = _segments(segments, tokens, real)
    span = _rows(rows, real)
    reader = Reader(decoder, wanted, real, torch.stack(list(named.values()), -1), size, span, dims)
    with torch.no_grad(), intercept(model, reader.attend), reader.watching():
        out = model(**given)
    return Record(
        tokens=tokens,
        real=real,
        segments=tuple(named),
        row_edges=edges(span[1] - span[0], size) + span[0],
        key_edges=edges(real.shape[1], size),
        logits=None if getattr(out, "logits", None) is None else out.logits[:, -1],
        held=reader.held(),
    )


def _tokens(tokens: TokenMap | None, real: Tensor) -> TokenMap:
    if tokens is None:
        return TokenMap.of_text(real)
    if tokens.length != real.shape[1] or tokens.rows not in (1, len(real)):
        raise RegardError(
            f"the token map is of {tokens.rows} rows and {tokens.length} arrivals, the prompt of {len(real)} and "
            f"{real.shape[1]}"
        )
    return tokens.to(real.device)


def _segments(segments: Mapping[str, Tensor] | None, tokens: TokenMap, real: Tensor) -> dict[str, Tensor]:
    """Every segment as bool `[B, T]`."""
    if segments is None:
        kinds = {kind.name.lower(): tokens.of(kind) for kind in Kind if kind != Kind.PADDING}
        images = {f"image {n + 1}": tokens.images == n for n in range(int(tokens.images.max()) + 1)}
        found = {name: mask for name, mask in kinds.items() if bool(mask.any())}
        found |= images if len(images) > 1 else {}
        return {name: mask.expand(real.shape) & real for name, mask in found.items()}
    if not segments:
        raise RegardError("segments is empty; leave it out for the kinds of tokens that there are")
    found = {}
    for name, mask in segments.items():
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape not in (real.shape, (1, real.shape[1])):
            raise RegardError(
                f"segment {name!r} must be bool [1 or {len(real)}, {real.shape[1]}], got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        mask = mask.to(real.device).expand(real.shape)
        if bool((mask & ~real).any()):
            row, at = (mask & ~real).nonzero()[0].tolist()
            raise RegardError(f"segment {name!r} lies over padding: row {row}, arrival {at}")
        found[name] = mask
    return found


def _rows(rows: tuple[int, int] | None, real: Tensor) -> tuple[int, int]:
    start, stop = (0, real.shape[1]) if rows is None else rows
    if not 0 <= start < stop <= real.shape[1]:
        raise RegardError(f"rows {start} to {stop} are out of range; the prompt has {real.shape[1]} arrivals")
    if not bool(real[:, start:stop].any()):
        raise RegardError(f"rows {start} to {stop} are padding in every prompt")
    return start, stop
