"""The subjects of the contract tests: every mechanism that can be attached, in the setting its card shows.

These tests feed text. Mechanisms that need pixels, by their cards, refuse that: tests/adapters/test_branch_images.py
has them.
"""

import torch

from regard import catalog
from regard.adapters.families import Decoder
from regard.recipes.recipe import Recipe, place

MECHANISMS = sorted(stem for stem, entry in catalog.attachable().items() if entry.card.needs != "pixels")
NEUTRAL = [stem for stem, entry in catalog.attachable().items() if entry.card.neutral is not None]


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
