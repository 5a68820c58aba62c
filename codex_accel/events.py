"""Logs of a run: one JSON object a line, whole lines only.

Rule: a line is appended and flushed at once, and a resumed run cuts the file back to the offset that its checkpoint
recorded, so no step is told twice and no half line survives a kill.
"""

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any


class LineLog:
    """An append-only NDJSON file; only the main process has one that writes."""

    def __init__(self, path: Path, *, enabled: bool = True):
        self.path, self.enabled = path, enabled
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self.cut_back(path.stat().st_size)

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`. A non-finite number is written as text ("nan"), which JSON has no number for."""
        if self.enabled:
            clean = {key: _finite(value) for key, value in record.items()}
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(clean, allow_nan=False) + "\n")

    @property
    def offset_bytes(self) -> int:
        """Length of the file: what a checkpoint records."""
        return self.path.stat().st_size if self.enabled else 0

    def cut_back(self, offset_bytes: int) -> bool:
        """Drop everything after `offset_bytes`, and a half line that ends there; False if so much was never there."""
        if not self.enabled:
            return True
        with open(self.path, "rb+") as stream:
            data = stream.read(offset_bytes)
            whole = data.rfind(b"\n") + 1
            stream.truncate(whole)
            stream.flush()
            os.fsync(stream.fileno())
        return whole == offset_bytes

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint records their offset."""
        if self.enabled:
            with open(self.path, "rb") as stream:
                os.fsync(stream.fileno())


def event(log: LineLog, kind: str, message: str, **facts: Any) -> None:
    """Append one event (start, resume, sweep, save, prune, skip, preempted, end ...) with its time."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    log.write({"time": time, "kind": kind, "process": int(os.environ.get("RANK", "0")), "message": message, **facts})


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
