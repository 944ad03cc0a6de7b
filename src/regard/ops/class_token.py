"""The class token of an image encoder: where its attention stands, and its queries and keys in some layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def tower(model: nn.Module) -> nn.Module | str:
    """The image encoder of `model`, if it has a class token; else why not, in words."""
    found = next((part for name, part in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)
    if found is None or not any(name.split(".")[-1] == "class_embedding" for name, _ in found.named_parameters()):
        return f"the image encoder of {type(model).__name__} has none"
    return found


def attentions(encoder: nn.Module) -> list[nn.Module]:
    """The attention modules of an encoder's layers, in order."""
    return [part for part in encoder.modules() if hasattr(part, "q_proj") and hasattr(part, "k_proj")]


@contextmanager
def watching(layers: Sequence[nn.Module]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, each of `layers` notes `q_proj` and `k_proj [images, 1 + n, C]`, heads side by side."""
    caught: list[dict[str, Tensor]] = [{} for _ in layers]

    def noting(seen: dict[str, Tensor], name: str):
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            seen[name] = out

        return hook

    hooks = [
        getattr(layer, name).register_forward_hook(noting(seen, name))
        for layer, seen in zip(layers, caught, strict=True)
        for name in ("q_proj", "k_proj")
    ]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()
