"""The subjects of the contract tests: every mechanism that can be attached, in the setting its card shows.

These tests feed text. Mechanisms whose cards need pixels refuse that: tests/adapters/test_branch_images.py has them.
"""

import torch

from regard import catalog
from regard.adapters.families import Decoder
from regard.core.token_map import Kind, Span, TokenMap
from regard.recipes.recipe import Recipe, place

MECHANISMS = sorted(stem for stem, entry in catalog.attachable().items() if entry.card.needs != "pixels")
NEUTRAL = [stem for stem, entry in catalog.attachable().items() if entry.card.neutral is not None]

# By position; what follows is generated, however long the prompt.
KINDS = [Kind.FIRST, Kind.TEMPLATE, *[Kind.VISUAL] * 5, *[Kind.QUERY] * 4]


def token_map(batch, padding=None):
    """An image and a question behind `padding [B]`, with the sets that mechanisms ask for."""
    padding = [0] * batch if padding is None else padding.tolist()
    kinds = torch.full((batch, max(padding) + len(KINDS)), Kind.GENERATED, dtype=torch.int8)
    sets = {name: torch.zeros(kinds.shape, dtype=torch.bool) for name in ("local", "summary")}
    for row, pad in enumerate(padding):
        kinds[row, :pad] = Kind.PADDING
        kinds[row, pad : pad + len(KINDS)] = torch.tensor(KINDS)
        sets["local"][row, pad + 2 : pad + 5] = True
        sets["summary"][row, pad + 5] = True
    return TokenMap(kinds, tuple(Span(row, pad + 2, pad + 7) for row, pad in enumerate(padding)), sets)


def example(stem: str, decoder: Decoder) -> Recipe:
    """The card's own example, fitted tensors filled with a fixed random draw."""
    drawn = torch.Generator().manual_seed(0)
    fitted = {
        name: torch.rand(*option.sizes(decoder), generator=drawn)
        for name, option in catalog.find(stem).card.options.items()
        if option.kind == "tensor"
    }
    return Recipe([place(stem, **catalog.find(stem).card.example, **fitted)])


def neutral(stem: str, decoder: Decoder) -> Recipe:
    """The card's neutral setting, nothing fitted; nothing else of the example differs from it."""
    card = catalog.find(stem).card
    assert card.neutral is not None
    return Recipe([place(stem, **card.example | card.neutral)])
