"""Words for what is wrong with a record.

Rule: a reason says what and where, and never repeats the data.
"""

import re
from typing import Any

from codex_accel.lines import Reading

# Letters, and digits only behind them: a name, and no key or token, which mix them.
_WORD = r"[^\W\d_]{0,16}[0-9]{0,3}"
_PLAIN = re.compile(rf"(?=.{{1,32}}\Z){_WORD}(?:[ _-]{_WORD})*")


def too_long(reading: Reading) -> ValueError:
    """The reason for a record over the limit."""
    return ValueError(f"longer than max_record_bytes = {reading.max_record_bytes}")


def shown(name: str) -> str:
    """A field's name from the data, if it is made of plain short words and can hardly be a secret."""
    plain = _PLAIN.fullmatch(name) and sum(map(str.isdigit, name)) <= 3
    return repr(name) if plain else f"a name of {len(name)} characters"


def names(fields: list[str]) -> str:
    """What fields there are, for a reason: the first eight."""
    return ", ".join(map(shown, fields[:8])) + (f" and {len(fields) - 8} more" if len(fields) > 8 else "") or "none"


def decode(data: bytes | bytearray | memoryview, encoding: str) -> str:
    """Text of `data`; raises ValueError with the place of the first byte that is not in the encoding."""
    try:
        return str(data, encoding)
    except UnicodeDecodeError as error:
        where = _place(error.object, error.start)
        what = f"not {encoding}: byte 0x{error.object[error.start]:02x} {where}. Convert the file, or set encoding"
        raise ValueError(what) from None


def _place(data: Any, at: int) -> str:
    """Where byte `at` of a record lies: its column in bytes, and its line if it is not the first."""
    return place(at - data.rfind(b"\n", 0, at), data.count(b"\n", 0, at) + 1)


def place(column: int, line: int) -> str:
    """A place in a record, both from 1; the line is told if it is not the first."""
    return f"at column {column}" + (f" of its line {line}" if line > 1 else "")


def refuse_nul(data: bytes | bytearray) -> None:
    """Raises ValueError if there is one."""
    if b"\0" in data:
        raise ValueError(f"raw NUL byte: {_place(data, data.index(0))}")
