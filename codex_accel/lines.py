"""The bytes of a unit as physical lines with their numbers: unpacked, bounded, and proven to be the bytes of the unit.

Rule: what comes out belongs to the digest that the inventory took, or the reading ends in an error; and no line is
held that is longer than the limit.
"""

import codecs
import collections
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from codex_accel import sources
from codex_accel.errors import UserError
from codex_accel.sources import Unit

BOM = codecs.BOM_UTF8
CHUNK_BYTES = 1 << 18
Line = bytes | Iterator[bytes]  # with its end; one over the limit comes in pieces, which need not be read
Values = Iterator[tuple[int, Any]]  # (physical line, value or ValueError)
DAMAGED = (EOFError, OSError, zlib.error)  # what the decompressors raise, and a failing disk
MARKS = {
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


@dataclass
class Reading:
    """What bounds the reading of a unit, and how far it has come."""

    max_record_bytes: int
    fields: tuple[str, ...] = ()  # whose values are used
    present: tuple[str, ...] = ()  # that only have to be there
    num_bytes: int = 0  # raw bytes consumed so far


def encoding_of(unit: Unit) -> str:
    """The encoding of the lines of a unit: that of its source, or UTF-8 if they must be transcoded to be told apart."""
    encoding = unit.raw.source.encoding
    return sources.codec(encoding) if sources.has_byte_lines(encoding) else "utf-8"


def physical(unit: Unit, reading: Reading) -> Iterator[tuple[int, Line]]:
    """(number, line). A byte order mark is no part of a line, and the limit is of the bytes between the line ends.

    Raises: UserError if the bytes are not those of the unit, or cannot be unpacked or transcoded.
    """
    limit = reading.max_record_bytes
    number = unit.first_line - 1
    with Stream(unit, reading, encoding=encoding_of(unit)) as stream:
        readline, mark = stream.text.readline, stream.mark
        try:
            while line := readline(limit + len(BOM + b"\r\n")):  # what a line of the allowed length can take
                number += 1
                if mark:
                    line, mark = line.removeprefix(mark), b""
                if len(line) > limit and len(line.removesuffix(b"\n").removesuffix(b"\r")) > limit:
                    pieces = _pieces(line, readline)
                    yield number, pieces
                    collections.deque(pieces, maxlen=0)
                else:
                    yield number, line
        except (*DAMAGED, NotInEncoding) as error:
            raise stream.problem(error, number + 1) from error
        stream.finish()
    if number < unit.first_line and unit.raw.compression is not None:
        raise UserError(f"{unit.raw.path}: is empty once it is unpacked. Remove it or name others.")


def _pieces(line: bytes, readline: Callable[[int], bytes]) -> Iterator[bytes]:
    """The line that begins with `line`, piece by piece."""
    yield line
    while line and not line.endswith(b"\n"):
        line = readline(CHUNK_BYTES)
        yield line


def chunks(unit: Unit, reading: Reading) -> Iterator[bytes]:
    """The whole text in UTF-8, in pieces of CHUNK_BYTES, wherever its lines end."""
    line = unit.first_line
    with Stream(unit, reading, encoding="utf-8") as stream:
        mark = stream.mark
        try:
            while chunk := stream.text.read(max(CHUNK_BYTES, len(BOM))):
                yield chunk.removeprefix(mark)
                mark = b""
                line += chunk.count(b"\n")
        except (*DAMAGED, NotInEncoding) as error:
            raise stream.problem(error, line) from error
        stream.finish()


class Stream:
    """A unit that is open for reading: `text` gives its bytes, unpacked, in the encoding asked for."""

    def __init__(self, unit: Unit, reading: Reading, *, encoding: str):
        self.unit = unit
        self._raw = _RawBytes(unit, reading)
        self.text = _unpack(unit.raw.compression, self._raw)
        found = sources.codec(unit.raw.source.encoding)
        if found != encoding:
            self.text = io.BufferedReader(_Transcoder(self.text, found), CHUNK_BYTES)
        self.mark = BOM if unit.start == 0 and encoding == "utf-8" else b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._raw.close()

    def finish(self) -> None:
        """Read what is left, which nobody needs; raises UserError unless all was what the inventory found."""
        while self._raw.read(CHUNK_BYTES):
            pass
        if self._raw.sha256 != self.unit.sha256 or self._raw.file_bytes != self.unit.file_bytes:
            raise UserError(f"{self.unit.raw.path}: has changed while it was being read. Run again.")

    def problem(self, error: Exception, line: int) -> UserError:
        """What to tell of an error at this line of the text: that the file has changed, if it has."""
        place, position = f"{self.unit.raw.path}:{line}", self.unit.start + self._raw.num_bytes
        if isinstance(error, OSError) and error.errno is not None:
            return UserError(
                f"{place}: cannot be read after byte {position} ({error.strerror}). Mend the disk or copy."
            )
        self.finish()
        if isinstance(error, NotInEncoding):
            return UserError(f"{self.unit.raw.path}:{error.line}: {error}")
        what = "is cut off" if isinstance(error, EOFError) or "Truncated" in str(error) else "is damaged"
        return UserError(
            f"{place}: the {self.unit.raw.compression} file {what} before byte {position} ({error}). What lies behind "
            "cannot be read or counted: fetch or make the file again."
        )


class _RawBytes(io.RawIOBase):
    """The bytes of a unit as they lie on the disk, hashed and counted as they go through."""

    def __init__(self, unit: Unit, reading: Reading):
        try:
            self._file = open(unit.raw.path, "rb", buffering=0)  # noqa: SIM115 (closed with this)
            self._file.seek(unit.start)
        except OSError as error:
            what = f"cannot be read ({error.strerror}). Mend it, or name other files."
            raise UserError(f"{unit.raw.path}: {what}") from error
        self._hash = hashlib.sha256()
        self._left, self._reading = unit.num_bytes, reading
        self.num_bytes = reading.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto(view) or 0
        self._hash.update(view[:count])
        self._left -= count
        self.num_bytes += count
        self._reading.num_bytes = self.num_bytes
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    @property
    def file_bytes(self) -> int:
        """Of the whole file, as it is now: what was appended to it lies in no unit."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _unpack(compression: str | None, raw: io.RawIOBase) -> io.BufferedReader:
    if compression is None:
        return io.BufferedReader(raw, CHUNK_BYTES)
    if compression == "gz":
        packed = io.BufferedReader(raw, CHUNK_BYTES)
        return io.BufferedReader(gzip.GzipFile(fileobj=packed, mode="rb"), CHUNK_BYTES)
    import pyarrow  # reads several frames and tells a cut; the package zstandard ends at a cut without a word

    unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(unpacked, CHUNK_BYTES)


class NotInEncoding(ValueError):
    """The text of a stream is not in its encoding, from this line on."""

    def __init__(self, what: str, line: int):
        super().__init__(what)
        self.line = line


class _Transcoder(io.RawIOBase):
    """UTF-8 of a text in an encoding whose lines cannot be told apart as bytes; an error comes after all before it."""

    def __init__(self, packed: io.BufferedReader, encoding: str):
        self._packed, self._encoding = packed, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._error = b"", None  # type: tuple[bytes, NotInEncoding | None]
        self._position, self._ended = 0, False  # bytes of the text that were given to the decoder
        self._line = 1  # that is being decoded

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            if self._error is not None:
                raise self._error
            self._decode(self._packed.read(CHUNK_BYTES))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decode(self, data: bytes) -> None:
        if self._position == 0 and self._encoding in MARKS and not data.startswith(MARKS[self._encoding]):
            name = self._encoding
            raise NotInEncoding(f"has no byte order mark. Set encoding to {name}-le or {name}-be, whichever it is.", 1)
        state = self._decoder.getstate()
        waiting = len(state[0])  # bytes of a character that has begun
        try:
            self._ready = self._decoder.decode(data, final=not data).encode()
            self._ended = not data and not self._ready
        except UnicodeError as error:
            at = getattr(error, "start", 0) if isinstance(error, UnicodeDecodeError) else 0
            place = self._position - waiting + at
            what = f"not {self._encoding} at byte {place} of the text. Convert the file, or set encoding."
            self._decoder.setstate(state)
            good = data[: max(at - waiting, 0)]
            self._ready = self._decoder.decode(good).encode() if good else b""
            self._error = NotInEncoding(what, self._line + self._ready.count(b"\n"))
        self._line += self._ready.count(b"\n")
        self._position += len(data)
