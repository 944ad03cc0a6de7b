"""The right answer to a question about a scene, read from the question's words alone."""

import re

from regard.measure import scene_questions as ask


def truth(text, things):
    """What `scene_questions` should say to `text` of `things`."""
    kinds = [thing.kind for thing in things]
    seen = [thing for thing in things if not thing.hidden]
    if found := re.fullmatch(r"is there a (\w+ \w+) .*\?", text):
        return "yes" if found[1] in kinds else "no"
    if re.fullmatch(r"how many objects are there .*\?", text):
        return ask.NUMBERS[len(seen)]
    if found := re.fullmatch(r"how many (\w+) objects are there .*\?", text):
        return ask.NUMBERS[sum(thing.kind.split()[0] == found[1] for thing in seen)]
    if found := re.fullmatch(r"how many (\w+)s are there .*\?", text):
        return ask.NUMBERS[sum(thing.kind.split()[1] == found[1] for thing in seen)]
    if found := re.fullmatch(r"what colour is the (\w+) .*\?", text):
        (kind,) = (kind for kind in kinds if kind.endswith(found[1]))
        return kind.split()[0]
    if found := re.fullmatch(r"where is the (\w+ \w+) .*\?", text):
        return next(thing.place for thing in things if thing.kind == found[1])
    return neutral_truth(text)


def neutral_truth(text):
    """The same of a question that no image answers."""
    number = ask.NUMBERS.index
    match text.split():
        case ["repeat", *said, "."]:
            return " ".join(said)
        case ["what", "comes", "after", word, "?"]:
            return ask.NUMBERS[number(word) + 1]
        case ["what", "comes", "before", word, "?"]:
            return ask.NUMBERS[number(word) - 1]
        case ["what", "is", first, "plus", second, "?"]:
            return ask.NUMBERS[number(first) + number(second)]
        case ["what", "is", "the", "opposite", "of", word, "?"]:
            return ask.OPPOSITES[word]
        case ["is", first, "more", "than", second, "?"]:
            return "yes" if number(first) > number(second) else "no"
    raise AssertionError(f"no rule for {text!r}")
