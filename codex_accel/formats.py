"""Raw files as located values: one function a format, each giving (line, value), or (line, ValueError) for a bad one.

Rule: nothing is dropped in silence. What cannot be used comes out as an error with its place, the next value is read,
and where nothing behind a fault can be told apart, the reading ends in a UserError. Reasons never repeat the data.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from codex_accel import files, lines, sources
from codex_accel.errors import UserError
from codex_accel.lines import Reading
from codex_accel.sources import Unit

Values = Iterator[tuple[int, Any]]  # (physical line, value or ValueError)
MAX_DEPTH = 400  # of nested JSON; far below Python's recursion limit, so that the answer is the same on any stack
MAX_DIGITS = 400  # of a JSON integer
NEWLINE = b"\n"
BATCH_BYTES, BATCH_ROWS = 8 << 20, 1024  # of a Parquet file held at once, whichever is less

# --- words for reasons --------------------------------------------------------------------------------------------


def too_long(reading: Reading) -> ValueError:
    """The reason for a record over the limit."""
    return ValueError(f"longer than max_record_bytes = {reading.max_record_bytes}")


def shown(name: str) -> str:
    """A field's name from the data, if it is a plain short word and can be no secret."""
    plain = re.fullmatch(r"[\w -]{1,32}", name) and sum(map(str.isdigit, name)) <= 3
    return repr(name) if plain else f"a name of {len(name)} characters"


def names(fields: list[str]) -> str:
    """What fields there are, for a reason: the first eight."""
    return ", ".join(map(shown, fields[:8])) + (f" and {len(fields) - 8} more" if len(fields) > 8 else "") or "none"


def decode(data: bytes | bytearray | memoryview, encoding: str) -> str:
    """Text of `data`; raises ValueError with the place of the first byte that is not in the encoding."""
    try:
        return str(data, encoding)
    except UnicodeDecodeError as error:
        where = _place(error.object, error.start, NEWLINE)
        what = f"not {encoding}: byte 0x{error.object[error.start]:02x} {where}. Convert the file, or set encoding"
        raise ValueError(what) from None


def _place(data: Any, at: int, end: Any) -> str:
    """Where place `at` of a record lies: its column, and its line if it is not the first; `end` is a line end."""
    column, line = at - data.rfind(end, 0, at), data.count(end, 0, at) + 1
    return f"at column {column}" + (f" of its line {line}" if line > 1 else "")


def _refuse_nul(data: bytes | bytearray) -> None:
    if b"\0" in data:
        raise ValueError(f"raw NUL byte: {_place(data, data.index(0), NEWLINE)}")


def _text_of(unit: Unit) -> tuple[bool, str]:
    """Whether the stream must be transcoded, and the encoding of its bytes then."""
    encoding = unit.raw.source.encoding
    return (False, sources.codec(encoding)) if sources.has_byte_lines(encoding) else (True, "utf-8")


# --- JSON ---------------------------------------------------------------------------------------------------------


def jsonl(unit: Unit, reading: Reading) -> Values:
    """One JSON value a line; blank lines are neither values nor errors."""
    transcode, encoding = _text_of(unit)
    for number, line in lines.physical(unit, reading, transcode=transcode):
        if line is None:
            yield number, too_long(reading)
            continue
        line = line.rstrip(b" \t\r\n")
        if not line:
            continue
        try:
            value = parse(decode(line, encoding))
        except ValueError as error:
            value = error
        yield number, value


