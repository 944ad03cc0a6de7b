"""Which tokens of a prompt see later ones, from the masks that a model makes around its decoder.

PaliGemma and Gemma 3 do: a prompt, or the tokens of an image, see each other both ways. What they make while attached
are light masks (`seam.Mask`), which know of what they were made: a padding mask, and the block of every arrival.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.adapters import seam
from regard.adapters.families import Decoder, looks_ahead
from regard.core.errors import RegardError
from regard.core.two_sided import TwoSided


class Masked(NamedTuple):
    """What a forward is told of its tokens.

    Args:
        padding: the 2-D padding mask `[B, S]`, None: no row is padded; or what was given in its place.
        blocks: the block of every arrival `[B, n]`, -1: none; None: nobody said.
        wide: whether blocks see all of themselves in layers with a window too.
    """

    padding: Any
    blocks: Tensor | None = None
    wide: bool = False


def masked(mask: Any) -> Masked:
    """What the decoder's `attention_mask` says: a padding mask, or masks made around the decoder, by type of layer.

    Raises:
        RegardError: one of these is made of more than causal cut, window, blocks and padding.
    """
    made = list(mask.values()) if isinstance(mask, dict) else [mask]
    if not made or not all(isinstance(one, seam.Mask) for one in made):
        return Masked(mask)
    for one in made:
        one.refuse_unknown(seam.TWO_SIDED)
    return Masked(made[0].padding, made[0].blocks, any(one.formula == seam.WIDE for one in made))


def spans(
    told: Masked, decoder: Decoder, padding: Tensor | None, batch: int, start: int, stop: int
) -> tuple[TwoSided, ...]:
    """The spans of a forward's arrivals `start` to `stop - 1`, by position; those of earlier forwards are past.

    `padding [B]` is how far rows are padded on the left, None: no row is. Padding, on either side, is in no span.

    Raises:
        RegardError: a block lies in several places, or not within this forward; the model looks ahead and nobody said
            where; a block is longer than a window that it is not bound by.
    """
    if told.blocks is None:
        if looks_ahead(decoder.config) and start == 0 and stop > 1:
            raise RegardError(
                f"{decoder.family} lets prompts see later tokens, and nobody said which: pass token_type_ids, as its "
                "processor makes them"
            )
        return ()
    shift = [0] * batch if padding is None else padding.tolist()
    blocks, found = told.blocks, []
    if told.padding is not None:
        real = told.padding.to(blocks.device, torch.bool)[:, : blocks.shape[1]]
        blocks = blocks.clone()
        blocks[:, : real.shape[1]].masked_fill_(~real, -1)
    for row, (numbers, left) in enumerate(zip(blocks.cpu(), shift, strict=True)):
        seen = set()
        for block, first, last in _runs(numbers):
            if block in seen:
                raise RegardError(
                    f"tokens of row {row} that see each other lie apart: block {block} goes on at arrival {first}, "
                    "behind others; attached layers take runs of tokens"
                )
            seen.add(block)
            if first < start < last or first < stop < last:
                raise RegardError(
                    f"arrivals {first} to {last - 1} of row {row} see each other, and this forward brings {start} to "
                    f"{stop - 1} only; feed such tokens together (no prefill_chunk_size)"
                )
            if start <= first < stop:
                found.append(TwoSided(row, first - left, last - left))
    for window in {window for window in decoder.windows if told.wide and window is not None}:
        for span in found:
            if span.stop - span.start > window:
                raise RegardError(
                    f"{span} is longer than the window of {window} tokens of some layers, where {decoder.family} lets "
                    "it see all of itself; attached layers look back over the window only"
                )
    return tuple(found)


def _runs(blocks: Tensor) -> Iterator[tuple[int, int, int]]:
    """`(block, start, stop)` of the runs in `blocks [n]`."""
    first, (values, counts) = 0, blocks.unique_consecutive(return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value >= 0:
            yield value, first, first + count
        first += count
