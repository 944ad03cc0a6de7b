"""A token map from what a processor made for a vision-language model.

Families are data: how the tokens of their images follow each other. Where images stand is read off the prompt (the
positions of the model's image token), how large they are off the inputs and the config; the two must agree.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError
from regard.core.token_map import Box, Kind, Span, TokenMap

_BY_HAND = "build the map by hand: TokenMap.of_text(attention_mask, spans)"
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class _Run:
    """Neighbouring image or video tokens of a row, and the ids beside them, -1 where the row ends."""

    row: int
    start: int
    stop: int
    kind: str
    before: int
    after: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Part:
    """The next `tokens` image tokens: of image or clip number `image` of the batch; the rest as in `Span`."""

    tokens: int
    image: int
    grid: tuple[int, int, int] | None = None
    box: Box | None = None
    separators: int = 0


# What a layout returns is all parts of the batch, in reading order.
_Layout = Callable[[Any, Mapping[str, Any], Sequence[_Run]], Iterable[_Part]]


def _given(inputs: Mapping[str, Any], name: str) -> Tensor:
    found = inputs.get(name)
    if not isinstance(found, Tensor):
        told = "nothing" if found is None else type(found).__name__
        raise RegardError(f"{name} must be a tensor (return_tensors='pt'), got {told}")
    return found


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _square(tokens: int) -> tuple[int, int, int]:
    side = isqrt(tokens)
    if side * side != tokens:
        raise RegardError(f"an image of {tokens} tokens is no square, as this family's are; {_BY_HAND}")
    return 1, side, side


def _patches(config: Any, pixels: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of the patches of `pixels [..., H, W]`."""
    patch = _side(config.vision_config.patch_size)
    return 1, pixels.shape[-2] // patch, pixels.shape[-1] // patch


def _single(config: Any, inputs: Mapping[str, Any], runs: Sequence[_Run]) -> Iterable[_Part]:
    """LLaVA, PaliGemma, Gemma 3: one grid an image, and before it the class token where LLaVA keeps it."""
    pixels = _given(inputs, "pixel_values")
    if "image_sizes" in inputs:
        raise RegardError(f"this vision tower breaks its rows with tokens of their own (image_sizes); {_BY_HAND}")
    pooled = getattr(config, "mm_tokens_per_image", None)
    grid = _patches(config, pixels) if pooled is None else _square(pooled)
    size = grid[1] * grid[2]
    classed = sum(map(len, runs)) == len(pixels) * (size + 1)
    for image in range(len(pixels)):
        if classed:
            yield _Part(1, image)
        yield _Part(size, image, grid, _WHOLE)


