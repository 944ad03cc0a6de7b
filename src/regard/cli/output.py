"""Printing, shared by the commands: tables for people, JSON for programs, one line for an error."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def fail(message: str) -> NoReturn:
    """Print `message` as one line and exit with 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def note(message: str) -> None:
    """Print a remark beside the result, which stays alone on standard output."""
    print(message, file=sys.stderr)


def print_json(value: Any) -> None:
    """Print `value` as JSON; what JSON cannot hold is written as text."""
    print(json.dumps(value, indent=2, default=str))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """Print one table; numbers are right-aligned by what the first row holds."""
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][number], (int, float)) and not isinstance(rows[0][number], bool)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(show(cell) for cell in row))
    console().print(table)


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Print `name  value` lines, names aligned."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, show(value))
    console().print(table)


def show(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item) for item in value) or "-"
    return str(value)


def console() -> Console:
    """A console that does not read square brackets as markup (paper numbers are written in them)."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
