"""Records out of raw files: every line is a record, a blank line, or a located bad record.

Rule: nothing is dropped in silence. What cannot be used comes out as a `BadRecord` with file, line and reason, and the
digest of a file is taken from the very bytes that were parsed.
"""

import codecs
import glob
import hashlib
import json
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from codex_accel import files
from codex_accel.errors import UserError
from codex_accel.schema import Source

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text", ".py": "text"}
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One document before tokenization: its parts in order, each with whether it is a target."""

    file: str
    line: int  # 1-based, of its first line
    offset: int  # of its first byte in the file
    parts: tuple[tuple[str, bool], ...]  # ((prompt, False), (completion, True)) or ((text, True),)
    key: str | None = None  # value of split.key

    @property
    def id(self) -> bytes:
        """16 bytes of SHA-256 over the content: equal content has an equal id, wherever it lies."""
        return hashlib.sha256(json.dumps(self.parts).encode()).digest()[:16]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    file: str
    line: int
    reason: str  # `<kind>: <detail>`, or the kind alone; of kinds there are few, so they can be counted


@dataclass(frozen=True)
class RawFile:
    """One file of a source, with its format decided."""

    path: Path
    format: str
    source: Source


def resolve(sources: list[Source], *, config_problem: Any, key: str = "sources.{}") -> list[RawFile]:
    """Every file that `sources` name, in order of the sources and sorted by path within each.

    `config_problem(key, what)` makes the problem line; `key` is where source number {} stands in the config. Raises:
    UserError listing each path without a match, empty file, file whose format cannot be told, and unknown or unsuitable
    encoding.
    """
    found: list[RawFile] = []
    problems: list[str] = []
    for index, source in enumerate(sources):
        paths = _expand(source.path)
        if not paths:
            problems.append(
                config_problem(f"{key.format(index)}.path", f"no file matches {source.path!r}. Check the path.")
            )
        for path in paths:
            format_ = SUFFIXES.get(path.suffix.lower()) if source.format == "auto" else source.format
            if format_ is None:
                what = f"cannot tell the format of '{path}' by its suffix. Set format, or name only the files you want."
                problems.append(config_problem(f"{key.format(index)}.path", what))
            elif path.stat().st_size == 0:
                problems.append(
                    config_problem(f"{key.format(index)}.path", f"'{path}' is empty. Remove it or name others.")
                )
            else:
                found.append(RawFile(path, format_, source))
        try:
            if "\n".encode(_codec(source.encoding)) != b"\n":
                what = f"{source.encoding!r} does not write a line end as one byte. Convert the file to utf-8 first."
                problems.append(config_problem(f"{key.format(index)}.encoding", what))
        except (LookupError, ValueError):
            what = f"unknown encoding {source.encoding!r}. Use a Python codec name such as utf-8 or latin-1."
            problems.append(config_problem(f"{key.format(index)}.encoding", what))
    if problems:
        raise UserError(*problems)
    return found


def _codec(encoding: str) -> str:
    """Python's own name of an encoding; utf-8-sig is utf-8, whose mark at the start of a file is always dropped."""
    return codecs.lookup(encoding).name.removesuffix("-sig")


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file())
        return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if path.is_file():
        return [path]
    return sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())


