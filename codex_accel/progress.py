"""One progress bar for long work.

Rule: it is drawn by the main process on a terminal only; in a pipe or a log file there is none.
"""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from codex_accel import cli

MIDDLE, WIDE = 110, 144  # columns of a terminal with room for a short bar beside all of a step, and for the rest


def _nothing(done: int, note: str = "") -> None:
    """Stands in where no bar is drawn."""


def note(values: Mapping[str, float], device: Any) -> str:
    """The numbers of a training step that stand beside the bar: loss, learning rate, tokens/s, MFU if known, memory."""
    mfu = [f"MFU {100 * values['mfu']:.0f} %"] if "mfu" in values else []
    rates = [f"{values['tokens_per_s']:,.0f} tokens/s", *mfu, f"peak {peak_bytes(device) / 1e9:.1f} GB"]
    return "  ".join([f"loss {values['loss']:.4f}", f"lr {values['learning_rate']:.1e}", *rates])


def peak_bytes(device: Any) -> int:
    """Most memory held so far: by tensors on a GPU (of torch's allocator), else by this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def bar(title: str, *, total: int, done: int = 0, unit: str = "") -> Iterator[Callable[[int, str], None]]:
    """Yield `show(done, note)`; draws title, bar, share, rate, time left and the note on one line.

    A narrow terminal has a short bar or none, no unit and no time spent, so that the note has room; of a note that is
    still too long, the last parts are left out.
    """
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
    from rich.table import Column

    console, fixed = Console(stderr=True), Column(no_wrap=True)  # which gives no room to the note
    wide = console.width >= WIDE
    columns: list = [TextColumn("{task.description}")]
    if console.width >= MIDDLE:
        columns += [BarColumn(bar_width=24 if wide else 10, table_column=fixed)]
    if unit == "bytes":
        columns += [DownloadColumn(table_column=fixed), TransferSpeedColumn(table_column=fixed)]
    else:
        columns += [MofNCompleteColumn(table_column=fixed)]
        columns += [TextColumn(unit), TimeElapsedColumn(table_column=fixed)] if wide else []
    columns += [TextColumn("left"), TimeRemainingColumn(table_column=fixed), _note_column()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def show(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield show


def _note_column() -> Any:
    """The last column: as many parts of the note, which two spaces divide, as there is room for."""
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Note:
        def __init__(self, parts: list[str]):
            self.parts = parts

        def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
            return Measurement(0, min(options.max_width, len("  ".join(self.parts))))

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
            parts = list(self.parts)
            while len("  ".join(parts)) > options.max_width:
                parts.pop()
            yield Text("  ".join(parts), no_wrap=True, overflow="crop")

    class NoteColumn(ProgressColumn):
        def render(self, task: Task) -> Any:
            return Note(task.fields["note"].split("  "))

    return NoteColumn()
