"""Where a phrase's words look in a diffusion transformer, once attention magnets are thrown away (RefAM)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.card import Card, Option
from regard.core.errors import RegardError
from regard.ops.maps import min_max, on_grid
from regard.primitives import lattice

CARD = Card(
    title="RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
    arxiv="2509.22650",
    sheet=178,
    implements="Magnets behind the phrase, heat maps of words, the filter of magnets, stop words and sinks, "
    "their mean, and the point to give to a segmenter.",
    exact=False,
    saving="none",
    departures=(
        "No code is public: the number of magnets, the words, and the detector of sinks are inferred.",
        "A word that stands behind the phrase is a magnet, whatever word it is.",
    ),
    oracles=(
        "no magnet and no filter: the mean map of cross-attention",
        "softmax: more magnets, and background falls while the object stays",
        "the order of tokens does not matter; the map lies in 0..1",
        "planted attention with a flat sink: the point is in the object for all seeds",
    ),
    options={
        "ratio": Option(kind="float", default=5.0, low=0.0, doc="a sink takes more than this many medians of tokens"),
        "spread": Option(
            kind="float", default=0.3, low=0.0, doc="and varies over the image by less than this share; 0: no sinks"
        ),
        "stop_words": Option(kind="bool", default=True, doc="leave stop words out, and magnets"),
    },
)
# Function words of English: they name nothing that could be seen.
STOP_WORDS = frozenset(
    "a an the this that these those and or but nor so as of in on at by for to from with without into onto over under "
    "up down off out is are was were be been being has have had do does did it its he his him she her hers they them "
    "their who whom whose which what where when while there here than then not no".split()
)
MAGNETS = ("the", "a", "of", "with", "and")


@dataclass(frozen=True, eq=False)
class Shown:
    """Where the phrase is in the image.

    Args:
        map: `[h, w]` in 0..1.
        point: row and column of its maximum, on the grid.
        words: by token of the text, the word it is of if its map was kept, else None.
        sinks: the tokens that were left out as sinks.
    """

    map: Tensor
    point: tuple[int, int]
    words: tuple[str | None, ...]
    sinks: tuple[int, ...]

    def pixel(self, size: Sequence[int]) -> tuple[int, int]:
        """Row and column, in an image of `size = (H, W)`, of the middle of the point's cell."""
        row, column = ((2 * self.point[i] + 1) * size[i] // (2 * self.map.shape[i]) for i in (0, 1))
        return row, column


def magnetised(phrase: str, count: int = 5, colour: str | None = None) -> str:
    """`phrase` with `count` stop words behind it, and one word of colour if given.

    Raises:
        RegardError: the phrase is empty, or `count` is negative.
    """
    if not phrase.strip() or count < 0:
        raise RegardError(f"magnets go behind a phrase, at least 0 of them; got {phrase!r} and {count}")
    words = [MAGNETS[i % len(MAGNETS)] for i in range(count)] + ([colour] if colour else [])
    return " ".join([phrase, *words])


def heat(weights: Tensor, image: slice, text: slice) -> Tensor:
    """Heat maps `[tokens, N]`: joint attention `[..., S, S]` of image rows to text keys, mean over all leading axes.

    Args:
        weights: probabilities after the joint softmax, layers and heads leading.
        image: the image's tokens.
        text: the text's tokens.
    """
    return weights[..., image, text].flatten(0, -3).mean(0).mT


def show(
    maps: Tensor,
    phrase: str,
    text: str,
    offsets: Sequence[tuple[int, int]],
    grid: Sequence[int],
    *,
    ratio: float = 5.0,
    spread: float = 0.3,
    stop_words: bool = True,
) -> Shown:
    """The mean map of the words that mean something, and its maximum.

    Args:
        maps: `[tokens, N]` float, of `heat`.
        phrase: what is looked for.
        text: what was encoded: the phrase, and the magnets behind it (`magnetised`).
        offsets: `(start, stop)` of every token in `text`, as a tokenizer gives them; empty ones are padding.
        grid: rows and columns of the image's N tokens.
        ratio: of sinks (see the card).
        spread: likewise.
        stop_words: leave out stop words, and what stands behind the phrase.

    Raises:
        RegardError: maps, offsets and grid disagree, the text does not begin with the phrase, a token lies across
            words, or no word is left; it lists them.

    Source: RefAM (2509.22650).
    """
    if len(lattice.shape(grid)) != 2:
        raise RegardError(f"an image has rows and columns, got a grid of {tuple(grid)}")
    if maps.ndim != 2 or len(maps) != len(offsets):
        raise RegardError(f"maps must be [tokens, N], one for each of {len(offsets)} tokens, got {list(maps.shape)}")
    words = spoken(text, offsets)
    if not text.startswith(phrase):
        raise RegardError(f"the text {text!r} does not begin with the phrase {phrase!r}")
    real = torch.tensor([word is not None for word in words], device=maps.device)
    if not real.any():
        raise RegardError(f"no token of {text!r} is a word")
    on_image = on_grid(maps, grid)
    sinks = flat_sinks(maps, real, ratio, spread)
    magnet = lambda i: offsets[i][0] >= len(phrase) or str(words[i]).lower() in STOP_WORDS  # noqa: E731
    kept = [i for i, word in enumerate(words) if word is not None and not sinks[i] and not (stop_words and magnet(i))]
    if not kept:
        listed = ", ".join(repr(word) for word in dict.fromkeys(words) if word is not None)
        raise RegardError(f"all words are stop words, magnets or sinks, so none is left: {listed}")
    chosen = min_max(on_image[kept].mean(0))
    row, column = divmod(int(chosen.argmax()), chosen.shape[1])
    told = tuple(word if i in kept else None for i, word in enumerate(words))
    return Shown(chosen, (row, column), told, tuple(sinks.nonzero()[:, 0].tolist()))


def flat_sinks(maps: Tensor, real: Tensor, ratio: float, spread: float) -> Tensor:
    """Which tokens take a large and even share of the whole image, bool `[tokens]`.

    Args:
        maps: `[tokens, N]`.
        real: `[tokens]` bool, those that are no padding.
        ratio: how many medians over tokens the mean over the image must exceed.
        spread: what its standard deviation over the image, relative to the mean, must stay below.
    """
    mean = maps.mean(1)
    even = maps.std(1, correction=0) < spread * mean
    return real & even & (mean > ratio * mean[real].median())


def spoken(text: str, offsets: Sequence[tuple[int, int]]) -> list[str | None]:
    """The word of `text` that each token is of; None for padding, and for tokens of punctuation alone.

    Raises:
        RegardError: a token lies outside the text or across words.
    """
    spans = [match.span() for match in re.finditer(r"[^\W_]+(?:['\u2019\-][^\W_]+)*", text)]
    found: list[str | None] = []
    for token, (start, stop) in enumerate(offsets):
        if not 0 <= start <= stop <= len(text):
            raise RegardError(f"token {token} at {(start, stop)} lies outside the text of {len(text)} characters")
        touched = [(a, b) for a, b in spans if start < b and a < stop]
        if len(touched) > 1:
            raise RegardError(f"token {token} at {(start, stop)} is of several words: {text[start:stop]!r}")
        found.append(text[slice(*touched[0])] if touched else None)
    return found
