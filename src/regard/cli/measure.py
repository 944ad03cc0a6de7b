"""`regard measure`: quality, seconds and bytes of one recipe, beside dense."""

from typing import Annotated

import typer

from regard.cli.common import Device, Dtype, Model, RecipeFile, TextFile, open_model, open_text
from regard.cli.output import Json, note, print_json, print_table

Context = Annotated[int, typer.Option(min=1, help="Tokens of each window that are prefilled.")]
Continuation = Annotated[int, typer.Option(min=2, help="Tokens of each window that are scored.")]
Windows = Annotated[int, typer.Option(min=1, help="Disjoint windows.")]
Chunk = Annotated[int, typer.Option(min=1, help="Continuation tokens a forward; 1 decodes one by one.")]
Repeats = Annotated[int, typer.Option(min=0, help="Interleaved timing pairs; 0 times nothing.")]
Facts = Annotated[int, typer.Option(min=0, help="Facts planted in the text and asked for; 0 plants none.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("measure")(measure)


def measure(
    model: Model,
    recipe: RecipeFile,
    text: TextFile = None,
    context: Context = 896,
    continuation: Continuation = 128,
    windows: Windows = 2,
    chunk: Chunk = 32,
    repeats: Repeats = 3,
    facts: Facts = 8,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure a recipe on MODEL and a text: quality, recall, seconds and bytes against the model's own attention."""
    import regard
    from regard.measure.measure import SCORES
    from regard.measure.measure import measure as measured
    from regard.measure.text import tokenise

    placed = regard.Recipe.load(recipe)
    words = open_text(model, text)
    network, tokenizer = open_model(model, device, dtype)
    placed.check(network)
    row = measured(
        network,
        placed.placements,
        tokenise(tokenizer, words),
        tokenizer=tokenizer,
        context=context,
        continuation=continuation,
        windows=windows,
        chunk=chunk,
        repeats=repeats,
        facts=facts,
    )
    if json:
        print_json({"recipe": placed.digest, "note": placed.note, **row.to_json()})
        return
    print_table(("score", "value", "meaning"), [(name, value, SCORES[name][0]) for name, value in row.scores().items()])
    cache = f"cache {row.bytes.stored:,} of {row.bytes.dense:,} bytes"
    note(f"{windows} windows of {context} + {continuation} tokens; {cache}")
