"""What the tests of the readers share: a file read to the end by its format."""

import pytest

from codex_accel import formats, sources
from codex_accel.errors import UserError
from codex_accel.lines import Reading
from codex_accel.schema import Source


def unit_of(path, data: bytes | None = None, **options):
    """The whole file, holding `data` if that is given, as one unit."""
    if data is not None:
        path.write_bytes(data)
    [raw] = sources.resolve([Source(path=str(path), **options)], config_problem=lambda key, what: f"{key}: {what}")
    return sources.whole(raw)


def read(path, data: bytes | None = None, *, limit: int = 1 << 20, fields=(), present=(), **options) -> list:
    """(line, value) of each, the reason in place of a bad value."""
    unit = unit_of(path, data, **options)
    found = formats.FORMATS[unit.raw.format](unit, Reading(limit, fields=fields, present=present))
    return [(line, f"! {value}" if isinstance(value, ValueError) else value) for line, value in found]


def failure(path, data: bytes | None = None, **options) -> str:
    """The error that reading ends in, without the path."""
    with pytest.raises(UserError) as caught:
        read(path, data, **options)
    return str(caught.value).removeprefix(str(path))
