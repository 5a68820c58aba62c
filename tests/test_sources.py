"""What can be read is found and cut the same way by everyone; what cannot be read is told before any work."""

import hashlib
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import sources
from codex_accel.errors import UserError
from codex_accel.schema import Source


def resolve(*given_sources: Source):
    return sources.resolve(list(given_sources), config_problem=lambda key, what: f"{key}: {what}")


def problems_of(*given_sources: Source) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(*given_sources)
    return caught.value.problems


def raw_file(path, data: bytes, **options):
    path.write_bytes(data)
    [raw] = resolve(Source(path=str(path), **options))
    return raw


# --- which files --------------------------------------------------------------------------------------------------


def test_sources_keep_their_order_and_folders_are_sorted(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.md", ".hidden.txt", "sub/.git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = resolve(Source(path=f"{tmp_path}/**/c.md"), Source(path=str(tmp_path)), Source(path=f"{tmp_path}/[b]*"))
    assert [(raw.path.name, raw.format) for raw in found] == [
        ("c.md", "text"),
        ("a.jsonl", "jsonl"),
        ("b.txt", "text"),
        ("c.md", "text"),
        ("b.txt", "text"),
    ]


@pytest.mark.parametrize(
    ("name", "format_", "compression"),
    [
        ("a.jsonl", "jsonl", None),
        ("a.ndjson.gz", "jsonl", "gz"),
        ("a.json", "json", None),
        ("a.JSON.GZ", "json", "gz"),
        ("a.csv.zst", "csv", "zst"),
        ("a.tsv", "tsv", None),
        ("a.md.zst", "text", "zst"),
        ("a.b.py", "text", None),
        ("a.parquet", "parquet", None),
    ],
)
def test_suffixes_tell_format_and_compression(tmp_path, name, format_, compression):
    raw = raw_file(tmp_path / name, b"x")
    assert (raw.format, raw.compression) == (format_, compression)


def test_format_given_wins_over_the_suffix_and_compression_does_not(tmp_path):
    assert raw_file(tmp_path / "a.csv", b"a,b\n", format="text").format == "text"
    raw = raw_file(tmp_path / "a.gz", b"x", format="text")
    assert (raw.format, raw.compression) == ("text", "gz")


def test_all_problems_of_sources_are_told_at_once(tmp_path):
    for name, data in {"empty.txt": b"", "a.bin": b"x", "a.parquet.gz": b"x", "good.txt": b"a\n"}.items():
        (tmp_path / name).write_bytes(data)
    names = ["none", "empty.txt", "a.bin", "a.parquet.gz"]
    encodings = ["no-such", "base64", "undefined", "a\0b", "unicode_escape"]
    good = str(tmp_path / "good.txt")
    told = problems_of(
        *[Source(path=str(tmp_path / name)) for name in names],
        *[Source(path=good, encoding=encoding) for encoding in encodings],
        Source(path=good, delimiter='"'),
        Source(path=good, messages="m", chat_template=str(tmp_path / "none.jinja")),
    )
    assert [problem.split(" ")[0] for problem in told] == [
        *[f"sources.{n}.path:" for n in range(4)],
        *[f"sources.{n}.encoding:" for n in range(4, 9)],
        "sources.9.delimiter:",
        "sources.10.chat_template:",
        "sources.10.messages:",
    ]
    expected = [
        "no file matches",
        "is empty",
        "cannot tell the format",
        "Unpack it first",
        "unknown encoding 'no-such'",
    ]
    for problem, words in zip(told, expected, strict=False):
        assert words in problem


@pytest.mark.security
def test_what_is_no_file_of_bytes_is_told_not_opened(tmp_path):
    """Opening a pipe would wait for ever."""
    (tmp_path / "link.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.txt").symlink_to(tmp_path / "folder")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.txt"))
    told = problems_of(Source(path=str(tmp_path)))
    assert len(told) == 4
    words = [
        "is a link to a folder",
        "is a link to nothing",
        "is a device, pipe or socket",
        "is a device, pipe or socket",
    ]
    for problem, expected in zip(told, words, strict=True):
        assert expected in problem
    assert "is a device" in problems_of(Source(path="/dev/zero", format="text"))[0]
    assert "is a link to nothing" in problems_of(Source(path=str(tmp_path / "l*.txt")))[0]


def test_name_with_a_line_end_is_told_in_one_line(tmp_path):
    (tmp_path / "a\nb.txt").touch()
    [told] = problems_of(Source(path=str(tmp_path)))
    assert "\n" not in told
    assert "a\\nb.txt' is empty" in told


def test_name_that_is_not_utf_8_is_told(tmp_path):
    """It could be read, but neither a manifest nor the quarantine can hold it."""
    (tmp_path / "c\udcff.txt").write_text("a\n")
    [told] = problems_of(Source(path=str(tmp_path)))
    assert told.endswith("c\\udcff.txt' is no name in UTF-8, so it cannot be recorded. Rename the file.")


def test_file_and_folder_without_permission_are_told(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    (tmp_path / "folder" / "inner").chmod(0)
    user = os.geteuid()
    for path in (tmp_path, *list(tmp_path.parents)[:2]):  # pytest's folders are closed to others
        path.chmod(0o755)
    if user == 0:
        os.seteuid(65534)
    try:
        told = problems_of(Source(path=str(tmp_path / "a.txt")), Source(path=str(tmp_path / "folder")))
    finally:
        os.seteuid(user)
        (tmp_path / "folder" / "inner").chmod(0o755)
    assert [problem.partition(" ")[0] for problem in told] == ["sources.0.path:", "sources.1.path:"]
    assert all("cannot be read (Permission denied)" in problem for problem in told)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.txt", {"prompt": "q", "completion": "a"}, "needs fields"),
        ("a.txt", {"required": ["x"]}, "needs fields"),
        ("a.csv", {"messages": "m"}, "needs a list"),
    ],
)
def test_fields_that_a_format_cannot_have_are_told(tmp_path, name, options, words):
    (tmp_path / name).write_text("a")
    assert words in problems_of(Source(path=str(tmp_path / name), **options))[0]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", True),
        ("latin-1", True),
        ("shift_jis", True),
        ("gb18030", True),
        ("utf-8-sig", True),
        ("utf-16", False),
        ("utf-32-le", False),
        ("cp037", False),
        ("iso2022_jp", False),
        ("hz", False),
        ("utf-7", False),
    ],
)
def test_encodings_whose_lines_can_be_told_apart_as_bytes(encoding, expected):
    assert sources.has_byte_lines(encoding) is expected


