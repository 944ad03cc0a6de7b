"""`regard search`: measured combinations, a front, a recipe and a report."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from regard.cli.common import Device, Dtype, Model, TextFile, open_model, open_text
from regard.cli.output import Json, print_json
from regard.core.errors import RegardError

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where recipe.yaml, report.html and the study go.")]
Constraint = Annotated[
    list[str] | None, typer.Option("--constraint", metavar="NAME<=X", help="A bound to meet; repeat for more.")
]
Objective = Annotated[
    list[str] | None, typer.Option("--objective", metavar="NAME", help="A score to trade off; repeat for more.")
]
Mechanism = Annotated[
    list[str] | None, typer.Option("--mechanism", metavar="STEM", help="Search only this one; repeat for more.")
]
Trials = Annotated[int, typer.Option(min=1, help="Trials of all processes together.")]
Seconds = Annotated[float | None, typer.Option(help="Wall time of the trials; left out, no bound.")]
Storage = Annotated[
    str | None, typer.Option(metavar="URL", help="Any Optuna storage, shared by several machines; else SQLite in DIR.")
]
Name = Annotated[str, typer.Option("--study", help="The study in the storage; one that exists is continued.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, such as context=2048 or final_length=8000."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("search")(search)


def search(
    model: Model,
    text: TextFile = None,
    out: Out = Path("regard-search"),
    constraint: Constraint = None,
    objective: Objective = None,
    mechanism: Mechanism = None,
    trials: Trials = 24,
    seconds: Seconds = None,
    storage: Storage = None,
    study: Name = "regard",
    setting: Setting = None,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Search for what to place where on MODEL, by measuring it on a text.

    Ctrl-C keeps every finished trial; the same command continues. Exits with 1 if nothing met the constraints.
    """
    import regard
    from regard.core.extras import need

    need("optuna", "search")
    settings = dict(map(_setting, setting or ()))
    words = open_text(model, text)
    network, tokenizer = open_model(model, device, dtype)
    found = regard.search(
        network,
        tokenizer,
        words,
        mechanisms=mechanism or None,
        objectives=objective or ("kl", "bytes"),
        constraints=("bytes<=0.4",) if constraint is None else constraint,
        trials=trials,
        seconds=seconds,
        storage=storage,
        study_name=study,
        out=out,
        progress=not quiet,
        **settings,
    )
    if json:
        print_json(found.to_json())
    if found.interrupted:
        raise typer.Exit(130)
    if found.chosen is None:
        raise typer.Exit(1)


def _setting(written: str) -> tuple[str, Any]:
    """`name=value`, the value read as YAML reads a word or a number."""
    name, equals, value = written.partition("=")
    if not equals or not name.strip():
        raise RegardError(f"--set {written!r} has not the form NAME=VALUE, such as context=2048")
    return name.strip().replace("-", "_"), yaml.safe_load(value)
