"""Optional dependencies: imported where they are used, with an error that says how to get them."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from regard.core.errors import RegardError

# Module -> the extra of `regard` that brings it.
EXTRAS = {"optuna": "search", "tensorboard": "train", "gguf": "demo", "accelerate": "demo", "PIL": "vision"}


def need(module: str, extra: str | None = None) -> ModuleType:
    """Import `module`, which the extra `extra` of regard brings (default: looked up in `EXTRAS`).

    Raises:
        RegardError: it is not installed.
    """
    top = module.partition(".")[0]
    if find_spec(top) is None:
        extra = extra or EXTRAS.get(top)
        how = f"pip install 'regard[{extra}]'" if extra else f"pip install {top}"
        raise RegardError(f"this needs the package {top!r}, which is not installed: {how}")
    return import_module(module)
