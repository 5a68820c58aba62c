"""Which raw files are read, and the stretches of them that are read by themselves.

Rule: a source that cannot be read is told before any work, and the cuts of a file depend on its bytes and `unit_bytes`
alone, never on who reads them.
"""

import codecs
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_accel.errors import UserError
from codex_accel.schema import Source

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
CHUNK_BYTES = 1 << 20
NOT_OF_TEXT = {"idna", "punycode", "unicode-escape", "raw-unicode-escape"}  # Python codecs that are no encodings
STATEFUL = ("iso2022", "hz", "utf-7")  # one byte means one thing here and another there, so lines cannot be cut out


@dataclass(frozen=True)
class RawFile:
    """One file of a source, with its format and compression decided."""

    path: Path
    format: str
    compression: str | None  # gz, zst
    source: Source


@dataclass(frozen=True)
class Unit:
    """A stretch of a raw file that is read by itself: bytes `start` to `stop` of the file as it lies on the disk."""

    raw: RawFile
    file_bytes: int  # of the whole file
    start: int
    stop: int
    first_line: int  # 1-based physical line of the file that begins at `start`
    sha256: str  # of these bytes

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return self.stop - self.start


@dataclass(frozen=True)
class FileFacts:
    """A raw file as it was found: the units tile it, in order."""

    raw: RawFile
    size: int  # bytes
    sha256: str
    units: tuple[Unit, ...]


# --- which files --------------------------------------------------------------------------------------------------


def resolve(sources: list[Source], *, config_problem: Any, key: str = "sources.{}") -> list[RawFile]:
    """Every file that `sources` name, in order of the sources and sorted by path within each.

    `config_problem(key, what)` makes the problem line; `key` is where source number {} stands in the config. A file
    that two sources name is read twice. Raises: UserError listing each path without a match, each file that is empty,
    cannot be read or has a format that cannot be told, unknown encodings, and keys that do not suit the format.
    """
    found: list[RawFile] = []
    problems: list[str] = []
    for index, source in enumerate(sources):
        files, told = _resolve_one(source)
        found += files
        problems += [config_problem(f"{key.format(index)}.{name}", what) for name, what in told]
    if problems:
        raise UserError(*problems)
    return found


def _resolve_one(source: Source) -> tuple[list[RawFile], list[tuple[str, str]]]:
    """The files of one source, and (key, what is wrong) of each problem."""
    found: list[RawFile] = []
    problems: list[tuple[str, str]] = []
    try:
        paths = _expand(source.path)
        if not paths:
            problems.append(("path", f"no file matches {source.path!r}. Check the path."))
    except OSError as error:
        what = (
            f"{str(error.filename or source.path)!r} cannot be read ({error.strerror}). Mend it, or name other files."
        )
        paths = []
        problems.append(("path", what))
    for path in paths:
        raw = RawFile(path, *_format_of(path, source.format), source)
        if fault := _unreadable(path) or _unsuitable_format(raw):
            problems.append(("path", fault))
        else:
            found.append(raw)
    return found, problems + list(_unsuitable_keys(source, found))


def _expand(pattern: str) -> list[Path]:
    """A file, all below a folder without hidden ones, or what a glob matches without its folders. Raises OSError."""
    path = Path(pattern)
    if path.is_dir():
        inside = []
        for root, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            # os.walk does not enter a linked folder; it stays in the list, so that it is told instead of left out
            linked = [name for name in folders if Path(root, name).is_symlink()]
            inside += [Path(root, name) for name in [*names, *linked] if not name.startswith(".")]
        return sorted(inside)
    if os.path.lexists(path):
        return [path]
    return sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if not p.is_dir())


def _raise(error: OSError) -> None:
    raise error