def _whole_and_fine(config: Any, inputs: Mapping[str, Any], runs: Sequence[_Run]) -> Iterable[_Part]:
    """LLaVA-NeXT: the whole image, then its tiles put together without their padding, a newline after each row."""
    from transformers.image_processing_utils import select_best_resolution

    coarse = _patches(config, _given(inputs, "pixel_values"))
    tile = config.vision_config.image_size
    for image, size in enumerate(_given(inputs, "image_sizes").tolist()):
        best = select_best_resolution(size, config.image_grid_pinpoints)
        rows, columns = (side // tile * of for side, of in zip(best, coarse[1:], strict=True))
        height, width = size
        # As the model rounds: what the longer side leaves over is padding, the same on both ends.
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        yield _Part(coarse[1] * coarse[2], image, coarse, _WHOLE)
        yield _Part(rows * (columns + 1), image, (1, rows, columns + 1), _WHOLE, separators=1)


def _merged(config: Any, inputs: Mapping[str, Any], runs: Sequence[_Run]) -> Iterable[_Part]:
    """Qwen: a grid of merged patches, time first; a clip is in one piece (2.5) or frame by frame (3)."""
    merge = config.vision_config.spatial_merge_size
    names = {kind: f"{kind}_grid_thw" for kind in ("video", "image")}
    waiting = {kind: _given(inputs, name).tolist() if name in inputs else [] for kind, name in names.items()}
    at, image = 0, -1
    while at < len(runs):
        run, image = runs[at], image + 1
        if not waiting[run.kind]:
            raise RegardError(f"row {run.row} has {run.kind} tokens without a line of {names[run.kind]}")
        frames, rows, columns = waiting[run.kind].pop(0)
        grid = frames, rows // merge, columns // merge
        if len(run) < frames * grid[1] * grid[2]:
            # Time stamps stand between its frames.
            yield from (_Part(grid[1] * grid[2], image, (1, *grid[1:]), _WHOLE) for _ in range(frames))
            at += frames
        else:
            yield _Part(frames * grid[1] * grid[2], image, grid, _WHOLE)
            at += 1
    for kind, left in waiting.items():
        if left:
            raise RegardError(f"{names[kind]} has {len(left)} more lines than the prompts have {kind}s")


def _tiled(config: Any, inputs: Mapping[str, Any], runs: Sequence[_Run]) -> Iterable[_Part]:
    """InternVL: tiles and a thumbnail in one run; how the tiles lie in the image, only the processor knew."""
    size, tiles = config.image_seq_length, len(_given(inputs, "pixel_values"))
    _counted(sum(map(len, runs)), tiles * size, f"{tiles} tiles of {size}")
    for image, run in enumerate(runs):
        for _ in range(len(run) // size):
            yield _Part(size, image, _square(size), _WHOLE if len(run) == size else None)


def _tiled_with_markers(config: Any, inputs: Mapping[str, Any], runs: Sequence[_Run]) -> Iterable[_Part]:
    """Idefics3, SmolVLM: a run a tile, the whole image last; markers tell the tiles, a newline ends their rows."""
    _, rows, columns = _patches(config, _given(inputs, "pixel_values"))
    tiles, size = inputs["pixel_values"].flatten(0, 1), rows * columns // config.scale_factor**2
    # The model drops tiles of zeros, which fill rows with fewer images than others.
    _counted(len(runs) * size, int(tiles.flatten(1).any(1).sum()) * size, f"tiles of {size}")
    whole = {run.row: run.before for run in runs}
    image, waiting = 0, list[_Run]()
    for run in runs:
        if run.before != whole[run.row]:
            waiting.append(run)
            continue
        # A row of tiles ends where something else follows than before another tile.
        down = max(1, sum(tile.after != run.after for tile in waiting))
        across = len(waiting) // down
        for number in range(len(waiting)):
            top, left = divmod(number, across)
            box = (top / down, left / across, (top + 1) / down, (left + 1) / across)
            yield _Part(size, image, _square(size), box)
        yield _Part(size, image, _square(size), _WHOLE)
        image, waiting = image + 1, []


FAMILIES: dict[str, _Layout] = {
    "llava": _single,
    "llava_next": _whole_and_fine,
    "qwen2_vl": _merged,
    "qwen2_5_vl": _merged,
    "qwen3_vl": _merged,
    "internvl": _tiled,
    "idefics3": _tiled_with_markers,
    "smolvlm": _tiled_with_markers,
    "paligemma": _single,
    "gemma3": _single,
}


def read(model: Any, inputs: Mapping[str, Any], *, processor: Any = None, query: Tensor | None = None) -> TokenMap:
    """What the tokens are that a processor made.

    Read off exactly: padding, and the image and video tokens with their grids (`Span`), which must agree with the
    sizes that `inputs` say. InternVL's processor turns a clip into images and does not say how tiles lie in their
    image, so its clips are images and its tiles have no `box`.

    Inferred: the first real token is FIRST unless it is an image's. TEMPLATE are the special tokens that the config
    names, those that `processor` knows, what stands between the parts of one image, and each sequence of tokens that
    the chat template of `processor` puts before, between and after turns, wherever it occurs. A token that holds
    text of both is QUERY, and so is all else. Say `query` where that is not what you mean.

    Args:
        model: the model, or its config.
        inputs: `input_ids [B, n]`, `attention_mask [B, n]` (None: no padding), and what the model gets of images:
            `pixel_values`, `image_sizes`, `image_grid_thw`, `video_grid_thw`.
        processor: the processor or tokenizer that made them.
        query: `[1|B, n]` bool, the user's text; the rest that is not FIRST and no image's is TEMPLATE then.

    Raises:
        RegardError: pixels for a text model or for a family that is not known; image tokens that are fewer or more
            than the inputs' images make; a mask with holes, or of another shape than `input_ids`, or `query`.
    """
    config = getattr(model, "config", model)
    given = {name: value for name, value in inputs.items() if value is not None}
    ids = _given(given, "input_ids")
    real = _real(ids, _given(given, "attention_mask") if "attention_mask" in given else None)
    spans = _spans(config, given, ids.masked_fill(~real, -1))
    kinds = torch.where(real, Kind.QUERY, Kind.PADDING).to(torch.int8)
    if query is None:
        kinds[real & _template(config, processor, ids)] = Kind.TEMPLATE
        for one, two in pairwise(spans):
            if (one.row, one.image) == (two.row, two.image):
                kinds[one.row, one.stop : two.start] = Kind.TEMPLATE
    else:
        if query.dtype != torch.bool or query.ndim != 2 or query.shape not in (ids.shape, (1, ids.shape[1])):
            raise RegardError(f"query is {query.dtype} {list(query.shape)}, expected bool {list(ids.shape)}")
        kinds[real & ~query.to(ids.device)] = Kind.TEMPLATE
    kinds[real & (real.long().cumsum(1) == 1)] = Kind.FIRST
    for span in spans:
        kinds[span.row, span.start : span.stop] = Kind.VISUAL
    return TokenMap(kinds, tuple(spans))


def _real(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens are no padding, `[B, n]` bool."""
    if ids.ndim != 2:
        raise RegardError(f"input_ids must be [rows, tokens], got {list(ids.shape)}")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise RegardError(f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}")
    real = mask.bool()
    if bool((real.diff(dim=1).sum(1) > 2 - real[:, 0].long() - real[:, -1].long()).any()):
        raise RegardError("attention_mask hides tokens between visible ones; pad prompts on the left")
    return real


def _spans(config: Any, given: Mapping[str, Any], ids: Tensor) -> list[Span]:
    """Images and clips of `ids`, which are -1 at padding."""
    pixels = sorted(name for name in given if name.startswith("pixel_values"))
    layout = FAMILIES.get(config.model_type)
    if layout is None:
        if pixels and getattr(config, "vision_config", None) is None:
            raise RegardError(f"{config.model_type} is a text model and has no place for {', '.join(pixels)}")
        if pixels:
            known = ", ".join(FAMILIES)
            raise RegardError(f"how {config.model_type} lays out its images is not known ({known} are); {_BY_HAND}")
        return []
    names = {"image": config.image_token_id, "video": getattr(config, "video_token_id", None)}
    runs = [run for kind, token in names.items() if token is not None for run in _runs(ids, token, kind)]
    runs.sort(key=lambda run: (run.row, run.start))
    if not pixels:
        if runs:
            raise RegardError(f"input_ids have {sum(map(len, runs))} image tokens, and there are no pixel_values")
        return []
    return _placed(runs, list(layout(config, given, runs)))


def _runs(ids: Tensor, token: int, kind: str) -> list[_Run]:
    edges = torch.nn.functional.pad((ids == token).long(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    beside = torch.nn.functional.pad(ids, (1, 1), value=-1).tolist()
    return [
        _Run(row, start, stop, kind, beside[row][start], beside[row][stop + 1])
        for (row, start), (_, stop) in zip(starts, stops, strict=True)
    ]


def _counted(found: int, made: int, how: str) -> None:
    if found != made:
        raise RegardError(
            f"input_ids have {found} image tokens, the images make {made} ({how}); a truncated prompt, or inputs of "
            "another model?"
        )


def _placed(runs: Sequence[_Run], parts: Sequence[_Part]) -> list[Span]:
    """`parts` one after another on the tokens of `runs`."""
    _counted(sum(map(len, runs)), sum(part.tokens for part in parts), f"{len(parts)} grids")
    spans, waiting, first = list[Span](), iter(runs), dict[int, int]()
    run, done = None, 0
    for part in parts:
        if run is None or done == len(run):
            run, done = next(waiting), 0
        if part.tokens > len(run) - done:
            raise RegardError(
                f"an image of {part.tokens} tokens meets {len(run) - done} image tokens at {run.start + done} of row "
                f"{run.row}; are the images in the order of the prompts?"
            )
        image = part.image - first.setdefault(run.row, part.image)
        at = run.start + done
        spans.append(Span(run.row, at, at + part.tokens, part.grid, run.kind, image, part.box, part.separators))
        done += part.tokens
    return spans


def _template(config: Any, processor: Any, ids: Tensor) -> Tensor:
    """Tokens that belong to no text of the user's, `[B, n]` bool."""
    special = set[int]()
    for source in (config, config.get_text_config()):
        for name, value in source.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    tokenizer = getattr(processor, "tokenizer", processor)
    special.update(getattr(tokenizer, "all_special_ids", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special.update(number for number, token in added.items() if token.special)
    special.discard(None)  # type: ignore[arg-type]
    found = torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
    for piece in _pieces(processor, tokenizer):
        size = len(piece)
        if 0 < size <= ids.shape[1]:
            for row, start in (ids.unfold(1, size, 1) == ids.new_tensor(piece)).all(-1).nonzero().tolist():
                found[row, start : start + size] = True
    return found


def _pieces(processor: Any, tokenizer: Any) -> list[list[int]]:
    """What the chat template puts before, between and after turns, as tokens, with the space around it and without."""
    if getattr(processor, "chat_template", None) is None:
        return []
    text = "QUERYTEXT"
    # A processor's template takes a list of parts, a tokenizer's a string.
    content: Any = text if processor is tokenizer else [{"type": "text", "text": text}]
    turns = [{"role": role, "content": content} for role in ("user", "assistant", "user")]
    shown = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    pieces = {way for piece in shown.split(text) for way in (piece, piece.strip())}
    return [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in sorted(pieces) if piece]