class Reader:
    """Iterates over the records of one file; `sha256` and `num_bytes` are of the bytes that went through."""

    def __init__(self, raw: RawFile, *, max_record_bytes: int, key: str | None = None):
        self.raw, self.max_record_bytes, self.key = raw, max_record_bytes, key
        self.encoding = _codec(raw.source.encoding)
        self.num_bytes = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Digest of what was read so far: of the file, once the iteration has ended."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Record | BadRecord]:
        self.num_bytes, self._hash = 0, hashlib.sha256()
        with open(self.raw.path, "rb") as stream:
            lines = self._lines(stream)
            yield from self._from_json(lines) if self.raw.format == "jsonl" else self._from_text(lines)

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
        """(number, offset, line with its end); a line over the limit comes as None. Memory is bounded by the limit."""
        number = 0
        limit = self.max_record_bytes + len(BOM + b"\r\n")  # what a line of the allowed length can take
        while line := stream.readline(limit):
            number, offset = number + 1, self.num_bytes
            self._count(line)
            if number == 1 and self.encoding == "utf-8":
                line = line.removeprefix(BOM)
            if len(line.removesuffix(b"\n").removesuffix(b"\r")) > self.max_record_bytes:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(1 << 20)
                    self._count(line)
                yield number, offset, None
            else:
                yield number, offset, line

    def _count(self, data: bytes) -> None:
        self._hash.update(data)
        self.num_bytes += len(data)

    def _bad(self, line: int, reason: str) -> BadRecord:
        return BadRecord(str(self.raw.path), line, reason)

    def _decode(self, data: bytes) -> str:
        """Text of `data`; raises ValueError with the place of the first byte that is not in the encoding."""
        try:
            return data.decode(self.encoding)
        except UnicodeDecodeError as error:
            found = data[error.start : error.start + 1].hex()
            raise ValueError(
                f"not {self.encoding}: byte 0x{found} at column {error.start + 1}. Convert the file, or set encoding"
            ) from error

    def _from_text(self, lines: Iterator[tuple[int, int, bytes | None]]) -> Iterator[Record | BadRecord]:
        """One record a line, a paragraph (lines between blank ones) or a file, with line ends as one newline."""
        unit = self.raw.source.unit
        start, pending = (1, 0), list[str]()  # (line, offset) of the record that is being gathered
        size, failed = 0, None
        for number, offset, line in lines:
            blank = line is not None and not line.strip()
            if unit == "line" or (unit == "paragraph" and blank) or (not pending and failed is None):
                yield from self._emit(start, pending, failed)
                start, pending, size, failed = (number, offset), [], 0, None
            if blank and unit != "file":
                continue
            size += len(line or b"")
            if failed is not None:
                continue
            try:
                if line is None or size > self.max_record_bytes + 2:
                    raise ValueError(f"longer than max_record_bytes = {self.max_record_bytes}")
                pending.append(self._decode(line).replace("\r\n", "\n"))
            except ValueError as error:
                failed, pending = self._bad(number, str(error)), []
        yield from self._emit(start, pending, failed)

    def _emit(
        self, start: tuple[int, int], pending: list[str], failed: BadRecord | None
    ) -> Iterator[Record | BadRecord]:
        text = "".join(pending)
        if self.raw.source.unit != "file":
            text = text.removesuffix("\n")
        if failed is not None:
            yield failed
        elif text.strip():
            yield Record(str(self.raw.path), *start, ((text, True),))

    def _from_json(self, lines: Iterator[tuple[int, int, bytes | None]]) -> Iterator[Record | BadRecord]:
        for number, offset, line in lines:
            if line is not None and not line.strip():
                continue
            try:
                if line is None:
                    raise ValueError(f"longer than max_record_bytes = {self.max_record_bytes}")
                yield self._record(number, offset, parse_object(self._decode(line.rstrip())))
            except ValueError as error:
                yield self._bad(number, str(error))

    def _record(self, number: int, offset: int, value: dict[str, Any]) -> Record:
        source = self.raw.source
        parts: tuple[tuple[str, bool], ...]
        if source.prompt is not None and source.completion is not None:
            parts = ((_field(value, source.prompt), False), (_field(value, source.completion), True))
        else:
            parts = ((_field(value, source.text), True),)
        if not any(text for text, is_target in parts if is_target):
            raise ValueError(f"field {source.completion or source.text!r} is empty, so nothing is a target")
        key = None if self.key is None else _field(value, self.key)
        return Record(str(self.raw.path), number, offset, tuple(parts), key)


def describe(raw: RawFile) -> dict[str, Any]:
    """How a manifest records a raw file that was read whole."""
    size, digest = raw.path.stat().st_size, files.sha256_file(raw.path)
    return {"path": str(raw.path), "format": raw.format, "size": size, "sha256": digest}


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object, by RFC 8259 and stricter: duplicate keys, NaN and numbers out of range are refused.

    Raises: ValueError with the reason.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key: {reprlib.repr(twice)}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number out of range: {text[:20]}")
    return value


def _integer(text: str) -> int:
    if len(text) > 400:
        raise ValueError(f"integer too long: {len(text)} digits")
    return int(text)


def _field(value: dict[str, Any], name: str) -> str:
    if name not in value:
        raise ValueError(f"no field {name!r}: there are {', '.join(map(reprlib.repr, list(value)[:8])) or 'none'}")
    text = value[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is of type {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} holds a lone surrogate: at character {error.start + 1}") from None
    return text
