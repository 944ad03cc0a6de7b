"""`regard run` and `regard explain`: a model under a recipe."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import Device, Dtype, Model, RecipeFile, TextFile, open_model
from regard.cli.output import Json, note, print_json, print_table
from regard.cli.prompts import Length, Prompt, Raw, text_inputs, with_text
from regard.core.errors import RegardError

Sample = Annotated[bool, typer.Option("--sample", help="Sample instead of taking the most likely token.")]

AnyRecipe = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe.yaml.", dir_okay=False)]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="STEM", help="Instead of a recipe: a mechanism at its defaults; repeat for more."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("run")(run)
    app.command("explain")(explain)


def run(
    model: Model,
    recipe: RecipeFile,
    prompt: Prompt,
    text: TextFile = None,
    max_new_tokens: Length = 64,
    raw: Raw = False,
    sample: Sample = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate with MODEL under a recipe, and say how many bytes its cache took.

    With --text, the file's text comes before the prompt.
    """
    import regard
    from regard.measure.measure import count

    placed = regard.Recipe.load(recipe)
    network, tokenizer = open_model(model, device, dtype)
    inputs = text_inputs(tokenizer, with_text(text, prompt), raw).to(network.device)
    length = inputs["input_ids"].shape[1]
    with regard.attach(network, placed):
        start = time.perf_counter()
        out = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
        # The last token is chosen but never read, so the cache holds one less than the sequence.
        held = count(network, out.past_key_values, out.sequences.shape[1] - 1)
    said = tokenizer.decode(out.sequences[0, length:], skip_special_tokens=True)
    new = out.sequences.shape[1] - length
    if json:
        facts = {"text": said, "prompt_tokens": length, "new_tokens": new, "seconds": seconds}
        print_json(facts | {"bytes": vars(held), "recipe": placed.digest})
        return
    print(said)
    note(
        f"{length} prompt and {new} new tokens in {seconds:.1f} s; cache {held.stored:,} bytes, "
        f"{held.ratio:.1%} of dense bf16 at {held.length} tokens"
    )


def explain(
    model: Model,
    recipe: AnyRecipe = None,
    mechanisms: With = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Say what would run in each layer of MODEL under a recipe, or why it cannot.

    With --with, say instead which mechanisms can stand on MODEL, alone, in pairs and all together; exits with 1 if
    all together cannot.
    """
    import regard

    if (recipe is None) == (not mechanisms):
        raise RegardError("name one recipe with --recipe FILE, or mechanisms with --with STEM")
    if mechanisms:
        _explain_mechanisms(model, mechanisms, device, dtype, json)
        return
    assert recipe is not None
    placed = regard.Recipe.load(recipe)
    network, _ = open_model(model, device, dtype)
    _refuse(placed, network, json)
    with regard.attach(network, placed) as handle:
        said = handle.explain()
    if json:
        print_json({"recipe": placed.digest, "note": placed.note, "lines": said.splitlines()})
    else:
        print(said)


def _refuse(recipe: Any, network: Any, json: bool) -> None:
    """Say which placements cannot be served on the model, alone or together, and why.

    Raises:
        RegardError: there are some, or the recipe was made for a model of another shape.
    """
    from regard.adapters.families import open_decoder
    from regard.recipes.legal import faults, told

    decoder = open_decoder(network)
    recipe.fits(decoder)
    found = faults(recipe.placements, decoder)
    if not found:
        return
    names = [f"{number} {told(place)}" for number, place in enumerate(recipe.placements)]
    rows = [(" + ".join(names[n] for n in fault.placements), fault.reason) for fault in found]
    if json:
        refused = [{"placements": list(fault.placements), "reason": fault.reason} for fault in found]
        print_json({"recipe": recipe.digest, "note": recipe.note, "refused": refused})
    else:
        print_table(("placement", "cannot be served because"), rows)
    raise RegardError(
        f"this recipe cannot be served on {type(network).__name__}: placement {rows[0][0]}: {rows[0][1]}"
        + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    )


def _explain_mechanisms(model: str, names: list[str], device: str | None, dtype: str | None, json: bool) -> None:
    """Say which of the named mechanisms can stand on the model at their defaults, and which of them together."""
    from regard import catalog
    from regard.adapters.families import open_decoder
    from regard.recipes.legal import together

    entries = list({entry.stem: entry for entry in map(catalog.find, names)}.values())
    network, _ = open_model(model, device, dtype)
    answers = together(entries, open_decoder(network))
    if json:
        print_json([{"mechanisms": list(stems), "reason": reason} for stems, reason in answers.items()])
    else:
        rows = [(" + ".join(stems), reason is None, reason or "") for stems, reason in answers.items()]
        print_table(("at their defaults", "can stand", "why not"), rows)
    if any(answers.values()):
        raise typer.Exit(1)
