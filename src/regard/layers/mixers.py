"""Mixers by name: every file of `layers/states/` is one, and its `Mixer` is built with the options it takes."""

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from regard.core.errors import RegardError, choose
from regard.layers import states

# What a model gives to mixers that ask for it; no user does.
GIVEN = ("layer", "layers")


def names() -> tuple[str, ...]:
    """The stems of all mixers, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(states.__path__)))


def load(name: str) -> type[nn.Module]:
    """The class `Mixer` of `layers/states/<name>.py`.

    Raises:
        RegardError: no such mixer; the message names the nearest.
    """
    choose("mixer", name, names())
    return import_module(f"regard.layers.states.{name}").Mixer


def holds(name: str) -> str:
    """What a request holds for mixer `name`: `keys` (and values), `latents`, or a `state`.

    Keys and latents are held for every token: the mixer takes a mask of all tokens so far, and can take tokens back.

    Raises:
        RegardError: no such mixer.
    """
    return getattr(load(name), "holds", "state")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Whether mixer `name` takes all of `options` (`heads` besides).

    Raises:
        RegardError: it does not take one; the message names the nearest.
    """
    takes = {*_keywords(load(name)), "heads"} - set(GIVEN)
    for option in options:
        choose(f"option of mixer {name}", option, takes)


def build(name: str, width: int, heads: int, *, layer: int, layers: int, options: Mapping[str, Any]) -> nn.Module:
    """Mixer `name` for one layer of a model; `options` may replace `heads`.

    Raises:
        RegardError: no such mixer or option, or sizes that do not divide; the message names the layer.
    """
    kind = load(name)
    check_options(name, options)
    given = {key: value for key, value in (("layer", layer), ("layers", layers)) if key in _keywords(kind)}
    rest = {key: value for key, value in options.items() if key != "heads"}
    try:
        return kind(width, options.get("heads", heads), **given, **rest)
    except RegardError as error:
        raise RegardError(f"layer {layer} ({name}): {error}") from error


def _keywords(kind: type[nn.Module]) -> set[str]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
