"""One progress bar for long work.

Rule: it is drawn by the main process on a terminal only; in a pipe or a log file there is none.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

from codex_accel import cli


def _nothing(done: int, note: str = "") -> None:
    """Stands in where no bar is drawn."""


@contextlib.contextmanager
def bar(title: str, *, total: int, done: int = 0, unit: str = "") -> Iterator[Callable[[int, str], None]]:
    """Yield `show(done, note)`; draws title, bar, share, rate, time left and the note."""
    if not (cli.is_main_process() and sys.stderr.isatty()):
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    if unit == "bytes":
        amount: tuple = (DownloadColumn(), TransferSpeedColumn())
    else:
        amount = (MofNCompleteColumn(), TextColumn(unit))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *amount,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def show(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield show
