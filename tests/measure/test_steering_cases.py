"""The cases that steer the tiny vision-language model: their rule by hand, and one run too small to show anything."""

import json
from random import Random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("PIL", reason="transformers reads images with pillow")

import steer_bench
import steers
from cases import steered, steering
from regard import catalog
from regard.measure import hallucination
from regard.measure import scene_questions as ask


def figures(**told):
    skills = dict.fromkeys((*ask.ABOUT_A_SCENE, *ask.ABOUT_NONE), 0.5)
    return {"accuracy": 0.8, "chair_i": 0.4, "recall": 0.6, **skills} | told


def test_the_rule_by_hand():
    plain = [figures(accuracy=0.78, chair_i=0.38), figures(accuracy=0.82, chair_i=0.42)]
    still = steering.compared(plain, plain, "all")
    assert (still["improves"], still["paired"]) == (False, False)
    better = [figures(accuracy=0.79, chair_i=0.35), figures(accuracy=0.82, chair_i=0.39)]
    found = steering.compared(better, plain, "all")
    assert (found["improves"], found["better"], found["worse"]) == (True, ["chair_i"], [])
    assert found["gains"]["chair_i"] == pytest.approx([0.03, 0.03])
    assert found["spread"]["chair_i"] == pytest.approx(0.02)
    assert found["deviation"]["accuracy"] == pytest.approx(0.01 / 2**0.5)
    assert (found["won"], found["lost"]) == (pytest.approx(1.5), pytest.approx(0.0))
    # A gain of just the spread is none beyond it, though it may be beyond that of the gains.
    tied = steering.compared([figures(**one | {"accuracy": one["accuracy"] + 0.02}) for one in plain], plain, "all")
    assert (tied["improves"], tied["better"], tied["paired"]) == (False, [], True)
    # Fewer absent kinds because fewer kinds are named: of no matter where only existence is asked about.
    silent = [figures(**one | {"recall": 0.59}) for one in better]
    worse = steering.compared(silent, plain, "captions")
    assert (worse["improves"], worse["worse"]) == (False, ["recall"])
    assert steering.merit(found) > steering.merit(worse)
    existence = steering.compared(silent, plain, "existence")
    assert (existence["lost"], existence["better"], existence["paired"]) == (pytest.approx(-0.25), [], False)
    assert steering.compared([figures(**one | {"count": 0.4}) for one in better], plain, "all")["spoiled"] == ["count"]


def test_what_is_tried_differs_from_the_best_in_one_value():
    random = Random(0)
    for stem, given in steers.GIVEN.items():
        best = steers.usual(stem)
        for near in (None, best):
            choice = steers.drawn(stem, random, near)
            assert all(choice[name] in values for name, values in given.tried.items())
            assert near is None or sum(choice[name] != best[name] for name in best) == 1
    for (stem, _), found in steers.FOUND.items():
        assert all(one.keys() <= steers.usual(stem).keys() for one in found)
    assert steers.usual("aia") == {steers.TIMES: 1.0}


def test_strengths_and_layers_by_hand():
    assert steers.stronger(catalog.find("var"), 0.5) == {"keep": pytest.approx(0.8)}
    assert steers.stronger(catalog.find("var"), 8.0) == {"keep": 0.0}
    # The cut below a share of the largest logit stays.
    assert steers.stronger(catalog.find("damro"), 2.0) == {"alpha": 4.0}
    assert [steers.scaled(layers, 6) for layers in ((2, 31), (2, 32), (16, 17), (0, 1))] == [
        (1, 2, 3, 4), (1, 2, 3, 4, 5), (3,), (0,)
    ]  # fmt: skip
    assert steers.scaled((2, 31), 32) == tuple(range(2, 31))
    unknown = steers.GIVEN.keys() - steers.mechanisms().keys()
    assert not unknown


