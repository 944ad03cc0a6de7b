"""Variable chunks of keys, scored against blocks of queries under a budget of tokens (DHSA)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, pad

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.core.placement import Where
from regard.core.slots import Chosen, Reading, Select
from regard.core.step import Step
from regard.primitives.blocks import Blocks, cut, edges
from regard.primitives.chunks import chunk_scores, fill, peaks, widest

CARD = Card(
    title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    arxiv="2510.24606",
    sheet=64,
    implements="The first version: boundary prediction, length-normalised scores of chunks, one list of keys a block "
    "of queries, dense last rows; decoding as blocks of one query.",
    exact=False,
    saving="compute",
    departures=(
        "The predictor reads keys after rotary positions, where the seam lies, and is trained on those.",
        "It reads the first placed layer's keys, but learns from attention averaged over all layers, as all share it.",
        "Its attention has one head a KV head and a residual; the paper's numbers are not known to us.",
        "Tokens of the response are cut into chunks of fixed length.",
        "Blocks are counted from the end of a forward's prompt rows, so that left padding moves none.",
        "A block's own keys are always read and never part of a chunk's score; its query is a mean over all its "
        "rows, so that earlier rows are served by what later ones ask for. Decoding has no such look ahead.",
        "Of the last chunk that fits in part, the beginning is read.",
    ),
    oracles=(
        "a budget of the whole length is the model's own attention to the bit",
        "fixed chunks are pooled block-sparse top-k",
        "identical keys score in proportion to the root of their number",
        "scores and lists equal slow loops; no list is over budget or lacks forced keys",
        "labels peak where attention jumps; a planted key is found with a tenth of the keys",
    ),
    whole_layers=True,
    neutral={"budget": None},
    example={"budget": 8, "block": 2, "first": 1, "last": 2, "dense": 1, "chunk": 3, "decode": True, "spacing": 2},
    options={
        "budget": Option(
            default=2048, low=1, optional=True, search=(512, 1024, 2048), doc="keys a row reads; none: all"
        ),
        "chunks": Option(
            kind="str", default="predicted", choices=("predicted", "fixed"), doc="where chunks of the prompt begin"
        ),
        "chunk": Option(default=16, low=1, doc="tokens of a fixed chunk, and of those of the response"),
        "block": Option(default=128, low=1, doc="queries of the prompt that share one list (the paper: 64 or 128)"),
        "first": Option(default=128, low=0, doc="first keys in reach that are always read"),
        "last": Option(default=128, low=1, doc="last keys in reach that are always read, a block's own among them"),
        "dense": Option(default=64, low=0, doc="last rows of the prompt that read all keys"),
        "decode": Option(kind="bool", default=False, doc="rows of the response are sparse too (inferred by the sheet)"),
        "share": Option(
            kind="str",
            default="chunks",
            choices=("nothing", "chunks", "lists"),
            doc="what the first placed layer decides for later ones: nothing, the chunks, or the lists of keys as well",
        ),
        "spacing": Option(default=8, low=0, doc="predicted chunks begin more than this many tokens apart"),
        "threshold": Option(kind="float", default=1.1, low=-100.0, high=100.0, doc="logit above which a chunk begins"),
        "mixer": Option(
            kind="tensor",
            default=None,
            shape=(4, "kv_heads", "head_dim", "kv_heads", "head_dim"),
            doc="the predictor's query, key, value and output maps",
        ),
        "shifts": Option(
            kind="tensor", default=None, shape=(6, "kv_heads", "head_dim"), doc="their biases; the norm's gain, shift"
        ),
        "hidden": Option(
            kind="tensor", default=None, shape=(256, 4, "kv_heads", "head_dim"), doc="of l, r, |l - r|, l r"
        ),
        "head": Option(kind="tensor", default=None, shape=(257, 3), doc="of cos(l, r), bias, output; its bias last"),
    },
)
SIDE = 4  # tokens that the predictor reads on either side of a gap
RATE = 8  # chunks asked for in a block of the prompt
Predictor = tuple[Tensor, Tensor, Tensor, Tensor]


def select(
    where: Where,
    *,
    budget: int | None,
    chunks: str,
    chunk: int,
    block: int,
    first: int,
    last: int,
    dense: int,
    decode: bool,
    share: str,
    spacing: int,
    threshold: float,
    mixer: Tensor | None,
    shifts: Tensor | None,
    hidden: Tensor | None,
    head: Tensor | None,
) -> Select | None:
    """Read `budget` keys a row: the chunks that score best against the row's block, and those that are forced.

    Raises:
        RegardError: the predictor is missing or another model's, or the budget does not hold the forced keys.
    """
    if budget is None:
        return None
    if budget < first + last:
        raise RegardError(f"'dhsa' needs budget >= first + last = {first} + {last} forced keys, got {budget}")
    if last < block:
        raise RegardError(f"'dhsa' needs last >= block, so that rows read their own block; got {last} and {block}")
    predictor = checked(where, mixer, shifts, hidden, head) if chunks == "predicted" else None
    name = ("dhsa", budget, chunk, block, first, last, dense, decode, spacing, threshold, id(mixer), chunks)
    name = (*name, where.layer) if share == "nothing" else name

    @torch.no_grad()
    def choose(reading: Reading) -> Sequence[Chosen] | None:
        step, device = reading.step, reading.query.device
        own = None if step.rows is None else where.layer
        here = (*name, device, reading.key.shape[2], reading.pattern.reach(), own)
        if (*here, "lists") in step.shared:
            return step.shared[(*here, "lists")]
        if here not in step.shared:
            if name not in step.shared:
                step.shared[name] = fixed(step, chunk)
                if predictor is not None:
                    step.shared[name] = predicted(reading, predictor, chunk, block, dense, spacing, threshold)
            blocks = cut(reading, budget=budget, block=block, dense=dense, decode=decode)
            step.shared[here] = blocks, edges(step.shared[name].to(device), blocks.place, step)
        blocks, ends = step.shared[here]
        pieces = _pieces(reading, blocks, ends, block, budget=budget, first=first, last=last) if blocks.runs else None
        if share == "lists":
            step.shared[(*here, "lists")] = pieces
        return pieces

    return Select(f"dhsa of {budget} keys", choose)


def _pieces(reading: Reading, blocks: Blocks, ends: Tensor, block: int, **read: int) -> list[Chosen]:
    """What each row reads, where some do not read all."""
    pieces = blocks.wholes(reading.key.shape[2], reading.query.shape[2])
    keys = blocks.keys(reading.key)
    for run in blocks.runs:
        apart = block if blocks.apart and run.length == block else 0
        scores = chunk_scores(run.queries(reading.query), keys, ends, run.low, run.high)
        ranks = fill(scores, ends, run.low, run.high, run.stop, sink=blocks.sink, apart=apart, **read)
        pieces.append(Chosen(run.rows, blocks.slots(ranks), own=apart > 0))
    return sorted(pieces, key=lambda piece: piece.rows.start)


def checked(where: Where, *tensors: Tensor | None) -> Predictor:
    """The predictor's tensors if they are there and fit the model.

    Raises:
        RegardError: one is missing, has another shape or holds no finite numbers.
    """
    sizes: dict[str | int, int] = {"kv_heads": where.kv_heads, "head_dim": where.head_dim}
    found = []
    for name, given in zip(("mixer", "shifts", "hidden", "head"), tensors, strict=True):
        shape = [sizes.get(axis) or axis for axis in CARD.options[name].shape]
        if given is None:
            raise RegardError(f"'dhsa' needs {name}, fitted by regard.calibrate.dhsa; chunks='fixed' needs none")
        if list(given.shape) != shape:
            raise RegardError(f"'dhsa' has {name} {list(given.shape)}, this model needs {shape}")
        if not bool(given.isfinite().all()):
            raise RegardError(f"'dhsa' has a {name} with numbers that are not finite")
        found.append(given)
    return tuple(found)


def fixed(step: Step, chunk: int) -> Tensor:
    """Where chunks of `chunk` tokens begin, by arrival: `[1|B, stop]` bool; the response begins one of its own."""
    arrivals = torch.arange(step.stop, device=step.device)
    at = step.positions(arrivals)
    if step.prompt is not None and step.prompt < step.stop:
        at = torch.where(arrivals >= step.prompt, arrivals - step.prompt, at)
    return at % chunk == 0


def predicted(
    reading: Reading, predictor: Predictor, chunk: int, block: int, dense: int, spacing: int, threshold: float
) -> Tensor:
    """Where chunks begin, by arrival: `[B, stop]` bool. What earlier forwards decided stands, in `reading.state`."""
    step, batch = reading.step, len(reading.query)
    end = step.stop if step.prompt is None else min(step.prompt, step.stop)
    starts = fixed(step, chunk).to(reading.query.device).expand(batch, -1).clone()
    known = reading.state.get("chunks", starts[:, :0])[:, : min(step.start, end)]
    # Rows that passed this layer by decided nothing.
    known = pad(known, (0, min(step.start, end) - known.shape[1]))
    if end > step.start:
        logits = _logits(reading, predictor, end)
        real = step.positions(torch.arange(step.start, end, device=logits.device))
        near = widest(pad(known, (spacing, logits.shape[1]))[:, -logits.shape[1] - spacing :].float(), spacing) > 0
        allowed = (real > 0) & (logits > threshold) & ~near[:, -logits.shape[1] :]
        asked = (real[:, -1:] + 1).clamp(min=0)[:, 0] // block * RATE - known.sum(1)
        new = peaks(logits, allowed, asked, spacing) | (real == 0)
        if step.prompt is not None and 0 <= step.prompt - dense - step.start < new.shape[1]:
            new[:, step.prompt - dense - step.start] = True
        known = torch.cat((known, new), 1)
    reading.state["chunks"] = known
    starts[:, :end] = known
    return starts


def _logits(reading: Reading, predictor: Predictor, end: int) -> Tensor:
    """Logits of a chunk's beginning, `[B, end - start]` by arrival, -inf where no row ran."""
    step, rows = reading.step, reading.query.shape[2]
    seen = slice(-(rows + SIDE), None)
    arrivals = step.arrivals.to(reading.query.device)
    real = reading.positions[:, seen] >= 0
    later = pad(arrivals >= end, (real.shape[1] - rows, 0))
    found = gaps(reading.key[:, :, seen].transpose(1, 2).flatten(2), real & ~later, predictor)[:, -rows:]
    out = found.new_full((len(found), step.width + 1), -torch.inf)
    at = torch.where(arrivals < 0, step.width, arrivals - step.start)
    return out.scatter(1, at.expand(len(found), -1), found)[:, : end - step.start]


