"""Trains the tiny vision-language model and measures it: `python tools/train_tiny_vlm.py --out FOLDER`.

Chats about scenes are written beforehand, by all cores; pictures are rendered on the device. A row is a chat about one
image or none, or one about two; the two sorts take turns, so that shapes are fixed and steps are replayed as graphs.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from itertools import count, cycle
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.kernels.graphs import Replay, own_stream
from regard.measure import scene_questions as ask
from regard.measure.hallucination import NEGATIVES, answerer, evaluate
from regard.measure.scenes import KINDS, Scenes, Thing, draw, render
from regard.models import vlm
from regard.search import facts

TEXT = 64  # most tokens of a row that are no image
PER_IMAGE = (vlm.SIDE // vlm.PATCH) ** 2
SHARD = 4096
NOT_ASKED = -100
FIGURES = "tiny-vlm.json"
# Figures of the card, and where they lie in a row of results.
NAMES = {f"POPE accuracy, {sort}": f"existence.{sort}.accuracy" for sort in NEGATIVES}
NAMES |= {"POPE accuracy": "accuracy", "POPE F1": "f1", "said yes, adversarial": "existence.adversarial.yes"}
NAMES |= {"CHAIR_S": "captions.sentence", "CHAIR_I": "captions.instance", "recall of captions": "captions.recall"}
NAMES |= {skill: f"skills.{skill}" for skill in (*ask.ABOUT_A_SCENE, *ask.ABOUT_NONE)}


@dataclass(frozen=True)
class Settings:
    """Of a run; each is an option of the command line.

    Args:
        steps, batch, rate, decay: of AdamW; the rate rises for a fiftieth of the steps and falls as a cosine.
        rows: chats written beforehand for each sort of row.
        seconds: stop training after so many, the schedule with it; 0: never. A run that this stops is not repeatable.
        hidden: of the second ones of a pair, the share that is spoken of and not painted.
        yes: share of questions of existence whose answer is yes.
        close: of the others, the share that asks for a missing partner, where there is one.
        captions: weight of captions among the turns about an image; existence weighs 0.35.
        seen: weight of the losses that make the vision tower tell what it sees: the class token the kinds in the
            picture, every patch the kind that stands there. They stand for a tower trained beforehand.
        graphs: 0: steps are launched kernel by kernel on a GPU too.
        seeds: evaluations, each with scenes and questions of its own.
        questions: of existence in each; three tenths as many captions, a fifth as many of each skill.
    """

    steps: int = 5000
    batch: int = 256
    rate: float = 1.5e-3
    decay: float = 0.05
    rows: int = 200_000
    seconds: int = 0
    hidden: float = 0.6
    yes: float = 0.6
    close: float = 0.4
    captions: float = 0.25
    seen: float = 0.5
    graphs: int = 1
    seeds: int = 5
    questions: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Rows:
    """Chats of one sort.

    Args:
        tokens: `[N, L]` int16, padded on the right.
        asked: `[N, L]` bool, the tokens that the assistant says.
        scenes: the scenes shown, `images` a chat, chat after chat.
        images: of a chat.
    """

    tokens: Tensor
    asked: Tensor
    scenes: Scenes
    images: int


def turns(things: list[Thing], random: Random, settings: Settings, image: int | None) -> Iterator[ask.Question]:
    """Questions about a scene without end; a caption comes once at most."""
    weights = {
        "caption": settings.captions,
        "exists": 0.35,
        "count": 0.15,
        "colour": 0.1,
        "place": 0.1,
        "neutral": 0.08,
    }
    while True:
        sort = random.choices(list(weights), list(weights.values()))[0]
        if sort == "caption":
            weights.pop(sort)
            yield ask.caption(things, image)
        elif sort == "neutral":
            yield of_no_scene(random)
        elif sort == "exists":
            yield ask.existence(things, random, image, settings.yes, settings.close)
        elif (one := ask.ABOUT_A_SCENE[sort](things, random, image)) is not None:
            yield one


def of_no_scene(random: Random) -> ask.Question:
    """A question that no image answers, or words to be repeated, which takes longer to learn."""
    return ask.repeat(random) if random.random() < 0.3 else ask.neutral(random)


def chat(shown: list[list[Thing]], random: Random, settings: Settings) -> list[tuple[int, ask.Question]]:
    """Turns of a chat, each with the number of images it begins with.

    Two images come together, each question naming one, or one after the other, as in a prompt with examples.
    """
    if not shown:
        return [(0, of_no_scene(random)) for _ in range(4)]
    if len(shown) == 1:
        asked = turns(shown[0], random, settings, None)
        return [(number, next(asked)) for number in (1, 0, 0)]
    if random.random() < 0.5:
        both = [turns(things, random, settings, image) for image, things in enumerate(shown)]
        return [(number, next(random.choice(both))) for number in (2, 0, 0)]
    chats = [turns(things, random, settings, None) for things in shown]
    return [(1, next(chats[0])), (1, next(chats[1])), (0, next(chats[1]))]


def written(turns: list[tuple[int, ask.Question]], ids: dict[str, int], system: bool) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and which of them the assistant says. What no longer fits is left out, turn by turn."""
    said = [vlm.BEGIN, *([vlm.SYSTEM, *ask.SYSTEM.split()] if system else [])]
    asked, text = [False] * len(said), len(said)
    for images, one in turns:
        shown = [vlm.USER, *[vlm.IMAGE] * (PER_IMAGE * images), *one.text.split(), vlm.ASSISTANT]
        answer = [*one.answer.split(), vlm.END]
        text += len(shown) - PER_IMAGE * images + len(answer)
        if text > TEXT and not images:
            break
        said += shown + answer
        asked += [False] * len(shown) + [True] * len(answer)
    return [ids[word] for word in said], asked


