"""What is noted of each layer while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.families import Decoder
from regard.adapters.seam import Call
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.attention import attend
from regard.ops.massive import peaks
from regard.ops.totals import edges, totals
from regard.primitives.sdpa import Overheard

READINGS = ("masses", "columns", "entropy", "maps", "sinks", "norms")
# Probabilities by tile and key that are in memory at once (64 MiB): heads are read in turns.
LIMIT = 2**24
TOKENS = 4096  # hidden states that are looked at together


def overheard(call: Call, window: int | None, real: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's own output `[B, T, H, Dv]`, and the log-sum-exp `[B, H, T]` of its scores.

    Raises:
        RegardError: the layer asks for more than causal attention with a window and padding.
    """
    call.refuse_extras()
    with Overheard() as heard:
        out, _ = call.own()
    lse = heard.taken(*call.query.shape[1:3])
    if lse is None:
        arrivals = torch.where(real, torch.arange(real.shape[1], device=real.device), -1)
        pattern = Pattern.causal() if window is None else Pattern.window(window)
        places = None if bool(real.all()) else arrivals
        lse = attend(
            call.query, call.key, call.value, pattern=pattern, scale=call.scale, softcap=call.softcap,
            q_positions=places, k_positions=places,
        )[1]  # fmt: skip
    return out, lse


