"""Questions: every answer against the question's own words."""

from random import Random

from asked import neutral_truth, truth
from regard.measure import scene_questions as ask
from regard.measure.scenes import KINDS, Thing, draw, partner

THINGS = draw(400, 0, hidden=0.5, masked=0.1).things()


def asked(random, image):
    """Everything that can be asked of each scene."""
    for things in THINGS:
        sorts = [question(things, random, image) for question in ask.ABOUT_A_SCENE.values()]
        sorts.append(ask.existence(things, random, image, 0.6, 0.5))
        yield from ((things, one) for one in sorts if one is not None)


def test_answers_are_true():
    for image in (None, 0, 1):
        for things, one in asked(Random(0), image):
            assert one.answer == truth(one.text, things), (one, things)
            assert (image is not None) == ("image" in one.text)


def test_hidden_objects_exist_and_are_not_counted():
    things = [Thing("red circle", "top left"), Thing("yellow square", "top right", hidden=True)]
    assert ask.exists("yellow square", things).answer == "yes"
    assert ask.caption(things).answer == "a red circle with a yellow square ."
    texts = [ask.count(things, Random(seed)) for seed in range(60)]
    assert ask.Question("how many objects are there ?", "one") in texts
    assert ask.Question("how many squares are there ?", "zero") in texts
    assert {ask.place(things, Random(seed)).answer for seed in range(20)} == {"top left"}
    assert ask.place(things[1:], Random(0)) is None
    assert ask.colour(things[1:], Random(0)) is None


def test_a_shape_of_two_colours_is_not_asked_for_its_colour():
    things = [Thing("red circle", "top left"), Thing("blue circle", "top right")]
    assert ask.colour(things, Random(0)) is None


def test_captions_name_all_once_and_partners_together():
    for things in THINGS:
        text = ask.caption(things).answer
        kinds = [thing.kind for thing in things]
        named = ask.named(text)
        assert sorted(named) == sorted(kinds)
        firsts = [ask.named(part)[0] for part in text.split(" , ") if ask.named(part)]
        assert firsts == [kind for kind in kinds if kind in firsts]
        for kind in kinds:
            other = KINDS[partner(KINDS.index(kind))]
            together = f"{kind} with a {other}" in text or f"{other} with a {kind}" in text
            assert together == (other in kinds)
    assert ask.caption([]).answer == "nothing ."


def test_named_reads_only_whole_kinds():
    assert ask.named("a red circle with a blue , square red ring . circle") == ["red circle", "red ring"]


def test_yes_and_close_are_shares():
    random = Random(0)
    asked = [(things, ask.existence(things, random, None, 0.7, 1.0)) for things in THINGS if things]
    assert 0.62 < sum(one.answer == "yes" for _, one in asked) / len(asked) < 0.78
    for things, one in asked:
        if one.answer == "no" and ask.partners(things):
            assert ask.named(one.text)[0] in ask.partners(things)


def test_absent_and_partners():
    things = [Thing("red circle", "top left"), Thing("blue ring", "top right")]
    other = KINDS[partner(KINDS.index("red circle"))]
    assert set(ask.absent(things)) == set(KINDS) - {"red circle", "blue ring"}
    assert other in ask.partners(things)
    assert ask.partners([*things, Thing(other, "middle left")]) == [KINDS[partner(KINDS.index("blue ring"))]]


def test_neutral_answers_are_true_and_of_every_sort():
    random = Random(1)
    asked = [one(random) for one in ask.ABOUT_NONE.values() for _ in range(800)]
    for one in asked:
        assert one.answer == neutral_truth(one.text), one
    assert len({one.text.split()[0] + one.text.split()[2] for one in asked if one.text.startswith("what")}) >= 4
    assert {one.answer for one in asked if one.text.startswith("is ")} == {"yes", "no"}


def test_every_word_is_in_the_vocabulary():
    known = set(ask.words())
    assert list(ask.words()) == sorted(known)
    random = Random(2)
    texts = [one for image in (None, 0, 1) for _, one in asked(random, image)]
    texts += [ask.caption(things, image) for things in THINGS for image in (None, 0, 1)]
    texts += [one(random) for one in ask.ABOUT_NONE.values() for _ in range(300)]
    used = {word for one in texts for word in f"{one.text} {one.answer}".split()} | set(ask.SYSTEM.split())
    assert used <= known
    assert len(known - used) <= 2, known - used