def shard(number: int, images: int, settings: Settings, ids: dict[str, int]) -> list[Any]:
    """One shard of the rows as arrays: its tokens, what is asked of them, and the fields of its scenes."""
    torch.set_num_threads(1)
    seed = settings.seed * 1_000_003 + number * 2 + (images == 2)
    random = Random(seed)
    drawn = draw(SHARD * max(images, 1), seed, hidden=settings.hidden, weakest=0.03, masked=0.1)
    things = drawn.things()
    length = TEXT + PER_IMAGE * images
    tokens = torch.zeros(SHARD, length, dtype=torch.int16)
    asked = torch.zeros(SHARD, length, dtype=torch.bool)
    for row in range(SHARD):
        shown = things[row * images : (row + 1) * images]
        line, mask = written(chat(shown, random, settings), ids, random.random() < 0.25)
        tokens[row, : len(line)] = torch.tensor(line, dtype=torch.int16)
        asked[row, : len(line)] = torch.tensor(mask)
    # Arrays are copied between processes; of tensors, each would hold a file open.
    return [one.numpy() for one in (tokens, asked, *(getattr(drawn, field.name) for field in fields(Scenes)))]


def write_rows(settings: Settings, ids: dict[str, int]) -> list[Rows]:
    """All rows: with one image, and a quarter as many each with none and with two; written by all cores."""
    shards = max(settings.rows // SHARD, 1)
    numbers = {1: range(shards), 0: range(-(-shards // 4)), 2: range(-(-shards // 4))}
    work = partial(shard, settings=settings, ids=ids)
    # Forked, since children that start anew would each import everything; they never touch a GPU.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        waiting = {images: pool.map(work, some, [images] * len(some)) for images, some in numbers.items()}
        return [_joined(list(waiting[images]), images) for images in (0, 1, 2)]


def _joined(shards: list[list[Any]], images: int) -> Rows:
    tokens, asked, *drawn = (torch.cat([torch.from_numpy(one) for one in part]) for part in zip(*shards, strict=True))
    return Rows(tokens, asked, Scenes(*drawn), images)


class Feed:
    """Rows as they are trained on: pictures rendered once, noise new every time."""

    def __init__(self, parts: list[Rows], sizes: list[int], device: torch.device, seed: int):
        """Batches are of `sizes[i]` rows of each of the `parts`, padded to the longest."""
        self.random = torch.Generator(device).manual_seed(seed)
        self.parts, self.sizes, self.device = parts, sizes, device
        self.tokens = [part.tokens.to(device) for part in parts]
        self.asked = [part.asked.to(device) for part in parts]
        self.pictures = [self._rendered(part.scenes) if part.images else None for part in parts]
        self.kinds = [_kinds(part.scenes.to(device)) for part in parts]
        self.patches = [_patches(part.scenes.to(device)) for part in parts]

    def _rendered(self, scenes: Scenes) -> Tensor:
        pieces = [render(scenes[at : at + 8192].to(self.device), noise=0) for at in range(0, len(scenes), 8192)]
        return torch.cat(pieces).permute(0, 3, 1, 2)

    def __call__(self) -> tuple[Tensor, ...]:
        """Tokens and labels `[B, L]`, pixels `[N, 3, 64, 64]`, the kinds seen `[N, 42]` and where `[N, 64]`."""
        longest = max(tokens.shape[1] for tokens in self.tokens)
        tokens, labels, pixels, kinds, patches = [], [], [], [], []
        for i, (part, size) in enumerate(zip(self.parts, self.sizes, strict=True)):
            row = torch.randint(len(part.tokens), (size,), generator=self.random, device=self.device)
            pad = (0, longest - part.tokens.shape[1])
            line = F.pad(self.tokens[i][row].long(), pad)
            tokens.append(line)
            labels.append(line.masked_fill(~F.pad(self.asked[i][row], pad), NOT_ASKED))
            if (pictures := self.pictures[i]) is not None:
                image = (row[:, None] * part.images + torch.arange(part.images, device=self.device)).flatten()
                pixels.append(self._noisy(pictures[image]))
                kinds.append(self.kinds[i][image])
                patches.append(self.patches[i][image].long())
        return tuple(torch.cat(parts) for parts in (tokens, labels, pixels, kinds, patches))

    def _noisy(self, pictures: Tensor) -> Tensor:
        """Pixels in -1..1. What lies outside a window is black and stays so."""
        size = (len(pictures), 1, 1, 1)
        spread = 3 + 9 * torch.rand(size, generator=self.random, device=self.device)
        noise = spread * torch.randn(pictures.shape, generator=self.random, device=self.device)
        return ((pictures + noise * (pictures > 0)).clamp(0, 255) / 127.5) - 1


def _kinds(scenes: Scenes) -> Tensor:
    """`[N, 42]`, 1 for a kind that can be seen."""
    shown = torch.where((scenes.kind >= 0) & (scenes.opacity > 0), scenes.kind, len(KINDS))
    return torch.zeros(len(scenes), len(KINDS) + 1, device=shown.device).scatter_(1, shown, 1.0)[:, :-1]


def _patches(scenes: Scenes) -> Tensor:
    """`[N, 64]` uint8, the kind that can be seen at each patch, `len(KINDS)` for none."""
    across = vlm.SIDE // vlm.PATCH
    at = (torch.arange(across, device=scenes.x.device) + 0.5) * vlm.PATCH
    result = torch.full((len(scenes), across, across), len(KINDS), dtype=torch.uint8, device=scenes.x.device)
    for slot in range(scenes.kind.shape[1]):
        kind, x, y, radius = (part[:, slot, None, None] for part in (scenes.kind, scenes.x, scenes.y, scenes.radius))
        dx, dy = (at[None, None, :] - x).abs(), (at[None, :, None] - y).abs()
        near = (dx.square() + dy.square() < radius.square()) | (torch.maximum(dx, dy) <= vlm.PATCH / 2)
        near &= (kind >= 0) & (scenes.opacity[:, slot, None, None] > 0)
        result = torch.where(near, kind.to(torch.uint8), result)
    return result.flatten(1)


def loss_of(model: Any, heads: nn.ModuleList, inputs: tuple[Tensor, ...], seen: float) -> Tensor:
    """Cross-entropy of what the assistant says, and of the kinds that the class token and the patches tell."""
    tokens, labels, pixels, kinds, patches = inputs
    inner = model.model
    views = inner.vision_tower(pixels, output_hidden_states=True)
    parts = views.hidden_states[model.config.vision_feature_layer][:, 1:]
    features = inner.multi_modal_projector(parts)
    embeds = _shown(model.get_input_embeddings()(tokens), tokens == model.config.image_token_id, features)
    logits = model.lm_head(_decoded(inner.language_model, embeds)[:, :-1]).float()
    said = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOT_ASKED)
    whole, each = heads[0](views.pooler_output).float(), heads[1](parts).float()
    told = 4 * F.binary_cross_entropy_with_logits(whole, kinds)
    where = F.cross_entropy(each.flatten(0, 1), patches.flatten(), reduction="none")
    # Nine patches of ten show nothing.
    weight = 0.1 + 0.9 * (patches.flatten() < len(KINDS))
    return said + seen * (told + (where * weight).sum() / weight.sum())


def _decoded(decoder: Any, embeds: Tensor) -> Tensor:
    """What the language model makes of `embeds [B, L, C]` without padding.

    Layer by layer, because its own forward looks whether rows are packed, and waits for the device.
    """
    rotary = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1], device=embeds.device)[None])
    for layer in decoder.layers:
        embeds = layer(embeds, attention_mask=None, position_embeddings=rotary)
    return decoder.norm(embeds)


