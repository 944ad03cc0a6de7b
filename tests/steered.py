"""One layer run in pieces on given queries and keys, with edits in force, and what it reads unedited."""

from itertools import pairwise

import torch

from regard.core.pattern import Pattern
from regard.core.slots import Slots
from regard.core.step import Step
from regard.ops import layer
from regard.ops.attention import attend
from regard.primitives.stores import build


def drawn(batch=2, heads=4, kv_heads=2, length=24, size=8, seed=0, scale=0.7):
    """Random queries `[B, H, n, D]` and keys `[B, Hk, n, D]` in float64."""
    g = torch.Generator().manual_seed(seed)
    q, k = (scale * torch.randn(batch, h, length, size, generator=g, dtype=torch.float64) for h in (heads, kv_heads))
    return q, k


def maps(q, k, cuts=(), *, prompt=None, padding=None, tokens=None, pattern=None, codecs=None, stream=None, **edits):
    """The layer's probabilities `[B, H, n, n]`, scale 1: outputs of values that name their keys.

    `edits` are fields of Slots; `stream [B, n, d]` is shown to those of `watch`; `codecs` is one entry a KV head.
    """
    n, kv_heads = q.shape[2], k.shape[1]
    pattern, codecs = pattern or Pattern.causal(), codecs or (None,) * kv_heads
    v = torch.eye(n, dtype=q.dtype).expand(*k.shape[:2], n, n)
    slots = Slots(pattern, codecs, (None,) * kv_heads, **edits)
    store, outs = build(pattern, codecs, slots.value_codec, kv_heads, attend), []
    for start, stop in pairwise([0, *cuts, n]):
        step = Step(start, stop - start, q.shape[0], q.device, padding, prompt, tokens=tokens)
        for edit in slots.watch:
            edit.run(stream[:, start:stop], step, store.state)
        view = store.append(k[:, :, start:stop], v[:, :, start:stop], step)
        outs.append(layer.run(slots, view, q[:, :, start:stop], step, store.state, scale=1.0))
    return torch.cat(outs, 2)


def scores(q, k, pattern=None, padding=None):
    """What the layer's softmax is of, `[B, H, n, n]`, -inf where a key is not seen."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    positions = torch.arange(n)[None] if padding is None else torch.arange(n) - padding[:, None]
    seen = (pattern or Pattern.causal()).allow(positions, positions)
    seen = seen if seen.shape[1] == 1 else seen.repeat_interleave(group, 1)
    return (q @ k.repeat_interleave(group, 1).transpose(-1, -2)).masked_fill(~seen, -torch.inf)


def softmax(scores):
    """Probabilities, 0 in rows that see nothing."""
    return scores.softmax(-1).nan_to_num(0.0)