def gaps(keys: Tensor, real: Tensor, predictor: Predictor) -> Tensor:
    """Logits `[B, n]` of a chunk beginning at each token, from the `SIDE` keys before it and those from it on.

    Args:
        keys: `[B, n, Hk * D]`, heads one after the other.
        real: `[1|B, n]` bool, tokens that may be looked at.
        predictor: its tensors, as on the card.
    """
    mixer, shifts, hidden, head = (x.to(keys.device, torch.float32) for x in predictor)
    heads, width = mixer.shape[1], keys.shape[-1]
    x, real = keys.float(), real.expand(len(keys), -1)
    maps, shifts = mixer.reshape(4, width, width), shifts.reshape(6, width)
    parts = torch.stack((x, *(x @ maps[i].T + shifts[i] for i in range(3))))
    parts = pad(parts, (0, 0, SIDE, SIDE - 1)).unfold(2, 2 * SIDE, 1).transpose(3, 4)
    told = pad(real, (SIDE, SIDE - 1)).unfold(1, 2 * SIDE, 1)
    out = []
    for some, seen in zip(parts.split(1024, 2), told.split(1024, 1), strict=True):
        own, q, k, v = some
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(2, 3) for y in (q, k, v))
        score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen[:, :, None, None], -torch.inf)
        mixed = (score.softmax(-1).nan_to_num(0) @ v).transpose(2, 3).flatten(3) @ maps[3].T + shifts[3]
        coded = layer_norm(own + mixed, (width,), shifts[4], shifts[5]) * seen[..., None]
        count = seen.unflatten(-1, (2, SIDE)).sum(-1).clamp(min=1)
        left, right = (coded.unflatten(2, (2, SIDE)).sum(3) / count[..., None]).unbind(2)
        pair = torch.stack((left, right, (left - right).abs(), left * right), 2).flatten(2)
        alike = cosine_similarity(left, right, -1)[..., None]
        inner = pair @ hidden.flatten(1).T + alike * head[:-1, 0] + head[:-1, 1]
        out.append(inner.relu() @ head[:-1, 2] + head[-1, 2])
    return torch.cat(out, 1)