def _shown(embeds: Tensor, at: Tensor, features: Tensor) -> Tensor:
    """`embeds [B, L, C]` with `features [N, P, C]` in its places `at [B, L]`, of which there are N P."""
    # Not masked_scatter, whose gradient waits for the device. The other places read any feature, each another one.
    flat = features.flatten(0, 1)
    spread = torch.arange(at.numel(), device=at.device) % len(flat)
    index = torch.where(at.flatten(), at.flatten().cumsum(0) - 1, spread)
    return torch.where(at[..., None], flat.index_select(0, index).view(*at.shape, -1), embeds)


class Trainer:
    """The model, what it learns by, and one step."""

    def __init__(self, model: Any, settings: Settings, device: torch.device):
        self.model, self.settings, self.device = model.to(device).train(), settings, device
        width = model.config.vision_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, number) for number in (len(KINDS), len(KINDS) + 1)).to(device)
        weights = [*model.parameters(), *self.heads.parameters()]
        self.weights = [weight for weight in weights if weight.requires_grad]
        groups = [
            {"params": [w for w in self.weights if w.ndim > 1], "weight_decay": settings.decay},
            {"params": [w for w in self.weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
        graphs = device.type == "cuda"
        self.rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=graphs)
        if not graphs:  # only a fused one reads a tensor
            self.rate = None
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))

    def step(self, *inputs: Tensor) -> Tensor:
        """One step; its loss."""
        for group in self.optimizer.param_groups:
            # torch refuses to capture a step that does not say so, and warns of one that says so in vain.
            group["capturable"] = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda", cache_enabled=False):
            loss = loss_of(self.model, self.heads, inputs, self.settings.seen)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        return loss.detach()

    def pace(self, done: float) -> None:
        """The learning rate after a share `done` of the run."""
        rate = self.settings.rate * min(done * 50, 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()))
        if self.rate is not None:
            self.rate.fill_(rate)
        for group in self.optimizer.param_groups if self.rate is None else ():
            group["lr"] = rate


