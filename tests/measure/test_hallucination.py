"""Hallucination: figures counted by hand, absent kinds that are absent, and answers of known quality."""

from dataclasses import replace
from random import Random

import pytest
import torch

from asked import truth
from regard.core.errors import RegardError
from regard.measure import hallucination as h
from regard.measure import scene_questions as ask
from regard.measure.scenes import KINDS, Thing, affinity, popularity, render


def seeing(scenes, seed):
    """Answers that are right, of whoever knows which scene each picture shows."""
    drawn = h.unlikely(scenes, seed)
    known = {
        picture.numpy().tobytes(): things
        for picture, things in zip(render(drawn, seed=seed), drawn.things(), strict=True)
    }

    def answer(images, texts):
        shown = [known[image.numpy().tobytes()] for image in images]
        return [
            ask.caption(things).answer if text == ask.TEXTS["caption"] else truth(text, things)
            for text, things in zip(texts, shown, strict=True)
        ]

    return answer


def test_tally_by_hand():
    done = h.tally(["yes", "yes", "no", "yes ."], ["no", "yes", "no", "red"])
    assert done == h.Existence(accuracy=5 / 8, precision=3 / 4, recall=3 / 4, f1=3 / 4, yes=4 / 8, questions=8)
    assert h.tally(["no"], [""]).f1 == 0
    assert h.tally(["no"], [""]).accuracy == 0


def test_captions_by_hand():
    scenes = [
        [Thing("red circle", "top left"), Thing("blue ring", "top right")],
        [Thing("green cross", "top left")],
        [Thing("white square", "top left"), Thing("red ring", "bottom left")],
    ]
    said = ["a red circle with a yellow square , a red circle .", "a green cross .", "nothing ."]
    assert h.count_named(said, scenes) == h.Captions(
        sentence=1 / 3, instance=1 / 3, recall=2 / 5, named=1.0, captions=3
    )


def test_right_answers_score_one_and_yes_scores_a_half():
    right = h.existence_quiz(40, 5).ask(seeing(40, 5))
    assert set(right) == set(h.NEGATIVES)
    for one in right.values():
        assert (one.accuracy, one.precision, one.recall, one.f1, one.yes) == (1, 1, 1, 1, 0.5)
    captions = h.captions_quiz(30, 6).ask(seeing(30, 6))
    assert (captions.sentence, captions.instance, captions.recall) == (0, 0, 1)
    report = h.evaluate(lambda images, texts: ["yes"] * len(texts), existence=40, captions=5, skills=5)
    for one in report.existence.values():
        assert (one.accuracy, one.recall, one.yes, one.questions) == (0.5, 1, 1, 20)
    assert report.f1 == pytest.approx(2 / 3)
    assert report.captions.recall == report.captions.named == 0
    assert report.row()["existence"]["popular"]["accuracy"] == report.accuracy == 0.5
    assert set(report.skills) == {*ask.ABOUT_A_SCENE, *ask.ABOUT_NONE}


def test_absent_kinds_are_absent_and_chosen_as_they_say():
    random = Random(0)
    for things in h.unlikely(100, 0).things():
        present = {thing.kind for thing in things}
        together = affinity()[[KINDS.index(kind) for kind in present]].sum(0)
        for sort in h.NEGATIVES:
            kind = h.negative(things, sort, random)
            assert kind not in present
            free = [k for k in range(len(KINDS)) if KINDS[k] not in present]
            score = {"popular": popularity(), "adversarial": together}.get(sort)
            if score is not None:
                better = sum(score[k] > score[KINDS.index(kind)] for k in free)
                assert better < h.FIRST
    with pytest.raises(RegardError, match="Did you mean 'popular'"):
        h.negative(things, "populer", random)


def test_skills_are_asked_of_scenes_that_can_answer():
    asked = []

    def answer(images, texts):
        assert len(images) == len(texts) == 12
        assert images[0].dtype == torch.uint8
        asked.extend(texts)
        return ["two"] * len(texts)

    done = {name: quiz.ask(answer) for name, quiz in h.skill_quizzes(12, 0).items()}
    assert len(asked) == 5 * 12
    assert done["colour"] == done["place"] == 0
    assert 0 < done["count"] < 1


def test_the_same_seed_asks_the_same():
    texts = []
    for seed in (0, 0, 1):
        h.existence_quiz(20, seed).ask(lambda images, said: texts.append(said) or ["no"] * len(said))
    assert texts[0] == texts[1] != texts[2]


def test_bad_input():
    good = h.evaluate(lambda images, texts: ["no"] * len(texts), existence=4, captions=1, skills=1)
    assert replace(good, skills={}).skills == {}
    for words, message in (({"existence": 3}, "existence must be at least 4"), ({"captions": 0}, "captions")):
        with pytest.raises(RegardError, match=message):
            h.evaluate(lambda images, texts: texts, **words)
    with pytest.raises(RegardError, match="expected an answer to each of 16 questions, got 1"):
        h.existence_quiz(4, 0).ask(lambda images, texts: ["no"])
    with pytest.raises(RegardError, match="a caption for each of 2"):
        h.count_named(["a"], [[], []])
    with pytest.raises(RegardError, match="got none"):
        h.tally([], [])
    with pytest.raises(RegardError, match="an image for each of 1"):
        h.answerer(None, None)([], ["is there a red circle ?"])
