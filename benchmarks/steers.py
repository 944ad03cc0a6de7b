"""Steering the tiny vision-language model: what each mechanism is given, and how it answers exams.

Which mechanisms there are is read off the cards. `GIVEN` says what one needs beyond its card, and what is tried of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

import regard
import steer_fits
from regard import catalog
from regard.core.errors import RegardError
from regard.core.placement import Placement
from regard.core.token_map import TokenMap
from regard.measure import hallucination
from regard.measure import scene_questions as ask
from regard.measure.hallucination import Captions
from regard.models import vlm
from steer_bench import Batch, Bench, Setting

# Where steering happens (docs/design.md, section 9).
SITES = ("scores", "probabilities", "heads", "residual", "logits", "objectives", "views")
# Papers speak of models of so many layers.
DEPTH = 32
# Of what is tried: steps from neutral to the card's defaults, and half-open ranges of the paper's layers.
TIMES, LAYERS = "times", "layers"
STRENGTHS = (1.0, 0.5, 2.0, 0.25, 4.0, 0.1, 8.0, 20.0)
# Logits below a share of the largest are cut: how far is no strength of the contrast.
CUT = "beta"
# The margin of a token that a cut leaves alone.
CLEAR = 100.0
ALL = (0, DEPTH)
Choice = dict[str, Any]


class Exam:
    """The questions of several seeds, asked in few large batches.

    Args:
        bench: who is asked.
        seeds: of the scenes; what is counted is counted seed by seed.
        sizes: how many questions of a sort a seed, as `hallucination.quizzes` takes them.
        size: questions at a time.
        images: what `pictures` draws for the same seeds and sizes; None: it is drawn here.
    """

    def __init__(
        self,
        bench: Bench,
        seeds: Sequence[int],
        sizes: Mapping[str, int],
        size: int,
        images: Tensor | None = None,
    ) -> None:
        self.bench, self.seeds = bench, seeds
        self._quizzes = [hallucination.quizzes(seed=seed, **sizes) for seed in seeds]
        self.texts = [text for one in self._quizzes for quiz in one.values() for text in quiz.texts]
        self.images = pictures(seeds, sizes) if images is None else images
        # Answers of like length together, so that few rows wait for others.
        order = sorted(range(len(self.texts)), key=lambda i: self.texts[i].split()[0])
        kinds = [self.texts[i].split()[0] for i in order]
        cuts = [i for i in range(len(order)) if i == 0 or kinds[i] != kinds[i - 1]] + [len(order)]
        self.batches = [
            bench.batch(self.images[part], [self.texts[i] for i in part], part)
            for start, stop in pairwise(cuts)
            for part in (order[at : min(at + size, stop)] for at in range(start, stop, size))
        ]

    def said(self, setting: Setting | None = None) -> list[str]:
        """An answer to every question."""
        found = [""] * len(self.texts)
        for batch in self.batches:
            for i, text in zip(batch.at, answers(self.bench, batch, setting), strict=True):
                found[i] = text
        return found

    def figures(self, setting: Setting | None = None) -> list[dict[str, float]]:
        """The figures of all answers, by name, a row a seed."""
        left, rows = iter(self.said(setting)), []
        for quizzes in self._quizzes:
            found = {name: quiz.figures([next(left) for _ in quiz.texts]) for name, quiz in quizzes.items()}
            rows.append(_flat(found))
        return rows

    def alone(self, setting: Setting | None, count: int) -> tuple[int, int]:
        """Of `count` questions spread over the exam: how many, and to how many the answer is the same asked alone."""
        some = list(range(0, len(self.texts), max(len(self.texts) // count, 1)))
        together = self.bench.batch(self.images[some], [self.texts[i] for i in some])
        single = [self.bench.batch(self.images[[i]], [self.texts[i]]) for i in some]
        for one in single:
            one.most = together.most
        said = [answers(self.bench, one, setting)[0] for one in single]
        same = sum(a == b for a, b in zip(said, answers(self.bench, together, setting), strict=True))
        return len(said), same


def pictures(seeds: Sequence[int], sizes: Mapping[str, int]) -> Tensor:
    """`[N, 64, 64, 3]` uint8, the images of an exam in its order."""
    quizzes = [quiz for seed in seeds for quiz in hallucination.quizzes(seed=seed, **sizes).values()]
    return torch.cat([quiz.show() for quiz in quizzes])


def _flat(found: Mapping[str, Any]) -> dict[str, float]:
    """Figures by name, of what quizzes found."""
    flat: dict[str, float] = {}
    for quiz, one in found.items():
        if isinstance(one, float):
            flat[quiz] = one
        elif isinstance(one, Captions):
            flat |= {"chair_s": one.sentence, "chair_i": one.instance, "recall": one.recall}
        else:
            for name in ("accuracy", "f1"):
                flat[name] = sum(getattr(part, name) for part in one.values()) / len(one)
            flat |= {sort: part.accuracy for sort, part in one.items()}
    return flat


@torch.no_grad()
def generated(
    bench: Bench, batch: Batch, setting: Setting | None = None, recipe: Sequence[Placement] = ()
) -> tuple[Tensor, Tensor]:
    """What is said to a batch, greedily, under `recipe` and steered by `setting`.

    Returns:
        ids: `[B, n]`, behind the prompt. margins: `[B, n]` float32, the largest logit less the second one, `CLEAR` at
        most.
    """
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    with steered(bench, batch, setting, recipe) as inputs:
        out = bench.model.generate(**inputs, max_new_tokens=batch.most, do_sample=False, **wanted)
    best = torch.stack(out.logits, 1).float().topk(2, -1).values
    return out.sequences[:, batch.inputs["input_ids"].shape[1] :], (best[..., 0] - best[..., 1]).clamp(max=CLEAR)


def answers(bench: Bench, batch: Batch, setting: Setting | None = None) -> list[str]:
    """The same as text, of the model steered or not."""
    return bench.text(generated(bench, batch, setting)[0])


@dataclass(frozen=True)
class Given:
    """What a mechanism is given here, and what is tried of it.

    Args:
        tried: values by name, the paper's first. A name is an option of the card (tokens are told as words), `layers`
            (half-open ranges of 32, scaled to the model's depth), `times` (`STRENGTHS`), or told to `fit` and `lend`.
        fit: makes tensor options of a setting, once.
        by: options of the card on which the fit depends.
        everywhere: the fit is one for all layers.
        rows: makes tensor options of a batch, one a row.
        mark: a batch's token map, with sets.
        lend: what branches use of a batch.
        show: other pixels for a batch, of what is called and not attached.
    """

    tried: Mapping[str, Sequence[Any]] = field(default_factory=lambda: {TIMES: STRENGTHS})
    fit: Callable[..., dict[str, Tensor]] | None = None
    by: Sequence[str] = ()
    everywhere: bool = False
    rows: Callable[[Bench, Batch], dict[str, Tensor]] | None = None
    mark: Callable[[Bench, Batch], TokenMap] | None = None
    lend: Callable[..., Any] | None = None
    show: Callable[[Bench, Batch, Setting], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Ready:
    """A batch as a mechanism wants it: what the model is given, what its tokens are, options a row, what is lent."""

    inputs: dict[str, Tensor]
    tokens: TokenMap
    options: dict[str, Tensor] = field(default_factory=dict)
    thing: Any = None


def ready(bench: Bench, batch: Batch, setting: Setting | None) -> Ready:
    """All of it that depends on the batch, made when it is first asked for."""
    if setting is None:
        return Ready(batch.inputs, batch.tokens)
    given = GIVEN.get(setting.stem, Given())
    pixels = {"pixel_values": given.show(bench, batch, setting)} if given.show else {}
    return Ready(
        batch.inputs | pixels,
        given.mark(bench, batch) if given.mark else batch.tokens,
        given.rows(bench, batch) if given.rows else {},
        given.lend(bench, batch, setting, **setting.extra) if given.lend else None,
    )


@contextmanager
def steered(
    bench: Bench, batch: Batch, setting: Setting | None, recipe: Sequence[Placement] = ()
) -> Iterator[dict[str, Tensor]]:
    """Inside, the model answers under `recipe` and steered by `setting`; yields what it is given for `batch`."""
    asked, placed = ready(bench, batch, setting), list(recipe)
    if setting is not None and catalog.find(setting.stem).attachable:
        options: dict[str, Any] = {**setting.options, **setting.tensors, **asked.options}
        placed.append(regard.place(setting.stem, layers=setting.layers, **options))
    if not placed:
        yield asked.inputs
        return
    with (
        regard.attach(bench.model, placed) as handle,
        handle.reading(asked.tokens),
        nullcontext() if asked.thing is None else handle.lending(asked.thing),
    ):
        yield asked.inputs


def mechanisms() -> dict[str, catalog.Entry]:
    """All that steers, by its card's site."""
    return {name: entry for name, entry in catalog.entries().items() if entry.site in SITES}


def refuse(stem: str) -> None:
    """Says why a mechanism cannot be tried, if it cannot.

    Raises:
        RegardError: it cannot be attached (or shown, by what is given here), or needs tensors that nothing here fits to
            images.
    """
    entry, given = catalog.find(stem), GIVEN.get(stem, Given())
    if given.show is None:
        entry.refuse_unattachable()
    needed = [name for name, one in entry.card.options.items() if one.kind == "tensor" and not one.optional]
    if needed and not (given.fit or given.rows):
        raise RegardError(f"{stem!r} needs {' and '.join(needed)}, and no fit of it here looks at images")


def made(bench: Bench, stem: str, choice: Choice, task: str = "all") -> Setting:
    """A mechanism with what was chosen of `GIVEN[stem].tried`; what was not is as the paper has it.

    Raises:
        RegardError: as `refuse` says.
    """
    refuse(stem)
    entry, given = catalog.find(stem), GIVEN.get(stem, Given())
    chosen = {name: values[0] for name, values in given.tried.items()} | choice
    times, layers = chosen.pop(TIMES, 1.0), tuple(chosen.pop(LAYERS, ALL))
    options: dict[str, Any] = stronger(entry, times) if times != 1 else {}
    extra: dict[str, Any] = {}
    for name, value in chosen.items():
        option = entry.card.options.get(name)
        if option is None:
            extra[name] = value
        elif name not in options:
            options[name] = tuple(bench.ids(value)) if option.kind == "tokens" else value
    places = "all" if layers == ALL else scaled(layers, bench.depth)
    setting = Setting(stem, task, places, options, extra)
    fit = given.fit
    if fit is None:
        return setting
    told = {name: options[name] for name in given.by}
    asked = replace(setting, layers="all" if given.everywhere else places, options=told)
    fitted = bench.once(repr(asked.told() | {"stem": stem, "task": task}), lambda: fit(bench, asked, **extra))
    # What has no neutral options is as strong as its tensors.
    factor = times if entry.card.neutral is None else 1.0
    return replace(
        setting, tensors={name: (factor * x).cpu() for name, x in fitted.items()}, extra=extra | {TIMES: factor}
    )


def drawn(stem: str, random: Random, near: Choice | None = None) -> Choice:
    """Something to try of a mechanism: any, or what differs from `near` in one name."""
    tried = GIVEN.get(stem, Given()).tried
    if near is None:
        return {name: random.choice(values) for name, values in tried.items()}
    name = random.choice([name for name, values in tried.items() if len(values) > 1])
    return near | {name: random.choice([value for value in tried[name] if value != near[name]])}


def usual(stem: str) -> Choice:
    """What the paper does, of a mechanism."""
    return {name: values[0] for name, values in GIVEN.get(stem, Given()).tried.items()}


def stronger(entry: catalog.Entry, strength: float) -> dict[str, float]:
    """The options by which a mechanism does nothing, `strength` times as far from there as the card has them."""
    found = {}
    for name, off in (entry.card.neutral or {}).items():
        option = entry.card.options[name]
        if isinstance(off, float) and not (entry.site == "logits" and name == CUT):
            low, high = (end if own is None else own for own, end in ((option.low, -math.inf), (option.high, math.inf)))
            found[name] = min(max(off + strength * (option.default - off), low), high)
    return found


def scaled(layers: tuple[int, int], depth: int) -> tuple[int, ...]:
    """The layers of a model of `depth` layers that lie within a half-open range of 32; the nearest, if none does."""
    first = math.ceil(layers[0] * depth / DEPTH)
    return tuple(range(first, max(math.floor(layers[1] * depth / DEPTH), first + 1)))


# Every layer of a model of six, and every run of its layers.
EACH = ((0, 1), (5, 6), (10, 11), (16, 17), (21, 22), (26, 27))
RUNS = tuple((low, high + 6 if high < 26 else DEPTH) for i, (low, _) in enumerate(EACH) for high, _ in EACH[i:])
CUTS = (0.1, 0.02, 0.25, 0.5, 0.75)
# What is not named here runs as its card says.
GIVEN: dict[str, Given] = {
    "act": Given(
        {LAYERS: ((2, 31), *RUNS), "theta": (0.1, 0.02, 0.04, 0.06), "beta": (0.4, 0.0, 0.2, 0.6, 0.8)},
        fit=steer_fits.calibrated,
        by=("theta",),
    ),
    "agla": Given(
        {"alpha": (2.0, 0.25, 0.5, 1.0, 4.0), "beta": (0.5, *CUTS), "similarity": (1.0, 0.7, 0.4, 0.1)},
        lend=steer_fits.relevant,
    ),
    "anchor_edit": Given(
        {LAYERS: ((16, 17), *RUNS), "alpha": (0.1, 0.0, 0.3, 1.0, 3.0), "beta": (0.1, 0.0, 0.3, 1.0, 3.0)},
        rows=steer_fits.anchors,
    ),
    "carve": Given(
        {
            LAYERS: ((20, 26), *EACH),
            "fuse": ("first",),
            "share": (0.2, 0.4, 0.6, 0.8, 0.95),
            "kept": (None, 1, 2, 6, 20),
            "floor": (1e-8, 1e-2, 1e-1),
        },
        show=steer_fits.refined,
    ),
    "damro": Given(
        {
            "alpha": (2.0, 0.05, 0.1, 0.25, 0.5, 1.0),
            "beta": CUTS,
            "outliers": (10, 1, 4, 24, 40, 56),
            "attention": ("merged", "mean"),
            "order": ("attention", "image"),
        }
    ),
    "dara": Given(
        {LAYERS: ((0, 1), *RUNS), "mode": ("add",), TIMES: (1.0, 0.5, 1.5, 2.0)},
        fit=steer_fits.balance,
    ),
    "dcd": Given(
        {
            "alpha": (1.0, 0.1, 0.25, 0.5, 2.0),
            "beta": CUTS,
            "sides": (("positive", "negative"), ("negative",)),
            "rate": (3e-5, 1e-4, 3e-4),
        },
        fit=steer_fits.projectors,
        everywhere=True,
    ),
    "gift": Given(
        {
            "alpha": (5.0, 0.25, 0.5, 1.0, 2.0),
            "sources": ("2", "0", "1", "3", "0,1"),
            "first": (None, 4, 5),
            "last": (4, 5, None),
        }
    ),
    "iri": Given(
        {
            "sources": (3, 1, 2, 6),
            "targets": (6, 1, 2, 4),
            "attention_strength": (0.26, 0.0, 0.1, 0.5, 0.8),
            "feed_forward_strength": (0.16, 0.0, 0.3, 0.6),
        },
        fit=steer_fits.recovery,
        everywhere=True,
    ),
    "locore": Given({LAYERS: (ALL, *RUNS), "window": (5, 1, 2, 10, 28), "beta": (0.1, 0.3, 1.0, 3.0, 8.0)}),
    "lol": Given(
        {
            "amateur": ("model", "exit"),
            "layer": (1, 2, 3, 4, 5),
            "strength": (1.0, 0.1, 0.25, 0.5, 2.0),
            "omega": (0.5, 0.0, 1.0),
            "refocus": (0.5, 0.0, 1.0),
            "beta": CUTS,
            "instruction": (f"{vlm.SYSTEM} {ask.SYSTEM}",),
            "rate": (1e-4, 3e-5, 3e-4),
            "denies": (True, False),
        },
        lend=steer_fits.amateur,
    ),
    "lqcd": Given(
        {
            "cue": ("yes", "no", "with", "first with a", "there are five objects", "is there a"),
            "tail": (1, 0),
            "alpha": (1.0, 0.1, 0.25, 0.5, 2.0),
            "beta": CUTS,
        }
    ),
    "paint": Given(
        {
            LAYERS: ((2, 32), *RUNS),
            "alpha": (0.7, 0.0, 0.1, 0.2, 0.4),
            "beta": (0.3, 0.0, 0.1, 0.6),
            "by_head": (False, True),
        },
        mark=steer_fits.local_and_summary,
    ),
    # Of a token of few numbers none can be far above the others' root mean square: the paper's 20 is 4.33 of 192.
    # Dimension 1 is the largest at the first token, in every layer but the first, and large where the image is empty.
    "var": Given(
        {
            LAYERS: ((2, 31), *RUNS),
            "tau": (4.33, 5.0, 4.7, 4.0, 3.5, 3.0, 2.0),
            "dimensions": (None, "1", "68", "36"),
            "keep": (0.6, 0.0, 0.3, 0.8),
            "rho": (0.5, 0.8, 1.0),
            "least": (0.2, 0.0, 0.4),
        }
    ),
    "vhr": Given({LAYERS: ((18, 32), *RUNS), "alpha": (2.0, 1.1, 1.25, 1.5), "outliers": ("drop", "keep")}),
}
LAST = (26, 32)
# LoL without its lower layer and its instruction; VAR wherever there is a sink.
CONTRAST: Choice = {"strength": 0.25, "omega": 0.0, "refocus": 0.0}
ANYWHERE: Choice = {"dimensions": "1", "rho": 1.0, "least": 0.0}
# What searches on tuning scenes left, by mechanism and task: what differs from the paper's, the best first.
FOUND: dict[tuple[str, str], Sequence[Choice]] = {
    ("act", "existence"): ({LAYERS: (21, 32), "beta": 0.0}, {LAYERS: LAST, "theta": 0.02}),
    ("act", "captions"): ({LAYERS: (0, 27), "theta": 0.02, "beta": 0.2}, {"theta": 0.06}),
    ("agla", "existence"): ({"alpha": 4.0, "beta": 0.25, "similarity": 0.7}, {"alpha": 4.0, "beta": 0.25}),
    ("agla", "captions"): ({"alpha": 4.0, "beta": 0.75}, {"alpha": 0.5, "beta": 0.75}),
    ("anchor_edit", "existence"): (
        {LAYERS: (16, 32), "alpha": 0.3},
        {LAYERS: (16, 32), "alpha": 0.5},
        {LAYERS: (16, 32), "alpha": 0.5, "beta": 0.3},
    ),
    ("anchor_edit", "captions"): (
        {LAYERS: (5, 11), "alpha": 1.0, "beta": 1.0},
        {LAYERS: (5, 11), "alpha": 2.0, "beta": 2.0},
        {LAYERS: (5, 16), "alpha": 1.0, "beta": 1.0},
        {LAYERS: (10, 11), "alpha": 1.0, "beta": 1.0},
    ),
    ("carve", "existence"): ({"share": 0.8, "kept": 20, "floor": 0.01},),
    ("damro", "existence"): ({"alpha": 0.1, "outliers": 1},),
    ("damro", "captions"): (
        {"alpha": 0.1, "beta": 0.5, "outliers": 1},
        {"alpha": 0.1, "beta": 0.25, "outliers": 1},
        {"alpha": 0.5, "beta": 0.75, "outliers": 1},
        {"alpha": 0.25, "beta": 0.5, "outliers": 56, "attention": "mean", "order": "image"},
    ),
    ("dara", "existence"): ({LAYERS: ALL, TIMES: 2.0}, {LAYERS: ALL, TIMES: 1.5}),
    ("dara", "captions"): ({LAYERS: ALL, TIMES: 1.5}, {LAYERS: ALL}),
    ("dcd", "existence"): ({"alpha": 4.0}, {"alpha": 2.0}),
    ("dcd", "captions"): ({"alpha": 0.5, "beta": 0.25}, {"alpha": 0.25, "beta": 0.25}),
    ("gift", "existence"): ({"alpha": 0.5, "first": 4},),
    ("gift", "captions"): tuple({"alpha": alpha, "sources": "3", "first": 5, "last": 5} for alpha in (2.0, 3.0, 1.0)),
    ("iri", "existence"): (
        {"sources": 6, "targets": 4, "attention_strength": 0.5, "feed_forward_strength": 0.3},
        {"sources": 1, "targets": 2, "attention_strength": 0.5, "feed_forward_strength": 0.3},
    ),
    ("iri", "captions"): (
        {"sources": 2, "targets": 1, "attention_strength": 0.1, "feed_forward_strength": 0.6},
        {"sources": 2, "targets": 2, "attention_strength": 0.0, "feed_forward_strength": 0.3},
    ),
    ("locore", "captions"): (
        {LAYERS: (16, 17), "window": 1, "beta": 8.0},
        {LAYERS: (16, 17), "window": 1, "beta": 3.0},
        {LAYERS: (10, 22), "window": 1, "beta": 3.0},
    ),
    ("lol", "existence"): (
        CONTRAST | {"strength": 1.0, "beta": 0.5, "denies": False},
        CONTRAST | {"strength": 0.5, "beta": 0.5, "denies": False},
    ),
    ("lol", "captions"): (
        {"amateur": "exit", "layer": 2, "strength": 0.25, "refocus": 0.0, "beta": 0.25},
        CONTRAST | {"beta": 0.25, "rate": 3e-5},
    ),
    ("lqcd", "existence"): ({"cue": "with", "tail": 0}, {"cue": "with", "tail": 0, "alpha": 2.0}),
    ("lqcd", "captions"): tuple({"cue": "first with a", "alpha": alpha, "beta": 0.25} for alpha in (0.25, 0.5, 0.1)),
    ("paint", "existence"): ({LAYERS: (0, 6), "alpha": 0.1, "beta": 0.0},),
    ("paint", "captions"): (
        {LAYERS: LAST, "alpha": 0.2},
        {LAYERS: LAST, "beta": 0.6},
        {LAYERS: LAST, "alpha": 0.4, "beta": 0.6},
        {LAYERS: (10, 11), "alpha": 0.4, "beta": 0.4},
    ),
    ("var", "existence"): (ANYWHERE | {LAYERS: (10, 11), "tau": 4.0, "keep": 0.3},),
    ("var", "captions"): tuple(
        ANYWHERE | {LAYERS: (5, 6), "tau": tau, "keep": keep} for tau, keep in ((4.0, 0.3), (4.0, 0.0), (3.5, 0.3))
    ),
    ("vhr", "existence"): ({LAYERS: (0, 16), "alpha": 1.5}, {LAYERS: (0, 16), "alpha": 1.25}),
    ("vhr", "captions"): ({LAYERS: LAST, "alpha": 1.5}, {LAYERS: LAST, "alpha": 1.4}),
}
