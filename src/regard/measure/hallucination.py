"""How often a vision-language model speaks of what is not there: POPE and CHAIR, on scenes of coloured shapes.

POPE (arXiv 2305.10355) asks for present and absent objects, the absent ones drawn at random, by how frequent they are,
or by what they come with. CHAIR (arXiv 1809.02156) counts the absent objects that a caption names. Besides: number,
colour and place of what is there, and questions that need no image, which no treatment should spoil.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import RegardError, choose
from regard.measure import scene_questions as ask
from regard.measure.scenes import KINDS, Scenes, Thing, affinity, draw, popularity, render

# `answer(images, texts)`: an image of each question (uint8 [64, 64, 3]) and its text, to what the model says.
Answer = Callable[[Sequence[Tensor], Sequence[str]], list[str]]
NEGATIVES = ("random", "popular", "adversarial")
# An absent kind is drawn of so many that come first.
FIRST = 3


@dataclass(frozen=True)
class Existence:
    """Answers to "is there ...", half of them rightly yes. A word that is neither yes nor no is wrong.

    Args:
        accuracy: share of right answers.
        precision, recall, f1: of yes; 0 where it was never said.
        yes: share of questions answered by yes.
        questions: how many there were.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    questions: int


@dataclass(frozen=True)
class Captions:
    """What captions name.

    Args:
        sentence: CHAIR_S, share of captions that name an absent kind.
        instance: CHAIR_I, share of named kinds that are absent.
        recall: share of present kinds that are named.
        named: kinds named in a caption, on average.
        captions: how many there were.
    """

    sentence: float
    instance: float
    recall: float
    named: float
    captions: int


@dataclass(frozen=True)
class Report:
    """All of it.

    Args:
        existence: by how absent kinds are chosen (`NEGATIVES`).
        captions: of the captions.
        skills: share of right answers on `count`, `colour`, `place`, `neutral` and `repeat`.
    """

    existence: dict[str, Existence]
    captions: Captions
    skills: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Mean accuracy on existence."""
        return sum(one.accuracy for one in self.existence.values()) / len(self.existence)

    @property
    def f1(self) -> float:
        """Mean F1 on existence."""
        return sum(one.f1 for one in self.existence.values()) / len(self.existence)

    def row(self) -> dict[str, Any]:
        """Plain values by name, to be written as JSON."""
        return {"accuracy": self.accuracy, "f1": self.f1} | asdict(self)


@dataclass(frozen=True)
class Quiz:
    """Questions of one sort, and what becomes of the answers.

    Args:
        show: draws the images, `[N, 64, 64, 3]` uint8, one a question.
        texts: the questions.
        figures: of an answer to each.
    """

    show: Callable[[], Tensor]
    texts: Sequence[str]
    figures: Callable[[Sequence[str]], Any]

    def ask(self, answer: Answer) -> Any:
        """The figures of what `answer` says.

        Raises:
            RegardError: it does not answer every question.
        """
        said = answer(list(self.show()), self.texts)
        if len(said) != len(self.texts):
            raise RegardError(f"expected an answer to each of {len(self.texts)} questions, got {len(said)}")
        return self.figures(said)


def unlikely(count: int, seed: int) -> Scenes:
    """Scenes to be asked about: nothing is hidden in them, and partners are missing more often than in training."""
    return draw(count, seed, prior=0.3)


def answerer(model: Any, processor: Any, *, batch: int = 64, tokens: int = 28, **generate: Any) -> Answer:
    """How `model` answers: greedily, in batches padded on the left, as the chat template has it.

    Whatever is attached to the model while it is asked takes part.

    Args:
        model: a LLaVA-like model of transformers.
        processor: its processor.
        batch: questions at a time.
        tokens: the most tokens of an answer.
        generate: further arguments of `model.generate`.
    """

    def answer(images: Sequence[Tensor], texts: Sequence[str]) -> list[str]:
        if len(images) != len(texts):
            raise RegardError(f"expected an image for each of {len(texts)} questions, got {len(images)} images")
        said = []
        for at in range(0, len(texts), batch):
            prompts = [prompt(processor, text) for text in texts[at : at + batch]]
            some = list(images[at : at + batch])
            inputs = processor(images=some, text=prompts, return_tensors="pt", padding=True).to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with torch.no_grad():
                out = model.generate(**inputs, **({"max_new_tokens": tokens, "do_sample": False} | generate))
            new = out[:, inputs["input_ids"].shape[1] :]
            said += processor.batch_decode(new, skip_special_tokens=True)
        return said

    return answer


def prompt(processor: Any, text: str, images: int = 1) -> str:
    """The text of a chat in which a user shows `images` images and says `text`."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def evaluate(answer: Answer, *, existence: int = 500, captions: int = 150, skills: int = 100, seed: int = 0) -> Report:
    """Existence, captions and skills of whatever answers, on scenes of `unlikely`.

    Args:
        answer: for example `answerer(model, processor)`.
        existence: questions of existence, rounded down to a multiple of four: a present kind and three absent ones.
        captions: captions.
        skills: questions of each skill.
        seed: of the scenes, their noise and the questions.

    Raises:
        RegardError: fewer than four questions of existence, or none of another sort; or `answer` gives no answer for
            each question.
    """
    for name, number, least in (("existence", existence, 4), ("captions", captions, 1), ("skills", skills, 1)):
        if number < least:
            raise RegardError(f"{name} must be at least {least}, not {number}")
    asked = quizzes(existence=existence, captions=captions, skills=skills, seed=seed)
    found = {name: quiz.ask(answer) for name, quiz in asked.items()}
    return Report(found.pop("existence"), found.pop("captions"), found)


