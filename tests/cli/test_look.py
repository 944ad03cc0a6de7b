"""`regard look` and `regard steer`: what they write and print, and how they refuse."""

import json
import re

import pytest

import regard
from regard.measure import scene_questions
from regard.models import vlm

PROMPT = ("--prompt", "One two three one two")


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory):
    """A vision-language model with random weights, as a folder; and an image for it."""
    image = pytest.importorskip("PIL.Image").new("RGB", (80, 60), (30, 90, 200))
    folder = tmp_path_factory.mktemp("models") / "shapes"
    model, processor = vlm.build(scene_questions.words())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image.save(folder / "image.png")
    return folder


def data(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def test_look(regard_command, tiny_folder, tmp_path):
    out = tmp_path / "look.html"
    done = regard_command("look", tiny_folder, *PROMPT, "--out", out, "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out)
    assert "one token each" in done.err
    told = data(out)
    assert (told["layers"], told["heads"]) == (2, 4)
    assert "".join(told["tokens"]).count("One two three one two") == 1
    assert told["kinds"][-3:] == [4, 4, 4]
    assert set(told["roles"]["names"]) == {"previous", "induction", "retrieval", "sink", "local"}


def test_look_at_the_last_rows(regard_command, tiny_folder, tmp_path):
    out = tmp_path / "look.html"
    words = ("look", tiny_folder, *PROMPT, "--raw", "--out", out, "--tokens", "-2:", "--size", 3, "--json")
    told = json.loads(regard_command(*words).out)
    assert told["tiles"] == [2, 3]
    assert told["bytes"] == out.stat().st_size
    assert data(out)["maps"]["rows"] == [told["tokens"] - 2, told["tokens"] - 1, told["tokens"]]


def test_look_at_an_image(regard_command, shapes_folder, tmp_path):
    out = tmp_path / "look.html"
    words = ("look", shapes_folder, "--prompt", "is there a red circle ?", "--image", shapes_folder / "image.png")
    done = regard_command(*words, "--out", out)
    assert done.code == 0, done.err
    told = data(out)
    assert [(span["grid"], span["image"]) for span in told["spans"]] == [([1, 8, 8], 0)]
    assert len(told["images"]) == 1
    assert "vision" in told["roles"]["names"]
    assert "".join(told["tokens"][-7:]) == " is there a red circle ? <assistant>"


def test_steer(regard_command, tiny_folder, tmp_path):
    words = ("steer", tiny_folder, *PROMPT, "--raw", "--max-new-tokens", 6)
    done = regard_command(*words, "--with", "streaming", "sink=0", "window=1", "layers=[0,1]")
    assert done.code == 0, done.err
    assert "without" in done.out
    assert "6 tokens" in done.out
    assert "[-" in done.out
    assert "{+" in done.out
    path = regard.Recipe([regard.place("streaming", layers=[0, 1], sink=0, window=1)]).save(tmp_path / "recipe.yaml")
    told = json.loads(regard_command(*words, "--recipe", path, "--json").out)
    assert not told["same"]
    assert set(told["with"]["text"].split()) <= set(re.sub(r"\{\+|\+\}|\[-|-\]", " ", done.out).split())
    neutral = regard_command(*words, "--with", "streaming", "window=500")
    assert "the answers are the same" in neutral.err
    assert "[-" not in neutral.out


def test_steer_finds_what_a_mechanism_has_to_know(regard_command, shapes_folder):
    words = ("steer", shapes_folder, "--prompt", "is there a red circle ?", "--with", "paint", "--max-new-tokens", 2)
    done = regard_command(*words, "--image", shapes_folder / "image.png", "alpha=5", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["with"]["tokens"] <= 2
    without = regard_command(*words)
    assert without.code == 2
    assert "'paint' needs visual tokens, and the token map has none" in without.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["look", "MODEL", *PROMPT, "--image", __file__], "is a text model (llama) and cannot be shown"),
        (["look", "MODEL", "--prompt", " "], "the prompt is empty"),
        (["look", "MODEL", *PROMPT, "--tokens", "last"], "--tokens 'last' has not the form START:STOP"),
        (["look", "MODEL", *PROMPT, "--tokens", "900:"], "names none of"),
        (["look", "MODEL", *PROMPT, "--out", "absent/look.html"], "no folder 'absent'"),
        (["steer", "MODEL", *PROMPT], "--recipe FILE, or mechanisms with --with STEM"),
        (["steer", "MODEL", *PROMPT, "--with", "streaming", "windw=3"], "Did you mean 'window'"),
        (["steer", "MODEL", *PROMPT, "--with", "streaming", "window"], "'window' has not the form OPTION=VALUE"),
        (["steer", "MODEL", *PROMPT, "--with", "streaming", "--with", "saw_int4", "layers=0"], "streaming.layers="),
        (["steer", "MODEL", *PROMPT, "--with", "streaming", "saw_int4.window=3"], "unknown mechanism named"),
    ],
)
def test_bad_input(regard_command, tiny_folder, words, said):
    done = regard_command(*[tiny_folder if word == "MODEL" else word for word in words])
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert said in done.err


def test_a_file_that_is_no_image(regard_command, shapes_folder):
    done = regard_command("look", shapes_folder, "--prompt", "yes ?", "--image", shapes_folder / "config.json")
    assert done.code == 2
    assert "cannot be read as an image" in done.err