# --- stretches ----------------------------------------------------------------------------------------------------

PIECES = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\n\n", b"\n\r\n", b" \n", b"x" * 9]), min_size=1)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("unit", ["line", "paragraph"])
@settings(max_examples=50)  # of each of eight
@given(pieces=PIECES, unit_bytes=st.integers(1, 12))
def test_units_tile_the_file_and_know_their_lines(tmp_path_factory, chunk_bytes, unit, pieces, unit_bytes):
    data = b"".join(pieces)
    raw = raw_file(tmp_path_factory.mktemp("units") / "a.txt", data, unit=unit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
        facts = sources.inventory(raw, unit_bytes=unit_bytes)
    assert (facts.size, facts.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert b"".join(data[unit.start : unit.stop] for unit in facts.units) == data
    assert [unit.stop for unit in facts.units[:-1]] == [unit.start for unit in facts.units[1:]]
    ends = (b"\n",) if unit == "line" else (b"\n\n", b"\n\r\n")
    places = [at for at in range(1, len(data)) if data[:at].endswith(ends)]
    expected: list[int] = []
    while later := [at for at in places if at >= ((expected or [0])[-1] // unit_bytes + 1) * unit_bytes]:
        expected.append(later[0])
    assert [unit.stop for unit in facts.units[:-1]] == expected
    for found in facts.units:
        assert found.sha256 == hashlib.sha256(data[found.start : found.stop]).hexdigest()
        assert found.first_line == data[: found.start].count(b"\n") + 1
        assert found.num_bytes == found.stop - found.start


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.txt.gz", {}),
        ("a.csv", {}),
        ("a.csv", {"quoted": False}),
        ("a.json", {}),
        ("a.parquet", {}),
        ("a.txt", {"unit": "file"}),
        ("a.txt", {"encoding": "utf-16"}),
        ("a.jsonl", {"encoding": "iso2022_jp"}),
    ],
)
def test_what_cannot_be_cut_is_one_unit(tmp_path, name, options):
    data = b"a\n\nb\n\n" * 9
    facts = sources.inventory(raw_file(tmp_path / name, data, **options), unit_bytes=4)
    assert [(unit.start, unit.stop, unit.first_line, unit.sha256) for unit in facts.units] == [
        (0, len(data), 1, hashlib.sha256(data).hexdigest())
    ]
    assert sources.whole(facts.raw) == facts.units[0]


def test_whole_is_one_unit_of_a_file_that_could_be_cut(tmp_path):
    raw = raw_file(tmp_path / "a.jsonl", b"1\n2\n")
    assert sources.whole(raw) == sources.Unit(raw, 4, 0, 4, 1, hashlib.sha256(b"1\n2\n").hexdigest())


def test_file_that_has_gone_since_is_told(tmp_path):
    raw = raw_file(tmp_path / "a.txt", b"a\n")
    raw.path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(No such file"):
        sources.whole(raw)
