"""Text is read by lines, paragraphs or files, and nothing in it is lost."""

from codex_accel import formats, sources
from codex_accel.lines import Reading
from codex_accel.schema import Source


def unit_of(path, data: bytes | None = None, **options):
    if data is not None:
        path.write_bytes(data)
    [raw] = sources.resolve([Source(path=str(path), **options)], config_problem=lambda key, what: f"{key}: {what}")
    return sources.whole(raw)


def read(path, data: bytes | None = None, *, limit: int = 1 << 20, fields=(), present=(), **options) -> list:
    """(line, value) of each, the reason in place of a bad value."""
    unit = unit_of(path, data, **options)
    found = formats.FORMATS[unit.raw.format](unit, Reading(limit, fields=fields, present=present))
    return [(line, f"! {value}" if isinstance(value, ValueError) else value) for line, value in found]


def test_nul_is_bad_text_with_its_line(tmp_path):
    data = b"a\n\nb\nc\0\n\nd\n"
    bad = (4, "! raw NUL byte: at column 2")
    assert read(tmp_path / "a.txt", data) == [(1, "a"), (3, "b"), bad, (6, "d")]
    assert read(tmp_path / "a.txt", data, unit="paragraph") == [(1, "a"), bad, (6, "d")]
    assert read(tmp_path / "a.txt", data, unit="file") == [bad]


def test_whitespace_of_any_script_is_blank(tmp_path):
    assert read(tmp_path / "a.txt", "\u3000\n \x0b\na\n".encode()) == [(3, "a")]
