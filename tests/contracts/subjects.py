"""The subjects of the contract tests: every mechanism of the catalog, in the setting its card shows."""

from typing import Any

import torch

from regard import catalog
from regard.adapters.families import Decoder
from regard.core.placement import Placement
from regard.recipes.recipe import Recipe, place

MECHANISMS = sorted(catalog.entries())
NEUTRAL = [stem for stem, entry in catalog.entries().items() if entry.card.neutral is not None]


def example(stem: str, decoder: Decoder) -> Recipe:
    """The card's own example, fitted tensors filled with a fixed random draw."""
    return Recipe([_place(stem, decoder, catalog.find(stem).card.example)])


def neutral(stem: str, decoder: Decoder) -> Recipe:
    """The card's neutral setting; nothing else of the example differs from it."""
    card = catalog.find(stem).card
    assert card.neutral is not None
    return Recipe([_place(stem, decoder, card.example | card.neutral)])


def _place(stem: str, decoder: Decoder, options: dict[str, Any]) -> Placement:
    drawn = torch.Generator().manual_seed(0)
    fitted = {
        name: torch.rand(*(getattr(decoder, axis) for axis in option.shape), generator=drawn)
        for name, option in catalog.find(stem).card.options.items()
        if option.kind == "tensor"
    }
    return place(stem, **options, **fitted)
