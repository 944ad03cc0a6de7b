"""Tokens in memory: a growing buffer, what one forward reads of it, and what all containers share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.core.step import Step
from regard.core.store import Codec, Decoding, Fields, Part
from regard.primitives import codes
from regard.primitives.merge import merge

Attend = Callable[..., tuple[Tensor, Tensor]]

# Numbers of keys that are gathered at once: on CPU what a cache holds, on a device what launches are worth.
GATHERED = {"cpu": 2**20, "cuda": 2**25}


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def written(x: Tensor, codec: Codec | None) -> Fields:
    """`x [B, Hk, T, D]` as the fields it is stored as; codes carry no gradient (see `Codec.straight`)."""
    return (x,) if codec is None else codec.encode(x.detach())


def joined(past: Fields, new: Fields) -> Fields:
    """`past` and `new` one after the other, `new` with its gradients; copies."""
    return tuple(torch.cat((p, n), dim=2) for p, n in zip(past, new, strict=True))


class Buffer:
    """Tuples of tensors `[B, Hk, slots, *]`, appended in place. Slots from `size` on hold anything.

    Args:
        limit: slots never exceed it while `size` does not (None: no limit).

    From 1,000 tokens on at most 5 % of the slots beyond `size` are empty, and growing moves a token
    about 32 times in all.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.fields: Fields = ()
        self.size = 0
        # Counts every change but those that fixed steps make.
        self.version = 0

    @property
    def slots(self) -> int:
        """Allocated token slots of each head."""
        return self.fields[0].shape[2] if self.fields else 0

    def append(self, new: Fields) -> None:
        """Write `new`, each `[B, Hk, T, *]`, behind what is there, without its gradients."""
        self.version += 1
        stop = self.size + new[0].shape[2]
        self._fit(stop, new)
        for field, part in zip(self.fields, new, strict=True):
            field[:, :, self.size : stop].copy_(part.detach())
        self.size = stop

    def room(self, tokens: int, like: Fields) -> Fields:
        """The whole fields, with slots for `tokens` more from `size` on; where there are none yet, such as `like`."""
        self.version += 1
        self._fit(self.size + tokens, like)
        return self.fields

    def reserve(self, spare: int) -> None:
        """Have slots for more tokens: `spare`, where fewer than half as many are left."""
        self.version += 1
        if self.slots - self.size < spare / 2 or self._stale:
            self._grow(self.size + spare, self.fields)

    def replace(self, fields: Fields) -> None:
        """Hold `fields`, which share no memory with the buffer, and nothing else."""
        self.size = 0
        self.append(fields)

    def read(self) -> Fields:
        """Views of what is held, each `[B, Hk, size, *]`."""
        return tuple(field[:, :, : self.size] for field in self.fields)

    def crop(self, size: int) -> None:
        """Keep the first `size` tokens."""
        self.version += 1
        self.size = min(size, self.size)
        if self.size == 0:
            self.fields = ()
        elif self.fields:
            self._fit(self.size, self.fields)

    def reorder(self, rows: Tensor) -> None:
        """Row `i` becomes the old row `rows[i]`."""
        self.version += 1
        self.fields = tuple(field.index_select(0, rows.to(field.device)) for field in self.fields)

    @property
    def _stale(self) -> bool:
        """Outside inference mode an inference tensor can no longer be written to."""
        return bool(self.fields) and self.fields[0].is_inference() and not torch.is_inference_mode_enabled()

    def _fit(self, size: int, like: Sequence[Tensor]) -> None:
        bounded = self.limit is not None and size <= self.limit
        most = self.limit if bounded else size + max(48, size // 20)
        if self.fields and size <= self.slots <= (most or 0) and not self._stale:
            return
        slots = size + max(16, size // 32)
        if bounded and self.limit is not None:
            slots = min(slots, self.limit)
        self._grow(slots, like)

    def _grow(self, slots: int, like: Sequence[Tensor]) -> None:
        past = self.read()
        self.fields = tuple(f.detach().new_empty((*f.shape[:2], slots, *f.shape[3:])) for f in like)
        for field, part in zip(self.fields, past, strict=False):
            field[:, :, : self.size].copy_(part)


@dataclass(frozen=True, eq=False)
class Shown:
    """The View of the containers: fields `[B, Hk, S, *]`, read through their codecs.

    Args:
        run: attention, called as `regard.attend`.
        live: this forward's own `k, v`, the last of those shown.
        positions: of the keys, `[1|B, S]`; None: consecutive, unpadded, ending with the last query.
    """

    run: Attend
    key_fields: Fields
    value_fields: Fields
    key_codec: Codec | None
    value_codec: Codec | None
    live: tuple[Tensor, Tensor]
    positions: Tensor | None

    @property
    def size(self) -> int:
        """Keys that it shows."""
        return self.key_fields[0].shape[2]

    def attend(
        self,
        q: Tensor,
        *,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
        index: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of `q [B, H, T, D]`: `(out [B, H, T, Dv], lse [B, H, T])`."""
        if index is None and bias is None and softcap is None and not step.two_sided:
            read = self._read_codes(q, pattern, step, scale)
            if read is not None:
                return read
        # Some rows of a forward are not the last of what is held.
        positions = self.positions if index is None and step.rows is None else self._places(step, q.device)
        k = self._held(self.key_fields, self.key_codec, self.live[0], q.dtype, index)
        v = self._held(self.value_fields, self.value_codec, self.live[1], q.dtype, index)
        if index is not None:
            assert positions is not None
            positions = pick(positions, index.clamp(min=0), 1).masked_fill(index < 0, -1)
        out, lse = self.run(
            q if self.key_codec is None else self.key_codec.query(q),
            k,
            v,
            pattern=pattern,
            bias=bias,
            scale=scale,
            softcap=softcap,
            q_positions=None if positions is None else step.queries(q.device),
            k_positions=positions,
            two_sided=step.two_sided,
        )
        return out if self.value_codec is None else self.value_codec.output(out), lse

    def _read_codes(self, q: Tensor, pattern: Pattern, step: Step, scale: float) -> tuple[Tensor, Tensor] | None:
        """The same straight from codes, None where that cannot be."""
        key, value = self.key_codec, self.value_codec
        if (key is None and value is None) or (
            torch.is_grad_enabled() and any(x.requires_grad for x in (q, *self.live))
        ):
            return None
        call = {"positions": self.positions, "pattern": pattern, "step": step, "scale": scale}
        return codes.read(q, self.key_fields, self.value_fields, key=key, value=value, **call)

    def attend_blocks(
        self,
        q: Tensor,
        index: Tensor,
        *,
        own: slice | None,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of `q [B, H, blocks * t, D]`, block by block over the lists `index [1|B, blocks, n]`.

        As many blocks run at once as `GATHERED` allows; see `View.attend_blocks`.
        """
        blocks, n = index.shape[1:]
        t = q.shape[2] // blocks
        held = self.live[0].shape[0] * self.live[0].shape[1] * self.live[0].shape[3]
        most = max(1, GATHERED.get(q.device.type, 2**20) // max(1, n * max(held, t)))
        q = q if self.key_codec is None else self.key_codec.query(q)
        q_positions = step.queries(q.device)
        parts, call = [], {"scale": scale, "softcap": softcap}
        for i in range(0, blocks, most):
            count = min(most, blocks - i)
            rows = slice(i * t, (i + count) * t)
            lists, some = index[:, i : i + count].flatten(1), fold(q[:, :, rows], count)
            if own is None:
                positions = pick(self._places(step, q.device), lists.clamp(min=0), 1).masked_fill(lists < 0, -1)
                batch = max(len(positions), len(q_positions))
                call |= {"pattern": pattern, "k_positions": positions.expand(batch, -1).reshape(-1, n)}
                call |= {"q_positions": q_positions[:, rows].expand(batch, -1).reshape(-1, t)}
                if batch == 1 and q.shape[0] > 1:
                    call |= {name: call[name].repeat(q.shape[0], 1) for name in ("q_positions", "k_positions")}
            else:
                call |= {"pattern": None, "causal": False}
            found = [self.run(some, *self._picked(lists, q.dtype, count), **call)] if n else []
            if own is not None:
                first = self.size - self.live[0].shape[2] + own.start
                mine = torch.arange(first + rows.start, first + rows.stop, device=q.device)[None]
                found.append(self.run(some, *self._picked(mine, q.dtype, count), scale=scale, softcap=softcap))
            parts.append(unfold(merge(found)[0], count))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return out if self.value_codec is None else self.value_codec.output(out)

    def _picked(self, index: Tensor, dtype: torch.dtype, blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots `index [1|B, blocks * n]`, `[B * blocks, Hk, n, *]` each."""
        k = self._held(self.key_fields, self.key_codec, self.live[0], dtype, index)
        v = self._held(self.value_fields, self.value_codec, self.live[1], dtype, index)
        return fold(k, blocks), fold(v, blocks)

    def keys(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """`q` and the keys `[B, Hk, S, D]` in one basis, and the keys' positions `[1|B, S]`."""
        k = self._held(self.key_fields, self.key_codec, self.live[0], q.dtype, None)
        return q if self.key_codec is None else self.key_codec.query(q), k, self._places(step, q.device)

    def _places(self, step: Step, device: torch.device) -> Tensor:
        if self.positions is not None:
            return self.positions
        return torch.arange(step.stop - self.size, step.stop, device=device)[None]

    def _held(
        self, fields: Fields, codec: Codec | None, live: Tensor, dtype: torch.dtype, index: Tensor | None
    ) -> Tensor:
        """Keys or values `[B, Hk, S, *]`, only those of `index` decoded where no gradient needs the others."""
        if index is None:
            return _read(fields, codec, live, dtype)
        if torch.is_grad_enabled() and live.requires_grad:
            return pick(_read(fields, codec, live, dtype), index.clamp(min=0), 2)
        return _read(tuple(pick(field, index.clamp(min=0), 2) for field in fields), codec, live, dtype)


@dataclass(frozen=True, eq=False)
class Fixed:
    """The View of a fixed step (`Step.at`): fields `[B, Hk, S, *]`, of which the device knows how much is held.

    Args:
        by: what it is read with.
        lengths: `[B]` slots that are held, the first ones; None: all, as far as `positions` says.
        positions: of the slots, `[1|B, S]`, negative: not a key; None: consecutive, ending with the query.
    """

    by: Decoding
    key_fields: Fields
    value_fields: Fields
    key_codec: Codec | None
    value_codec: Codec | None
    lengths: Tensor | None
    positions: Tensor | None

    @property
    def size(self) -> int:
        """Slots that it shows, held or not."""
        return self.key_fields[0].shape[2]

    def attend(
        self,
        q: Tensor,
        *,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
        index: Tensor | None = None,
        bias: Tensor | None = None,
        part_of: Part | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of `q [B, H, 1, D]`: `(out [B, H, 1, Dv], lse [B, H, 1])`.

        With `part_of`, `q` is of all heads of the layer, and what is returned are `part_of.out` and `part_of.lse`.

        Raises:
            RegardError: `index` or `bias` is given, or the pattern is no window with a sink.
        """
        band = codes.span(pattern)
        if index is not None or bias is not None or band is None:
            raise self._refused(f"pattern {pattern!r}" if band is None else "a list of keys or a bias")
        where = {"lengths": self.lengths, "positions": self.positions, "part_of": part_of}
        key, value = self.key_codec, self.value_codec
        if softcap is None and (key or value):
            fields = (self.key_fields, self.value_fields)
            read = codes.read(q, *fields, key=key, value=value, pattern=pattern, step=step, scale=scale, **where)
            if read is not None:
                return read
        if part_of is not None and value is not None:
            # An output in another basis is brought back on its way.
            mine = part_of.queries
            out, lse = self.attend(q.index_select(1, mine), pattern=pattern, step=step, scale=scale, softcap=softcap)
            return part_of.out.index_copy_(1, mine, out), part_of.lse.index_copy_(1, mine, lse.to(part_of.lse.dtype))
        out, lse = self.by.decode(
            q if key is None else key.query(q),
            self.key_fields[0] if key is None else key.decode(self.key_fields, q.dtype),
            self.value_fields[0] if value is None else value.decode(self.value_fields, q.dtype),
            q_positions=None if self.positions is None else step.queries(q.device),
            sink=band[0],
            recent=band[1],
            scale=scale,
            softcap=softcap,
            check=False,
            **where,
        )
        return out if value is None else value.output(out), lse

    def attend_blocks(
        self,
        q: Tensor,
        index: Tensor,
        *,
        own: slice | None,
        pattern: Pattern,
        step: Step,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Refused.

        Raises:
            RegardError: always.
        """
        raise self._refused("lists of keys")

    def keys(self, q: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: how many there are is not known here.

        Raises:
            RegardError: always.
        """
        raise self._refused("the keys themselves")

    def _refused(self, what: str) -> RegardError:
        return RegardError(f"a fixed step reads windows with sinks over all that is held; it was asked for {what}")


def fold(x: Tensor, blocks: int) -> Tensor:
    """`[B, H, blocks * n, D]` as a batch of blocks, `[B * blocks, H, n, D]`."""
    return x.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, blocks: int) -> Tensor:
    """What `fold` folded, put back."""
    return x.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)


def pick(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries `index [1|B, n]` of `x [1|B, ..., S, ...]` along `dim`, copied."""
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return torch.take_along_dim(x, index.view(shape), dim)


def _read(fields: Fields, codec: Codec | None, live: Tensor, dtype: torch.dtype) -> Tensor:
    if codec is None:
        return fields[0]
    x = codec.decode(fields, dtype)
    if codec.straight is None or not (torch.is_grad_enabled() and live.requires_grad):
        return x
    own = codec.straight(live).to(dtype)
    past = x.shape[2] - own.shape[2]
    return torch.cat((x[:, :, :past], x[:, :, past:] + (own - own.detach())), dim=2)


class Container:
    """What the stores over one Buffer share. Keys and values are its fields, keys first.

    Args:
        attend: attention, called as `regard.attend`; given here because primitives lie below `ops`.
        key_codec, value_codec: how vectors are written; None: as they come.
        limit: see Buffer.
    """

    kind: str

    def __init__(
        self, attend: Attend, key_codec: Codec | None = None, value_codec: Codec | None = None, limit: int | None = None
    ):
        self.run, self.key_codec, self.value_codec = attend, key_codec, value_codec
        self.buffer = Buffer(limit)
        self.length = 0
        self.state: dict[str, Tensor] = {}
        self._split = 1

    def write(self, k: Tensor, v: Tensor, step: Step) -> Fields:
        """The fields of `k [B, Hk, T, D]`, `v [B, Hk, T, Dv]`, not yet stored.

        Raises:
            RegardError: `step` does not go on where this store ends, or its rows or heads are not those held.
        """
        self._check(k, step)
        both = codes.encoded(k, v, self.key_codec, self.value_codec)
        keys, values = both or (written(k, self.key_codec), written(v, self.value_codec))
        self._split = len(keys)
        return keys + values

    def place(self, k: Tensor, v: Tensor, step: Step) -> bool:
        """Store `k`, `v` behind what the buffer holds, as codes and in one launch; False where that cannot be.

        Raises:
            RegardError: as `write`.
        """
        found = None if torch.is_grad_enabled() else codes.writer(k, v, self.key_codec, self.value_codec)
        if found is None:
            return False
        self._check(k, step)
        keys = codes.blank(k, self.key_codec, 0)
        self._split = split = len(keys)
        fields = self.buffer.room(k.shape[2], keys + codes.blank(v, self.value_codec, 0))
        codes.write(found, k, v, fields[:split], fields[split:], self.key_codec, self.value_codec, self.buffer.size)
        self.buffer.size += k.shape[2]
        return True

    def _check(self, k: Tensor, step: Step) -> None:
        if step.start != self.length:
            raise RegardError(f"a forward from arrival {step.start} on met a store that ends at {self.length}")
        for field in self.buffer.fields[:1]:
            if field.shape[:2] != k.shape[:2]:
                given, held = tuple(k.shape[:2]), tuple(field.shape[:2])
                raise RegardError(f"{given} (rows, heads) were written to a store of {held}")

    def shown(self, fields: Fields, k: Tensor, v: Tensor, positions: Tensor | None) -> Shown:
        """The View of `fields`, whose last tokens are `k`, `v`."""
        keys, values = fields[: self._split], fields[self._split :]
        return Shown(self.run, keys, values, self.key_codec, self.value_codec, (k, v), positions)

    def unfixed(self, step: Step) -> str | None:
        """Why `step` cannot be a fixed step, or None."""
        return f"a {self.kind} store has no fixed steps"

    def fix(self, spare: int) -> int | None:
        """Have room for more arrivals: `spare`, where there is for fewer than half as many. Returns all there is."""
        self.buffer.reserve(spare)
        return self.buffer.slots

    def put(self, k: Tensor, v: Tensor, step: Step, by: Decoding, heads: Tensor | None = None) -> Fixed:
        """`append` of a fixed step: `k [B, Hk, 1, D]`, `v` go to the slot that `step.at` comes to, nothing is counted.

        Raises:
            RegardError: as `write`.
        """
        self._check(k if heads is None else k[:, : len(heads)], step)
        slots, seen, lengths, positions = self._fixed(step, k.shape[0])
        fields = tuple(field[:, :, :seen] for field in self.buffer.fields)
        keys, values = fields[: self._split], fields[self._split :]
        key, value = self.key_codec, self.value_codec
        if key is None and value is None:
            by.place(k, v, *fields, slots=slots, heads=heads)
        elif (found := codes.writer(k, v, key, value)) is not None:
            codes.write(found, k, v, keys, values, key, value, slots, heads)
        else:
            k, v = (x if heads is None else x.index_select(1, heads) for x in (k, v))
            for field, new in zip(fields, written(k, key) + written(v, value), strict=True):
                field.index_copy_(2, slots[:1], new)
        return Fixed(by, keys, values, key, value, lengths, positions)

    def _fixed(self, step: Step, rows: int) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
        """In a fixed step: the new token's slot `[B]`, slots that are read, lengths `[B]`, positions `[1|B, slots]`."""
        raise NotImplementedError

    def passed(self) -> None:
        """A fixed step went by."""
        self.length += 1

    def versions(self) -> Iterator[int]:
        """Changes with everything but fixed steps."""
        yield self.buffer.version

    def advance(self, step: Step) -> None:
        """Refused: this store has no place for arrivals it was not given.

        Raises:
            RegardError: always.
        """
        raise RegardError(f"a layer with a {self.kind} store ran no row of the forward at arrival {step.start}")

    def reorder(self, rows: Tensor) -> None:
        """Row `i` becomes the old row `rows[i]`; the number of rows may change."""
        self.buffer.reorder(rows)
        self.state = {name: x.index_select(0, rows.to(x.device)) for name, x in self.state.items()}

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.buffer.crop(0)
        self.state.clear()
        self.length = 0

    def storages(self) -> Iterator[Tensor]:
        """Every tensor that keeps memory alive."""
        yield from self.buffer.fields
        yield from self.state.values()

    def raw(self) -> Iterator[Tensor]:
        """Those of `storages` that hold keys or values as they come."""
        keys, values = self.buffer.fields[: self._split], self.buffer.fields[self._split :]
        yield from keys if self.key_codec is None else ()
        yield from values if self.value_codec is None else ()

    @property
    def capacity(self) -> dict[str, int]:
        """Allocated token slots summed over heads."""
        heads = self.buffer.fields[0].shape[1] if self.buffer.fields else 0
        return {self.kind: self.buffer.slots * heads}

    def checked(self, length: int) -> int:
        """`length` if a crop may keep that many arrivals.

        Raises:
            RegardError: it is negative, or what later queries need before it is gone.
        """
        if length < 0:
            raise RegardError(f"cannot crop to {length} arrivals; 0 forgets all of the {self.length} held")
        if self.length - length > self.removable:
            raise RegardError(
                f"cannot forget the last {self.length - length} of {self.length} arrivals: earlier ones were already "
                f"evicted, {self.removable} can be removed; call record() before the forwards a crop may undo"
            )
        return min(length, self.length)

    @property
    def removable(self) -> int:
        """How many of the last arrivals a `crop` can forget now."""
        return self.length
