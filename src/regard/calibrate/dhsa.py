"""Training of the boundary predictor of DHSA [064]: where does attention change its mind about neighbouring keys?

Labels come from the frozen model's own attention: a chunk begins where later queries look at the keys on one side
much more than at those on the other. The predictor sees keys only, and learns to tell.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from regard.adapters.families import open_decoder
from regard.adapters.intercept import intercept
from regard.adapters.seam import Call
from regard.calibrate.common import Progress
from regard.core.errors import RegardError
from regard.core.pattern import Pattern
from regard.ops.sparsity.dhsa import CARD, SIDE, Predictor, gaps

NAMES = ("mixer", "shifts", "hidden", "head")
# Queries whose attention is built at once, and later rows that count in sliding layers.
BLOCK, SLIDING = 128, 4096
EPSILON = 1e-6


def fit(
    model: nn.Module,
    tokens: Tensor,
    *,
    progress: Progress | None = None,
    texts: int = 12,
    length: int = 512,
    passes: int = 20,
    layer: int = 0,
    rate: float = 1e-3,
    positive: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train one predictor for all layers; returns `{"mixer", "shifts", "hidden", "head"}`, float32.

    The defaults take about a minute for a 135M model on two cores.

    Args:
        model: any model `regard.attach` takes; its weights are not changed.
        tokens: `[n]` real text.
        progress: told steps done and steps in all: a step is a text looked at, or learnt from.
        texts: texts, spread over `tokens`; they overlap where those are few.
        length: tokens of a text.
        passes: how often each text is learnt from.
        layer: whose keys are read: the first layer that the mechanism will be placed on.
        rate: of AdamW.
        positive: weight of the label's positive part.
        seed: of the first weights.

    Raises:
        RegardError: the text is shorter than `length`, `length` leaves no token with neighbours and later queries,
            or there is no such layer.
    """
    if length < 4 * SIDE:
        raise RegardError(f"fitting 'dhsa' needs texts of {4 * SIDE} tokens or more, got length={length}")
    if len(tokens) < length:
        raise RegardError(f"fitting 'dhsa' needs {length} tokens of text, got {len(tokens)}")
    if texts < 1 or passes < 1:
        raise RegardError(f"fitting 'dhsa' needs texts >= 1 and passes >= 1, got {texts} and {passes}")
    layers = open_decoder(model).layers
    if not 0 <= layer < layers:
        raise RegardError(f"layer {layer} is out of range; this model has {layers} (layers 0 to {layers - 1})")
    told = _Told(progress, texts * (1 + passes))
    examples = _examples(model, tokens, texts, length, layer, told)
    return _train(examples, passes, rate, positive, seed, told)


class _Told:
    """Counts steps for whoever wants to know."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


Example = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def _examples(
    model: nn.Module, tokens: Tensor, texts: int, length: int, layer: int, told: _Told
) -> tuple[list[Example], int, int]:
    """`(keys [1, n, Hk * D], labels [1, n], known [1, n])` of each text, and the model's `Hk`, `D`."""
    learning, device = model.training, next(model.parameters()).device
    seen = _Seen(layer)
    found: list[Example] = []
    model.eval()
    try:
        with intercept(model, seen.run) as decoder:
            seen.windows = decoder.windows
            for at in torch.linspace(0, len(tokens) - length, texts).long().tolist():
                seen.masses = []
                decoder.module(input_ids=tokens[None, at : at + length].to(device), use_cache=False)
                past = torch.stack([mass[0] for mass in seen.masses]).mean(0)
                after = torch.stack([mass[1] for mass in seen.masses]).mean(0)
                label, known = labels(past, after)
                # The gap before a token is judged by the token that ends the left side.
                found.append((seen.keys, pad(label, (1, -1))[None], pad(known, (1, -1))[None]))
                told.step()
            return found, decoder.kv_heads, decoder.head_dim
    finally:
        model.train(learning)


class _Seen:
    """Answers every layer as the model does, and notes what its attention does to neighbours."""

    def __init__(self, layer: int):
        self.layer, self.masses = layer, list[tuple[Tensor, Tensor]]()
        self.windows: tuple[int | None, ...] = ()
        self.keys = torch.empty(0)

    def run(self, call: Call) -> Tensor:
        index = call.seat.layer
        if index == self.layer:
            self.keys = call.key.transpose(1, 2).flatten(2).float()
        window = self.windows[index]
        pattern = Pattern.causal() if window is None else Pattern.window(window)
        attention = mean_attention(call.query, call.key, pattern, call.scale, call.softcap)
        self.masses.append(masses(attention, rows=None if window is None else SLIDING))
        return call.own()[0].transpose(1, 2)