def parse(text: str, *, unit: str = "column") -> Any:
    """One JSON value, by RFC 8259 and stricter: duplicate keys, NaN and numbers out of range are refused.

    Raises: ValueError with the reason; places are counted in characters from 1 and called `unit`.
    """
    start = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        value, end = _DECODER.raw_decode(text, start)
        if end < len(text) and text[end:].strip(" \t\r\n"):
            end += len(text[end:]) - len(text[end:].lstrip(" \t\r\n"))
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at {unit} {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError("JSON nested too deeply")
    return value


def _depth(value: Any) -> int:
    """How many arrays and objects lie within each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key: {shown(twice)}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"integer too long: {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float, parse_int=_integer
)

_SPACE = re.compile(rb"[ \t\r\n]*+")
# A string up to its quote, or to one behind several backslashes, which must be counted. `[^"\\]` would say it better
# and is five times slower in Python's re. What is flat (no bracket in a bracket) is stepped over in one match.
_IN_STRING = rb'[^"]*+(?:(?<=[^\\]\\)"[^"]*+)*+'
_STRING = rb'"' + _IN_STRING + rb'(?<!\\)"'
_FLAT = rb'[\[{](?:[^"\[\]{}]++|' + _STRING + rb")*+[\]}]"
_REST_OF_STRING = re.compile(_IN_STRING)
_BETWEEN = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb"|" + _FLAT + rb")*+")
_INSIDE = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb"|" + _FLAT + rb")*+")


def json_array(unit: Unit, reading: Reading) -> Values:
    """The elements of one JSON array of any size; memory is bounded by the largest element and by the limit.

    An element ends at the comma or bracket where its own brackets and strings are closed, so a bad one spoils no other.
    Raises: UserError if the file is no array, has no end, or goes on after it: what is there cannot be counted.
    """
    encoding = sources.codec(unit.raw.source.encoding)
    elements = _Elements(unit, reading, lines.chunks(unit, reading, transcode=encoding != "utf-8"))
    num_elements = 0
    elements.open_array()
    while True:
        line, data, closed = elements.next()
        missing = data == b""
        if missing and closed and not num_elements:
            break  # []
        num_elements += 1
        value: Any
        try:
            if data is None:
                raise too_long(reading)
            if missing:
                raise ValueError("not JSON: no value before a comma or after the last one")
            value = parse(decode(data, "utf-8"), unit="character")
        except ValueError as error:
            value = error
        yield line, value
        if closed:
            break
    elements.close()


class _Elements:
    """Cuts the text of an array into the bytes of its elements, chunk by chunk."""

    def __init__(self, unit: Unit, reading: Reading, pieces: Iterator[bytes]):
        self._path, self._limit, self._pieces = unit.raw.path, reading.max_record_bytes, pieces
        self._chunk, self._at = b"", 0
        self._line = unit.first_line  # at the place `_at` of the chunk

    def _more(self) -> bool:
        """Go on to the next chunk; false at the end of the text."""
        self._chunk, self._at = next(self._pieces, b""), 0
        return bool(self._chunk)

    def _advance(self, stop: int) -> bytes:
        data = self._chunk[self._at : stop]
        self._line += data.count(b"\n")
        self._at = stop
        return data

    def _skip_space(self) -> bytes:
        """The next byte that is no white space, still unread; empty at the end of the text."""
        while True:
            self._advance(_SPACE.match(self._chunk, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._chunk):
                return self._chunk[self._at : self._at + 1]
            if not self._more():
                return b""

    def open_array(self) -> None:
        first = self._skip_space()
        if first == b"[":
            self._advance(self._at + 1)
            return
        what = {b"": "holds no JSON array, only white space", b"{": "begins with a JSON object, not with an array"}
        told = what.get(first, "does not begin with the [ of a JSON array")
        raise UserError(
            f"{self._path}:{self._line}: {told}. Set format: jsonl if each line is a value; else give one array."
        )

    def next(self) -> tuple[int, bytes | None, bool]:
        """(line, bytes of the element or None if they are too many, whether the array ends behind it)."""
        self._skip_space()
        first_line = self._line
        pieces: list[bytes] | None = []
        size = depth = 0
        in_string = False
        while True:
            start = self._at
            stop, depth, in_string, end = _scan(self._chunk, start, depth, in_string)
            data = self._advance(stop)
            size += len(data)
            if size > self._limit + lines.CHUNK_BYTES:  # white space at its end is not of the element
                pieces = None
            elif pieces is not None:
                pieces.append(data)
            if end:
                self._advance(stop + 1)
                element = None if pieces is None else b"".join(pieces).rstrip(b" \t\r\n")
                if element is not None and len(element) > self._limit:
                    element = None
                return first_line, element, end == b"]"
            left = self._chunk[stop:]  # half an escape, which is one byte
            if not self._more():
                what = f"the JSON array is not closed: its last element begins in line {first_line}"
                raise UserError(f"{self._path}:{self._line}: {what}. Mend the file, or fetch it again.")
            self._chunk = left + self._chunk

    def close(self) -> None:
        if self._skip_space():
            what = "goes on after the end of its JSON array. Give one array a file, or set format: jsonl"
            raise UserError(f"{self._path}:{self._line}: {what}.")


def _scan(chunk: bytes, at: int, depth: int, in_string: bool) -> tuple[int, int, bool, bytes]:
    """From `at` to the end of an element or of the chunk: (place, depth, whether in a string, byte that ends it)."""
    while True:
        if in_string:
            at, in_string = _scan_string(chunk, at)
            if in_string:
                return at, depth, True, b""
        if depth > MAX_DEPTH:  # it cannot come to an end within so many bytes, so brackets need only be counted
            stop = at + depth - 1
            quote = chunk.find(b'"', at, stop)
            brackets = chunk[at : stop if quote < 0 else quote]
            depth += sum(map(brackets.count, b"[{")) - sum(map(brackets.count, b"]}"))
            at += len(brackets)
        at = (_INSIDE if depth else _BETWEEN).match(chunk, at).end()  # type: ignore[union-attr]
        byte = chunk[at : at + 1]
        if byte == b"":
            return at, depth, False, b""
        if not depth and byte in b",]":
            return at, 0, False, byte
        if byte == b'"':
            in_string = True
        elif byte in b"[{":
            depth += 1
        elif depth:  # a bracket that closes; one that closes nothing makes the element bad when it is parsed
            depth -= 1
        at += 1


def _scan_string(chunk: bytes, at: int) -> tuple[int, bool]:
    """From `at` in a string to behind its quote, or to the chunk's end less half an escape: (place, whether in it)."""
    while True:
        begin, at = at, _REST_OF_STRING.match(chunk, at).end()  # type: ignore[union-attr]
        is_escaped = False
        if chunk[at - 1 : at] == b"\\":
            text = chunk[begin:at]
            is_escaped = (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
        if at == len(chunk):
            return at - is_escaped, True
        at += 1
        if not is_escaped:
            return at, False


# --- tables -------------------------------------------------------------------------------------------------------


def csv(unit: Unit, reading: Reading) -> Values:
    """Rows as {field: text} by RFC 4180, named by the first row; rows end in LF or CRLF, empty lines are none.

    The csv module is not used: it holds 4 bytes for each character of a field, and lets quotes stand in plain fields.
    Raises: UserError for a header that cannot name the fields.
    """
    delimiter = unit.raw.source.delimiter or ("\t" if unit.raw.format == "tsv" else ",")
    transcode, encoding = _text_of(unit)
    stream = _Resumable(lines.physical(unit, reading, transcode=transcode))
    split = _splitter(delimiter, quoted=unit.raw.source.quoted)
    header: list[str] | None = None
    for number, row in _rows(stream, split, encoding, reading):
        if header is None:
            header = _header(row, reading, f"{unit.raw.path}:{number}")
        elif isinstance(row, ValueError):
            yield number, row
        elif len(row) != len(header):
            yield number, ValueError(f"ragged row: {_count(len(row), 'field')}, the header has {len(header)}")
        else:
            yield number, dict(zip(header, row, strict=True))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _header(row: list[str] | ValueError, reading: Reading, place: str) -> list[str]:
    if isinstance(row, ValueError):
        raise UserError(f"{place}: the header cannot be read: {row}. Mend it, or set format, encoding and quoted.")
    _require_columns(row, reading, place)
    return row


def _require_columns(columns: list[str], reading: Reading, place: str) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}: two columns have one name: {shown(twice)}. Give each its own.")
    for name in (*reading.fields, *reading.present):
        if name not in columns:
            raise UserError(f"{place}: no column {name!r}: there are {names(columns)}. Name the field that is meant.")


class _Resumable:
    """Physical lines that can be given back, held as the bytes that they are."""

    def __init__(self, source: Iterator[tuple[int, bytes | None]]):
        self._source = source
        self._back: list[Iterator[tuple[int, bytes | None]]] = []  # the last is read first

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        return self

    def __next__(self) -> tuple[int, bytes | None]:
        while self._back:
            for item in self._back[-1]:
                return item
            self._back.pop()
        return next(self._source)

    def give_back(self, number: int, data: bytes | bytearray, *, then: tuple[int, None] | None = None) -> None:
        """Have these whole lines, the first of this number, read next, and behind them one that was too long."""
        self._back.append(iter([then] if then else []))
        self._back.append(enumerate(io.BytesIO(data), number))


class _Malformed(ValueError):
    """A fault in a row, which ends with the last of these lines."""

    def __init__(self, what: str, text: str, at: int):
        super().__init__(f"{what}: {_place(text, at, chr(10))}")
        self.num_lines = text.count("\n", 0, at) + 1


class _NotClosed(_Malformed):
    """A quoted field has no end in the text."""


def _rows(
    stream: _Resumable, split: Callable[[str], list[str]], encoding: str, reading: Reading
) -> Iterator[tuple[int, list[str] | ValueError]]:
    """(line of its start, fields) of each row.

    A row is complete when its quotes are even in number. A fault lies outside of quotes, so a malformed row ends with
    the line of its fault; a quote that is never closed spoils its line alone. Reading goes on in the line behind.
    """
    for number, line in stream:
        if line is None:
            yield number, too_long(reading)
        elif line.rstrip(b"\r\n"):
            row = _row(line, split, encoding)
            if isinstance(row, _NotClosed):
                row = _gathered(number, line, stream, split, encoding, reading)
            yield number, row


def _gathered(
    number: int, line: bytes, stream: _Resumable, split: Callable[[str], list[str]], encoding: str, reading: Reading
) -> list[str] | ValueError:
    """The row that begins with an open quote in `line`; what is not of it is given back."""
    data = bytearray(line)
    for behind, more in stream:
        data += more or b""
        if more is None or len(data) > reading.max_record_bytes + len(b"\r\n"):
            stream.give_back(number + 1, data[len(line) :], then=(behind, None) if more is None else None)
            return ValueError(f"a quote is not closed: within max_record_bytes = {reading.max_record_bytes}")
        if more.count(b'"') % 2:
            row = _row(data, split, encoding)
            if isinstance(row, _Malformed):
                end = 0
                for _ in range(row.num_lines):
                    end = data.find(b"\n", end) + 1 or len(data)
                stream.give_back(number + row.num_lines, data[end:])
            return row
    stream.give_back(number + 1, data[len(line) :])
    return ValueError("a quote is not closed: before the file ends")


def _row(data: bytes | bytearray, split: Callable[[str], list[str]], encoding: str) -> list[str] | ValueError:
    """Fields of a row with its line end, or its fault: one of the quotes comes before one of the bytes."""
    end = 2 if data.endswith(b"\r\n") else int(data.endswith((b"\n", b"\r")))
    try:
        view = memoryview(data)[: len(data) - end]  # a slice would be a copy
        try:
            text = decode(view, encoding)
        except ValueError:
            split(str(view, encoding, "replace"))
            raise
        fields = split(text)
        _refuse_nul(data)
    except ValueError as error:
        return error
    return fields


def _splitter(delimiter: str, *, quoted: bool) -> Callable[[str], list[str]]:
    """What cuts the text of a row into its fields; it raises _Malformed."""
    d = re.escape(delimiter)
    field = re.compile(rf'"((?:[^"]++|"")*+)"|[^"{d}\r\n]*+' if quoted else rf"[^{d}\r\n]*+")

    def split(text: str) -> list[str]:
        if "\r" not in text and not (quoted and '"' in text):
            return text.split(delimiter)
        fields, at = [], 0
        while True:
            found: Any = field.match(text, at)
            begin, at = at, found.end()
            fields.append(found[1].replace('""', '"') if found.lastindex else found[0])
            if at == len(text):
                return fields
            if text[at] != delimiter:
                raise _fault(text, begin, at, in_quotes=bool(found.lastindex))
            at += 1

    return split


def _fault(text: str, begin: int, at: int, *, in_quotes: bool) -> _Malformed:
    """What is wrong with the field that begins at `begin` and may not be followed by what stands at `at`."""
    if text[at] == "\r":
        return _Malformed("a lone CR outside of quotes, where rows end in LF or CRLF", text, at)
    if in_quotes:
        return _Malformed("text after a closing quote", text, at)
    if at > begin:
        return _Malformed("a quote in an unquoted field", text, at)
    return _NotClosed("a quote is not closed", text, at)


# --- text ---------------------------------------------------------------------------------------------------------


def text(unit: Unit, reading: Reading) -> Values:
    """One text a line, a paragraph (lines between blank ones) or a file, with line ends as one newline."""
    transcode, encoding = _text_of(unit)
    by = unit.raw.source.unit
    start, data, is_long = unit.first_line, bytearray(), False  # of the record that is being gathered
    for number, line in lines.physical(unit, reading, transcode=transcode):
        blank = line is not None and not line.strip()
        if by == "line":
            yield from () if blank else _text(number, line, encoding, reading, by)
            continue
        if blank and by == "paragraph":
            yield from _text(start, None if is_long else data, encoding, reading, by)
            data, is_long = bytearray(), False
            continue
        if not data and not is_long:
            start = number
        is_long = is_long or line is None or len(data) + len(line) > reading.max_record_bytes + len(b"\r\n")
        if is_long or line is None:
            data = bytearray()
        else:
            data += line
    yield from _text(start, None if is_long else data, encoding, reading, by)


def _text(
    number: int, data: bytes | bytearray | None, encoding: str, reading: Reading, by: str
) -> list[tuple[int, str | ValueError]]:
    """The record that begins in line `number`, or the line and reason of its fault; nothing if it is blank."""
    if data is None:
        return [(number, too_long(reading))]
    try:
        text = _plain(data, encoding).replace("\r\n", "\n")
    except ValueError as error:
        for at, line in enumerate(io.BytesIO(data), number):
            try:
                _plain(line, encoding)
            except ValueError as fault:
                return [(at, fault)]
        return [(number, error)]
    if by != "file":
        text = text.removesuffix("\n")
    return [(number, text)] if text and not text.isspace() else []


def _plain(data: bytes | bytearray, encoding: str) -> str:
    text = decode(data, encoding)
    _refuse_nul(data)
    return text


# --- Parquet ------------------------------------------------------------------------------------------------------


def parquet(unit: Unit, reading: Reading) -> Values:
    """Rows as {column: value}, of the columns that are needed; the line is the number of the row, from 1.

    The digest of the file is checked before and after the reading. Raises: UserError for a file that is damaged or
    lacks a column.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path, row = unit.raw.path, 0
    _require_digest(unit)
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            _require_columns(table.schema_arrow.names, reading, str(path))
            columns = sorted({*reading.fields, *reading.present})
            for batch in table.iter_batches(_batch_rows(table.metadata), columns=columns):
                for value in _values(batch, reading):
                    row += 1
                    yield row, value
                reading.num_bytes = unit.num_bytes * row // table.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        _require_digest(unit)
        what = f"is no Parquet file that can be read ({' '.join(str(error).split())[:200]})"
        raise UserError(f"{path}:{row + 1}: {what}. Fetch or make it again.") from error
    _require_digest(unit)
    reading.num_bytes = unit.num_bytes


def _require_digest(unit: Unit) -> None:
    if files.sha256_file(unit.raw.path) != unit.sha256:
        raise UserError(f"{unit.raw.path}: has changed while it was being read. Run again.")


def _batch_rows(metadata: Any) -> int:
    """Rows to hold at once, by the mean size of a row in the row group where it is largest."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    mean = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1)
    return int(min(max(BATCH_BYTES // max(mean, 1), 1), BATCH_ROWS))


def _values(batch: Any, reading: Reading) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a batch; of a column that only has to be there, None or True."""
    columns: dict[str, list[Any]] = {}
    for name in reading.present:
        columns[name] = [valid or None for valid in batch.column(name).is_valid().to_pylist()]
    for name in reading.fields:
        try:
            columns[name] = batch.column(name).to_pylist()
        except ValueError:  # in any of its cells
            columns[name] = [_cell(cell) for cell in batch.column(name)]
    for row in zip(*columns.values(), strict=True):
        fault = next((cell for cell in row if isinstance(cell, ValueError)), None)
        if sum(map(_num_bytes, row)) > reading.max_record_bytes:
            fault = too_long(reading)
        yield fault or dict(zip(columns, row, strict=True))


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return ValueError(f"not utf-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a cell")
    except ValueError:
        return ValueError(f"a cell of type {cell.type} that Python cannot hold")


def _num_bytes(value: Any) -> int:
    """UTF-8 bytes of the texts in a cell."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, list | dict):
        return sum(map(_num_bytes, value.values() if isinstance(value, dict) else value))
    return 0


FORMATS: dict[str, Callable[[Unit, Reading], Values]] = {
    "jsonl": jsonl,
    "json": json_array,
    "csv": csv,
    "tsv": csv,
    "text": text,
    "parquet": parquet,
}
