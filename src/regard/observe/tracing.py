"""Causal tracing [175]: clean outputs put back into a corrupted run, one part, layer and group of tokens at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.families import Decoder
from regard.adapters.seam import open_free
from regard.core.errors import RegardError, choose
from regard.observe.inputs import prepared

# What attention and the feed-forward part add to the residual stream, and the stream as it leaves a layer.
PARTS = ("attention", "feed_forward", "stream")
# A prompt whose corruption costs the answer less than this cannot tell what restores it.
LEAST = 1e-3


@dataclass(frozen=True, eq=False)
class Recovery:
    """How much of an answer's probability each patch restores.

    Args:
        rates: `[P, L, G]` float64: `(p_patched - p_corrupted) / (p_clean - p_corrupted)`, mean over the prompts used.
        parts: names along the first dimension.
        groups: names along the last one.
        clean: `[B]` float64, the answers' probabilities.
        corrupted: `[B]` float64.
        used: prompts; `skipped` ones did not mind the corruption.
        skipped: prompts.
    """

    rates: Tensor
    parts: tuple[str, ...]
    groups: tuple[str, ...]
    clean: Tensor
    corrupted: Tensor
    used: int
    skipped: int


class Patches:
    """Keeps what parts of layers put out in a clean run, and puts it back in others.

    While `clean` is being filled (`recording`), every output is kept: `clean[part, layer] [B, T, d]`. Where `chosen [n,
    P, L]` bool is set, run i of a forward of n rows gets those parts back at `rows` (bool, broadcasts to `[n, T]`).
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = tuple(parts)
        self.clean: dict[tuple[int, int], Tensor] = {}
        self.recording = False
        self.chosen: Tensor | None = None
        self.rows: Tensor | None = None

    @contextmanager
    def on(self, decoder: Decoder) -> Iterator["Patches"]:
        """Inside, the parts of `decoder` are kept and put back.

        Raises:
            RegardError: the family does not tell where a part of a layer stands.
        """
        places = list(product(range(len(self.parts)), range(decoder.layers)))
        modules = [_module(decoder, layer, self.parts[part]) for part, layer in places]
        hooks = []
        try:
            for place, module in zip(places, modules, strict=True):
                hooks.append(module.register_forward_hook(self._hook(*place)))
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, part: int, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            if self.recording:
                self.clean[part, layer] = x
            if self.chosen is not None and self.rows is not None:
                here = self.chosen[:, part, layer, None, None] & self.rows[..., None]
                clean = self.clean[part, layer]
                x = torch.where(here, clean.repeat(len(x) // len(clean), 1, 1), x)
            return (x, *out[1:]) if isinstance(out, tuple) else x

        return hook


def _module(decoder: Decoder, layer: int, part: str) -> nn.Module:
    return decoder.blocks[layer] if part == "stream" else decoder.part(layer, f"{part}_out")


def trace(
    model: nn.Module,
    clean: Tensor | Mapping[str, Any],
    corrupted: Tensor | Mapping[str, Any],
    answer: Tensor | int,
    *,
    groups: Mapping[str, Tensor],
    parts: Sequence[str] = PARTS,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Recovery rates of every part of every layer, for every group of tokens.

    Args:
        model: any model `regard.attach` takes, with its language-model head, not attached; it is not changed.
        clean: ids `[B, T]`, or what a processor made, padded on the left.
        corrupted: the same prompts with what the answer depends on changed: other tokens, or noise on `pixel_values`
            (`noised`); of the same length.
        answer: token id, or `[B]` of them.
        groups: bool `[1|B, T]` by name: the tokens patched together.
        parts: some of `PARTS`.
        batch: patched runs in one forward.
        progress: told runs done and runs in all.

    Raises:
        RegardError: an unknown part, prompts of different shape or padding, a group that is empty, of another length or
            over padding, every prompt skipped, or a family that does not tell where the parts of a layer stand.
    """
    for part in parts:
        choose("part", part, PARTS)
    decoder, _ = open_free(model)
    given, real = prepared(model, clean)
    noisy, same = prepared(model, corrupted)
    if same.shape != real.shape or not torch.equal(same, real) or not bool(real[:, -1].all()):
        raise RegardError("clean and corrupted prompts must have one shape and padding, on the left")
    masks = {name: _group(name, mask, real) for name, mask in groups.items()}
    answers = torch.as_tensor(answer, device=real.device).expand(len(real))
    patches = Patches(parts)
    with torch.no_grad(), patches.on(decoder):
        patches.recording = True
        whole = _answered(model, given, answers)
        patches.recording = False
        broken = _answered(model, noisy, answers)
        found = _patched(model, patches, decoder.layers, noisy, answers, masks, batch, progress)
    lost = whole - broken
    used = lost >= LEAST
    if not bool(used.any()):
        raise RegardError(
            f"the corruption changes the probability of none of the {len(real)} answers by {LEAST:g}: they do not "
            "depend on what was changed"
        )
    rates = (found - broken)[:, used] / lost[used]
    shape = (len(parts), decoder.layers, len(masks))
    kept = int(used.sum())
    return Recovery(
        rates.mean(1).view(shape), tuple(parts), tuple(masks), whole, broken, kept, len(real) - kept
    )  # fmt: skip


def _patched(
    model: Any, patches: Patches, layers: int, noisy: Mapping[str, Any], answers: Tensor, masks: Mapping[str, Tensor],
    batch: int, progress: Callable[[int, int], None] | None,
) -> Tensor:  # fmt: skip
    """The answers' probabilities in every patched run, `[P * L * G, B]` float64."""
    found, runs = [], list(product(range(len(patches.parts)), range(layers), masks))
    for start in range(0, len(runs), batch):
        some = runs[start : start + batch]
        chosen = torch.zeros(len(some), len(patches.parts), layers, dtype=torch.bool, device=answers.device)
        for i, (part, layer, _) in enumerate(some):
            chosen[i, part, layer] = True
        patches.chosen = chosen.repeat_interleave(len(answers), 0)
        patches.rows = torch.cat([masks[group] for _, _, group in some])
        found.append(_answered(model, _repeated(noisy, len(some)), answers.repeat(len(some))))
        if progress is not None:
            progress(start + len(some), len(runs))
    return torch.cat(found).view(len(runs), -1)


def noised(inputs: Mapping[str, Any], scale: float = 3.0, seed: int = 0) -> dict[str, Any]:
    """`inputs` with Gaussian noise on `pixel_values`, of `scale` times their standard deviation.

    Raises:
        RegardError: there are no pixels.
    """
    if "pixel_values" not in inputs:
        raise RegardError(f"there are no pixel_values to put noise on; inputs are {', '.join(inputs)}")
    pixels = inputs["pixel_values"]
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    return {**inputs, "pixel_values": pixels + scale * pixels.std() * drawn}


def _group(name: str, mask: Tensor, real: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape not in (real.shape, (1, real.shape[1])):
        raise RegardError(
            f"group {name!r} must be bool [1 or {len(real)}, {real.shape[1]}], got {mask.dtype} {list(mask.shape)}"
        )
    mask = mask.to(real.device).expand(real.shape)
    if not bool(mask.any(1).all()):
        raise RegardError(f"group {name!r} has no token in row {int((~mask.any(1)).nonzero()[0])}")
    if bool((mask & ~real).any()):
        row, at = (mask & ~real).nonzero()[0].tolist()
        raise RegardError(f"group {name!r} lies over padding: row {row}, arrival {at}")
    return mask


def _repeated(given: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The prompts `times` times, one after the other; numbers and words stay."""
    return {
        name: torch.cat([x] * times) if isinstance(x, Tensor) and x.ndim > 0 else x for name, x in given.items()
    }  # fmt: skip


def _answered(model: Any, given: Mapping[str, Any], answers: Tensor) -> Tensor:
    """Probability of each row's answer after the prompt, `[rows]` float64 on the CPU."""
    logits = model(**given).logits[:, -1].double()
    return logits.softmax(-1).gather(1, answers[:, None].long())[:, 0].cpu()
