"""`regard.attach`: a model and a recipe."""

from collections.abc import Sequence

from torch import nn

from regard.adapters.install import Handle, install
from regard.core.placement import Placement
from regard.recipes.recipe import Recipe


def attach(model: nn.Module, recipe: Recipe | Sequence[Placement], *, graphs: bool = False) -> Handle:
    """Run `model` under `recipe` until the returned handle is detached (or its `with` block is left).

    Everything is checked first; a recipe that cannot be served leaves the model untouched.

    Args:
        model: any transformers model with a causal decoder, PEFT-wrapped or not.
        recipe: a Recipe, or its placements.
        graphs: replay forwards of one token as a CUDA graph, where the recipe's stores let them be of fixed shapes;
            `handle.explain()` says whether, and why not. All layers then run on regard's stores, neutral ones too.

    Raises:
        RegardError: what cannot be served, naming it.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(tuple(recipe))
    return install(model, recipe.placements, recipe.fits, graphs=graphs)