def mean_attention(q: Tensor, k: Tensor, pattern: Pattern, scale: float, softcap: float | None = None) -> Tensor:
    """Probabilities averaged over rows and heads, `[T, T]` float32; `BLOCK` queries at a time.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hk, T, D]`.
        pattern: who sees whom, one for all heads.
        scale: of the scores.
        softcap: `s` becomes `softcap * tanh(s / softcap)`.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    place = torch.arange(q.shape[2], device=q.device)[None]
    parts = []
    for start in range(0, q.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        scores = q[:, :, rows].float() @ k.mT * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        mask = pattern.allow(place[:, rows], place)
        parts.append(scores.masked_fill(~mask, -torch.inf).softmax(-1).mean((0, 1)))
    return torch.cat(parts)


def masses(attention: Tensor, side: int = SIDE, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """What later queries put on the `side` keys ending at each position, and on the `side` keys after it.

    Args:
        attention: `[T, T]`, queries by keys.
        side: keys on either side; queries count from `t + side` on.
        rows: how many of those queries count; None: all.

    Returns:
        two `[T]`, by a 2-D prefix sum; keys beyond either end have no mass.
    """
    total = attention.shape[0]
    # Differences of sums as large as T: single precision would leave no digit of a small mass.
    prefix = pad(attention.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    t = torch.arange(total, device=attention.device)
    top = (t + side).clamp(max=total)
    end = torch.full_like(t, total) if rows is None else (top + rows).clamp(max=total)

    def box(left: Tensor, right: Tensor) -> Tensor:
        left, right = left.clamp(0, total), right.clamp(0, total)
        return prefix[end, right] - prefix[top, right] - prefix[end, left] + prefix[top, left]

    return box(t - side + 1, t + 1), box(t + 1, t + side + 1)


def labels(past: Tensor, after: Tensor, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Soft labels of a boundary after each position, and where they are known.

    The label is `sigmoid(4 ln r)` with `r = (max + eps) / (min + eps)` of both masses `[T]`; float32, from 1/2 on.
    It is known where both sides are whole and a later query stands.
    """
    high, low = torch.maximum(past, after), torch.minimum(past, after)
    ratio = (high + EPSILON) / (low.clamp(min=0) + EPSILON)
    t = torch.arange(len(past), device=past.device)
    return torch.sigmoid(4 * ratio.log()).float(), (t >= side - 1) & (t + side < len(past))


def focal_loss(logits: Tensor, label: Tensor, known: Tensor, positive: float = 1.0) -> Tensor:
    """Mean over `known` of `(1 - p_t)^2 BCE(logits, label)`, `p_t = p label + (1 - p)(1 - label)`."""
    weight = torch.tensor(positive, device=logits.device)
    loss = binary_cross_entropy_with_logits(logits, label, reduction="none", pos_weight=weight)
    p = logits.sigmoid()
    wrong = 1 - (p * label + (1 - p) * (1 - label))
    return (wrong.square() * loss)[known].mean()


def _first(heads: int, size: int, seed: int) -> Predictor:
    """Weights to begin with: maps of unit gain, no biases, a norm that does nothing."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = {"kv_heads": heads, "head_dim": size}
    shapes = {name: [sizes.get(str(axis)) or int(axis) for axis in CARD.options[name].shape] for name in NAMES}
    mixer, hidden = (torch.randn(shapes[name], generator=drawn) for name in ("mixer", "hidden"))
    shifts, head = torch.zeros(shapes["shifts"]), torch.randn(shapes["head"], generator=drawn)
    shifts[4] = 1
    width = heads * size
    head = torch.cat((head[:-1] * torch.tensor([1.0, 0.0, (len(head) - 1) ** -0.5]), torch.zeros(1, 3)))
    return mixer * width**-0.5, shifts, hidden * (4 * width) ** -0.5, head


def _train(
    told_of: tuple[list[Example], int, int], passes: int, rate: float, positive: float, seed: int, told: _Told
) -> dict[str, Tensor]:
    examples, heads, size = told_of
    device = examples[0][0].device
    with torch.enable_grad():
        tensors = [x.to(device).requires_grad_(True) for x in _first(heads, size, seed)]
        mixer, shifts, hidden, head = tensors
        optimiser = torch.optim.AdamW(tensors, lr=rate)
        for _ in range(passes):
            for keys, label, known in examples:
                logits = gaps(keys, torch.ones_like(known), (mixer, shifts, hidden, head))
                loss = focal_loss(logits, label, known, positive)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                told.step()
    return {name: x.detach().cpu() for name, x in zip(NAMES, tensors, strict=True)}
