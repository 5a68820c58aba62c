"""Logs of a run: one JSON object a line, whole lines only.

Rule: a line is appended at once, and a resumed run cuts the file back to the offset that its checkpoint recorded, so no
step is told twice and no half line survives a kill. Lines that a full or failing disk does not take wait in memory, and
no checkpoint is written as long as one waits.
"""

import contextlib
import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

from codex_accel import files


class LineLog:
    """An append-only NDJSON file; only the main process has one that writes."""

    def __init__(self, path: Path, *, enabled: bool = True):
        self.path, self.enabled = path, enabled
        self._waiting = b""
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.cut_back(path.stat().st_size)

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`. A non-finite number is written as text ("nan"), which JSON has no number for."""
        if self.enabled:
            clean = {key: _finite(value) for key, value in record.items()}
            self._waiting += json.dumps(clean, allow_nan=False).encode() + b"\n"
            with contextlib.suppress(OSError):  # `sync` raises it, before anything relies on these lines
                self._append()

    def _append(self) -> None:
        with open(self.path, "ab", buffering=0) as stream:
            while self._waiting:
                self._waiting = self._waiting[stream.write(self._waiting) :]

    def sync(self) -> int:
        """Force all lines to the disk; returns the length of the file, which a checkpoint records.

        Raises: OSError naming the file if it cannot take them; they are kept for the next try.
        """
        if not self.enabled:
            return 0
        try:
            self._append()
            files.fsync_path(self.path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return self.path.stat().st_size

    def cut_back(self, offset_bytes: int) -> bool:
        """Drop everything after `offset_bytes`, and a half line that ends there; False if so much was never there."""
        if not self.enabled:
            return True
        with open(self.path, "rb+") as stream:
            data = stream.read(offset_bytes)
            whole = data.rfind(b"\n") + 1
            stream.truncate(whole)
        files.fsync_path(self.path)
        return whole == offset_bytes


def event(log: LineLog, kind: str, message: str, **facts: Any) -> None:
    """Append one event (start, resume, sweep, save, prune, skip, preempted, end ...) with its time."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    log.write({"time": time, "kind": kind, "process": int(os.environ.get("RANK", "0")), "message": message, **facts})


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
