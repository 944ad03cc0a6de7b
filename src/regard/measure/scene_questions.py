"""What is asked of a scene, and what is true: existence, number, colour, place, a caption; and of no scene at all.

Every text is made of `words()`, spaces between them.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

from regard.measure.scenes import COLOURS, COLUMNS, KINDS, LINES, SHAPES, Thing, partner

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
OPPOSITES = {"left": "right", "top": "bottom", "more": "less", "yes": "no", "first": "last", "before": "after"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
# `{of}` is nothing, or " in the first image" and the like.
TEXTS = {
    "exists": "is there a {kind}{of} ?",
    "count": "how many objects are there{of} ?",
    "count shape": "how many {shape}s are there{of} ?",
    "count colour": "how many {colour} objects are there{of} ?",
    "colour": "what colour is the {shape}{of} ?",
    "place": "where is the {kind}{of} ?",
    "caption": "describe the image .",
    "caption one": "describe the {which} image .",
    "after": "what comes after {a} ?",
    "before": "what comes before {a} ?",
    "plus": "what is {a} plus {b} ?",
    "opposite": "what is the opposite of {word} ?",
    "more": "is {a} more than {b} ?",
    "repeat": "repeat {words} .",
}
OF = " in the {which} image"
ORDINALS = ("first", "second")
SYSTEM = "answer the user about the image ."
EMPTY = "nothing"
LINK, NEXT, END = "with", ",", "."
NEUTRAL = ("after", "before", "plus", "opposite", "more")


class Question(NamedTuple):
    """A question, and its one right answer."""

    text: str
    answer: str


def words() -> tuple[str, ...]:
    """Every word of every question and answer, sorted."""
    parts = [*TEXTS.values(), OF, SYSTEM, EMPTY, LINK, NEXT, END, "a", "yes", "no"]
    said = {word for text in parts for word in text.split() if "{" not in word}

    names = (*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *LINES, *COLUMNS, *NUMBERS, *OPPOSITES, *ORDINALS)
    return tuple(sorted(said | set(names)))


def which(image: int | None) -> str:
    """The words that say which image is meant, of several."""
    return "" if image is None else OF.format(which=ORDINALS[image])


def exists(kind: str, things: Sequence[Thing], image: int | None = None) -> Question:
    """Whether a kind is in the scene, hidden or not."""
    there = any(thing.kind == kind for thing in things)
    return Question(TEXTS["exists"].format(kind=kind, of=which(image)), "yes" if there else "no")


def absent(things: Sequence[Thing]) -> list[str]:
    """The kinds that are not in the scene."""
    present = {thing.kind for thing in things}
    return [kind for kind in KINDS if kind not in present]


def partners(things: Sequence[Thing]) -> list[str]:
    """The kinds that are not in the scene though their partner is."""
    near = {KINDS[partner(KINDS.index(thing.kind))] for thing in things}
    return sorted(near - {thing.kind for thing in things})


def existence(things: Sequence[Thing], random: Random, image: int | None, yes: float, close: float) -> Question | None:
    """A kind of the scene in a share `yes` of cases; of the others, a missing partner in a share `close`."""
    if things and random.random() < yes:
        return exists(random.choice(things).kind, things, image)
    missing = partners(things) if random.random() < close else []
    return exists(random.choice(missing or absent(things)), things, image)


def count(things: Sequence[Thing], random: Random, image: int | None = None) -> Question:
    """How many objects can be seen: all, of one shape, or of one colour."""
    seen = [thing for thing in things if not thing.hidden]
    form = random.choice(("count", "count shape", "count colour"))
    shape = random.choice([*SHAPES, *(thing.shape for thing in seen)])
    colour = random.choice([*COLOURS, *(thing.colour for thing in seen)])
    match = {
        "count": lambda t: True,
        "count shape": lambda t: t.shape == shape,
        "count colour": lambda t: t.colour == colour,
    }
    number = sum(map(match[form], seen))
    return Question(TEXTS[form].format(shape=shape, colour=colour, of=which(image)), NUMBERS[number])


def colour(things: Sequence[Thing], random: Random, image: int | None = None) -> Question | None:
    """The colour of a shape that is there once and can be seen; None where there is none."""
    shapes = [thing.shape for thing in things]
    single = [thing for thing in things if shapes.count(thing.shape) == 1 and not thing.hidden]
    if not single:
        return None
    thing = random.choice(single)
    return Question(TEXTS["colour"].format(shape=thing.shape, of=which(image)), thing.colour)


def place(things: Sequence[Thing], random: Random, image: int | None = None) -> Question | None:
    """Where an object stands that can be seen; None where there is none."""
    seen = [thing for thing in things if not thing.hidden]
    if not seen:
        return None
    thing = random.choice(seen)
    return Question(TEXTS["place"].format(kind=thing.kind, of=which(image)), thing.place)


def caption(things: Sequence[Thing], image: int | None = None) -> Question:
    """All kinds of the scene in reading order, but a partner directly after the one that comes first."""
    text = TEXTS["caption"] if image is None else TEXTS["caption one"].format(which=ORDINALS[image])
    left, parts = [thing.kind for thing in things], []
    while left:
        first = left.pop(0)
        other = KINDS[partner(KINDS.index(first))]
        parts.append(f"a {first}")
        if other in left:
            left.remove(other)
            parts[-1] += f" {LINK} a {other}"
    return Question(text, f" {NEXT} ".join(parts or [EMPTY]) + f" {END}")


def named(text: str) -> list[str]:
    """The kinds a text names, in order: each colour that stands directly before a shape."""
    said = text.split()
    pairs = (f"{first} {second}" for first, second in pairwise(said))
    return [pair for pair in pairs if pair in KINDS]


def repeat(random: Random) -> Question:
    """Two to five words to be said again."""
    said = " ".join(random.choice((*COLOURS, *SHAPES, *NUMBERS)) for _ in range(random.randint(2, 5)))
    return Question(TEXTS["repeat"].format(words=said), said)


def neutral(random: Random) -> Question:
    """A question that no image answers."""
    form = random.choice(NEUTRAL)
    last = len(NUMBERS) - 1
    if form == "opposite":
        word = random.choice(sorted(OPPOSITES))
        return Question(TEXTS[form].format(word=word), OPPOSITES[word])
    a = random.randint(form == "before", last - (form == "after"))
    b = random.randint(0, last - a) if form == "plus" else random.choice([n for n in range(last + 1) if n != a])
    answers = {"after": a + 1, "before": a - 1, "plus": a + b}
    answer = ("yes" if a > b else "no") if form == "more" else NUMBERS[answers[form]]
    return Question(TEXTS[form].format(a=NUMBERS[a], b=NUMBERS[b]), answer)


# Skills of which every one can be asked beside an image.
ABOUT_A_SCENE: dict[str, Callable[[Sequence[Thing], Random], Question | None]] = {
    "count": count,
    "colour": colour,
    "place": place,
}
ABOUT_NONE: dict[str, Callable[[Random], Question]] = {"neutral": neutral, "repeat": repeat}
