"""Rows of CSV and TSV files as located values, by RFC 4180.

Rule: a row that cannot be used is one bad record, and what may belong to it is never read as rows, unless a quote is
open to the end of the file: then it has spoiled its first line alone.
"""

import codecs
import io
import re
from collections.abc import Callable, Iterable, Iterator

from codex_accel import lines, reasons
from codex_accel.errors import UserError
from codex_accel.lines import Line, Reading, Values
from codex_accel.sources import Unit

# Possessive (`++`, `*+`): what has been matched is not tried again shorter, which would take quadratic time.
_IN_QUOTES = rb'(?:[^"]++|"")*+'


def csv(unit: Unit, reading: Reading) -> Values:
    """Rows as {field: text}, named by the first row; rows end in LF or CRLF, empty lines are none.

    The csv module is not used: it holds 4 bytes for each character of a field, and lets quotes stand in plain fields.
    Raises: UserError for a header that cannot name the fields.
    """
    header: list[str] | None = None
    for number, row in _rows(_Table(unit, reading)):
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
    require_columns(row, reading, place)
    return row


def require_columns(columns: list[str], reading: Reading, place: str) -> None:
    """Raises UserError if two columns have one name, or one that is needed is missing."""
    seen: set[str] = set()
    for name in columns:
        if name in seen:
            raise UserError(f"{place}: two columns have one name: {reasons.shown(name)}. Give each its own.")
        seen.add(name)
    for name in (*reading.fields, *reading.present):
        if name not in seen:
            what = f"no column {name!r}: there are {reasons.names(columns)}. Name the field that is meant."
            raise UserError(f"{place}: {what}")


# --- lines and rows -----------------------------------------------------------------------------------------------


class _Table:
    """A table that is being read: how its rows are split, and its physical lines, which can be read again."""

    def __init__(self, unit: Unit, reading: Reading):
        source = unit.raw.source
        self.reading, self.encoding = reading, lines.encoding_of(unit)
        self.delimiter = source.delimiter or ("\t" if unit.raw.format == "tsv" else ",")
        self.quoted = source.quoted
        self.split = _splitter(self.delimiter.encode(), quoted=source.quoted)
        self._unit, self._source = unit, lines.physical(unit, reading)
        self._back: list[Iterator[tuple[int, Line]]] = []  # the last is read first

    def __iter__(self) -> Iterator[tuple[int, Line]]:
        return self

    def __next__(self) -> tuple[int, Line]:
        while self._back:
            for item in self._back[-1]:
                return item
            self._back.pop()
        return next(self._source)

    def give_back(self, items: Iterable[tuple[int, Line]]) -> None:
        """Have these lines read next, before what was given back earlier."""
        self._back.append(iter(items))

    def go_back(self, number: int) -> None:
        """Read on behind line `number`, from the start of the unit.

        That happens once in a file at most: it has been read to its end without a line that could close the quote, so
        each line behind holds quotes in pairs, and none can open one.
        """
        self._source, self._back = lines.physical(self._unit, self.reading), []
        for at, _ in self._source:
            if at == number:
                break


class _Malformed(ValueError):
    """A fault in a row, which ends with the last of these lines."""

    def __init__(self, what: str, data: bytes | bytearray, at: int):
        start = data.rfind(b"\n", 0, at) + 1
        self.num_lines = data.count(b"\n", 0, at) + 1
        column = len(str(data[start:at], "utf-8", "replace")) + 1
        super().__init__(f"{what}: {reasons.place(column, self.num_lines)}")


class _NotClosed(_Malformed):
    """A quoted field has no end in the text."""


def _rows(table: _Table) -> Iterator[tuple[int, list[str] | ValueError]]:
    """(line of its start, fields) of each row.

    A row is complete when its quotes are even in number. A fault lies outside of quotes, so a malformed row ends with
    the line of its fault; a quote that is open to the end of the file spoils its line alone.
    """
    for number, line in table:
        if not isinstance(line, bytes):
            yield number, _passed(number, _leaves_open(line, table, in_quotes=False), table)
        elif line.removesuffix(b"\n").removesuffix(b"\r"):
            row = _row(line, table)
            if isinstance(row, _NotClosed):
                row = _gathered(number, line, table)
            yield number, row


def _gathered(number: int, line: bytes, table: _Table) -> list[str] | ValueError:
    """The row that begins with an open quote in `line`; what is not of it is given back."""
    data = bytearray(line)
    for behind, more in table:
        if not isinstance(more, bytes) or len(data) + len(more) > table.reading.max_record_bytes + len(b"\r\n"):
            table.give_back([(behind, more)])
            break
        data += more
        if more.count(b'"') % 2:
            break
    row = _row(data, table)
    if isinstance(row, _NotClosed):
        return _passed(number, True, table)
    if isinstance(row, _Malformed):
        end = 0
        for _ in range(row.num_lines):
            end = data.find(b"\n", end) + 1 or len(data)
        table.give_back(enumerate(io.BytesIO(data[end:]), number + row.num_lines))
    return row