def quizzes(*, existence: int = 0, captions: int = 0, skills: int = 0, seed: int = 0) -> dict[str, Quiz]:
    """What `evaluate` asks, by name: `existence`, `captions` and every skill; what there is none of is left out."""
    made = {"existence": existence_quiz(existence // 4, seed)} if existence else {}
    if captions:
        made["captions"] = captions_quiz(captions, seed + 1)
    return made | (skill_quizzes(skills, seed + 2) if skills else {})


def existence_quiz(scenes: int, seed: int) -> Quiz:
    """POPE on `scenes` scenes, by how the absent kind is chosen. The present kind of a scene is asked for once."""
    random, drawn = Random(seed), unlikely(scenes, seed)
    sorts = ("present", *NEGATIVES)
    asked = [
        ask.exists(random.choice(things).kind if sort == "present" else negative(things, sort, random), things)
        for things in drawn.things()
        for sort in sorts
    ]

    def figures(said: Sequence[str]) -> dict[str, Existence]:
        by_sort = {sort: said[at :: len(sorts)] for at, sort in enumerate(sorts)}
        return {sort: tally(by_sort["present"], by_sort[sort]) for sort in NEGATIVES}

    def show() -> Tensor:
        return render(drawn, seed=seed).repeat_interleave(len(sorts), 0)

    return Quiz(show, [one.text for one in asked], figures)


def negative(things: Sequence[Thing], sort: str, random: Random) -> str:
    """An absent kind: any, one of the most frequent, or one of those that come most often with what is there.

    Raises:
        RegardError: no such sort.
    """
    free = ask.absent(things)
    if choose("sort of absent kinds", sort, NEGATIVES) != "random":
        score = popularity()
        if sort == "adversarial":
            score = score * 1e-3 + affinity()[[KINDS.index(thing.kind) for thing in things]].sum(0)
        told = dict(zip(KINDS, score.tolist(), strict=True))
        free = sorted(free, key=lambda kind: -told[kind])[:FIRST]
    return random.choice(free)


def tally(present: Sequence[str], absent: Sequence[str]) -> Existence:
    """The figures of what was answered for present and for absent kinds.

    Raises:
        RegardError: nothing was answered.
    """
    if not (present and absent):
        raise RegardError("expected answers for present and for absent kinds, got none")
    hits, false = (sum(_first(text) == "yes" for text in side) for side in (present, absent))
    right = hits + sum(_first(text) == "no" for text in absent)
    total = len(present) + len(absent)
    return Existence(
        accuracy=right / total,
        precision=hits / max(hits + false, 1),
        recall=hits / len(present),
        f1=2 * hits / (hits + false + len(present)),
        yes=(hits + false) / total,
        questions=total,
    )


def captions_quiz(scenes: int, seed: int) -> Quiz:
    """CHAIR on a caption of each of `scenes` scenes."""
    drawn = unlikely(scenes, seed)
    things = drawn.things()
    texts = [ask.caption(one).text for one in things]
    return Quiz(partial(render, drawn, seed=seed), texts, partial(count_named, scenes=things))


def count_named(captions: Sequence[str], scenes: Sequence[Sequence[Thing]]) -> Captions:
    """The figures of captions of these scenes; a kind that a caption names twice counts once.

    Raises:
        RegardError: not one caption a scene, or none at all.
    """
    if len(captions) != len(scenes) or not captions:
        raise RegardError(f"expected a caption for each of {len(scenes)} scenes, got {len(captions)}")
    present = [{thing.kind for thing in things} for things in scenes]
    named = [set(ask.named(text)) for text in captions]
    wrong = [len(said - there) for said, there in zip(named, present, strict=True)]
    total = sum(map(len, named))
    right = sum(len(said & there) for said, there in zip(named, present, strict=True))
    return Captions(
        sentence=sum(map(bool, wrong)) / len(captions),
        instance=sum(wrong) / max(total, 1),
        recall=right / max(sum(map(len, present)), 1),
        named=total / len(captions),
        captions=len(captions),
    )


def skill_quizzes(questions: int, seed: int) -> dict[str, Quiz]:
    """By skill. What is not about the image comes with one all the same."""
    random, made = Random(seed), {}
    skills = dict(ask.ABOUT_A_SCENE)
    skills |= {name: lambda things, random, one=one: one(random) for name, one in ask.ABOUT_NONE.items()}
    for skill, question in skills.items():
        seed += 1
        scenes = unlikely(4 * questions, seed)
        asked = list(_askable(scenes, question, random))[:questions]
        show = partial(_some, scenes, [at for at, _ in asked], questions)
        rights = [one.answer for _, one in asked]
        made[skill] = Quiz(show, [one.text for _, one in asked], partial(_share, rights))
    return made


def _some(scenes: Scenes, which: list[int], seed: int) -> Tensor:
    """Some of the pictures, as they are among all."""
    return render(scenes, seed=seed)[which]


def _share(rights: Sequence[str], said: Sequence[str]) -> float:
    return sum(text.strip() == right for text, right in zip(said, rights, strict=True)) / len(rights)


def _askable(scenes: Scenes, question: Callable[..., Any], random: Random) -> Iterator[tuple[int, ask.Question]]:
    """Of the scenes that can be asked it: which, and the question."""
    for at, things in enumerate(scenes.things()):
        one = question(things, random)
        if one is not None:
            yield at, one


def _first(text: str) -> str:
    return text.split()[0] if text.split() else ""
