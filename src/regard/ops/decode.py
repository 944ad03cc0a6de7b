"""Attention of few queries over many keys, ragged or paged: how a model decodes.

`reference` gathers the pages and masks, in plain torch on any device; `triton` reads every key and value once, where it
lies (`kernels/attention/decode.py`). A named backend never falls back.
"""

from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.errors import choose as one_of
from regard.core.pattern import Pattern
from regard.core.rules import Causal, Either, Rule, Sink, Window
from regard.core.shapes import group_size
from regard.core.store import Part as PartOf
from regard.kernels import device
from regard.primitives import reference

__all__ = ["choose", "decode", "place", "refuses", "run", "yields"]

Part = tuple[Tensor, Tensor]
BACKENDS = ("auto", "reference", "triton")
# Fewer keys than this are no work for a whole card: `attend` leaves them to torch.
MANY = 512
# Beside a sink, keys that a window does not see are read too, up to this many times as many as are seen.
WASTE = 2


def choose(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> tuple[str, str]:
    """The backend that `decode` would run, and why: `("reference" | "triton", reason)`.

    Raises:
        RegardError: no such backend, or "triton" refuses the call; the message says why.
    """
    one_of("backend", backend, BACKENDS)
    if backend == "reference":
        return "reference", "asked for"
    reason = _refuses(q, k, v)
    if reason is None:
        return "triton", "asked for" if backend == "triton" else "every key and value is read once"
    if backend == "triton":
        raise RegardError(f"backend 'triton' refuses: {reason}. Use backend='reference' or 'auto'")
    return "reference", reason


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    positions: Tensor | None = None,
    q_positions: Tensor | None = None,
    sink: int = 0,
    recent: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    workers: int | None = None,
    check: bool | None = None,
    part_of: PartOf | None = None,
    backend: str = "auto",
) -> Part:
    """Attention of the last `T` tokens of every request over all its keys; "triton" has no gradients.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, S, D]`, `Hk` dividing `H`; with `pages` a pool `[P, Hk, page, D]`.
        v: as `k`, with `Dv`.
        lengths: `[B]`, keys of each request, its last `T` the new ones; None: all there is room for. They are read on
            the device, so a CUDA graph may be replayed while they grow; nothing behind them is read.
        pages: `[B, n]`: key `j` of request b is at `j % page` in page `pages[b, j // page]`.
        positions: `[1|B, S]` or `[1|B, Hk, S]` of the keys, in any order; negative: unused (its value must be finite).
            None: `0..length - 1`.
        q_positions: `[1|B, T]`, negative: an empty row. None: the last `T` of `0..length - 1`.
        sink: keys at positions below it are seen even where `recent` bounds how far queries look back.
        recent: positions a query may look back, its own included; None: all.
        causal: False: later keys are seen too.
        scale: of the scores; None: `D ** -0.5`.
        softcap: `s` becomes `softcap * tanh(s / softcap)`.
        workers: programs among which the tiles of all keys are divided; None: as many as the card runs at once.
        check: read `lengths` and `pages` first (None: on a CPU only); False where requests share pages for reading.
        part_of: `k` and `v` are of some KV heads only: `q` has all of them, and answers go where this says.
        backend: "auto", "reference" or "triton".

    Returns:
        out `[B, H, T, Dv]` in q's dtype, lse `[B, H, T]` float32 (or float64): 0 and -inf where no key is seen.

    Raises:
        RegardError: shapes, dtypes or heads disagree, "triton" refuses, or (where checked) there is no room for a
            length, or a page does not exist or is held by two requests.

    Source: LeanAttention (2405.10480).
    """
    own = q if part_of is None else q[:, : k.shape[1] * part_of.group]
    _check_shapes(own, k, v, lengths, pages, positions, q_positions, workers)
    if check or (check is None and q.device.type == "cpu"):
        _check_values(k, lengths, pages)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = {"lengths": lengths, "pages": pages, "positions": positions, "q_positions": q_positions, "scale": scale}
    call |= {"sink": sink, "recent": recent, "causal": causal, "softcap": softcap}
    if choose(own, k, v, backend=backend)[0] == "triton":
        return _run(q, k, v, workers=workers, part_of=part_of, **call)
    return _reference(q, k, v, **call) if part_of is None else _in_place(q, k, v, part_of, **call)


