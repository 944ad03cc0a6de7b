"""What mechanisms need before they steer the tiny vision-language model: tensors fitted once, and things of a batch.

Fits are on scenes of their own, asked what the task asks.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn

import regard
from regard.adapters.families import open_decoder
from regard.calibrate import dcd
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
from steer_bench import LONG, Batch, Bench, Setting

# Scenes of fits; exams take seeds below.
FITS = 1_000_000
MANY = 1920
# How many pictures the encoder, or the eager model, looks at together.
TOGETHER = 512


class Preference(NamedTuple):
    """An image with a question, a right answer, and one that says what is not so."""

    image: Tensor
    text: str
    right: str
    wrong: str


@cache
def preferences(task: str, denies: bool = True) -> list[Preference]:
    """`MANY` questions of a task, of `existence` as often rightly yes as no.

    A wrong caption names an absent kind. A wrong answer is yes to one; and no to a present one, or yes as it should be
    if not `denies`.
    """
    random, drawn, found = Random(FITS), hallucination.unlikely(MANY, FITS), []
    for number, (image, things) in enumerate(zip(render(drawn, seed=FITS), drawn.things(), strict=True)):
        if task == "captions" or (task == "all" and number % 3 == 0):
            missing = random.choice(ask.partners(things) or ask.absent(things))
            right = ask.caption(things)
            wrong = ask.caption([*things, Thing(missing, things[0].place)]).answer
        elif number % 2:
            right = ask.exists(random.choice(things).kind, things)
            wrong = "no" if denies else right.answer
        else:
            missing = hallucination.negative(things, random.choice(hallucination.NEGATIVES), random)
            right, wrong = ask.exists(missing, things), "yes"
        found.append(Preference(image, right.text, right.answer, wrong))
    return found


def projectors(
    bench: Bench, setting: Setting, *, sides: Sequence[str], rate: float, count: int = 320
) -> dict[str, Tensor]:
    """DCD: projectors of right and of wrong answers, or of the latter alone."""
    pairs = []
    for image, text, right, wrong in preferences(setting.task)[:count]:
        given = bench.batch(image[None], [text]).inputs
        chosen, rejected = (torch.tensor(bench.ids(f"{answer} {vlm.END}")) for answer in (right, wrong))
        pairs.append(dcd.Pair(given["input_ids"][0].cpu(), chosen, rejected, {"pixel_values": given["pixel_values"]}))
    return dcd.fit(bench.model, pairs=pairs, sides=sides, epochs=1, rate=rate)


def amateur(bench: Bench, batch: Batch, setting: Setting, *, rate: float, denies: bool) -> nn.Module | None:
    """LoL: the model fine-tuned on wrong answers, where the amateur is to be a model."""
    if setting.options["amateur"] != "model":
        return None
    return bench.once(("amateur", setting.task, rate, denies), partial(_amateur, bench, setting.task, rate, denies))


def _amateur(bench: Bench, task: str, rate: float, denies: bool, steps: int = 40, rows: int = 24) -> nn.Module:
    model, _ = vlm.load(device=bench.model.device)
    drawn = preferences(task, denies)[: steps * rows]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for at in range(0, len(drawn), rows):
        part = drawn[at : at + rows]
        batch, answer = _answered(bench, part, [one.wrong for one in part])
        with torch.enable_grad():
            loss = _loss(model, batch, answer)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def balance(
    bench: Bench, setting: Setting, *, steps: int = 120, rate: float = 2e-2, rows: int = 16
) -> dict[str, Tensor]:
    """DARA: sums for the scores of the image in the placed layers, trained on right answers, `rows` a step."""
    drawn, decoder = preferences(setting.task)[: steps * rows], open_decoder(bench.model)
    factors = torch.zeros(decoder.layers, decoder.heads, 1, device=bench.model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([factors], lr=rate, weight_decay=0.0)
    for at in range(0, len(drawn), rows):
        part = drawn[at : at + rows]
        batch, answer = _answered(bench, part, [one.right for one in part])
        # What is attached holds the graph of its factors, which a step uses up.
        placed = regard.place("dara", layers=setting.layers, mode="add", factors=factors)
        with torch.enable_grad(), regard.attach(bench.model, [placed]) as handle, handle.reading(batch.tokens):
            loss = _loss(bench.model, batch, answer)
        (factors.grad,) = torch.autograd.grad(loss, factors)
        optimiser.step()
    return {"factors": factors.detach().cpu()}


def calibrated(bench: Bench, setting: Setting, *, count: int = 240) -> dict[str, Tensor]:
    """ACT: the paper's search for the heads that are calibrated, here by the loss of right answers about images.

    Of every head by itself.
    """
    drawn = preferences(setting.task)[:count]
    batch, answer = _answered(bench, drawn, [one.right for one in drawn])
    decoder = open_decoder(bench.model)

    def loss(mask: Tensor) -> float:
        placed = regard.place("act", layers=setting.layers, heads_mask=mask, **setting.options)
        with torch.no_grad(), regard.attach(bench.model, [placed]):
            return float(_loss(bench.model, batch, answer))

    kept = torch.zeros(decoder.layers, decoder.heads)
    plain = loss(kept)
    layers = range(decoder.layers) if isinstance(setting.layers, str) else setting.layers
    for layer, head in product(layers, range(decoder.heads)):
        alone = torch.zeros_like(kept)
        alone[layer, head] = 1
        kept[layer, head] = loss(alone) < plain
    return {"heads_mask": kept}


def _answered(bench: Bench, some: Sequence[Preference], answers: Sequence[str]) -> tuple[Batch, Tensor]:
    """Questions with answers behind them, and which tokens after the first are the answers'."""
    ends = [f" {answer} {vlm.END}" for answer in answers]
    batch = bench.batch(torch.stack([one.image for one in some]), [one.text for one in some], ends=ends)
    lengths = torch.tensor([len(bench.ids(end)) for end in ends])[:, None]
    width = batch.inputs["input_ids"].shape[1]
    return batch, (torch.arange(1, width) >= width - lengths).to(bench.model.device)


