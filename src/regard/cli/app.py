"""The `regard` command: puts the command groups together and turns a user's error into one line."""

import sys

import typer

from regard.cli import apply, look, measure, mechanisms, search, steer, train
from regard.cli.output import fail
from regard.core.errors import RegardError

app = typer.Typer(
    name="regard",
    help="Change how a pretrained model pays attention, and choose the change by measurement.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (mechanisms, search, measure, apply, look, steer, train):
    group.register(app)


def run() -> None:
    """Run the command line. A `RegardError` prints as one line and exits with 2, as a usage error does."""
    try:
        app()
    except RegardError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