def _in_place(q: Tensor, k: Tensor, v: Tensor, part: PartOf, **call: Any) -> Part:
    """`_reference` of the heads that `part` names, written to their places."""
    mine = part.queries
    out, lse = _reference(q.index_select(1, mine), k, v, **call)
    return part.out.index_copy_(1, mine, out), part.lse.index_copy_(1, mine, lse)


def place(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, /, *, slots: Tensor, heads: Tensor | None = None) -> None:
    """Write a token of every request to its slot, which is read on the device.

    Args:
        k: `[B, Hk, 1, D]`.
        v: `[B, Hk, 1, Dv]`.
        keys: `[B, n, S, D]`, n = Hk without `heads`.
        values: `[B, n, S, Dv]`.
        slots: `[B]` integers; where no kernel writes, the first one counts for all requests.
        heads: `[n]` integers, the heads of `k` and `v` that are written; None: all.
    """
    if device.refuses(k) is None:
        from regard.kernels.cache import saw_int4 as kernels

        if kernels.refuses_write(k, v, (keys,), (values,), None, None) is None:
            kernels.write(k, v, (keys,), (values,), key=None, value=None, start=slots, heads=heads)
            return
    for held, new in ((keys, k), (values, v)):
        held.index_copy_(2, slots[:1], new if heads is None else new.index_select(1, heads))


def refuses(q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | None, bias: Tensor | None = None) -> str | None:
    """Why `regard.attend` cannot take the decoding kernel for this call, or None."""
    if bias is not None:
        return "the decoding kernel takes no bias"
    if pattern is not None and _span(pattern) is None:
        return f"the decoding kernel takes causal, window and sink patterns, the same in all heads, not {pattern!r}"
    return _refuses(q, k, v)


def yields(q: Tensor, k: Tensor, *, pattern: Pattern | None, aligned: bool = True) -> str | None:
    """Why another backend is better for a call that `refuses` does not refuse, or None.

    `aligned` says that positions are `0..S-1` and the queries the last of them.
    """
    keys, (sink, recent) = k.shape[2], (0, None) if pattern is None else _span(pattern) or (0, None)
    if keys < MANY:
        return f"{keys} keys are few"
    if not aligned:
        return None
    if recent is not None and sink and WASTE * (sink + recent + q.shape[2]) < keys:
        return f"{pattern!r} skips most of the {keys} keys, and the decoding kernel would read them"
    if q.shape[2] == 1 and q.dtype != torch.float32 and (recent is None or recent >= keys):
        # 41 and 38 microseconds for 32,768 keys (8 heads of 128) on an H200, 57 and 21 to launch.
        return "torch's kernels read all keys for one query as fast, and are launched sooner"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Part:
    """`regard.attend` on the decoding kernel, for calls that `refuses` does not refuse; no pattern: all see all."""
    sink, recent = (0, None) if pattern is None else _span(pattern) or (0, None)
    if q_positions is None and k_positions is None and recent is not None and not sink:
        first = k.shape[2] - q.shape[2] + 1 - recent
        if first > 0:
            k, v = k[:, :, first:], v[:, :, first:]
    call = {"sink": sink, "recent": recent, "causal": pattern is not None, "scale": scale, "softcap": softcap}
    return _run(q, k, v, positions=k_positions, q_positions=q_positions, **call)


def _run(q: Tensor, k: Tensor, v: Tensor, **call: object) -> Part:
    from regard.kernels.attention.decode import decode as kernel

    return kernel(q, k, v, **call)  # type: ignore[arg-type]


def _refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if why := device.refuses(q):
        return why
    from regard.kernels.attention.decode import refuses

    return refuses(q, k, v)


def _span(pattern: Pattern) -> tuple[int, int | None] | None:
    """`(sink, recent)` such that exactly `p_k < sink` and `p_q - p_k < recent` are allowed; None: there are none."""
    if not pattern.cut:
        return (0, None) if pattern.is_full else None
    first = pattern.rules[0]
    if any(rule != first for rule in pattern.rules[1:]) or not _simple(first):
        return None
    return first.reach.sink, first.reach.recent