class Reader:
    """Answers each layer with its own attention, and keeps what was asked for.

    Args:
        decoder: the opened model.
        wanted: some of `READINGS`.
        real: bool `[B, T]`.
        segments: bool `[B, T, n]`.
        size: tiles a side, at most.
        span: first arrival that is read and the one after the last.
        dims: where massive activations are looked for.
    """

    def __init__(
        self, decoder: Decoder, wanted: frozenset[str], real: Tensor, segments: Tensor, size: int,
        span: tuple[int, int], dims: Sequence[int] | None,
    ):  # fmt: skip
        self.decoder, self.wanted, self.real, self.span, self.dims = decoder, wanted, real, span, dims
        self.segments = segments
        self.row_edges, self.key_edges = edges(span[1] - span[0], size), edges(real.shape[1], size)
        self.pool = _pooling(self.key_edges.to(real.device))
        inside = real[:, slice(*span)].long()
        counts = torch.nn.functional.pad(inside.cumsum(1), (1, 0))[:, self.row_edges.to(real.device)]
        self.tile_rows = counts.diff(dim=1).clamp(min=1)[:, None]
        self.seen = {window: self._seen(window) for window in decoder.windows}
        self._found: dict[str, list[Tensor]] = {}
        self._spoiled: list[Tensor] = []

    def attend(self, call: Call) -> Tensor:
        """The layer's own answer."""
        window = self.decoder.windows[call.seat.layer]
        if call.key.shape[2] != self.real.shape[1]:
            raise RegardError(
                f"layer {call.seat.layer} holds {call.key.shape[2]} keys of {self.real.shape[1]} tokens; use a cache "
                "that grows, or none"
            )
        out, lse = overheard(call, window, self.real)
        self._spoiled.append(torch.isnan(lse.masked_fill(~self.real[:, None], 0)).any())
        if "norms" in self.wanted:
            self._note("values", _norm(call.value))
        if self.wanted - {"norms"}:
            self._read(call, lse, window)
        return out.transpose(1, 2)

    def _read(self, call: Call, lse: Tensor, window: int | None) -> None:
        start, stop = self.span
        q, k, lse = call.query[:, :, start:stop], call.key, lse[:, :, start:stop]
        (batch, heads), keys, tiles = q.shape[:2], k.shape[2], len(self.row_edges) - 1
        group = heads // k.shape[1]
        together = max(1, LIMIT // (group * tiles * keys))
        rows = max(1, together // k.shape[1])
        how = {"tiles": tiles, "scale": call.scale, "softcap": call.softcap, "first": start, "window": window}
        parts = []
        for b in range(0, batch, rows):
            some = slice(b, b + rows)
            pieces = []
            for h in range(0, k.shape[1], together):
                mine = slice(h * group, (h + together) * group)
                mass, spread = totals(
                    q[some, mine], k[some, h : h + together], lse[some, mine], real=self.real[some],
                    entropy="entropy" in self.wanted, **how,
                )  # fmt: skip
                pieces.append(self._reduced(mass, spread, some))
            parts.append({name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]})
        for name in parts[0]:
            self._note(name, torch.cat([part[name] for part in parts]))
        if "columns" in parts[0]:
            columns = self._found["columns"][-1]
            columns /= self.seen[window].clamp(min=1)[:, None]
            self._note("seen", self.seen[window])

    def _reduced(self, mass: Tensor, spread: Tensor | None, some: slice) -> dict[str, Tensor]:
        """Readings of some heads: `mass [b, h, R, S]`, `spread [b, h, R]`."""
        found, rows = {}, self.tile_rows[some]
        if self.wanted & {"columns", "sinks"}:
            found["columns"] = mass.sum(2)
        if "masses" in self.wanted:
            # One vector at a time reads the sums at full speed; a product with few columns does not.
            parts = zip(mass, self.segments[some].to(mass.dtype), strict=True)
            shares = [torch.stack([one @ segment for segment in many.T], -1) for one, many in parts]
            found["masses"] = torch.stack(shares) / rows[..., None]
        if "maps" in self.wanted:
            found["maps"] = self.pool(mass) / rows[..., None]
        if spread is not None:
            found["entropy"] = spread / rows
        return found

    def _seen(self, window: int | None) -> Tensor:
        """How many rows see each key, `[B, T]`."""
        start, stop = self.span
        length = self.real.shape[1]
        rows = torch.zeros_like(self.real, dtype=torch.long)
        rows[:, start:stop] = self.real[:, start:stop]
        before = torch.nn.functional.pad(rows.cumsum(1), (1, 0))
        at = torch.arange(length, device=rows.device)
        last = (at + (length if window is None else window)).clamp(max=length)
        return (before[:, last] - before[:, at]) * self.real

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, hidden states are read as they enter the layers."""
        hooks = []
        if self.wanted & {"sinks", "norms"}:
            hooks = [block.register_forward_pre_hook(self._watch, with_kwargs=True) for block in self.decoder.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else kwargs["hidden_states"]).split(TOKENS, 1)
        read: dict[str, Callable[[Tensor], Tensor]] = {}
        if "sinks" in self.wanted:
            read["peaks"] = lambda part: peaks(part, self.dims)
        if "norms" in self.wanted:
            read["stream"] = _norm
        for name, function in read.items():
            self._note(name, torch.cat([function(part) for part in x], 1))

    def _note(self, name: str, tensor: Tensor) -> None:
        self._found.setdefault(name, []).append(tensor)

    def held(self) -> dict[str, Tensor]:
        """The readings of all layers.

        Raises:
            RegardError: the scores of a layer hold NaN.
        """
        spoiled = torch.stack(self._spoiled).nonzero()
        if len(spoiled):
            raise RegardError(f"layer {int(spoiled[0])} is the first whose attention scores hold NaN")
        return {name: torch.stack(layers) for name, layers in self._found.items()}


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _pooling(ends: Tensor) -> Callable[[Tensor], Tensor]:
    """Sums of the last dimension between `ends [C + 1]`."""
    sizes = ends.diff()
    count, widest = len(sizes), int(sizes.max())
    if bool((sizes == widest).all()):
        return lambda x: x.unflatten(-1, (count, widest)).sum(-1)
    inside = torch.arange(widest, device=ends.device)
    # Places beyond a tile read a column of zeros behind the last key.
    index = torch.where(inside < sizes[:, None], ends[:-1, None] + inside, ends[-1])
    return lambda x: torch.nn.functional.pad(x, (0, 1))[..., index.flatten()].unflatten(-1, index.shape).sum(-1)
