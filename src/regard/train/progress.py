"""What is shown while a model trains: a bar in the terminal, curves for TensorBoard."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard.core.extras import need


class Watcher(Protocol):
    """Somebody who is told how a run goes."""

    def begin(self, step: int, steps: int) -> None:
        """It begins at `step` of `steps`."""
        ...

    def losses(self, step: int, losses: Sequence[float], rate: float) -> None:
        """The training losses of the last steps, up to and with `step`, whose learning rate was `rate`."""
        ...

    def measured(self, found: dict[str, float]) -> None:
        """A measurement on held-out rows: `step`, `loss`, perhaps `accuracy`."""
        ...


class Bar:
    """A progress bar on standard error, if that is a terminal; use it as a context manager."""

    def __init__(self) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
        )
        console = Console(file=sys.stderr, highlight=False)
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bars.add_task("", total=None, note="")
        self._held = ""

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, step: int, steps: int) -> None:
        """Show where the run begins."""
        self._bars.update(self._task, completed=step, total=steps)

    def losses(self, step: int, losses: Sequence[float], rate: float) -> None:
        """Move on."""
        self._bars.update(self._task, completed=step, note=f"loss {losses[-1]:.4f}{self._held}")

    def measured(self, found: dict[str, float]) -> None:
        """Show the last measurement beside the loss from now on."""
        said = f", accuracy {found['accuracy']:.1%}" if "accuracy" in found else ""
        self._held = f", held out {found['loss']:.4f}{said}"


class Board:
    """Curves in `folder` for TensorBoard; a run that goes on replaces what lies after its checkpoint.

    Raises:
        RegardError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path):
        need("tensorboard")
        self._folder, self._writer = str(folder), None

    def begin(self, step: int, steps: int) -> None:
        """Open the file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def losses(self, step: int, losses: Sequence[float], rate: float) -> None:
        """One point a step."""
        for number, loss in enumerate(losses, step - len(losses) + 1):
            self._open.add_scalar("train/loss", loss, number)
        self._open.add_scalar("train/rate", rate, step)

    def measured(self, found: dict[str, float]) -> None:
        """One point for each figure."""
        for name, value in found.items():
            if name != "step":
                self._open.add_scalar(f"held out/{name}", value, int(found["step"]))
        self._open.flush()

    @property
    def _open(self) -> Any:
        assert self._writer is not None
        return self._writer

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