def _simple(rule: Rule) -> bool:
    """Whether the reach of `rule` is the rule itself."""
    if isinstance(rule, Either):
        return _simple(rule.left) and _simple(rule.right)
    return isinstance(rule, (Causal, Sink)) or (isinstance(rule, Window) and rule.block == 1)


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    pages: Tensor | None,
    positions: Tensor | None,
    q_positions: Tensor | None,
    workers: int | None,
) -> None:
    """Raise RegardError for arguments that do not belong together, and for too few workers."""
    if workers is not None and workers < 1:
        raise RegardError(f"decoding needs 1 worker or more, got {workers}")
    four = q.dim() == k.dim() == v.dim() == 4
    rows = four and (pages is not None or q.shape[0] == k.shape[0])
    if not (rows and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]):
        raise RegardError(
            "q [B, H, T, D], k [B, Hk, S, D] and v [B, Hk, S, Dv], or pools of pages [P, Hk, page, D], disagree: "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    group_size(q, k)
    if pages is not None and (pages.dim() != 2 or k.shape[2] < 1):
        raise RegardError(
            f"pages must be [B, n] over pages of 1 key or more, got {list(pages.shape)} over {k.shape[2]}"
        )
    B, T = q.shape[0], q.shape[2]
    S = k.shape[2] if pages is None else k.shape[2] * pages.shape[1]
    shapes = {
        "lengths": (lengths, ((B,),)),
        "pages": (pages, () if pages is None else ((B, pages.shape[1]),)),
        "positions": (positions, tuple((b, *h, S) for b in (1, B) for h in ((), (1,), (k.shape[1],)))),
        "q_positions": (q_positions, ((1, T), (B, T))),
    }
    for name, (given, wanted) in shapes.items():
        if given is None:
            continue
        if tuple(given.shape) not in wanted:
            choices = " or ".join(str(list(shape)) for shape in dict.fromkeys(wanted))
            raise RegardError(f"{name} must be {choices}, got {list(given.shape)}")
        if given.dtype not in (torch.int32, torch.int64):
            raise RegardError(f"{name} must be int32 or int64, got {given.dtype}")
        if given.device != q.device:
            raise RegardError(f"{name} lies on {given.device}, q on {q.device}")


def _check_values(k: Tensor, lengths: Tensor | None, pages: Tensor | None) -> None:
    """Raise RegardError for a length or a page that there is no memory for, and for a page that two requests hold."""
    size = k.shape[2]
    room = size if pages is None else size * pages.shape[1]
    if lengths is not None:
        for row, length in enumerate(lengths.tolist()):
            if not 0 <= length <= room:
                raise RegardError(f"request {row} has {length} keys; there is room for 0 to {room}")
    if pages is None:
        return
    held = [room] * len(pages) if lengths is None else lengths.tolist()
    owner: dict[int, int] = {}
    for row, (entries, length) in enumerate(zip(pages.tolist(), held, strict=True)):
        for place, page in enumerate(entries[: -(-length // size)]):
            if not 0 <= page < k.shape[0]:
                last = k.shape[0] - 1
                raise RegardError(f"entry {place} of the page table of request {row} is {page}; pages are 0 to {last}")
            if page in owner:
                raise RegardError(
                    f"page {page} is held by request {owner[page]} and by request {row} (entry {place}); "
                    "pass check=False if they share it for reading"
                )
            owner[page] = row


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    lengths: Tensor | None,
    pages: Tensor | None,
    positions: Tensor | None,
    q_positions: Tensor | None,
    sink: int,
    recent: int | None,
    causal: bool,
) -> Part:
    """`decode` by its definition: pages gathered, a mask built."""
    if pages is not None:
        index = pages.clamp(0, k.shape[0] - 1)
        k, v = (x[index].transpose(1, 2).flatten(2, 3) for x in (k, v))
    places = torch.arange(k.shape[2], device=q.device)[None, None]
    held = torch.full((1,), k.shape[2], device=q.device) if lengths is None else lengths.clamp(max=k.shape[2])
    real = places < held[:, None, None]
    at = places if positions is None else positions if positions.dim() == 3 else positions[:, None]
    asked = torch.arange(q.shape[2], device=q.device)[None]
    if q_positions is not None:
        asked = q_positions
    elif causal or recent is not None:
        asked = asked + held[:, None] - q.shape[2]
    asked, at = asked[:, None, :, None], at[:, :, None]
    mask = real[:, :, None] & (at >= 0) & (asked >= 0)
    if causal:
        mask = mask & (at <= asked)
    if recent is not None:
        mask = mask & ((at < sink) | (asked - at < recent))
    # Whatever stands where nothing was written must not reach the sum, not even times 0.
    k, v = (x.masked_fill(~real[..., None], 0) for x in (k, v))
    return reference.reference(q, k, v, mask=mask, scale=scale, softcap=softcap)
