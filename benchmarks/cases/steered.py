"""Steering on top of a quantised and of a streaming cache, on the tiny vision-language model `shapes`.

Where a recipe alone answers as the dense model does, steering on top of it should answer as steering alone does. Where
it does not is counted, for every mechanism that its card lets run; how near to a tie those answers were is told by the
margin of logits, of steering alone, at the first token that differs.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

import regard
import steer_fits
import steers
from regard.calibrate import duo
from regard.core.errors import RegardError, choose
from regard.core.placement import Placement
from regard.measure import hallucination
from regard.measure import scene_questions as ask
from regard.models import vlm
from regard.search import facts
from steer_bench import Bench, Setting

# Exceptions that are kept word by word, a row.
SHOWN = 12


def run(
    existence: int = 400,
    captions: int = 100,
    skills: int = 80,
    seed: int = 0,
    batch: int = 1024,
    sparsity: int = 50,
    sink: int = 4,
    recent: int = 32,
    strength: int = 100,
    steps: int = 40,
    task: str = "all",
    stems: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for every recipe and mechanism.

    Args:
        existence: questions of this sort, as `hallucination.evaluate` takes them.
        captions: the same.
        skills: the same.
        seed: of the questions.
        batch: questions at a time.
        sparsity: KV heads that stream, in percent.
        sink: first positions that they keep.
        recent: last positions that they keep.
        strength: of the steering, in percent of the cards' defaults.
        steps: in which the gates that tell KV heads apart are trained.
        task: all, existence, captions or skills.
        stems: mechanisms, commas between them; None: all.
    """
    bench = Bench.open("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"existence": existence, "captions": captions, "skills": skills}
    kept = {name: number for name, number in sizes.items() if choose("task", task, ("all", *sizes)) in (name, "all")}
    exam = steers.Exam(bench, [seed], kept, batch)
    gates = duo.fit(bench.model, spoken(bench), steps=steps, length=128, sink=sink, recent=recent)
    streaming = {"sparsity": sparsity / 100, "sink": sink, "recent": recent}
    options: dict[str, Any] = {**streaming, **gates}
    recipes = {"int4": [regard.place("saw_int4")], "duo": [regard.place("duo", **options)]}
    dense = replies(exam, None, ())
    alone = {name: replies(exam, None, recipe) for name, recipe in recipes.items()}
    table, left = [], {}
    for stem in steers.mechanisms() if stems is None else stems.split(","):
        try:
            setting = steers.made(bench, stem, {steers.TIMES: strength / 100})
            steering = replies(exam, setting, ())
            for name, recipe in recipes.items():
                both = replies(exam, setting, recipe)
                row = {"recipe": name, "method": stem, **agreement(exam, dense, alone[name], steering, both)}
                table.append(row | {"setting": setting.told()})
        except RegardError as error:
            left[stem] = str(error)
    told = facts.machine(bench.model) | {"model": facts.model_facts(bench.model), "asked": sizes, "seed": seed}
    return told | {"duo": streaming, "strength": strength, "cannot run": left}, table


def spoken(bench: Bench, scenes: int = 64) -> Tensor:
    """`[n]` ids of chats without images: what heads are told apart by."""
    said = []
    for things in hallucination.unlikely(scenes, steer_fits.FITS).things():
        for one in (ask.caption(things), ask.exists(things[0].kind, things)):
            said.append(f"{hallucination.prompt(bench.processor, one.text, 0)} {one.answer} {vlm.END}")
    return torch.tensor(bench.ids(" ".join(said)))


Replies = Sequence[tuple[list[int], list[float]]]


def replies(exam: steers.Exam, setting: Setting | None, recipe: Sequence[Placement]) -> Replies:
    """The tokens of every answer, up to its end, and their margins."""
    found: list[Any] = [None] * len(exam.texts)
    end = exam.bench.model.generation_config.eos_token_id
    for batch in exam.batches:
        ids, margins = steers.generated(exam.bench, batch, setting, recipe)
        for i, row, gaps in zip(batch.at, ids.tolist(), margins.tolist(), strict=True):
            stop = row.index(end) + 1 if end in row else len(row)
            found[i] = (row[:stop], gaps[:stop])
    return found


def agreement(
    exam: steers.Exam, dense: Replies, recipe: Replies, steering: Replies, both: Replies
) -> Mapping[str, Any]:
    """How often a recipe and steering together say what steering alone says, where the recipe alone changes nothing."""
    same = [i for i in range(len(dense)) if recipe[i][0] == dense[i][0]]
    moved = [i for i in same if steering[i][0] != dense[i][0]]
    broken = [i for i in same if both[i][0] != steering[i][0]]
    at = {
        i: next(n for n, (a, b) in enumerate(zip(steering[i][0], both[i][0], strict=False)) if a != b) for i in broken
    }
    gaps = [steering[i][1][at[i]] for i in broken]
    text = exam.bench.processor.tokenizer.decode
    shown = [
        {"asked": exam.texts[i]}
        | {name: text(one[i][0][:-1]) for name, one in {"dense": dense, "steering": steering, "both": both}.items()}
        | {"margin": gap}
        for i, gap in sorted(zip(broken, gaps, strict=True), key=lambda pair: -pair[1])[:SHOWN]
    ]
    return {
        "asked": len(dense),
        "recipe as dense": len(same),
        "steering moves": len(moved),
        "exceptions": len(broken),
        "agree": 1 - len(broken) / max(len(same), 1),
        "agree where moved": 1 - len(set(broken) & set(moved)) / max(len(moved), 1),
        "margin of exceptions": median(gaps) if gaps else 0.0,
        "margin of the others": median(min(steering[i][1]) for i in same if i not in at)
        if len(same) > len(at)
        else 0.0,
        "shown": shown,
    }
