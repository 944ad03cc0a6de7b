"""Which mixer each layer of a hybrid decoder has: the ratios of [133], and lists with softmax layers by number."""

from collections.abc import Iterable, Sequence

from regard.core.errors import RegardError
from regard.layers import mixers

SOFTMAX = "softmax"


def ratio(mixer: str, per_softmax: int | None, *, layers: int, recall: bool = True) -> list[str]:
    """`per_softmax` layers of `mixer`, then one of softmax attention, and so on ([133]; 3 for [089]).

    Layer l is softmax attention iff `(l + 1) % (per_softmax + 1) == 0`. 0 is a plain transformer, None no softmax.

    Args:
        mixer: a stem of `layers/states/`.
        per_softmax: layers of `mixer` for each of softmax attention.
        layers: of the decoder.
        recall: refuse a layout without any softmax layer.

    Raises:
        RegardError: no such mixer, a negative ratio, no layers, or no softmax layer under `recall`.
    """
    mixers.load(mixer)
    if layers < 1:
        raise RegardError(f"a decoder has 1 layer or more, got {layers}")
    if per_softmax is None:
        return [mixer] * layers
    if per_softmax < 0:
        raise RegardError(f"a ratio is 0 or more layers for each of softmax attention, got {per_softmax}")
    made = [SOFTMAX if (layer + 1) % (per_softmax + 1) == 0 else mixer for layer in range(layers)]
    if recall and SOFTMAX not in made:
        raise RegardError(
            f"{per_softmax}:1 on {layers} layers leaves no softmax layer, and recall needs one; take at most "
            f"{layers - 1}:1, or say recall=False"
        )
    return made


def layout(mixer: str, *, layers: int, softmax: Iterable[int]) -> list[str]:
    """Layers of `mixer`, those numbered in `softmax` (from 0) of softmax attention.

    Raises:
        RegardError: no such mixer, a number out of range, or one given twice.
    """
    mixers.load(mixer)
    made = [mixer] * layers
    for number in softmax:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < layers:
            raise RegardError(f"softmax layer {number!r} is out of range: layers are numbered 0 to {layers - 1}")
        if made[number] == SOFTMAX:
            raise RegardError(f"softmax layer {number} is named twice")
        made[number] = SOFTMAX
    return made


def check(names: Sequence[str], layers: int) -> None:
    """Whether `names` says the mixer of each of `layers` layers.

    Raises:
        RegardError: wrong length, or no such mixer; the message names the layer.
    """
    if isinstance(names, str) or len(names) != layers:
        got = repr(names) if isinstance(names, str) else f"{len(names)} names"
        raise RegardError(f"mixers must be a list with one name for each of {layers} layers, got {got}")
    for layer, name in enumerate(names):
        try:
            mixers.load(name)
        except RegardError as error:
            raise RegardError(f"layer {layer}: {error}") from error


def same(ours: Sequence[str], theirs: Sequence[str], what: str) -> None:
    """Whether two layouts agree.

    Raises:
        RegardError: they do not; the message names the first layer that differs, and both mixers.
    """
    if len(ours) != len(theirs):
        raise RegardError(f"{what} has {len(theirs)} layers, this model {len(ours)}")
    for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            raise RegardError(f"layer {layer} is {other!r} in {what} and {mine!r} in this model")