def _format_of(path: Path, format_: str) -> tuple[str, str | None]:
    """(format, compression) by the suffixes, where `format_` is not given; "" if it cannot be told."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    inner = path.with_suffix("") if compression else path
    return (SUFFIXES.get(inner.suffix.lower(), "") if format_ == "auto" else format_), compression


def _unreadable(path: Path) -> str | None:
    """What keeps a file from being read and recorded, if anything does."""
    try:
        str(path).encode()
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return f"{str(path)!r} is a link to a folder, and links are not followed. Name that folder as a source."
        if not stat.S_ISREG(status.st_mode):
            return f"{str(path)!r} is a device, pipe or socket. Write its content to a file, and name that."
        if status.st_size == 0:
            return f"{str(path)!r} is empty. Remove it or name others."
        with open(path, "rb"):
            return None
    except UnicodeEncodeError:
        return f"{str(path)!r} is no name in UTF-8, so it cannot be recorded. Rename the file."
    except FileNotFoundError:
        return f"{str(path)!r} is a link to nothing. Remove it, or bring back what it points to."
    except OSError as error:
        return f"{str(path)!r} cannot be read ({error.strerror}). Mend it, or name other files."


def _unsuitable_format(raw: RawFile) -> str | None:
    if not raw.format:
        return (
            f"cannot tell the format of {str(raw.path)!r} by its suffix. Set format, or name only the files you want."
        )
    if raw.format == "parquet" and raw.compression is not None:
        return f"{str(raw.path)!r} is compressed around Parquet, which compresses by itself. Unpack it first."
    return None


def _unsuitable_keys(source: Source, found: list[RawFile]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of keys that do not go with the encoding or with the formats of the files found."""
    try:
        name = codec(source.encoding)
        if name in NOT_OF_TEXT:
            yield "encoding", f"{source.encoding!r} is not an encoding of text. Use utf-8, latin-1 or the like."
        "\n".encode(name)
    except (LookupError, ValueError):
        what = f"unknown encoding {source.encoding!r}. Use a Python codec name such as utf-8 or latin-1."
        yield "encoding", what
    if source.delimiter is not None and source.delimiter in '"\r\n':
        yield "delimiter", f"{source.delimiter!r} ends a row or quotes a field. Use another character."
    if source.chat_template is not None:
        path = Path(source.chat_template)
        if not path.is_file() or not os.access(path, os.R_OK):
            yield "chat_template", f"{str(path)!r} is not a file that can be read. Give a file with a Jinja template."
    fields = {"prompt": source.prompt, "messages": source.messages, "required": source.required}
    for name, value in fields.items():
        without = next((raw for raw in found if value and raw.format == "text"), None)
        flat = next((raw for raw in found if value and name == "messages" and raw.format in ("csv", "tsv")), None)
        if without is not None:
            yield name, f"{value!r} needs fields, and the text file {str(without.path)!r} has none. Name other files."
        elif flat is not None:
            yield name, f"{value!r} needs a list, and {str(flat.path)!r} holds only text. Use JSON or Parquet."


def codec(encoding: str) -> str:
    """Python's own name of an encoding; utf-8-sig is utf-8, whose mark at the start of a file is always dropped.

    Raises: LookupError or ValueError for an unknown name.
    """
    return codecs.lookup(encoding).name.removesuffix("-sig").replace("_", "-")


def has_byte_lines(encoding: str) -> bool:
    """Whether each byte 0x0A of a text in this encoding is a line end, and lines can be decoded one by one."""
    name = codec(encoding)
    return not name.startswith(STATEFUL) and "\n".encode(name) == b"\n"


# --- stretches of a file ------------------------------------------------------------------------------------------


def whole(raw: RawFile) -> Unit:
    """The file as one unit. Raises UserError if it cannot be read."""
    return inventory(raw, unit_bytes=1 << 62).units[0]


def inventory(raw: RawFile, *, unit_bytes: int) -> FileFacts:
    """Hash a file and cut it into units, in one pass. Raises UserError if it cannot be read.

    A file of lines is cut at the first line end at or after each multiple of `unit_bytes`, text with unit paragraph at
    the first empty line there; what cannot be cut (compressed, quoted, nested or two-byte text) is one unit.
    """
    end = _unit_end(raw)
    total, current = hashlib.sha256(), hashlib.sha256()
    units: list[tuple[int, int, int, str]] = []
    start = position = 0
    first_line = line = 1  # at `start`, and at what is in `current`
    tail = b""  # the last bytes before `position`: what a unit ends with may lie across two chunks
    for chunk in _chunks(raw.path):
        total.update(chunk)
        window = tail + chunk
        done = len(tail)  # of the window, what is in `current`
        while end is not None:
            target = (start // unit_bytes + 1) * unit_bytes
            found = end.search(window, max(target - position + len(tail), done + 1) - 1)
            cut = found.end() if found else None
            current.update(memoryview(window)[done:cut])
            line += window.count(b"\n", done, cut)
            if cut is None:
                break
            stop = position + cut - len(tail)
            units.append((start, stop, first_line, current.hexdigest()))
            current, start, first_line, done = hashlib.sha256(), stop, line, cut
        position += len(chunk)
        tail = window[-2:]
    if start < position or not units:
        units.append((start, position, first_line, (current if end else total).hexdigest()))
    found_units = tuple(Unit(raw, position, *unit) for unit in units)
    return FileFacts(raw, position, total.hexdigest(), found_units)


def _unit_end(raw: RawFile) -> re.Pattern[bytes] | None:
    """The last byte of what a unit of this file may end with; nothing if the file cannot be cut."""
    if raw.compression is not None or not has_byte_lines(raw.source.encoding):
        return None
    if raw.format == "jsonl" or (raw.format == "text" and raw.source.unit == "line"):
        return re.compile(rb"\n")
    if raw.format == "text" and raw.source.unit == "paragraph":
        return re.compile(rb"\n(?:(?<=\n\n)|(?<=\n\r\n))")
    return None


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Mend it, or name other files.") from error
