"""Softmax attention in three, two or one pass over the keys, and the cascades of Einsums they are (FuseMax)."""

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.shapes import group_size
from regard.ops.cascades import Cascade, Einsum

CARD = Card(
    title="FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design",
    arxiv="2406.10491",
    sheet=7,
    implements="The cascades of full attention in three, two and one passes, executable and as data: passes, live "
    "elements, traffic, operations, cycles of the paper's array, roofline.",
    exact=True,
    saving="none",
    departures=(
        "The two-pass form and the rule that counts passes are inferred.",
        "In plain torch: it shows what is read and computed, and is not fast.",
    ),
    oracles=(
        "all three equal torch's attention, for logits of 10,000 too",
        "passes 3, 2, 1; a division before the product with values turns two into three",
        "live elements do not grow with the keys in one pass",
        "elements read of q, k and v, exponentials, divisions and products equal those of the executed ops",
        "moved elements equal the closed forms",
    ),
    options={
        "passes": Option(default=1, choices=(1, 2, 3), doc="how often the keys are traversed"),
        "chunk": Option(default=256, low=1, doc="keys a step, with one or two passes"),
        "pad": Option(
            kind="bool", default=False, doc="the last chunk may be short, as if filled with keys that score -inf"
        ),
        "scale": Option(kind="float", default=None, optional=True, doc="of the scores; none: D ** -0.5"),
    },
)

_SPLIT = {"m": ("m1", "m0")}
_CHUNKS = {"Q": ("e", "p"), "K": ("e", "m1", "m0"), "V": ("f", "m1", "m0")}
_LOCAL = (
    Einsum("QK", ("m1", "m0", "p"), ("Q", "K"), "multiply"),
    Einsum("LM", ("m1", "p"), ("QK",), "max"),
)
CASCADES = {
    3: Cascade(
        {"Q": ("e", "p"), "K": ("e", "m"), "V": ("f", "m")},
        (
            Einsum("QK", ("m", "p"), ("Q", "K"), "multiply"),
            Einsum("GM", ("p",), ("QK",), "max"),
            Einsum("SN", ("m", "p"), ("QK", "GM"), "exp"),
            Einsum("SD", ("p",), ("SN",), "add"),
            Einsum("A", ("m", "p"), ("SN", "SD"), "divide"),
            Einsum("AV", ("f", "p"), ("A", "V"), "multiply"),
        ),
        {},
    ),
    2: Cascade(
        _CHUNKS,
        (
            *_LOCAL,
            Einsum("SLN", ("m1", "m0", "p"), ("QK", "LM"), "exp"),
            Einsum("SLD", ("m1", "p"), ("SLN",), "add"),
            Einsum("SLNV", ("f", "m1", "p"), ("SLN", "V"), "multiply"),
            Einsum("GM", ("p",), ("LM",), "max", 1),
            Einsum("RS", ("m1", "p"), ("LM", "GM"), "exp", 1),
            Einsum("SD", ("p",), ("SLD", "RS"), "multiply", 1),
            Einsum("SNV", ("f", "p"), ("SLNV", "RS"), "multiply", 1),
            Einsum("AV", ("f", "p"), ("SNV", "SD"), "divide", 1),
        ),
        _SPLIT,
    ),
    1: Cascade(
        _CHUNKS,
        (
            *_LOCAL,
            Einsum("RM", ("p", "m1"), ("LM",), "max", 1, running=True),
            Einsum("SLN", ("m1", "m0", "p"), ("QK", "RM"), "exp"),
            Einsum("SLD", ("m1", "p"), ("SLN",), "add"),
            Einsum("SLNV", ("f", "m1", "p"), ("SLN", "V"), "multiply"),
            Einsum("PRM", ("m1", "p"), ("RM",), "exp", 1),
            Einsum("RD", ("p", "m1"), ("PRM", "SLD"), "multiply", 1, running=True),
            Einsum("RNV", ("f", "p", "m1"), ("PRM", "SLNV"), "multiply", 1, running=True),
            Einsum("AV", ("f", "p"), ("RNV", "RD"), "divide", 1),
        ),
        _SPLIT,
    ),
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    passes: int = 1,
    chunk: int = 256,
    pad: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention by the cascade of `passes`.

    Args:
        q: `[B, H, T, D]`, `T` at least 1.
        k: `[B, Hk, S, D]`, `S` at least 1, `Hk` dividing `H`.
        v: `[B, Hk, S, Dv]`.
        passes: 1, 2 or 3.
        chunk: keys a step, with one or two passes.
        pad: the last chunk may be short, which is what filling it with keys that score minus infinity comes to.
        scale: of the scores; None: `D ** -0.5`.

    Returns:
        out `[B, H, T, Dv]` and lse `[B, H, T]` in the dtype of q; float16 and bfloat16 are computed as they are.

    Raises:
        RegardError: another number of passes, no keys, head counts that disagree, or a chunk that does not divide the
            keys without `pad`.
    """
    if passes not in CASCADES:
        raise RegardError(f"there are cascades of 1, 2 and 3 passes, got {passes}")
    B, H, T = q.shape[:3]
    S, Hk = k.shape[2], k.shape[1]
    group = group_size(q, k)
    if S < 1 or chunk < 1:
        raise RegardError(f"attention in passes needs keys and chunks of at least 1, got {S} keys, chunk {chunk}")
    if passes < 3 and S % chunk and not pad:
        raise RegardError(f"{S} keys are not divisible by chunk {chunk}; pass pad=True to let the last one be short")
    rows = q.reshape(B, Hk, group * T, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    step = S if passes == 3 else chunk
    chunks = [(k[:, :, i : i + step], v[:, :, i : i + step]) for i in range(0, S, step)]
    out, lse = (_one, _two, _three)[passes - 1](rows, chunks)
    return out.view(B, H, T, -1), lse.view(B, H, T)


def _three(q: Tensor, chunks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ((key, value),) = chunks
    scores = q @ key.transpose(-1, -2)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total) @ value, (most + total.log()).squeeze(-1)


def _two(q: Tensor, chunks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mosts, totals, outs = [], [], []
    for key, value in chunks:
        scores = q @ key.transpose(-1, -2)
        mosts.append(scores.amax(-1))
        weights = (scores - mosts[-1][..., None]).exp()
        totals.append(weights.sum(-1))
        outs.append(weights @ value)
    local = torch.stack(mosts)
    most = local.amax(0)
    share = (local - most).exp()
    total = (torch.stack(totals) * share).sum(0)
    return (torch.stack(outs) * share[..., None]).sum(0) / total[..., None], most + total.log()


def _one(q: Tensor, chunks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    most = q.new_full(q.shape[:-1], -torch.inf)
    total, out = torch.zeros_like(most), q.new_zeros(*q.shape[:-1], chunks[0][1].shape[-1])
    for key, value in chunks:
        scores = q @ key.transpose(-1, -2)
        before, most = most, torch.maximum(most, scores.amax(-1))
        weights, keep = (scores - most[..., None]).exp(), (before - most).exp()
        total = total * keep + weights.sum(-1)
        out = out * keep[..., None] + weights @ value
    return out / total[..., None], most + total.log()
