"""What a search shows in the terminal: one bar, one line a trial, and the fronts at the end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from regard.search import attribution
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


class Table:
    """The fronts for the terminal: first what was measured again, then the rest of the front of the trials.

    Marks say which row is chosen and which are on the front at the final length. A terminal wide enough has
    what a row is beside its figures, any other below them; one too narrow for all figures drops the last. Below
    a row of several mechanisms stands what it owes to each.
    """

    def __init__(self, study: Study):
        chosen, self.layers, self.study = study.chosen, study.layers, study
        self.chosen = chosen.number if chosen else None
        self.final_front = {r.number for r in study.final_front}
        again = [r for r in study.rows if r.final or r.number in self.final_front]
        short = [r for r in (study.front if again else (*study.front, *study.contenders)) if r not in again]
        self.groups = [again, list({r.number: r for r in short}.values())]
        told = [r.measurement for r in study.rows if r.measurement]
        finals = [r.final for r in study.rows if r.final]
        self.length = told[0]["length"] if told else 0
        self.final_length = finals[0]["length"] if finals else None
        known = {name for r in (*again, *short) for name in self.last(r)}
        self.extras = [n for n in ("prefill", "decode", "recall") if n in known]

    def last(self, row: Row) -> dict[str, float]:
        """Scores at the longest length that anything was measured at."""
        return self.study.at_final(row) if self.final_length else row.scores

    def heads(self) -> list[str]:
        """Titles of the columns."""
        late = [f"KL at {self.final_length:,}", "bytes"] if self.final_length else []
        return ["", "trial", f"KL at {self.length:,}", "bytes", *late, *self.extras]

    def cells(self, row: Row) -> list[str]:
        """The figures of one row, a mark first."""
        mark = "*" if row.number == self.chosen else "o" if row.number in self.final_front else ""
        late = self.last(row)
        found = [mark, str(row.number), *_pair(row.scores), *(_pair(late) if self.final_length else [])]
        return found + [_extra(name, late) for name in self.extras]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines that fit into the console."""
        rows = [sorted(group, key=lambda r: (self.last(r) or r.scores)["bytes"]) for group in self.groups]
        lines = [self.heads(), *(self.cells(r) for group in rows for r in group)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        while len(widths) > 4 and sum(widths) + 2 * len(widths) - 2 > options.max_width:
            widths.pop()
        figures_wide = sum(widths) + 2 * len(widths) - 2
        said = {r.number: words(r.placements, self.layers) for group in rows for r in group}
        beside = figures_wide + 2 + max(map(len, said.values()), default=0) <= options.max_width

        def line(cells: list[str], style: str = "") -> Text:
            return Text("  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=False)), style, no_wrap=True)

        yield Text()
        yield line(self.heads(), "bold")
        for group in filter(None, rows):
            if group is rows[1] and rows[0]:
                yield Text(f"not measured again, on the front at {self.length:,}:", "dim")
            for row in group:
                figured = line(self.cells(row), "green" if row.number == self.chosen else "")
                yield figured.append("  " + said[row.number], "dim") if beside else figured
                below = [] if beside else [said[row.number]]
                below += [f"owes: {attribution.words(row.owes)}"] if row.owes else []
                margin = " " * (figures_wide + 2 if beside else widths[0] + 4)
                for part in (
                    p for text in below for p in Text(text).wrap(console, max(20, options.max_width - len(margin)))
                ):
                    yield Text(margin + part.plain.rstrip(), "dim")
        marks = "* chosen" if self.chosen is not None else ""
        if self.final_length:
            marks += f"{'; * and o' if marks else 'o'}: on the front at {self.final_length:,} tokens, other text"
        yield Text(f"\n{marks}\n" if marks else "", "dim")


def _pair(scores: dict[str, float]) -> list[str]:
    return [f"{scores['kl']:.4f}", f"{scores['bytes']:.1%}"] if scores else ["", ""]


def _extra(name: str, scores: dict[str, float]) -> str:
    if name not in scores:
        return ""
    return f"{scores[name]:.0%}" if name == "recall" else f"{scores[name]:.2f}x"