def _passed(number: int, is_open: bool, table: _Table) -> ValueError:
    """Read on to the end of a row that is too long to be held, which begins in line `number`; returns its reason."""
    last = number
    while is_open:
        last, line = next(table, (0, b""))
        if not last:
            table.go_back(number)
            return ValueError("a quote is not closed: before the file ends")
        if not isinstance(line, bytes):
            is_open = _leaves_open(line, table, in_quotes=True)
        elif b'"' in line:
            is_open = isinstance(_row(b'"' + line, table), _NotClosed)
    return ValueError(f"{reasons.too_long(table.reading)}" + (f": it ends in line {last}" if last > number else ""))


def _leaves_open(pieces: Iterable[bytes], table: _Table, *, in_quotes: bool) -> bool:
    """Whether a quote is open at the end of a line that is too long to be held; `in_quotes`: at its start.

    A fault ends the row with this line, and so closes it.
    """
    if not table.quoted:
        return False
    decoder = codecs.getincrementaldecoder(table.encoding)("replace")
    delimiter = table.delimiter.encode()
    inside = re.compile(_IN_QUOTES)
    before = delimiter  # the last character that was read, where a field may begin with a quote
    closed = False  # a quote was read that ends a field, or is the first of two
    for piece in pieces:
        text = decoder.decode(piece).encode()
        at = 0
        while at < len(text):
            if in_quotes:
                at = inside.match(text, at).end()  # type: ignore[union-attr]
                closed = at < len(text)
                in_quotes = not closed
                at += closed
            elif closed:
                in_quotes = text.startswith(b'"', at)  # the second of two, in the next piece
                if not in_quotes and not text.startswith(delimiter, at):
                    return False
                at, closed, before = at + (1 if in_quotes else len(delimiter)), False, delimiter
            else:
                quote = text.find(b'"', at)
                plain = text[at:quote] if quote >= 0 else text[at:]
                before = plain[-len(delimiter) :] or before
                at += len(plain) + 1
                if b"\r" in plain or (quote >= 0 and before != delimiter):
                    return False
                in_quotes = quote >= 0
    return in_quotes


# --- fields -------------------------------------------------------------------------------------------------------


def _row(data: bytes | bytearray, table: _Table) -> list[str] | ValueError:
    """Fields of a row with its line end, or its fault: one of the quotes comes before one of the bytes."""
    try:
        try:
            fields = table.split(data if table.encoding == "utf-8" else str(data, table.encoding).encode())
        except UnicodeDecodeError:
            table.split(str(data, table.encoding, "replace").encode())
            reasons.decode(data, table.encoding)
            raise
        reasons.refuse_nul(data)
    except ValueError as error:
        return error
    return fields


def _splitter(delimiter: bytes, *, quoted: bool) -> Callable[[bytes | bytearray], list[str]]:
    """What cuts a row in UTF-8 into its fields; it raises _Malformed, and UnicodeDecodeError.

    Fields are decoded one by one, because a single wide character takes 4 bytes for each of the text that it stands in.
    """
    d = re.escape(delimiter)
    plain = rb'[^"%b\r\n]*+' % d if len(delimiter) == 1 else rb'(?:(?!%b)[^"\r\n])*+' % d
    if not quoted:
        plain = plain.replace(b'"', b"")
    field = re.compile(rb'"(%b)"|%b' % (_IN_QUOTES, plain) if quoted else plain)

    def split(data: bytes | bytearray) -> list[str]:
        stop = len(data) - (2 if data.endswith(b"\r\n") else int(data.endswith((b"\n", b"\r"))))
        if data.find(b"\r", 0, stop) < 0 and not (quoted and b'"' in data):
            return [str(text, "utf-8") for text in data[:stop].split(delimiter)]
        fields, at = [], 0
        while True:
            found = field.match(data, at, stop)
            assert found is not None  # the empty field always matches
            begin, at = at, found.end()
            in_quotes = bool(found.lastindex)
            fields.append(str(found[1].replace(b'""', b'"') if in_quotes else found[0], "utf-8"))
            if at == stop:
                return fields
            if not data.startswith(delimiter, at):
                raise _fault(data, begin, at, in_quotes=in_quotes)
            at += len(delimiter)

    return split


def _fault(data: bytes | bytearray, begin: int, at: int, *, in_quotes: bool) -> _Malformed:
    """What is wrong with the field that begins at `begin` and may not be followed by what stands at `at`."""
    if data[at : at + 1] == b"\r":
        return _Malformed("a lone CR outside of quotes, where rows end in LF or CRLF", data, at)
    if in_quotes:
        return _Malformed("text after a closing quote", data, at)
    if at > begin:
        return _Malformed("a quote in an unquoted field", data, at)
    return _NotClosed("a quote is not closed", data, at)