def _loss(model: nn.Module, batch: Batch, answer: Tensor) -> Tensor:
    """Cross-entropy of the answers' tokens."""
    logits = model(**batch.inputs).logits[:, :-1][answer]
    return nn.functional.cross_entropy(logits, batch.inputs["input_ids"][:, 1:][answer])


def recovery(bench: Bench, setting: Setting, *, count: int = 64) -> dict[str, Tensor]:
    """IRI: what each layer's outputs at the last token restore of a yes to what is there, under noise on the image."""
    drawn = hallucination.unlikely(count, FITS)
    texts = [ask.exists(things[0].kind, things).text for things in drawn.things()]
    given = bench.batch(render(drawn, seed=FITS), texts).inputs
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
    prompts = bench.captioning(len(images))
    out = bench.model.generate(**prompts, pixel_values=images, max_new_tokens=LONG, do_sample=False)
    captions = bench.text(out[:, prompts["input_ids"].shape[1] :])
    kinds = torch.full((len(captions), MOST), -1)
    for row, caption in enumerate(captions):
        named = list(dict.fromkeys(ask.named(caption)))[:MOST]
        kinds[row, : len(named)] = torch.tensor([KINDS.index(kind) for kind in named], dtype=torch.long)
    painted = bench.pixels(render(replace(draw(len(captions), FITS, faint=0.0), kind=kinds), seed=FITS))
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
    for pixels in batch.inputs["pixel_values"].split(TOGETHER):
        maps = bench.eager.model.vision_tower(pixels, output_attentions=True).attentions
        early, late = paint.sets(maps[0], maps[-2], maps[0].shape[-1] - 1)
        local.append(early)
        summary.append(late)
    return paint.marked(batch.tokens, torch.cat(local), torch.cat(summary))


def relevant(bench: Bench, batch: Batch, setting: Setting, *, similarity: float) -> Tensor:
    """AGLA: the pixels that matter for the likeliest answer. The model is its own matcher, in its middle layer.

    Nothing here compares an image with a text, so the cosine that says how much is kept is given.
    """
    pixels = batch.inputs["pixel_values"]
    maps = batch.once("relevant", partial(_relevant, bench, batch))
    cosine = torch.full((len(maps),), similarity, device=pixels.device)
    # Black is 0 before it is normalised.
    return 2 * agla.masked((pixels + 1) / 2, agla.enlarged(maps, pixels.shape[-1]), cosine) - 1


def _relevant(bench: Bench, batch: Batch) -> Tensor:
    """`[B, patches]`, how much each matters."""
    found, rows = [], len(batch.inputs["input_ids"])
    for at in range(0, rows, TOGETHER):
        given = {name: x[at : at + TOGETHER] for name, x in batch.inputs.items()}
        kinds = batch.tokens.kinds[at : at + TOGETHER]
        with torch.enable_grad():
            out = bench.eager(**given, output_attentions=True)
            match = out.logits[:, -1].float().log_softmax(-1).amax(-1)
            maps = agla.relevance(out.attentions[bench.depth // 2], match, kinds == Kind.QUERY)
        found.append(maps[kinds == Kind.VISUAL].view(len(maps), -1))
    return torch.cat(found)


def refined(bench: Bench, batch: Batch, setting: Setting) -> Tensor:
    """CARVE: the part of each image that the question looks at more than a caption does, cut out and enlarged.

    Looked at are the rows that emit the first token. What is enlarged has the image's size again.
    """
    return batch.once(repr(setting.told()), partial(_refined, bench, batch, setting))


@torch.no_grad()
def _refined(bench: Bench, batch: Batch, setting: Setting) -> Tensor:
    pixels, side, layers = batch.inputs["pixel_values"], vlm.SIDE // vlm.PATCH, list(setting.layers)
    looks = [maps[:, layers] for maps in batch.once("looks", partial(_looks, bench, batch))]
    shown = []
    # Black is 0 before it is normalised. Regions are found faster on the host.
    for image, question, general in zip((pixels.cpu() + 1) / 2, *looks, strict=True):
        found = carve.show(question[None], general[None], (side, side), image.shape[1:], **setting.options)
        (part,) = carve.images(image, found, keep_original=False)
        shown.append(resized(part, image.shape[1:]))
    return (2 * torch.stack(shown) - 1).to(pixels)


def _looks(bench: Bench, batch: Batch) -> list[Tensor]:
    """Attention of the rows that emit the first token, `[B, layers, patches]` on the host: asked, and for a caption."""
    found = []
    for given in (batch.inputs, batch.inputs | bench.captioning(len(batch.inputs["input_ids"]))):
        maps = []
        for at in range(0, len(given["input_ids"]), TOGETHER):
            part = {name: x[at : at + TOGETHER] for name, x in given.items()}
            out = bench.eager(**part, output_attentions=True).attentions
            rows = torch.stack([one[:, :, -1].mean(1) for one in out], 1)
            seen = (part["input_ids"] == bench.model.config.image_token_id)[:, None].expand_as(rows)
            maps.append(rows[seen].view(*rows.shape[:2], -1))
        found.append(torch.cat(maps).cpu())
    return found
