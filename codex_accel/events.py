"""Logs of a run: one JSON object a line, whole lines only, in one file or in numbered ones.

Rule: a line is appended at once, and a resumed run cuts the log back to the offset that its checkpoint recorded, so no
step is told twice and no half line survives a kill. Lines that a full or failing disk does not take wait in memory, and
no checkpoint is written as long as one waits.

A log `metrics.ndjson` with a limit is the files metrics.000001.ndjson, metrics.000002.ndjson ... and metrics.ndjson, in
this order, and offsets count through all of them. A file gets its number before the next one begins, and files are
taken away from the end backwards, so at every instant what stands there is the log up to some line.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from codex_accel import files, redaction
from codex_accel.errors import UserError

BEGINNING = b'{"'  # of every line, so of what a kill leaves of one too
BLOCK_BYTES = 1 << 16  # read at once when a log is opened or cut


class Line(NamedTuple):
    """A whole line of a log."""

    path: Path  # the file that it stands in
    number: int  # in that file, from 1
    text: bytes  # without its end


class LineLog:
    """An append-only NDJSON log; only the main process has one that writes.

    With `max_bytes`, a line that would make the file longer begins a new one; nothing is ever deleted for room, and a
    line that is longer has a file of its own. With `max_waiting_bytes`, the oldest of the lines that wait for a disk
    are dropped when they take more; once the disk takes lines again, one with `"kind": "dropped"` tells how many.

    Raises: UserError if the file ends in what no kill leaves of a line, so is none of ours; it stays as it is.
    """

    def __init__(
        self, path: Path, *, enabled: bool = True, max_bytes: int | None = None, max_waiting_bytes: int | None = None
    ):
        self.path, self.enabled = path, enabled
        self.max_bytes, self.max_waiting_bytes = max_bytes, max_waiting_bytes
        self._waiting: deque[bytes] = deque()
        self._is_begun = False  # the first that waits is the rest of a line, of which the file has the beginning
        self._num_dropped = 0  # lines, not yet told
        self._is_named = False  # the names of all files are on the disk
        if enabled:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._check_end()
            self._trim(path.stat().st_size)

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`, its secrets masked; a non-finite number as text ("nan"), which JSON has no number for."""
        if not self.enabled:
            return
        self._waiting.append(_line(record))
        try:
            self._append()
        except OSError:  # `sync` raises it, before anything relies on these lines
            self._drop_oldest()

    def _append(self) -> None:
        while self._waiting or self._num_dropped:
            tells = self._num_dropped > 0 and not self._is_begun
            line = self._dropped() if tells else self._waiting[0]
            with open(self.path, "ab", buffering=0) as stream:
                is_full = not self._is_begun and self._is_full(stream, len(line))
                taken = 0 if is_full else stream.write(line)
            if is_full:
                self._number()
                continue
            if tells:
                self._num_dropped = 0
                self._waiting.appendleft(line)
            self._waiting[0] = line[taken:]
            self._is_begun = taken < len(line)
            if not self._is_begun:
                self._waiting.popleft()

    def _is_full(self, stream: Any, num_bytes: int) -> bool:
        if self.max_bytes is None:
            return False
        size = os.fstat(stream.fileno()).st_size
        return size > 0 and size + num_bytes > self.max_bytes

    def _number(self) -> None:
        """Give the file its number, so that the next line begins a new one."""
        files.fsync_path(self.path)
        number = max(_numbered(self.path), default=0) + 1
        self._is_named = False
        os.rename(self.path, self.path.with_name(f"{self.path.stem}.{number:06d}{self.path.suffix}"))
        files.fsync_path(self.path.parent)

    def _drop_oldest(self) -> None:
        """Keep what waits within its limit; a line that the file has the beginning of stays, or it would be a half."""
        first = int(self._is_begun)
        while self.max_waiting_bytes is not None and len(self._waiting) > first:
            if sum(map(len, self._waiting)) <= self.max_waiting_bytes:
                break
            del self._waiting[first]
            self._num_dropped += 1

    def _dropped(self) -> bytes:
        what = f"the disk took no lines, and {self._num_dropped} of them are dropped"
        return _line(_stamped("dropped", what, num_lines=self._num_dropped))

    def sync(self) -> int:
        """Force all lines to the disk; returns the length of the log in bytes, which a checkpoint records.

        Raises: OSError naming the file if it cannot take them; they are kept for the next try.
        """
        if not self.enabled:
            return 0
        try:
            self._append()
            files.fsync_path(self.path)
            if not self._is_named:
                files.fsync_path(self.path.parent)
                self._is_named = True
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return length(self.path)

    def cut_back(self, offset_bytes: int) -> bool:
        """Drop everything after `offset_bytes`, and a half line that ends there; False if so much was never there.

        The file in which the offset falls, or which ends there, is the one that grows again. If there is less, or a
        numbered file before it is missing, all lines stay.
        """
        if not self.enabled:
            return True
        self._waiting.clear()
        self._is_begun, self._num_dropped = False, 0
        found = _located(self.path, offset_bytes)
        if found is None:
            self._trim(self.path.stat().st_size)
            return False
        kept, rest_bytes = found
        if kept != self.path:
            self.path.unlink()
            for path in reversed(_numbered(self.path).values()):
                if path == kept:
                    break
                path.unlink()
            files.fsync_path(self.path.parent)  # or a power cut may bring one back, with a hole before it
            os.rename(kept, self.path)
            files.fsync_path(self.path.parent)
        return self._trim(rest_bytes)

    def _check_end(self) -> None:
        """Refuse a file with a last line that has no end and does not begin as ours do, which `_trim` would cut."""
        with open(self.path, "rb") as stream:
            stream.seek(_whole_bytes(stream, self.path.stat().st_size))
            rest = stream.read(BLOCK_BYTES).rstrip(b"\0")  # a power cut may leave zeros
            if not BEGINNING.startswith(rest[: len(BEGINNING)]):
                problem = "is no log of this kind: its last line has no end and is no JSON"
                raise UserError(f"{self.path}: {problem}. Name another file, or end the line.")

    def _trim(self, limit_bytes: int) -> bool:
        """Cut the file to the whole lines within its first bytes; whether they are as many bytes."""
        with open(self.path, "rb+") as stream:
            whole = _whole_bytes(stream, limit_bytes)
            stream.truncate(whole)
        files.fsync_path(self.path)
        return whole == limit_bytes


