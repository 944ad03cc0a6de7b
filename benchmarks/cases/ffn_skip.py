"""FFN-SkipLLM on the demo model: what share of feed-forward blocks is skipped, at what KL, against chance.

The control skips as many blocks of the same layers and tokens, drawn by chance.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from regard.adapters.families import open_decoder
from regard.calibrate.ffn_skip import saturations, suggest
from regard.core.placement import Placement, Where
from regard.core.slots import Feed
from regard.core.step import Step
from regard.measure import text
from regard.measure.quality import dense, quality
from regard.measure.seconds import seconds
from regard.models import pretrained
from regard.ops.depth import ffn_skip
from regard.search import facts

WARMUP, CHUNK = 25, 32


def run(
    windows: int = 4, context: int = 256, continuation: int = 128, timing: int = 3, fitted: int = 512
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Realised share, KL and perplexity for some shares and jumps, each beside its control; decode time.

    Args:
        windows: held-out windows.
        context: prompt tokens of each.
        continuation: response tokens of each, the first 25 of which are the warm-up.
        timing: pairs of decode timings (0: none).
        fitted: tokens that regions and thresholds are found on.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = pretrained.load("demo", torch.float32, device)
    tokens = text.tokenise(tokenizer, pretrained.demo_text())
    taught, held = tokens[:fitted], tokens[len(tokens) // 2 :]
    reference = dense(model, text.windows(held, context, continuation, windows), CHUNK)
    told = facts.machine(model) | {
        "model": facts.model_facts(model), "text": facts.text_digest(tokens), "windows": windows, "context": context,
        "continuation": continuation, "warmup": WARMUP, "chunk": CHUNK,
        "saturation": [round(s, 4) for s in saturations(model, taught).mean(1).tolist()],
    }  # fmt: skip
    rows = []
    for wanted, jump in ((15, 1), (25, 1), (25, 2), (25, 4), (30, 2), (40, 4)):
        options = suggest(model, taught, share=wanted / 100, jump=jump, warmup=WARMUP)
        options.pop("share")
        placed = [Placement("ffn_skip", options=options)]
        for what in ("saturated", "by chance"):
            chance = what == "by chance"
            shares: list[float] = []
            with by_chance(rows[-1]["share"], options) if chance else nullcontext(), counting(model, shares):
                found = quality(model, placed, reference.windows, CHUNK, reference)
            share = sum(shares) / len(shares)
            rows.append({"what": what, "wanted": wanted / 100, "share": share, "kl": found.kl, "top1": found.top1,
                         "ratio": found.perplexity_ratio, **options})  # fmt: skip
            if timing and not chance:
                timed = seconds(model, placed, held[: context + continuation], continuation, timing)
                rows[-1] |= {"decode": timed.decode.ratio.median, "decode mad": timed.decode.ratio.mad}
            else:
                rows[-1] |= {"decode": "", "decode mad": ""}
    return told, rows


@contextmanager
def by_chance(share: float, options: dict[str, Any]) -> Iterator[None]:
    """`ffn_skip` skips each block of the same tokens and layers by chance, `share` of all blocks of the model."""

    def feed(where: Where, *, first: int, last: int, warmup: int, threshold: float, jump: int) -> Feed | None:
        layers = where.layers - last - first - 1
        # As in the mechanism, the first block of the middle always runs.
        if not first < where.layer < where.layers - last:
            return None

        def choose(step: Step) -> Tensor | None:
            if step.prompt is None or step.stop <= step.prompt + warmup:
                return None
            drawn = torch.Generator().manual_seed(1000 * step.start + where.layer)
            kept = torch.rand(step.batch, step.width, generator=drawn) >= share * where.layers / layers
            return kept.to(step.device) | (step.arrivals < step.prompt + warmup)

        return Feed("chance", choose, lambda before, after, step: None)

    with mock.patch.object(ffn_skip, "feed", feed):
        yield


@contextmanager
def counting(model: Any, shares: list[float]) -> Iterator[None]:
    """Puts the share of blocks that added nothing, after prompt and warm-up, into `shares`: one entry a token."""
    decoder = open_decoder(model)
    made: list[Tensor] = []
    seen = {"rows": 0}

    def part(module: Any, args: Any, out: Any) -> None:
        made.append((out[0] if isinstance(out, tuple) else out).eq(0).all(-1).cpu())

    def forward(module: Any, args: Any, out: Any) -> None:
        width = made[0].shape[1]
        # A forward of another width than the chunk is the prompt.
        seen["rows"] = 0 if width != CHUNK else seen["rows"] + width
        late = max(min(seen["rows"] - WARMUP, width), 0)
        if late:
            shares.extend(torch.stack(made)[:, :, -late:].double().mean(0).flatten().tolist())
        made.clear()

    hooks = [decoder.part(i, "feed_forward_out").register_forward_hook(part) for i in range(decoder.layers)]
    hooks.append(decoder.module.register_forward_hook(forward))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
