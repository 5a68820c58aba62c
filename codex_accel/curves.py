"""The measurements of a training run over its steps, as `metrics.ndjson` has them.

Rule: a value is known by the number of its line, from 1, through all files of the log. What is no whole line of
measurements is counted, not guessed.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_accel import events, json_values, run_folder
from codex_accel.errors import UserError

TRAIN = "train"  # the split of the training steps
RUN = "run.json"


@dataclass(frozen=True)
class Curves:
    """The lines of a run's log."""

    run: str  # name of its folder
    lines: dict[int, dict[str, Any]]  # by number, from 1
    num_damaged: int  # lines that are none
    step: int | None = None  # of the checkpoint that is looked at; None: the end, or not known

    def splits(self) -> list[str]:
        """Names of what was measured: `train`, then the evaluated splits in the order of the log."""
        found = dict.fromkeys(line["split"] for line in self.lines.values())
        return sorted(found, key=lambda split: split != TRAIN)

    def points(self, split: str, name: str) -> list[tuple[int, float, float]]:
        """(line, step, value) of each line of a split that has a finite number called `name`."""
        return [
            (number, line["step"], line[name])
            for number, line in self.lines.items()
            if line["split"] == split and is_finite(line.get(name))
        ]


def is_finite(value: Any) -> bool:
    """Whether a value of a log is a number that can be drawn; the log has text for others, "nan"."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # an integer may be beyond all floats


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / RUN).is_file()


def read(run_dir: Path, *, step: int | None = None) -> Curves:
    """The curves of a run, which may still be training: a half line at the end is left out.

    Raises: UserError if the log cannot be read.
    """
    path = run_dir / run_folder.METRICS
    lines, num_damaged = {}, 0
    try:
        for number, written in enumerate(events.read(path), 1):
            line = _parsed(written.text)
            if line is None:
                num_damaged += 1
            else:
                lines[number] = line
    except OSError as error:
        what = f"cannot be read ({error.strerror}). Restore it from a copy."
        raise UserError(f"{error.filename or path}: {what}") from error
    return Curves(run_dir.resolve().name, lines, num_damaged, step)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json_values.parse(text.decode())
    except ValueError:
        return None
    whole = isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("split"), str)
    return line if whole else None


def of_model(folder: Path) -> Curves | None:
    """The curves of the run that a model folder lies in: its `final`, or one of its `checkpoints`; None if in none.

    Raises: UserError as `read` does.
    """
    folder = folder.resolve()
    for run_dir in (folder, folder.parent, folder.parent.parent):
        if is_run(run_dir) and events.exists(run_dir / run_folder.METRICS):
            number = re.search(r"step-(\d+)$", folder.name)
            return read(run_dir, step=int(number.group(1)) if number else None)
    return None
