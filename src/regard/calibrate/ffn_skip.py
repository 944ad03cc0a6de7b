"""FFN-SkipLLM [057]: cold regions and threshold for a wanted share of skipped feed-forward blocks.

There is nothing to train. One forward measures how far each layer's block turns the residual stream; the
threshold is then found by halving, on the share that the mechanism itself skips.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regard.adapters.families import Decoder, open_decoder
from regard.adapters.install import install
from regard.calibrate.common import Progress
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.measure.replay import forward, quiet
from regard.ops.depth.ffn_skip import saturation

# The prompt of a measurement; what follows it is decoded.
PROMPT = 16
HALVINGS = 12
JUMPS = (1, 2, 4)


def suggest(
    model: Any,
    tokens: Tensor,
    *,
    share: float = 0.25,
    jump: int | None = None,
    warmup: int = 25,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Options of `ffn_skip` under which about `share` of all blocks are skipped on `tokens [n]`, after the warm-up.

    A layer is cold if its mean saturation lies below the threshold; the cold ones at both ends are left alone.
    Also says `"share"`, what was skipped on `tokens` (drop it before placing).

    Args:
        model: a causal language model whose family names its feed-forward parts, not attached.
        tokens: real text, some hundred tokens.
        share: of all blocks of the tokens after the warm-up, 0 to 1.
        jump: of the mechanism; None: the smallest of 1, 2, 4 that comes within a tenth of `share`.
        warmup: of the mechanism.
        progress: told forwards done and forwards in all.

    Raises:
        RegardError: `share` lies outside 0 to 1, the text is too short, or the nearest share is off by a quarter.
    """
    if not 0 < share < 1:
        raise RegardError(f"share must lie between 0 and 1, got {share}")
    if len(tokens) <= PROMPT + warmup:
        raise RegardError(f"suggesting needs more than {PROMPT + warmup} tokens of text, got {len(tokens)}")
    jumps = JUMPS if jump is None else (jump,)
    report, total = progress or (lambda done, total: None), 1 + HALVINGS * len(jumps)
    measured = saturations(model, tokens)
    # Halving over what was measured, not over numbers: saturations crowd together near 1.
    grid = measured[:, PROMPT + warmup :].flatten().sort().values
    tried: list[dict[str, Any]] = []
    for tries, jump in enumerate(jumps):
        low, high = 0, len(grid) - 1
        for step in range(HALVINGS):
            threshold = float(grid[(low + high) // 2])
            first, last = cold(measured.mean(1), threshold)
            options = {"first": first, "last": last, "warmup": warmup, "threshold": threshold, "jump": jump}
            tried.append({**options, "share": skipped(model, tokens, options)})
            low, high = ((low + high) // 2, high) if tried[-1]["share"] > share else (low, (low + high) // 2)
            report(1 + tries * HALVINGS + step + 1, total)
        best = min(tried, key=lambda one: abs(one["share"] - share))
        if abs(best["share"] - share) <= share / 10:
            break
    report(total, total)
    if abs(best["share"] - share) > share / 4:
        raise RegardError(
            f"no threshold skips {share:.0%} of the blocks with jump {' or '.join(map(str, jumps))}; "
            f"the nearest share is {best['share']:.0%}, with jump {best['jump']}"
        )
    return best


def cold(mean: Tensor, threshold: float) -> tuple[int, int]:
    """How many first and how many last layers have a mean saturation `[L]` below `threshold`; all first if all."""
    warm = (mean >= threshold).nonzero()[:, 0].tolist()
    return (warm[0], len(mean) - 1 - warm[-1]) if warm else (len(mean), 0)


def saturations(model: Any, tokens: Tensor) -> Tensor:
    """Cosine of the residual stream before and after each block of the model as it is, `[L, n]`."""
    found: dict[int, Tensor] = {}
    decoder = open_decoder(model)
    added: dict[int, Tensor] = {}

    def block(layer: int, out: Tensor) -> None:
        scale = getattr(decoder.blocks[layer], "residual_multiplier", 1.0)
        found[layer] = saturation(out - scale * added.pop(layer), out)[0]

    with quiet(model), _watching(decoder, added.__setitem__, block):
        forward(model, tokens.to(model.device)[None], None, keep=1)
    return torch.stack([found[layer] for layer in range(decoder.layers)]).cpu()


def skipped(model: Any, tokens: Tensor, options: dict[str, Any]) -> float:
    """The share of blocks that `ffn_skip` skips on `tokens [n]` after a short prompt and the warm-up."""
    decoder, ran = open_decoder(model), []
    start = PROMPT + options["warmup"]

    def part(layer: int, out: Tensor) -> None:
        # A block that did not run added nothing at all.
        ran.append(out[0, start:].ne(0).any(-1).double().mean().cpu())

    handle = install(model, [Placement("ffn_skip", options=options)])
    with quiet(model), handle, handle.prompting(PROMPT), _watching(decoder, part, lambda layer, out: None):
        forward(model, tokens.to(model.device)[None], None, keep=1)
    return 1 - float(torch.stack(ran).mean())


@contextmanager
def _watching(
    decoder: Decoder, part: Callable[[int, Tensor], None], block: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Tell what each feed-forward part adds `[B, T, d]`, and what each layer returns."""

    def telling(told: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
        return lambda module, args, out: told(layer, out[0] if isinstance(out, tuple) else out)

    hooks = []
    try:
        for layer, module in enumerate(decoder.blocks):
            hooks.append(decoder.part(layer, "feed_forward_out").register_forward_hook(telling(part, layer)))
            hooks.append(module.register_forward_hook(telling(block, layer)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
