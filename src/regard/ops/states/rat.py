"""RAT: a gated recurrence inside chunks, softmax attention over what the chunks before left."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.ops.attention import attend, merge
from regard.ops.elementwise import recur
from regard.primitives.grid import Grid, grid, packed
from regard.primitives.rotary import rotate
from regard.primitives.sdpa import own_refuses, with_own

CARD = Card(
    title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
    arxiv="2507.04416",
    sheet=135,
    implements="The operator between the projections: chunk recurrence, positions by chunk, attention over chunk "
    "ends joined with the token's own summary, decoding from one entry a chunk.",
    exact=False,
    saving="memory",
    departures=(
        "Lengths that are no multiple of the chunk are served, and padded and packed rows.",
        "A token's score with its own summary is taken before rotation: both stand in one chunk, so it is the same.",
    ),
    oracles=(
        "chunk T: the gated recurrence itself; chunk 1: softmax attention with keys (1 - g) k and values (1 - g) v",
        "a loop over tokens, in any split of prefill and decoding",
        "states equal flash-linear-attention's naive_recurrent_hgrn",
        "ceil(T / chunk) entries are held; a chunk's tokens reach later ones through its end alone",
    ),
    options={
        "chunk": Option(default=16, low=1, search=(8, 16, 32), doc="tokens that one entry of the cache stands for"),
        "base": Option(
            kind="float",
            default=10000.0,
            optional=True,
            low=1.0,
            doc="of rotary positions, counted in chunks; none: no positions",
        ),
    },
)


class State(NamedTuple):
    """What decoding needs.

    `keys`, `values` `[B, H, ceil(seen / chunk), D]`: one entry a chunk, keys rotated; the last one is that of the
    chunk still open. `key`, `value` `[B, H, D]`: the running summaries in float32, keys before rotation. `seen`
    tokens went by, padding included; `count [B]` of them were real (None: all, in every row).
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    seen: int
    chunk: int
    count: Tensor | None = None

    @property
    def real(self) -> int | Tensor:
        """Real tokens that went by: one number for all rows, or one a row."""
        return self.seen if self.count is None else self.count


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    chunk: int = 16,
    base: float | None = 10000.0,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """`y_t = softmax(q_t . [chunk ends before t's chunk, k~_t] / sqrt(D)) [values there, v~_t]`.

    In a chunk `k~_t = g_t k~_{t-1} + (1 - g_t) k_t` and likewise `v~`, from zero at its start.

    Args:
        q: `[B, G, T, D]`; head h uses group `h % G`, as the paper tiles them.
        k: `[B, G, T, D]`.
        v: `[B, H, T, D]`.
        gate: `[B, H, T, D]`, in 0..1.
        chunk: tokens a chunk, C.
        base: of the rotary positions of q and of chunk ends, counted in chunks; None: none.
        initial_state: what an earlier call returned; the tokens follow on.
        cu_seqlens: `[N + 1]`, packed sequences, B = 1; they are padded to the longest, which is read from the device.
        mask: `[B, T]` bool, False: padding, on either side; its output is 0.
        check: read the gates and refuse values outside 0..1 (None: on a CPU).
        backend: of the attention over chunk ends, as `regard.attend` has them.

    Returns:
        y `[B, H, T, D]` in v's dtype, and the `State` after the last token (N rows when packed).

    Raises:
        RegardError: shapes disagree, `chunk` is below 1, a gate is outside 0..1, or a state was made with other chunks.

    Source: RAT (2507.04416), section 3; CLAIRE-Labo/RAT, `src/model/backbone/rat/rat.py`.
    """
    _check(q, k, v, gate, chunk, base, initial_state, mask, check)
    if cu_seqlens is not None:
        if v.shape[0] != 1 or mask is not None:
            raise RegardError(f"packed sequences have one batch row and no mask, got {v.shape[0]} rows")
        rows = packed(cu_seqlens, v.shape[2])
        call = {"chunk": chunk, "base": base, "initial_state": initial_state, "check": False, "backend": backend}
        out, state = scan(*(rows.rows(x) for x in (q, k, v, gate)), mask=rows.mask, **call)
        return rows.pack(out), state
    if v.shape[2] == 1 and initial_state is not None and mask is None and not torch.is_grad_enabled():
        return step(q, k, v, gate, initial_state, base=base)
    laid = grid(v.shape[2], chunk, 0 if initial_state is None else initial_state.real, mask)
    keys, values = _summaries(laid, k, v, gate, initial_state)
    numbers = torch.arange(laid.slots // chunk, device=q.device)[None]
    numbers = numbers + (laid.first if isinstance(laid.first, int) else laid.first[:, None])
    ends = (rotate(keys[:, :, chunk - 1 :: chunk], numbers, base), values[:, :, chunk - 1 :: chunk])
    placed = laid.place(q, 0.0)
    scores = _own_scores(placed, keys)
    turned = _tile(rotate(placed, numbers.repeat_interleave(chunk, 1), base), v.shape[1])
    out = _read(laid, turned, scores, values, ends, initial_state, backend)
    return laid.take(out, v.shape[2]), _after(laid, v.shape[2], keys, values, ends, initial_state)


def step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: State, *, base: float | None) -> tuple[Tensor, State]:
    """One token of `scan`, without gradients. The entries of `state` are written in place."""
    heads, chunk = v.shape[1], state.chunk
    real = torch.full((1, 1), state.seen, device=v.device) if state.count is None else state.count[:, None]
    at, opens = real // chunk, (real % chunk == 0)[..., None]
    key, value = (
        (gate * was[:, :, None]).masked_fill(opens[..., None], 0) + torch.addcmul(x, gate, x, value=-1)
        for x, was in ((_tile(k, heads), state.key), (v, state.value))
    )
    missing = -(-(state.seen + 1) // chunk) - state.keys.shape[2]
    slot = at[:, None, :, None].expand_as(value)
    keys, values = (
        (F.pad(held, (0, 0, 0, missing)) if missing else held).scatter_(2, slot, new.to(held.dtype))
        for held, new in ((state.keys, rotate(key, at, base)), (state.values, value))
    )
    places = torch.arange(keys.shape[2], device=v.device)[None]
    places = None if state.count is None else places.masked_fill(places > at, -1)
    out, _ = attend(_tile(rotate(q, at, base), heads), keys, values, causal=False, k_positions=places)
    count = None if state.count is None else state.count + 1
    return out, State(keys, values, key[:, :, 0], value[:, :, 0], state.seen + 1, chunk, count)


def _tile(x: Tensor, heads: int) -> Tensor:
    """`x [B, G, T, D]` for all heads: head h gets group `h % G`."""
    return x if x.shape[1] == heads else x.repeat(1, heads // x.shape[1], 1, 1)


def _summaries(laid: Grid, k: Tensor, v: Tensor, gate: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    """`k~` and `v~` at every slot, `[B, H, slots, D]`; free slots keep what stood before."""
    forget = laid.place(gate, 1.0)
    split, found = (-1, k.shape[1]), []
    for x, was in ((k, None if state is None else state.key), (v, None if state is None else state.value)):
        x = laid.place(x, 0.0)
        x = x.unflatten(1, split) if x.shape[1] == v.shape[1] else x[:, None]
        inputs = torch.addcmul(x, forget.unflatten(1, split), x, value=-1).flatten(1, 2)
        found.append(recur(forget, laid.enter(inputs, was), reset=laid.chunk)[0])
    return found[0], found[1]


def _own_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Scaled scores of `q [B, G, S, D]` with the summary that stands at the same token, `[B, H, S]`."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    products = q.to(exact)[:, None] * keys.unflatten(1, (-1, q.shape[1]))
    return products.sum(-1).flatten(1, 2) * q.shape[3] ** -0.5


def _read(
    laid: Grid, q: Tensor, scores: Tensor, values: Tensor, ends: tuple[Tensor, ...], state: State | None, backend: str
) -> Tensor:
    """Softmax over earlier chunk ends and the own summary, `[B, H, slots, D]`.

    The tokens at one place of their chunks are one query head, and see its chunk ends causally: no mask is needed.
    """
    B, H, slots, D = q.shape
    shape = (B * H, slots // laid.chunk, laid.chunk)
    q, own = (x.reshape(*shape, D).transpose(1, 2) for x in (q, values))
    scores = scores.reshape(shape).transpose(1, 2)
    k, v = (x.reshape(B * H, 1, shape[1], D) for x in ends)
    if q.is_cuda and own_refuses(q, k, v) is not None:  # float32: torch's kernel has no grouped heads
        k, v = k.repeat(1, q.shape[1], 1, 1), v.repeat(1, q.shape[1], 1, 1)
    past = state is not None and not (isinstance(laid.first, int) and laid.first == 0)
    if not past and backend == "auto" and own_refuses(q, k, v) is None:
        out = with_own(q, k, v, scores, own, scale=D**-0.5)
        return out.transpose(1, 2).reshape(B, H, slots, D)
    before, lse = attend(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], backend=backend)
    parts = [(own, scores), (F.pad(before, (0, 0, 1, 0)), F.pad(lse, (1, 0), value=-torch.inf))]
    if past:
        assert state is not None
        held = (x.flatten(0, 1)[:, None] for x in (state.keys, state.values))
        places = torch.arange(state.keys.shape[2], device=q.device)[None]
        limit = laid.first if isinstance(laid.first, int) else laid.first.repeat_interleave(H)[:, None]
        places = places.masked_fill(places >= limit, -1)
        parts.append(attend(q, *held, causal=False, k_positions=places, backend=backend))
    return merge(parts)[0].transpose(1, 2).reshape(B, H, slots, D)


def _after(
    laid: Grid, tokens: int, keys: Tensor, values: Tensor, ends: tuple[Tensor, Tensor], state: State | None
) -> State:
    """The state after `tokens` more, in memory of its own."""
    seen, *past = (tokens, None, None) if state is None else (state.seen + tokens, state.keys, state.values)
    kept = [laid.entries(new, old, -(-seen // laid.chunk)) for new, old in zip(ends, past, strict=True)]
    exact = torch.float64 if keys.dtype == torch.float64 else torch.float32
    key, value = (laid.last(x, tokens).to(exact, copy=True) for x in (keys, values))
    return State(kept[0], kept[1], key, value, seen, laid.chunk, laid.count)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk: int,
    base: float | None,
    state: State | None,
    mask: Tensor | None,
    check: bool | None,
) -> None:
    """Raise RegardError for arguments that do not belong together."""
    shapes = [list(x.shape) for x in (q, k, v, gate)]
    fit = v.dim() == 4 and q.shape == k.shape and v.shape == gate.shape and q.dim() == 4
    if not fit or (q.shape[0], *q.shape[2:]) != (v.shape[0], *v.shape[2:]) or v.shape[2] == 0:
        raise RegardError(f"q, k must be [B, G, T, D] and v, gate [B, H, T, D] with T above 0, got {shapes}")
    if v.shape[1] % q.shape[1]:
        raise RegardError(f"{v.shape[1]} value heads are not a multiple of {q.shape[1]} groups of queries and keys")
    if chunk < 1:
        raise RegardError(f"chunk must be at least 1, got {chunk}")
    if base is not None and v.shape[3] % 2:
        raise RegardError(f"rotary positions need an even head dimension, got {v.shape[3]}; base=None leaves them out")
    if mask is not None and (mask.shape != (v.shape[0], v.shape[2]) or mask.dtype != torch.bool):
        raise RegardError(f"mask must be bool [B, T], got {list(mask.shape)} {mask.dtype}")
    if state is not None:
        if state.chunk != chunk:
            raise RegardError(f"the state holds one entry for {state.chunk} tokens, this call wants chunk={chunk}")
        wanted = (v.shape[1], -(-state.seen // chunk), v.shape[3])
        if tuple(state.keys.shape[1:]) != wanted or state.values.shape != state.keys.shape:
            raise RegardError(f"entries of the state must be {wanted} after the batch, got {list(state.keys.shape)}")
    if (check or (check is None and gate.device.type == "cpu")) and not bool(((gate >= 0) & (gate <= 1)).all()):
        raise RegardError(f"gates must lie in 0..1, got {gate.min().item():.4g} to {gate.max().item():.4g}")
