"""JSON as located values: one a line, or the elements of one array of any size.

Rule: strict by RFC 8259; a bad value comes out as an error with its place and spoils no other, and what cannot be told
apart ends the reading.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from codex_accel import lines, reasons
from codex_accel.errors import UserError
from codex_accel.lines import Reading, Values
from codex_accel.sources import Unit

MAX_DEPTH = 400  # of nested JSON; far below Python's recursion limit, so that the answer is the same on any stack
MAX_DIGITS = 400  # of a JSON integer


def jsonl(unit: Unit, reading: Reading) -> Values:
    """One JSON value a line; blank lines are neither values nor errors."""
    encoding = lines.encoding_of(unit)
    for number, line in lines.physical(unit, reading):
        if not isinstance(line, bytes):
            yield number, reasons.too_long(reading)
            continue
        line = line.rstrip(b" \t\r\n")
        if not line:
            continue
        try:
            value = parse(reasons.decode(line, encoding))
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
        raise ValueError(f"duplicate key: {reasons.shown(twice)}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def _integer(text: str) -> int:
    num_digits = len(text) - text.startswith("-")
    if num_digits > MAX_DIGITS:
        raise ValueError(f"integer too long: {num_digits} digits")
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


def array(unit: Unit, reading: Reading) -> Values:
    """The elements of one JSON array of any size; memory is bounded by the largest element and by the limit.

    An element ends at the comma or bracket where its own brackets and strings are closed, so a bad one spoils no other.
    Raises: UserError if the file is no array, has no end, or goes on after it: what is there cannot be counted.
    """
    elements = _Elements(unit, reading, lines.chunks(unit, reading))
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
                raise reasons.too_long(reading)
            if missing:
                raise ValueError("not JSON: no value before a comma or after the last one")
            value = parse(reasons.decode(data, "utf-8"), unit="character")
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
