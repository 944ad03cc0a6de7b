"""Steering the tiny vision-language model: how its questions are asked, and what each mechanism is given.

Which mechanisms there are is read off the cards. `GIVEN` says what one needs beyond its card: layers scaled from the
paper's depth, what is fitted once, and what depends on the images of a batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise, product
from random import Random
from typing import Any

import torch
from torch import Tensor

import regard
from regard import catalog
from regard.adapters import tokens
from regard.adapters.families import open_decoder
from regard.calibrate import dcd
from regard.core.errors import RegardError, choose
from regard.core.placement import Placement
from regard.core.token_map import Kind, TokenMap
from regard.measure import hallucination
from regard.measure import scene_questions as ask
from regard.measure.scenes import KINDS, MOST, Thing, draw, render
from regard.models import vlm
from regard.observe import tracing
from regard.ops.logits import agla
from regard.ops.maps import resized
from regard.ops.residual.anchor_edit import anchor
from regard.ops.scores import paint
from regard.ops.views import carve

# Where steering happens (docs/design.md, section 9).
SITES = ("scores", "probabilities", "heads", "residual", "logits", "objectives", "views")
# Papers speak of models of so many layers, and of this width.
DEPTH, WIDTH = 32, 4096
# Of all steps from neutral to the card's defaults.
STRENGTHS = (1.0, 0.5, 2.0, 0.25, 4.0, 0.1, 8.0, 20.0)
# Logits below a share of the largest are cut: how far is no strength of the contrast.
CUT = "beta"
# Scenes of fits; exams take seeds below.
FITS = 1_000_000
SHORT, LONG = 8, 28
# The margin of a token that a cut leaves alone.
CLEAR = 100.0
ALL = (0, DEPTH)


@dataclass(eq=False)
class Batch:
    """Questions that are asked together: what the model is given, what its tokens are, and whose they are.

    `once` keeps what mechanisms make of a batch.
    """

    inputs: dict[str, Tensor]
    tokens: TokenMap
    at: Sequence[int]
    most: int
    _kept: dict[Any, Any] = field(default_factory=dict)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first called under `name`."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


@dataclass(eq=False)
class Bench:
    """The model that is steered, and its processor."""

    model: Any
    processor: Any

    @classmethod
    def open(cls, device: str) -> "Bench":
        """The trained model on `device`."""
        return cls(*vlm.load(device=device))

    @cached_property
    def eager(self) -> Any:
        """The same model, whose attention returns its weights."""
        other, _ = vlm.load(device=self.model.device)
        other.set_attn_implementation("eager")
        return other

    @cached_property
    def depth(self) -> int:
        """Layers of the language model."""
        return open_decoder(self.model).layers

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self.processor.tokenizer(text)["input_ids"]

    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """`[N, 3, 64, 64]` on the model's device."""
        made = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return made.to(self.model.device)

    def batch(
        self, images: Sequence[Tensor], texts: Sequence[str], at: Sequence[int] = (), ends: Sequence[str] | None = None
    ) -> Batch:
        """Questions about images, padded on the left; `ends` follow the prompts."""
        prompts = [hallucination.prompt(self.processor, text) for text in texts]
        prompts = [prompt + end for prompt, end in zip(prompts, ends or [""] * len(texts), strict=True)]
        given = self.processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
        said = tokens.read(self.model, given, processor=self.processor).to(self.model.device)
        return Batch(dict(given.to(self.model.device)), said, at, LONG if ask.TEXTS["caption"] in texts else SHORT)

    @torch.no_grad()
    def generated(
        self, batch: Batch, setting: "Setting | None" = None, recipe: Sequence[Placement] = ()
    ) -> tuple[Tensor, Tensor]:
        """What is said to a batch, greedily, under `recipe` and steered by `setting`.

        Returns:
            ids: `[B, n]`, behind the prompt. margins: `[B, n]` float32, the largest logit less the second one, `CLEAR`
            at most.
        """
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        with steered(self, batch, setting, recipe) as inputs:
            out = self.model.generate(**inputs, max_new_tokens=batch.most, do_sample=False, **wanted)
        best = torch.stack(out.logits, 1).float().topk(2, -1).values
        return out.sequences[:, batch.inputs["input_ids"].shape[1] :], (best[..., 0] - best[..., 1]).clamp(max=CLEAR)

    def answers(self, batch: Batch, setting: "Setting | None" = None, recipe: Sequence[Placement] = ()) -> list[str]:
        """The same as text."""
        return self.text(self.generated(batch, setting, recipe)[0])

    def text(self, ids: Tensor) -> list[str]:
        """`ids [B, n]` as words, without marks."""
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def _existence(answer: hallucination.Answer, *, seed: int, existence: int, **others: int) -> Any:
    return hallucination.pope(answer, existence // 4, seed)


def _captions(answer: hallucination.Answer, *, seed: int, captions: int, **others: int) -> Any:
    return hallucination.chair(answer, captions, seed + 1)


# What is asked by task: everything, or the same questions of existence, or the same captions, alone.
TASKS: dict[str, Callable[..., Any]] = {
    "all": hallucination.evaluate,
    "existence": _existence,
    "captions": _captions,
}


class Exam:
    """The questions of a task for several seeds, asked in few large batches.

    Args:
        bench: who is asked.
        seeds: of the scenes; what is counted is counted seed by seed.
        sizes: further arguments of `hallucination.evaluate`.
        size: questions at a time.
        task: one of `TASKS`.
    """

    def __init__(
        self, bench: Bench, seeds: Sequence[int], sizes: Mapping[str, int], size: int, task: str = "all"
    ) -> None:
        self.bench, self.seeds, self._sizes = bench, seeds, dict(sizes)
        self._evaluate = TASKS[choose("task", task, TASKS)]
        self.images: list[Tensor] = []
        self.texts: list[str] = []
        for seed in seeds:
            self._evaluate(self._collect, seed=seed, **self._sizes)
        # Answers of like length together, so that few rows wait for others.
        order = sorted(range(len(self.texts)), key=lambda i: self.texts[i].split()[0])
        kinds = [self.texts[i].split()[0] for i in order]
        cuts = [i for i in range(len(order)) if i == 0 or kinds[i] != kinds[i - 1]] + [len(order)]
        self.batches = [
            bench.batch([self.images[i] for i in part], [self.texts[i] for i in part], part)
            for start, stop in pairwise(cuts)
            for part in (order[at : min(at + size, stop)] for at in range(start, stop, size))
        ]

    def _collect(self, images: Sequence[Tensor], texts: Sequence[str]) -> list[str]:
        self.images += images
        self.texts += texts
        return [""] * len(texts)

    def said(self, setting: "Setting | None" = None) -> list[str]:
        """An answer to every question."""
        found = [""] * len(self.texts)
        for batch in self.batches:
            for i, text in zip(batch.at, self.bench.answers(batch, setting), strict=True):
                found[i] = text
        return found

    def reports(self, said: Sequence[str]) -> list[Any]:
        """The figures of all answers, a report of the task a seed."""
        left = iter(said)

        def answer(images: Sequence[Tensor], texts: Sequence[str]) -> list[str]:
            return [next(left) for _ in texts]

        return [self._evaluate(answer, seed=seed, **self._sizes) for seed in self.seeds]

    def alone(self, setting: "Setting | None", count: int) -> tuple[int, int]:
        """Of `count` questions spread over the exam: how many, and to how many the answer is the same asked alone."""
        some = range(0, len(self.texts), max(len(self.texts) // count, 1))
        together = self.bench.batch([self.images[i] for i in some], [self.texts[i] for i in some])
        single = [self.bench.batch([self.images[i]], [self.texts[i]]) for i in some]
        for one in single:
            one.most = together.most
        said = [self.bench.answers(one, setting)[0] for one in single]
        same = sum(a == b for a, b in zip(said, self.bench.answers(together, setting), strict=True))
        return len(said), same


@dataclass(frozen=True)
class Setting:
    """A mechanism as it is tried.

    Args:
        stem: which.
        strength: steps from neutral to the card's defaults.
        layers: where it is placed.
        options: the mechanism's own, without tensors.
        lent: what `Given.lend` is told.
        tensors: fitted options.
    """

    stem: str
    strength: float
    layers: Sequence[int] | str
    options: dict[str, Any]
    lent: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"times": self.strength, "layers": self.layers, **self.options, **self.lent}


def _plain(bench: Bench) -> Sequence[dict[str, Any]]:
    return ({},)


@dataclass(frozen=True)
class Given:
    """What a mechanism is given here beyond its card's defaults.

    Args:
        layers: half-open ranges of 32 layers that are tried, scaled to the model's depth; the paper's come first.
        variants: options that are tried, each at every strength; what is no option of the card is told to `lend`.
        fit: makes tensor options for a placement, once.
        rows: makes tensor options of a batch, one a row.
        mark: a batch's token map, with sets.
        lend: what branches use of a batch.
        show: other pixels for a batch, of what is called and not attached.
    """

    layers: Sequence[tuple[int, int]] = (ALL,)
    variants: Callable[[Bench], Sequence[dict[str, Any]]] = _plain
    fit: Callable[[Bench, Sequence[int] | str], dict[str, Tensor]] | None = None
    rows: Callable[[Bench, Batch], dict[str, Tensor]] | None = None
    mark: Callable[[Bench, Batch], TokenMap] | None = None
    lend: Callable[..., Any] | None = None
    show: "Callable[[Bench, Batch, Setting], Tensor] | None" = None


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
        given.lend(bench, batch, **setting.lent) if given.lend else None,
    )


@contextmanager
def steered(
    bench: Bench, batch: Batch, setting: Setting | None, recipe: Sequence[Placement] = ()
) -> Iterator[dict[str, Tensor]]:
    """Inside, the model answers under `recipe` and steered by `setting`; yields what it is given for `batch`."""
    asked, placed = ready(bench, batch, setting), list(recipe)
    if setting is not None and catalog.find(setting.stem).attachable:
        options: dict[str, Any] = setting.options | setting.tensors | asked.options
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


def settings(bench: Bench, stem: str, strengths: Sequence[float] = STRENGTHS) -> Iterator[Setting]:
    """All settings of a mechanism that are tried, those of the paper's strength and place first.

    Raises:
        RegardError: the mechanism cannot be attached (or shown, by what is given here), or needs tensors that nothing
            here fits to images.
    """
    entry, given = catalog.find(stem), GIVEN.get(stem, Given())
    if given.show is None:
        entry.refuse_unattachable()
    needed = [name for name, one in entry.card.options.items() if one.kind == "tensor" and not one.optional]
    if needed and not (given.fit or given.rows):
        raise RegardError(f"{stem!r} needs {' and '.join(needed)}, and no fit of it here looks at images")
    places = ["all" if layers == ALL else scaled(layers, bench.depth) for layers in given.layers]
    fitted, seen = {}, []
    for strength, variant, layers in product(strengths, given.variants(bench), places):
        if layers not in fitted:
            fitted[layers] = given.fit(bench, layers) if given.fit else {}
        own = {name: x for name, x in variant.items() if name in entry.card.options}
        lent = {name: x for name, x in variant.items() if name not in own}
        # What has no neutral options is as strong as its tensors.
        factor = strength if fitted[layers] and entry.card.neutral is None else 1.0
        made = {name: factor * x for name, x in fitted[layers].items()}
        setting = Setting(stem, strength, layers, stronger(entry, strength) | own, lent, made)
        told = setting.told() | {"times": factor}
        if told not in seen:
            seen.append(told)
            yield setting


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


def preferences(bench: Bench, count: int) -> list[tuple[Tensor, str, str, str]]:
    """Images with a question, a right answer and a wrong one that names what is absent (or denies what is there)."""
    random, drawn, found = Random(FITS), hallucination.unlikely(count, FITS), []
    for number, (image, things) in enumerate(zip(render(drawn, seed=FITS), drawn.things(), strict=True)):
        missing = random.choice(ask.partners(things) or ask.absent(things))
        if number % 3 == 0:
            right = ask.caption(things)
            wrong = ask.caption([*things, Thing(missing, things[0].place)]).answer
        else:
            right = ask.exists(random.choice(things).kind if number % 3 == 1 else missing, things)
            wrong = ask.OPPOSITES[right.answer]
        found.append((image, right.text, right.answer, wrong))
    return found


def projectors(bench: Bench, layers: Any, count: int = 360, epochs: int = 1) -> dict[str, Tensor]:
    """DCD: projectors of right and of wrong answers."""
    pairs = []
    for image, text, right, wrong in preferences(bench, count):
        given = bench.batch([image], [text]).inputs
        chosen, rejected = (torch.tensor(bench.ids(f"{answer} {vlm.END}")) for answer in (right, wrong))
        pairs.append(dcd.Pair(given["input_ids"][0].cpu(), chosen, rejected, {"pixel_values": given["pixel_values"]}))
    return dcd.fit(bench.model, pairs=pairs, epochs=epochs, rate=3e-4)


def balance(
    bench: Bench, layers: Sequence[int] | str, count: int = 192, steps: int = 120, rate: float = 2e-2, rows: int = 24
) -> dict[str, Tensor]:
    """DARA: sums for the scores of the image in `layers`, trained on right answers, `rows` a step."""
    drawn, decoder = preferences(bench, count), open_decoder(bench.model)
    parts = [_answered(bench, drawn[at : at + rows]) for at in range(0, count, rows)]
    factors = torch.zeros(decoder.layers, decoder.heads, 1, device=bench.model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([factors], lr=rate, weight_decay=0.0)
    for step in range(steps):
        batch, answer = parts[step % len(parts)]
        # What is attached holds the graph of its factors, which a step uses up.
        placed = regard.place("dara", layers=layers, mode="add", factors=factors)
        with torch.enable_grad(), regard.attach(bench.model, [placed]) as handle, handle.reading(batch.tokens):
            logits = bench.model(**batch.inputs).logits[:, :-1]
            target = batch.inputs["input_ids"][:, 1:][answer]
            loss = torch.nn.functional.cross_entropy(logits[answer], target)
        (factors.grad,) = torch.autograd.grad(loss, factors)
        optimiser.step()
    return {"factors": factors.detach().cpu()}


def _answered(bench: Bench, some: Sequence[tuple[Tensor, str, str, str]]) -> tuple[Batch, Tensor]:
    """Questions with their right answers behind them, and which tokens after the first are the answers'."""
    images, texts, rights, _ = zip(*some, strict=True)
    ends = [f" {right} {vlm.END}" for right in rights]
    batch = bench.batch(images, texts, ends=ends)
    lengths = torch.tensor([len(bench.ids(end)) for end in ends])[:, None]
    width = batch.inputs["input_ids"].shape[1]
    return batch, (torch.arange(1, width) >= width - lengths).to(bench.model.device)


def calibrated(bench: Bench, layers: Sequence[int] | str, count: int = 72) -> dict[str, Tensor]:
    """ACT: the paper's search for the heads that are calibrated, here by the loss of right answers about images.

    Of every head by itself, at the card's defaults.
    """
    batch, answer = _answered(bench, preferences(bench, count))
    decoder = open_decoder(bench.model)
    target = batch.inputs["input_ids"][:, 1:][answer]

    def loss(mask: Tensor) -> float:
        placed = regard.place("act", layers=layers, heads_mask=mask)
        with torch.no_grad(), regard.attach(bench.model, [placed]):
            return float(torch.nn.functional.cross_entropy(bench.model(**batch.inputs).logits[:, :-1][answer], target))

    kept = torch.zeros(decoder.layers, decoder.heads)
    plain = loss(kept)
    for layer, head in product(range(decoder.layers) if isinstance(layers, str) else layers, range(decoder.heads)):
        alone = torch.zeros_like(kept)
        alone[layer, head] = 1
        kept[layer, head] = loss(alone) < plain
    return {"heads_mask": kept}


def recovery(bench: Bench, layers: Any, count: int = 32) -> dict[str, Tensor]:
    """IRI: what each layer's outputs at the last token restore of a yes to what is there, under noise on the image."""
    drawn = hallucination.unlikely(count, FITS)
    texts = [ask.exists(things[0].kind, things).text for things in drawn.things()]
    given = bench.batch(list(render(drawn, seed=FITS)), texts).inputs
    last = torch.zeros_like(given["input_ids"], dtype=torch.bool)
    last[:, -1] = True
    parts = ("attention", "feed_forward")
    yes = bench.ids("yes")[0]
    found = tracing.trace(bench.model, given, tracing.noised(given), yes, groups={"last": last}, parts=parts)
    return {f"{part}_rates": found.rates[i, :, 0].float() for i, part in enumerate(parts)}


def anchors(bench: Bench, batch: Batch) -> dict[str, Tensor]:
    """Generative anchors: every image, and one painted of what the model's own caption of it names."""
    return batch.once("anchors", partial(_anchors, bench, batch))


@torch.no_grad()
def _anchors(bench: Bench, batch: Batch) -> dict[str, Tensor]:
    images = batch.inputs["pixel_values"]
    prompts = _captioning(bench, len(images))
    out = bench.model.generate(**prompts, pixel_values=images, max_new_tokens=LONG, do_sample=False)
    captions = bench.text(out[:, prompts["input_ids"].shape[1] :])
    kinds = torch.full((len(captions), MOST), -1)
    for row, caption in enumerate(captions):
        named = list(dict.fromkeys(ask.named(caption)))[:MOST]
        kinds[row, : len(named)] = torch.tensor([KINDS.index(kind) for kind in named], dtype=torch.long)
    painted = bench.pixels(list(render(replace(draw(len(captions), FITS, faint=0.0), kind=kinds), seed=FITS)))
    ends = {}
    for name, pixels in (("positive", images), ("negative", painted)):
        features = bench.model.get_image_features(pixel_values=pixels).pooler_output
        ends[name] = torch.stack([anchor(image) for image in features])
    return ends


def local_and_summary(bench: Bench, batch: Batch) -> TokenMap:
    """PAINT: the map with its two sets, from the encoder's attention."""
    return batch.once("sets", partial(_sets, bench, batch))


@torch.no_grad()
def _sets(bench: Bench, batch: Batch) -> TokenMap:
    local, summary = [], []
    for pixels in batch.inputs["pixel_values"].split(512):
        maps = bench.eager.model.vision_tower(pixels, output_attentions=True).attentions
        early, late = paint.sets(maps[0], maps[-2], maps[0].shape[-1] - 1)
        local.append(early)
        summary.append(late)
    return paint.marked(batch.tokens, torch.cat(local), torch.cat(summary))


def relevant(bench: Bench, batch: Batch, similarity: float) -> Tensor:
    """AGLA: the pixels that matter for the likeliest answer. The model is its own matcher, in its middle layer.

    Nothing here compares an image with a text, so the cosine that says how much is kept is given.
    """
    return batch.once(("relevant", similarity), partial(_relevant, bench, batch, similarity))


def _relevant(bench: Bench, batch: Batch, similarity: float) -> Tensor:
    shown, rows = [], len(batch.inputs["input_ids"])
    for at in range(0, rows, 256):
        given = {name: x[at : at + 256] for name, x in batch.inputs.items()}
        kinds = batch.tokens.kinds[at : at + 256]
        with torch.enable_grad():
            out = bench.eager(**given, output_attentions=True)
            match = out.logits[:, -1].float().log_softmax(-1).amax(-1)
            maps = agla.relevance(out.attentions[bench.depth // 2], match, kinds == Kind.QUERY)
        maps = maps[kinds == Kind.VISUAL].view(len(maps), -1)
        pixels = given["pixel_values"]
        cosine = torch.full((len(maps),), similarity, device=pixels.device)
        shown.append(agla.masked(pixels, agla.enlarged(maps, pixels.shape[-1]), cosine))
    return torch.cat(shown)


def refined(bench: Bench, batch: Batch, setting: Setting) -> Tensor:
    """CARVE: the part of each image that the question looks at more than a caption does, cut out and enlarged.

    Looked at are the rows that emit the first token. What is enlarged has the image's size again.
    """
    return batch.once(repr(setting.told()), partial(_refined, bench, batch, setting))


@torch.no_grad()
def _refined(bench: Bench, batch: Batch, setting: Setting) -> Tensor:
    pixels, captions = batch.inputs["pixel_values"], _captioning(bench, len(batch.inputs["input_ids"]))
    layers, side = list(setting.layers), vlm.SIDE // vlm.PATCH
    looks = []
    for given, visual in (
        (batch.inputs, batch.tokens.of(Kind.VISUAL)),
        (captions | {"pixel_values": pixels}, captions["input_ids"] == bench.model.config.image_token_id),
    ):
        maps = []
        for at in range(0, len(pixels), 256):
            part = {name: x[at : at + 256] for name, x in given.items()}
            out = bench.eager(**part, output_attentions=True).attentions
            rows = torch.stack([out[layer][:, :, -1].mean(1) for layer in layers], 1)
            seen = visual[at : at + 256, None].expand_as(rows)
            maps.append(rows[seen].view(*rows.shape[:2], -1))
        looks.append(torch.cat(maps).cpu())
    shown = []
    # Black is 0 before it is normalised. Regions are found faster on the host.
    for image, question, general in zip((pixels.cpu() + 1) / 2, *looks, strict=True):
        found = carve.show(question[None], general[None], (side, side), image.shape[1:], **setting.options)
        (part,) = carve.images(image, found, keep_original=False)
        shown.append(resized(part, image.shape[1:]))
    return (2 * torch.stack(shown) - 1).to(pixels)


def _captioning(bench: Bench, rows: int) -> dict[str, Tensor]:
    """Ids and mask of `rows` prompts for a caption."""
    blank = torch.zeros(vlm.SIDE, vlm.SIDE, 3, dtype=torch.uint8)
    inputs = bench.batch([blank], [ask.TEXTS["caption"]]).inputs
    return {name: inputs[name].expand(rows, -1) for name in ("input_ids", "attention_mask")}


# What is not named here runs as its card says.
GIVEN: dict[str, Given] = {
    "act": Given(layers=((2, 31), ALL), variants=lambda bench: ({"theta": 0.1},), fit=calibrated),
    "agla": Given(
        lend=relevant, variants=lambda bench: ({"similarity": 1.0}, {"similarity": 0.4}, {"similarity": 0.1})
    ),
    "anchor_edit": Given(layers=((16, 17), (26, 27)), rows=anchors),
    "carve": Given(
        layers=((20, 26),),
        variants=lambda bench: tuple({"fuse": "first", "share": share} for share in (0.2, 0.4, 0.6)),
        show=refined,
    ),
    "damro": Given(variants=lambda bench: ({"outliers": 1}, {"outliers": 4}, {"outliers": 10})),
    "dara": Given(layers=((0, 1), ALL), variants=lambda bench: ({"mode": "add"},), fit=balance),
    "dcd": Given(fit=projectors),
    "iri": Given(fit=recovery, variants=lambda bench: ({"sources": 1, "targets": 2}, {"sources": 3, "targets": 6})),
    "lol": Given(
        variants=lambda bench: tuple(
            {"amateur": "exit", "layer": layer, "instruction": tuple(bench.ids(f"{vlm.SYSTEM} {ask.SYSTEM}"))}
            for layer in (bench.depth // 4, bench.depth // 2)
        )
    ),
    "lqcd": Given(variants=lambda bench: ({"cue": tuple(bench.ids("yes")), "tail": 1},)),
    "paint": Given(layers=((2, 32), ALL), mark=local_and_summary),
    # Of a token of few numbers none can be far above the others' root mean square.
    "var": Given(
        layers=((2, 31), ALL),
        variants=lambda bench: tuple(
            {"tau": round(tau * (open_decoder(bench.model).width / WIDTH) ** 0.5, 2)} for tau in (20.0, 14.0, 10.0)
        ),
    ),
}