def test_agreement_by_hand():
    end, decode = 9, lambda ids: " ".join(map(str, ids))
    exam = SimpleNamespace(
        texts=["a", "b", "c", "d"],
        bench=SimpleNamespace(processor=SimpleNamespace(tokenizer=SimpleNamespace(decode=decode))),
    )

    def said(*firsts):
        return [([first, end], [0.5 + at, 3.0]) for at, first in enumerate(firsts)]

    row = steered.agreement(exam, said(1, 1, 1, 1), said(1, 1, 1, 2), said(1, 3, 3, 3), said(1, 3, 4, 4))
    assert (row["recipe as dense"], row["steering moves"], row["exceptions"]) == (3, 2, 1)
    assert (row["agree"], row["agree where moved"]) == (pytest.approx(2 / 3), 0.5)
    assert (row["margin of exceptions"], row["margin of the others"]) == (2.5, 1.0)
    assert row["shown"] == [{"asked": "c", "dense": "1", "steering": "3", "both": "4", "margin": 2.5}]


def test_batches_are_what_the_processor_makes():
    bench = steer_bench.Bench.open("cpu")
    for quiz in hallucination.quizzes(existence=4, captions=2, seed=4).values():
        images = quiz.show()
        made = bench.batch(images, quiz.texts).inputs
        texts = [hallucination.prompt(bench.processor, text) for text in quiz.texts]
        wanted = bench.processor(images=list(images), text=texts, return_tensors="pt", padding=True)
        assert made.keys() == wanted.keys()
        for name, x in made.items():
            torch.testing.assert_close(x, wanted[name], rtol=0, atol=1e-6)


def test_both_cases_run(monkeypatch, tmp_path):
    """One mechanism that is told the images' tokens, and one that cannot be attached."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(steer_bench, "LONG", 3)
    small = {"captions": 2, "stems": "gift,aia"}
    halves = {"tuned_captions": 2, "tuned_existence": 0, "existence": 0, "skills": 0, "tuning": 1, "tasks": "captions"}
    lines = tmp_path / "rows"
    facts, rows = steering.run(**small, **halves, seeds=1, trials=2, timed=1, lines=str(lines))
    assert [json.loads(line)["method"] for line in lines.read_text().splitlines()] == ["gift", "aia"]
    with monkeypatch.context() as patch:
        # What has figures is not asked again, nor is what they are compared with.
        patch.setattr(steers, "answers", None)
        _, again = steering.run(**small, **halves, seeds=1, trials=2, timed=1, lines=str(lines))
    assert [row["seeds"] for row in again[:2]] == [row["seeds"] for row in rows[:2]]
    late = steering.Sizes("cpu", 1, 0, (), (), 1, 1, 1.0, ("captions",), stop=1.0)
    begun = [steering.judge((stem, "captions"), late)["improves"] for stem in ("gift", "aia")]
    assert begun == ["not run", "cannot run"]
    untried = {"stems": "gift", "captions": 2, **halves, "tuning": 0}
    assert steering.run(**untried, seeds=1, timed=1)[1][1]["tried"] == []
    none, gift, aia = rows
    assert [row["method"] for row in rows] == ["none", "gift", "aia"]
    assert none.keys() - {"seeds", "spread"} <= gift.keys() & aia.keys()
    tried = 1 + len(steers.FOUND["gift", "captions"])
    assert (gift["improves"] in ("yes", "no"), len(gift["tried"])) == (True, tried)
    assert gift["choice"] in [{name: one[name] for name in gift["choice"]} for one in gift["tried"]]
    assert gift["alone"] == {"asked": 2, "same": 2}
    assert gift["seeds"][0]["chair_i"] == pytest.approx(none["chair_i"] - gift["gains"]["chair_i"][0])
    assert set(facts["test seeds"]).isdisjoint(facts["tuning seeds"])
    assert (aia["improves"], aia["recall"], facts["cannot run"]) == ("cannot run", None, ["aia"])
    assert "is added to a loss" in aia["why"]["said"]
    facts, rows = steered.run(**small, task="captions", steps=1)
    assert [(row["recipe"], row["method"], row["asked"]) for row in rows] == [("int4", "gift", 2), ("duo", "gift", 2)]
    assert "is added to a loss" in facts["cannot run"]["aia"]
