"""What a search shows in the terminal: one bar, one line a trial, and the front at the end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from regard.search.results import Row, Study
from regard.search.space import words


class Screen:
    """Progress on standard error, so that standard output stays free for results; silent if not `shown`."""

    def __init__(self, shown: bool, layers: int):
        self.console = Console(file=sys.stderr, quiet=not shown, highlight=False)
        self.layers = layers
        self._bars: Progress | None = None

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator["Bar"]:
        """A bar for one phase of `total` steps."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            yield Bar(bars, bars.add_task(name, total=total, note=""))

    def trial(self, row: Row) -> None:
        """One line about a finished trial."""
        what = words(row.placements, self.layers)
        if row.reason:
            self.console.print(f"[red]{row.number:>4} failed[/]  {what}: {row.reason}", soft_wrap=True)
        else:
            self.console.print(f"{row.number:>4}  {figures(row.scores)}  [dim]{what}[/]", soft_wrap=True)


class Bar:
    """One phase's bar."""

    def __init__(self, bars: Progress, task: Any):
        self._bars, self._task = bars, task

    def at(self, done: int, total: int | None = None, name: str | None = None, note: str = "") -> None:
        """Show `done` of `total` steps."""
        changed: dict[str, Any] = {k: v for k, v in (("total", total), ("description", name)) if v is not None}
        self._bars.update(self._task, completed=done, note=note, **changed)


def figures(scores: dict[str, float]) -> str:
    """The main scores in a line."""
    parts = [f"KL {scores['kl']:.4f}", f"bytes {scores['bytes']:6.1%}"] if {"kl", "bytes"} <= set(scores) else []
    parts += [f"{name} {scores[name]:.2f}x" for name in ("prefill", "decode") if name in scores]
    return "  ".join(parts)


def table(study: Study) -> Group:
    """The front for the terminal: what the trials said, what was measured again, and then what each row is.

    The chosen row is marked. Words stand below the figures: beside them a narrow terminal folds them to shreds.
    """
    chosen = study.chosen
    rows = {r.number: r for r in (*study.front, *study.contenders)}.values()
    first = next((r.measurement["length"] for r in rows if r.measurement), 0)
    again = next((r.final["length"] for r in rows if r.final), None)
    extras = [n for n in ("prefill", "decode", "recall") if any(n in (r.final_scores or r.scores) for r in rows)]
    heads = ["trial", f"KL at {first:,}", "bytes", *([f"KL at {again:,}", "bytes"] if again else []), *extras]
    made = Table(header_style="bold", box=None, pad_edge=False)
    for name in ["", *heads]:
        made.add_column(name, justify="right", no_wrap=True)
    lines = []
    for row in sorted(rows, key=lambda r: r.scores["bytes"]):
        mark = "[green]*[/]" if chosen is not None and row.number == chosen.number else ""
        cells = [mark, str(row.number), f"{row.scores['kl']:.4f}", f"{row.scores['bytes']:.1%}"]
        late = row.final_scores
        if again:
            cells += [f"{late['kl']:.4f}", f"{late['bytes']:.1%}"] if late else ["", ""]
        scores = late if again else row.scores
        cells += [_extra(name, scores) for name in extras]
        made.add_row(*cells)
        lines.append(f"{mark or ' '} {row.number:>4}  {words(row.placements, study.layers)}")
    return Group("", made, "", *lines, "")


def _extra(name: str, scores: dict[str, float]) -> str:
    if name not in scores:
        return ""
    return f"{scores[name]:.0%}" if name == "recall" else f"{scores[name]:.2f}x"
