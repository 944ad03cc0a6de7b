"""`regard steer`: what a model answers with mechanisms and without, side by side."""

import time
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from regard import catalog
from regard.cli.apply import AnyRecipe, With
from regard.cli.common import Device, Dtype, Model, TextFile, open_model
from regard.cli.output import Json, console, note, print_json
from regard.cli.prompts import Asked, Images, Length, Prompt, Raw, ask, with_text
from regard.core.errors import RegardError, choose

Options = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OPTION=VALUE]...", help="Options of the mechanisms; STEM.OPTION=VALUE where two have it."),
]
# Beside a mechanism's own options.
_PLACES = ("layers", "heads")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("steer")(steer)


def steer(
    model: Model,
    prompt: Prompt,
    options: Options = None,
    mechanisms: With = None,
    recipe: AnyRecipe = None,
    image: Images = None,
    text: TextFile = None,
    max_new_tokens: Length = 64,
    raw: Raw = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Answer a prompt with MODEL as it is and with mechanisms attached, and mark where the answers differ.

    Both answers are greedy. With --text, the file's text comes before the prompt.
    """
    placed = _recipe(recipe, mechanisms or (), options or ())
    network, tokenizer = open_model(model, device, dtype)
    asked = ask(model, network, tokenizer, with_text(text, prompt), image, raw)
    found = _both(network, tokenizer, _told(network, asked, placed), placed, max_new_tokens)
    if json:
        print_json({**found, "same": found["without"]["text"] == found["with"]["text"], "recipe": placed.digest})
        return
    _print(found)


def _recipe(path: Path | None, stems: Sequence[str], options: Sequence[str]) -> Any:
    """The recipe of the file, or of the mechanisms named.

    Raises:
        RegardError: neither or both are named; an option has the wrong form, or is of none or of two mechanisms.
    """
    import regard

    if (path is None) == (not stems):
        raise RegardError("name one recipe with --recipe FILE, or mechanisms with --with STEM")
    if path is not None:
        if options:
            raise RegardError(f"{options[0]!r}: a recipe says its own options; name the mechanism with --with STEM")
        return regard.Recipe.load(path)
    entries = {entry.stem: entry for entry in map(catalog.find, stems)}
    written: dict[str, dict[str, Any]] = {stem: {} for stem in entries}
    for option in options:
        told, equals, value = option.partition("=")
        if not equals:
            raise RegardError(f"{option!r} has not the form OPTION=VALUE, such as layers=[2,3]")
        stem, name = _owner(told.replace("-", "_"), entries)
        written[stem][name] = yaml.safe_load(value)
    return regard.Recipe([regard.place(stem, **told) for stem, told in written.items()])


def _owner(told: str, entries: dict[str, catalog.Entry]) -> tuple[str, str]:
    """Which mechanism an option is of: the one that is named before a dot, or the only one that has it."""
    stem, dot, name = told.rpartition(".")
    if dot:
        return choose("mechanism named with --with", stem, entries), name
    having = {stem: {*entry.card.options, *_PLACES} for stem, entry in entries.items()}
    choose("option", name, set().union(*having.values()))
    owners = [stem for stem, names in having.items() if name in names]
    if len(owners) > 1:
        raise RegardError(f"option {name!r} is of {' and '.join(owners)}: write {owners[0]}.{name}=...")
    return owners[0], name


def _told(network: Any, asked: Asked, recipe: Any) -> Asked:
    """`asked` with what the recipe's mechanisms have to know of its tokens beside their kinds."""
    for stem in dict.fromkeys(place.stem for place in recipe.placements):
        tell = getattr(catalog.load(stem), "tell", None)
        if tell is not None:
            asked = replace(asked, tokens=tell(network, asked.inputs, asked.tokens))
    return asked


def _both(network: Any, tokenizer: Any, asked: Asked, recipe: Any, length: int) -> dict[str, dict[str, Any]]:
    """What the model says without the recipe and with it, and how fast."""
    import regard

    def answer() -> dict[str, Any]:
        start = time.perf_counter()
        ids = network.generate(**asked.inputs, max_new_tokens=length, do_sample=False)[0, asked.length :]
        text, seconds = tokenizer.decode(ids, skip_special_tokens=True), time.perf_counter() - start
        return {"text": text.strip(), "tokens": len(ids), "seconds": seconds, "tokens_per_second": len(ids) / seconds}

    # What runs first pays for what is loaded late.
    network.generate(**asked.inputs, max_new_tokens=1, do_sample=False)
    without = answer()
    with regard.attach(network, recipe) as handle, handle.reading(asked.tokens):
        return {"without": without, "with": answer()}


def _print(found: dict[str, dict[str, Any]]) -> None:
    before, after = (_marked(found["without"]["text"], found["with"]["text"], side) for side in (0, 1))
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True, padding=(0, 3, 0, 0))
    for name in found:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(before, after)
    table.add_row(*(f"{one['tokens']} tokens, {one['tokens_per_second']:.1f} a second" for one in found.values()))
    console().print(table)
    if found["without"]["text"] == found["with"]["text"]:
        note("the answers are the same")


def _marked(before: str, after: str, side: int) -> Text:
    """One of two answers; words that the other lacks are bold, in [-...-] of the first or {+...+} of the second."""
    words = before.split(), after.split()
    marks = (("[-", "-]"), ("{+", "+}"))[side]
    parts = list[Text]()
    for kind, *places in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        said = " ".join(words[side][places[2 * side] : places[2 * side + 1]])
        if said:
            parts.append(Text(said) if kind == "equal" else Text(said.join(marks), style="bold"))
    return Text(" ").join(parts)