def _whole_bytes(stream: BinaryIO, limit_bytes: int) -> int:
    """Bytes of the whole lines within the first bytes of a file; read backwards, so a long log takes no memory."""
    end = min(limit_bytes, stream.seek(0, os.SEEK_END))
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Iterator[Line]:
    """The whole lines of a log, of all its files in order. Its run may be writing: half a line at the end stays out.

    Raises: OSError if there is no such log, or if it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        last, numbered = _opened(path, stack)
        for closed in numbered:
            with open(closed, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    yield Line(closed, number, line.removesuffix(b"\n"))
        for number, line in enumerate(last or (), 1):
            if line.endswith(b"\n"):
                yield Line(path, number, line[:-1])


def _opened(path: Path, stack: contextlib.ExitStack) -> tuple[BinaryIO | None, list[Path]]:
    """The file that grows, opened, and the numbered ones before it, of one instant.

    If the path still leads to the opened file after the others were listed, no file has got its number in between.
    """
    while True:
        last = None
        with contextlib.suppress(FileNotFoundError):  # a kill between two files
            last = stack.enter_context(open(path, "rb"))  # noqa: SIM115  (closed by the caller)
        numbered = list(_numbered(path).values())
        try:
            is_same = last is not None and os.path.samestat(os.fstat(last.fileno()), path.stat())
        except FileNotFoundError:
            is_same = False
        if is_same or (last is None and not path.exists()):
            break
    if last is None and not numbered:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return last, numbered


def exists(path: Path) -> bool:
    """Whether there is such a log; a kill between two files has left numbered ones alone."""
    return path.is_file() or bool(_numbered(path))


def length(path: Path) -> int:
    """Bytes of a log, of all its files; 0 if there is none."""
    last_bytes = path.stat().st_size if path.exists() else 0
    return last_bytes + sum(file.stat().st_size for file in _numbered(path).values())


def reaches(path: Path, offset_bytes: int) -> bool:
    """Whether a log has its first so many bytes, none of its files missing before."""
    return _located(path, offset_bytes) is not None


def _located(path: Path, offset_bytes: int) -> tuple[Path, int] | None:
    """The file of a log that `offset_bytes` falls in, or that ends there, and the bytes in it; None if in none."""
    numbered = _numbered(path)
    if offset_bytes == 0:
        return next(iter(numbered.values()), path), 0
    for wanted, (number, file) in enumerate([*numbered.items(), (len(numbered) + 1, path)], 1):
        if number != wanted:
            return None
        size = file.stat().st_size if file.exists() else 0
        if 0 <= offset_bytes <= size:
            return file, offset_bytes
        offset_bytes -= size
    return None


def _numbered(path: Path) -> dict[int, Path]:
    """The numbered files of a log by number, in order."""
    name = re.compile(rf"{re.escape(path.stem)}\.(\d{{6,}}){re.escape(path.suffix)}")
    try:
        found = [(match, file) for file in path.parent.iterdir() if (match := name.fullmatch(file.name))]
    except FileNotFoundError:
        return {}
    return dict(sorted((int(match[1]), file) for match, file in found))


# --- lines -----------------------------------------------------------------------------------------------------------


def event(log: LineLog, kind: str, message: str, **facts: Any) -> None:
    """Append one event (start, resume, sweep, save, prune, skip, preempted, end ...) with its time."""
    log.write(_stamped(kind, message, **facts))


def _stamped(kind: str, message: str, **facts: Any) -> dict[str, Any]:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {"time": time, "kind": kind, "process": int(os.environ.get("RANK", "0")), "message": message, **facts}


def _line(record: dict[str, Any]) -> bytes:
    """One line of ASCII: whatever is no plain character of it is escaped, so nothing in a text breaks or turns it."""
    return json.dumps(_finite(redaction.value(record)), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