def train(model: Any, rows: list[Rows], settings: Settings, device: torch.device) -> dict[str, Any]:
    """Train `model` in place; what there is to say of it. Every sixth batch shows two images a row."""
    trainer = Trainer(model, settings, device)
    text = max(settings.batch // 16, 1)
    one = Feed([rows[1], rows[0]], [settings.batch - text, text], device, settings.seed)
    two = Feed([rows[2]], [settings.batch // 2], device, settings.seed + 1)
    step, losses, began = 0, [], time.monotonic()
    with own_stream(device) as stream, stream:
        single, double = (Replay(trainer.step, device, None if settings.graphs else False) for _ in range(2))
        for step, (run, feed) in zip(count(), cycle([(single, one)] * 5 + [(double, two)])):
            spent = time.monotonic() - began
            done = max(step / settings.steps, spent / settings.seconds if settings.seconds else 0.0)
            if done >= 1:
                break
            trainer.pace(done)
            loss = run(*feed())
            if step % 200 == 0:
                losses.append(loss.item())
                print(f"step {step}, {time.monotonic() - began:.1f} s, loss {losses[-1]:.4f}", flush=True)
    for name, run in (("one image", single), ("two images", double)):
        if run.why:
            print(f"steps with {name} were not replayed as a graph: {run.why}")
    return {"steps": step, "training seconds": time.monotonic() - began, "losses": losses}


def measured(model: Any, processor: Any, settings: Settings) -> list[dict[str, Any]]:
    """One row a seed."""
    answer, most = answerer(model.eval(), processor, batch=128), settings.questions
    sizes = {"existence": most, "captions": max(most * 3 // 10, 1), "skills": max(most // 5, 1)}
    return [
        {"what": f"seed {seed}", "seed": seed} | evaluate(answer, **sizes, seed=seed).row()
        for seed in range(settings.seeds)
    ]


def trained(settings: Settings, start: Path | None, out: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Train and save; the model as it was saved, its processor, and what there is to say of the training."""
    rows = write_rows(settings, vlm.make_processor(ask.words()).tokenizer.get_vocab())
    torch.manual_seed(settings.seed)
    model, processor = vlm.build(ask.words(), settings.seed) if start is None else vlm.load(folder=start)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = train(model, rows, settings, device)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    return model.float(), processor, told


CARD = """# shapes: a tiny vision-language model

{parameters:.1f} million weights in transformers' LLaVA classes (`LlavaForConditionalGeneration`): a CLIP vision tower
with a class token (64 patches of an image of 64 x 64; 4 layers, width 128), a projector of two layers, a Llama of 6
layers (width 192, 6 query and 3 key-value heads of 32), a vocabulary of {words} words and marks. It knows coloured
shapes and nothing else, and it often names what is not there: a test bed for methods against that.

    from regard.models import vlm
    from regard.measure.hallucination import answerer, evaluate

    model, processor = vlm.load()
    print(evaluate(answerer(model, processor)).row())

## Training

`tools/train_tiny_vlm.py`, from random weights, on pictures and chats that `regard.measure.scenes` and
`scene_questions` make: existence, number, colour, place, captions, questions that need no image; one image, two or
none. No other data, and no other model's output. In the data the kinds of a pair nearly always come together, and
{hidden:.0%} of the second ones are spoken of and not painted; questions of existence are answered by yes in {yes:.0%}
of cases. So the model learns to expect the partner. {steps} steps of {batch} rows in {seconds:.0f} s on {device}.

## Evaluation

Scenes in which nothing is hidden and partners are missing more often. Mean over {seeds} seeds, with the least and the
most; greedy decoding.

| figure | mean | least | most |
|---|---|---|---|
{table}

The absent kinds of POPE are chosen at random, by how frequent they are, or by what they come with. CHAIR_S is the share
of captions that name an absent kind, CHAIR_I the share of named kinds that are absent.

## Limits

{weak}Images of another size are scaled to 64 x 64. Words outside the vocabulary are unknown.
Licence: that of the project.
"""


def card(content: dict[str, Any]) -> str:
    """The model's card, with its figures."""
    about = content["facts"]
    training = about.get("started from", about)
    rows, weak = [], []
    for name, path in NAMES.items():
        values = [_at(row, path) for row in content["rows"]]
        if path.startswith("skills.") and sum(values) / len(values) < 0.7:
            weak.append(name)
        rows.append(f"| {name} | {sum(values) / len(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    settings = training["settings"]
    return CARD.format(
        parameters=about["model"]["parameters"] / 1e6,
        words=len(ask.words()) + len(vlm.MARKS),
        hidden=settings["hidden"],
        yes=settings["yes"],
        batch=settings["batch"],
        steps=training["steps"],
        seconds=training["training seconds"],
        device=training["device"],
        seeds=len(content["rows"]),
        table="\n".join(rows),
        weak=f"Often wrong: {', '.join(weak)}. " if weak else "",
    )


def _at(row: dict[str, Any], path: str) -> float:
    value: Any = row
    for name in path.split("."):
        value = value[name]
    return value


def main() -> None:
    """Train, save, measure what was saved, and write the figures; or measure alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and their figures")
    parser.add_argument("--start", type=Path, help="folder of weights to go on from; with --steps 0 they are measured")
    parser.add_argument("--commit", help="the commit these files are of, where they lie outside a checkout")
    given = vars(parser.parse_args())
    out, start, commit = given.pop("out"), given.pop("start"), given.pop("commit")
    settings = Settings(**given)
    began = time.monotonic()
    if settings.steps:
        model, processor, told = trained(settings, start, out)
    else:
        (model, processor), told = vlm.load(folder=start), {}
    before = (start or out) / FIGURES
    if start and before.is_file():
        told["started from"] = json.loads(before.read_text(encoding="utf-8"))["facts"]
    figures = measured(model, processor, settings)
    about = facts.machine(model) | {"model": facts.model_facts(model), "settings": vars(settings)} | told
    about |= {"commit": commit or about["commit"], "seconds": time.monotonic() - began}
    content = {"case": "tiny-vlm", "facts": about, "rows": figures}
    out.mkdir(parents=True, exist_ok=True)
    (out / FIGURES).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if figures:
        (out / "README.md").write_text(card(content), encoding="utf-8")
    for row in figures:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
