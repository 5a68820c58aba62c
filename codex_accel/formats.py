"""Raw files as located values: one function a format, each giving (line, value), or (line, ValueError) for a bad one.

Rule: nothing is dropped in silence. What cannot be used comes out as an error with its place, the next value is read,
and where nothing behind a fault can be told apart, the reading ends in a UserError.
"""

import io
from collections.abc import Callable, Iterator

from codex_accel import json_values, lines, parquet, reasons, tables
from codex_accel.lines import Reading, Values
from codex_accel.sources import Unit


def text(unit: Unit, reading: Reading) -> Values:
    """One text a line, a paragraph (lines between blank ones) or a file, with line ends as one newline."""
    encoding, by = lines.encoding_of(unit), unit.raw.source.unit
    for number, data in _stretches(unit, reading, by):
        yield from [(number, reasons.too_long(reading))] if data is None else _text(number, data, encoding, by)


def _stretches(unit: Unit, reading: Reading, by: str) -> Iterator[tuple[int, bytes | bytearray | None]]:
    """(number of the first line, the lines of one text); None if they are too long."""
    start, data = unit.first_line, bytearray()  # type: tuple[int, bytearray | None]
    for number, found in lines.physical(unit, reading):
        line = found if isinstance(found, bytes) else None
        if by == "line":
            yield number, line
        elif by == "paragraph" and line is not None and not line.strip():
            yield start, data
            data = bytearray()
        else:
            if data == b"":
                start = number
            if data is None or line is None or len(data) + len(line) > reading.max_record_bytes + len(b"\r\n"):
                data = None
            else:
                data += line
    yield start, data


def _text(number: int, data: bytes | bytearray, encoding: str, by: str) -> list[tuple[int, str | ValueError]]:
    """The record that begins in line `number`, or the line and reason of its fault; nothing if it is blank."""
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
    text = reasons.decode(data, encoding)
    reasons.refuse_nul(data)
    return text


FORMATS: dict[str, Callable[[Unit, Reading], Values]] = {
    "jsonl": json_values.jsonl,
    "json": json_values.array,
    "csv": tables.csv,
    "tsv": tables.csv,
    "text": text,
    "parquet": parquet.rows,
}
