"""Images of a request: what the model's encoder makes of them, and what branches are shown in their place."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapters.cache_layer import Fork, Shown, eager
from regard.adapters.seam import Surgery
from regard.core.errors import RegardError
from regard.core.slots import Contrast, Image, Sight

ENCODE = "get_image_features"


@dataclass(frozen=True)
class Form:
    """How an encoder returns images: its type, and whether features, and those of deeper layers, are one tensor."""

    kind: type
    stacked: bool
    deep: bool

    @classmethod
    def of(cls, out: Any) -> "Form":
        """The form of what an encoder returned."""
        deep = _deep(out)
        return cls(type(out), isinstance(out.pooler_output, Tensor), bool(deep) and isinstance(deep[0], Tensor))

    def joined(self, images: Sequence[Image]) -> Any:
        """`images` as the encoder would return them."""
        features, *deep = zip(*images, strict=True)
        # Some encoders add fields to an output that has none of that name.
        full = self.kind()
        full.pooler_output = torch.stack(features) if self.stacked else features
        if deep:
            full.deepstack_features = [torch.cat(layer) if self.deep else layer for layer in deep]
        return full


@dataclass(eq=False)
class Seen:
    """Images that were encoded together.

    Args:
        given: what the encoder was given, by name.
        form: of what it returned.
        views: one tuple an image: its features as the request and each branch see it.
        taken: whether a request has them.
        number: of this encoding.
    """

    given: dict[str, Any]
    form: Form
    views: list[tuple[Image, ...]]
    taken: bool = False
    number: int = field(default_factory=itertools.count().__next__)


class Sights:
    """Stands before a model's image encoder, notes what it made, and answers in its place while a branch runs.

    Args:
        language: the language model.
        decoder: the stack of layers inside it.
        contrast: says what the branches are shown.
    """

    def __init__(self, language: nn.Module, decoder: nn.Module, contrast: Contrast):
        self._language, self._contrast = language, contrast
        owners = [m for m in language.modules() if hasattr(m, ENCODE) and decoder in m.modules()]
        self._owner = owners[-1] if owners else None
        self._answer: Any = None
        self.times = 1
        self.last: Seen | None = None
        self.lent: Any = None
        if self._owner is None and any(spec.view for spec in contrast.branches):
            raise RegardError(f"{contrast.name!r} works on images, and {type(language).__name__} takes none")

    def open(self, surgery: Surgery) -> None:
        """Put it in the encoder's place."""
        if self._owner is not None:
            surgery.set(self._owner, ENCODE, self._watching(getattr(self._owner, ENCODE)))

    def _watching(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        @eager
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._answer is not None:
                return self._answer
            around = self._contrast.around
            with nullcontext() if around is None else around(self._language, self.lent) as caught:
                out = encode(*args, **kwargs)
            given = dict(zip(inspect.signature(encode).parameters, args, strict=False)) | kwargs
            self.last = self._seen(encode, given, out, caught)
            return out

        return watched

    def _seen(self, encode: Callable[..., Any], given: dict[str, Any], out: Any, caught: Any) -> Seen:
        def again(**changed: Any) -> list[Image]:
            return split(encode(**given | changed))

        images = split(out)
        views: list[Sequence[Image]] = [images]
        for spec in self._contrast.branches:
            if spec.view is None:
                views.append(images)
                continue
            view = spec.view(Sight(self._language, given, images, again, caught, self.lent, self.times))
            found = [len(image[0]) for image in view]
            if len(view) != len(images) or any(n > len(image[0]) for n, image in zip(found, images, strict=True)):
                raise RegardError(
                    f"the view of {self._contrast.name!r} has images of {found} tokens, the request "
                    f"{[len(image[0]) for image in images]}"
                )
            views.append(view)
        told = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        return Seen(told, Form.of(out), list(zip(*views, strict=True)))

    def note(self, fork: Fork, brings: bool) -> None:
        """Give the images that were encoded last to the request that is fed, if they are its."""
        last = self.last
        if last is None or not (brings or not last.taken) or (fork.seen and fork.seen.number == last.number):
            return
        last.taken = True
        fork.fresh.append(last)
        fork.seen = last

    def resolve(self, fork: Fork, ids: Tensor, rows: int) -> None:
        """Give the images of a complete prompt `ids [B, N]`, made from `rows` rows, to its rows.

        Raises:
            RegardError: its image tokens are not those of the images that were encoded, or a view lacks an image.
        """
        name, batch = repr(self._contrast.name), ids.shape[0]
        fork.images = [list(held) for held in fork.images] or [[] for _ in range(batch)]
        flat = [views for seen in fork.fresh for views in seen.views]
        # On the host: a card would be waited for in every row.
        at = [
            self.places(row)[sum(len(i.views[0][0]) for i in held) :]
            for row, held in zip(ids.cpu(), fork.images, strict=True)
        ]
        total = sum(len(views[0][0]) for views in flat)
        times = 1 if sum(map(len, at)) == total else batch // rows
        if sum(len(places) for places in at[::times]) != total and any(map(len, at)):
            raise RegardError(
                f"{name} needs every image of a request; it has {sum(map(len, at))} new image tokens, and images of "
                f"{total} were encoded while it was attached"
            )
        images = iter(flat)
        for row in range(0, batch, times):
            new, done = [], 0
            while done < len(at[row]):
                views = next(images, None)
                done += len(views[0][0]) if views else len(at[row])
                if views is None or done > len(at[row]):
                    raise RegardError(
                        f"the image tokens of row {row} are not those of whole images, which {name} needs"
                    )
                new.append(Shown(int(at[row][done - 1]), views))
            for beam in range(row, row + times):
                fork.images[beam] = fork.images[beam] + new
        fork.fresh = []
        without = [row for row, held in enumerate(fork.images) if not held]
        if without and any(spec.view for spec in self._contrast.branches):
            where = "" if len(without) == batch else f" in rows {', '.join(map(str, without))}"
            raise RegardError(f"{name} works on images, and this request has none{where}")

    def places(self, row: Tensor) -> Tensor:
        """Where the image tokens of `row [N]` are."""
        token = self.token
        return row.new_zeros(0) if token is None else (row == token).nonzero()[:, 0]

    @property
    def token(self) -> int | None:
        """The token that stands for images; None: the model takes none."""
        if self._owner is None:
            return None
        config: Any = self._language.config
        return getattr(config, "image_token_id", None)

    def kept(self, fork: Fork, branch: int, ids: Tensor, real: Tensor) -> Tensor:
        """Which of a branch's prompt `ids [B, N]` stay, of those that are `real`: as many as its view has features.

        Raises:
            RegardError: its image tokens are not those of the request's images.
        """
        kept, told = real.cpu().clone(), ids.cpu()
        for row, held in enumerate(fork.images):
            places, own = self.places(told[row]), [len(image.views[0][0]) for image in held]
            if len(places) != sum(own):
                raise RegardError(
                    f"the branch prompt of {self._contrast.name!r} has {len(places)} image tokens, the request "
                    f"{sum(own)}"
                )
            for span, image in zip(places.split(own), held, strict=True):
                kept[row, span[len(image.views[branch][0]) :]] = False
        return kept.to(real.device)

    @contextmanager
    def showing(self, fork: Fork, branch: int) -> Iterator[dict[str, Tensor]]:
        """Inside, the encoder answers what `branch` is shown; yields what the language model is given for it."""
        flat = [image.views[branch] for row in fork.images for image in row]
        flat = [image for image in flat if len(image[0])]
        if not flat:
            yield {}
            return
        self._answer = fork.seen.form.joined(flat)
        try:
            yield fork.seen.given
        finally:
            self._answer = None


def split(out: Any) -> list[Image]:
    """What an encoder returned as images, in order."""
    features = list(out.pooler_output)
    lengths = [len(x) for x in features]
    layers = [layer.split(lengths) if isinstance(layer, Tensor) else layer for layer in _deep(out)]
    return list(zip(features, *layers, strict=True))


def _deep(out: Any) -> Sequence[Any]:
    return getattr(out, "deepstack_features", None) or ()
