"""The scorer: how far a method's predictions are from the dense model's, on the cached path.

Both sides prefill the context, then read the held-out continuation in the same chunks on the cache
of the same request. There is no uncached shortcut: without a cache, what a store dropped or rounded
would never be read, and every loss would be 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure.replay import installed, prefill, quiet, respond
from regard.measure.text import Window

Observer = Callable[[Any, Window], None]


@dataclass(frozen=True)
class WindowQuality:
    """One window's scores over all continuation rows, and over the last half of them.

    Args:
        start: index of the window's first token in the text.
        kl: mean `KL(dense || method)`, nats per token.
        top1: fraction of rows where both prefer the same token.
        nll, dense_nll: mean negative log-likelihood of the text, nats per token.
    """

    start: int
    kl: float
    kl_last_half: float
    kl_max: float
    top1: float
    top1_last_half: float
    nll: float
    dense_nll: float


@dataclass(frozen=True)
class Quality:
    """Means over windows, and the windows.

    Args:
        kl, kl_last_half: mean `KL(dense || method)`, nats per token.
        kl_worst: the mean KL of the worst window.
        top1, top1_last_half: agreement of the most likely token, 0 to 1.
        perplexity, dense_perplexity: of the text under the method and under dense.
        perplexity_ratio: method / dense; 1 is no loss.
        chunk: continuation tokens a forward.
    """

    kl: float
    kl_last_half: float
    kl_worst: float
    top1: float
    top1_last_half: float
    perplexity: float
    dense_perplexity: float
    perplexity_ratio: float
    chunk: int
    windows: tuple[WindowQuality, ...]


@dataclass
class Dense:
    """The dense side of a measurement, computed once: float32 logits `[N, vocabulary]` of each window.

    float32 because rounding them to 16 bits would add a KL of its own.
    """

    windows: list[Window]
    chunk: int
    logits: list[Tensor] = field(default_factory=list)


def dense(model: Any, windows: Sequence[Window], chunk: int = 32) -> Dense:
    """Replay `windows` through the model's own attention.

    Raises:
        RegardError: no windows, `chunk` below 1, or the dense model yields NaN.
    """
    if not windows:
        raise RegardError("quality needs at least one window")
    reference = Dense(list(windows), chunk)
    with quiet(model):
        for window in windows:
            cache = prefill(model, None, window.context)
            reference.logits.append(torch.cat(list(respond(model, None, window.continuation, cache, chunk))))
    return reference


def quality(
    model: Any,
    placements: Sequence[Placement],
    windows: Sequence[Window],
    chunk: int = 32,
    reference: Dense | None = None,
    observe: Observer | None = None,
) -> Quality:
    """Score `placements` on `windows` against the dense model.

    Args:
        model: a transformers causal language model, not attached.
        placements: what is measured; none gives exactly 0.
        windows: held-out windows.
        chunk: continuation tokens a forward; 1 is decoding token by token.
        reference: `dense(model, windows, chunk)` if already at hand.
        observe: called with the live cache and the window after each window (counting bytes).

    Raises:
        RegardError: `reference` belongs to other windows or another chunk; the method yields NaN.
    """
    reference = reference or dense(model, windows, chunk)
    same = len(reference.windows) == len(windows) and all(
        a is b or (torch.equal(a.context, b.context) and torch.equal(a.continuation, b.continuation))
        for a, b in zip(reference.windows, windows, strict=False)
    )
    if not same or reference.chunk != chunk:
        raise RegardError("the dense reference was computed on other windows or with another chunk")
    scored = []
    with quiet(model), installed(model, placements) as handle:
        for window, logits in zip(windows, reference.logits, strict=True):
            cache = prefill(model, handle, window.context)
            scored.append(_score(window, logits, respond(model, handle, window.continuation, cache, chunk)))
            if observe is not None:
                observe(cache, window)
    return _mean(scored, chunk)


def _score(window: Window, reference: Tensor, pieces: Any) -> WindowQuality:
    """Compare `reference [N, vocabulary]` with the method's logits, which arrive in pieces."""
    kls, agree, nlls, dense_nlls, row = [], [], [], [], 0
    text = window.continuation.to(reference.device)
    for logits in pieces:
        # float64: a KL of 1e-6 is the difference of sums of 50,000 terms near 10 nats.
        p = reference[row : row + len(logits)].double().log_softmax(-1)
        q = logits.double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).nan_to_num(nan=0.0, posinf=torch.inf).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        following = text[row + 1 : row + 1 + len(logits), None]  # the last row's next token lies outside
        nlls.append(-q[: len(following)].gather(-1, following)[:, 0])
        dense_nlls.append(-p[: len(following)].gather(-1, following)[:, 0])
        row += len(logits)
    kl, same = torch.cat(kls), torch.cat(agree).double()
    if not bool(torch.isfinite(kl).all()):
        row = int((~torch.isfinite(kl)).nonzero()[0])
        raise RegardError(
            f"the attached model yields an infinite KL at row {row} of the window at token {window.start}: it rules "
            "out tokens that the dense model does not, as a plausibility cut does (an option beta); measure without it"
        )
    half = row // 2
    return WindowQuality(
        start=window.start,
        kl=kl.mean().item(),
        kl_last_half=kl[half:].mean().item(),
        kl_max=kl.max().item(),
        top1=same.mean().item(),
        top1_last_half=same[half:].mean().item(),
        nll=torch.cat(nlls).mean().item(),
        dense_nll=torch.cat(dense_nlls).mean().item(),
    )


def _mean(scored: Sequence[WindowQuality], chunk: int) -> Quality:
    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in scored) / len(scored)

    nll, dense_nll = torch.tensor([mean("nll"), mean("dense_nll")], dtype=torch.float64)
    return Quality(
        kl=mean("kl"),
        kl_last_half=mean("kl_last_half"),
        kl_worst=max(one.kl for one in scored),
        top1=mean("top1"),
        top1_last_half=mean("top1_last_half"),
        perplexity=nll.exp().item(),
        dense_perplexity=dense_nll.exp().item(),
        perplexity_ratio=(nll - dense_nll).exp().item(),
        chunk=chunk,
        windows=tuple(scored),
    )
