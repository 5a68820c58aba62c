"""Rows are those of RFC 4180 and of the csv module, and no part of a bad one is read as another."""

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_files import failure, read, unit_of

from codex_accel import lines, tables
from codex_accel.lines import Reading

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def test_csv_spectrum(shared):
    """The whole suite of https://github.com/maxogden/csv-spectrum."""
    folder = shared / "loaders" / "csv-spectrum"
    paths = sorted((folder / "csvs").glob("*.csv"))
    assert len(paths) == 11
    for path in paths:
        expected = json.loads((folder / "json" / f"{path.stem}.json").read_bytes())
        assert [value for _, value in read(path)] == expected, path.name


@pytest.mark.parametrize("dialect", [{"delimiter": ","}, {"delimiter": "\t"}, {"delimiter": "é"}, {"delimiter": "]"}])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@settings(max_examples=30)  # of each of eight dialects
@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT)))
def test_rows_that_the_csv_module_writes_come_back(tmp_path_factory, dialect, end, rows):
    """With the line in which each begins. NUL is refused; a CR at the end of a row that ends in LF is not quoted."""
    left_out = str.maketrans("", "", "\0" if end == "\r\n" else "\0\r")
    rows = [[text.translate(left_out) for text in row] for row in rows]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    text, expected = io.StringIO(), []
    writer = csv.writer(text, lineterminator=end, **dialect)
    for row in [["x", "y", "z"], *rows]:
        expected.append((text.getvalue().count("\n") + 1, dict(zip("xyz", row, strict=True))))
        writer.writerow(row)
    assert read(path, text.getvalue().encode(), **dialect) == expected[1:]


@given(data=st.lists(st.sampled_from(['"', ",", "\n", "\r\n", "a", "b c", '""', '","'])).map("".join))
def test_what_the_strict_csv_module_takes_is_read_alike(tmp_path_factory, data):
    """Beyond it a quote in a plain field is refused, and empty lines are left out."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    found = read(path, f"x,y\n{data}".encode())
    try:
        rows = [row for row in csv.reader(io.StringIO(data, newline=""), strict=True) if row]
    except csv.Error:
        rows = None
    if rows is None:
        assert any(isinstance(value, str) for _, value in found)
    elif all(isinstance(value, dict) for _, value in found):
        assert [list(value.values()) for _, value in found] == rows


def test_malformed_rows_are_located_and_end_with_their_fault(tmp_path):
    data = (
        b'x,y\n"a ""b""\r\nc",1\n1,2,3\n5" disk,2\nz,"q"r\n"m\n\nn"o,1\np,1\n\n1\n"\nopen" x\n2,\xff\n"\n\xff",2\n'
        b'"h\ni",\0\n3,4\r5\n"last",1\n"never,1\nspoilt,"2"\n"never\ngood,2'
    )
    assert read(tmp_path / "a.csv", data) == [
        (2, {"x": 'a "b"\r\nc', "y": "1"}),
        (4, "! ragged row: 3 fields, the header has 2"),
        (5, "! a quote in an unquoted field: at column 2"),
        (6, "! text after a closing quote: at column 6"),
        (7, "! text after a closing quote: at column 3 of its line 3"),
        (10, {"x": "p", "y": "1"}),
        (12, "! ragged row: 1 field, the header has 2"),
        (13, "! text after a closing quote: at column 6 of its line 2"),
        (15, "! not utf-8: byte 0xff at column 3. Convert the file, or set encoding"),
        (16, "! not utf-8: byte 0xff at column 1 of its line 2. Convert the file, or set encoding"),
        (18, "! raw NUL byte: at column 4 of its line 2"),
        (20, "! a lone CR outside of quotes, where rows end in LF or CRLF: at column 4"),
        (21, {"x": "last", "y": "1"}),
        (22, "! text after a closing quote: at column 9 of its line 2"),
        (24, "! a quote is not closed: before the file ends"),
        (25, {"x": "good", "y": "2"}),
    ]


def test_row_over_the_limit_is_one_bad_record_whatever_lies_in_it(tmp_path):
    """Its lines would pass as rows; the last one ends in a line that is itself over the limit."""
    inside = b"".join(b"%d,%d\n" % (n, n) for n in range(100))
    data = b'x,y\n"open,1\n' + inside + b'end",1\n"a\n",2\n3,"' + inside + b"z" * 300 + b'""",""\n"' + b"z" * 300
    data += b"\n" + inside + b'",1\n' + b'"",' * 100 + b"\n4,5\n"
    assert read(tmp_path / "a.csv", data, limit=200) == [
        (2, "! longer than max_record_bytes = 200: it ends in line 103"),
        (104, {"x": "a\n", "y": "2"}),
        (106, "! longer than max_record_bytes = 200: it ends in line 206"),
        (207, "! longer than max_record_bytes = 200: it ends in line 308"),
        (309, "! longer than max_record_bytes = 200"),
        (310, {"x": "4", "y": "5"}),
    ]


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("first", [b'"open,1', b'"' + b"z" * 99])
def test_quote_that_is_open_to_the_end_spoils_its_line_alone(tmp_path, first, compression):
    data = b"x,y\n1,2\n" + first + b'\n3,4\n5,""\n' + b"z" * 99 + b"\n6,7"
    path = tmp_path / f"a.csv{compression}"
    assert read(path, gzip.compress(data) if compression else data, limit=20) == [
        (2, {"x": "1", "y": "2"}),
        (3, "! a quote is not closed: before the file ends"),
        (4, {"x": "3", "y": "4"}),
        (5, {"x": "5", "y": ""}),
        (6, "! longer than max_record_bytes = 20"),
        (7, {"x": "6", "y": "7"}),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "shift_jis"])
@settings(max_examples=50)  # of each of three encodings
@given(
    pieces=st.lists(st.sampled_from(['"', '""', "¥", "a", "bc", "\n", "\r\n", "\r", 'a"¥"', "表" * 9])),
    limit=st.integers(4, 30),
    chunk_bytes=st.integers(4, 9),
)
def test_limit_does_not_change_where_rows_begin(tmp_path_factory, encoding, pieces, limit, chunk_bytes):
    """The delimiter is of several bytes in UTF-8, where there is one."""
    delimiter = "|" if encoding == "shift_jis" else "¥"
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    data = f"x¥y\n{''.join(pieces)}".replace("¥", delimiter).encode(encoding)
    options = {"delimiter": delimiter, "encoding": encoding}
    expected = read(path, data, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
        found = read(path, **options, limit=limit)
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, value), (_, other) in zip(found, expected, strict=True):
        assert value == other or str(value).startswith("! longer than max_record_bytes")


def test_quotes_are_text_where_fields_are_not_quoted(tmp_path):
    data = b'x\ty\n"a\tb"c\n""\t\n'
    assert read(tmp_path / "a.tsv", data, quoted=False) == [(2, {"x": '"a', "y": 'b"c'}), (3, {"x": '""', "y": ""})]


def test_empty_fields_make_a_row_and_an_empty_line_does_not(tmp_path):
    assert read(tmp_path / "a.tsv", b"\n\nx\ty\n\n\t\n\r\n \t \n") == [
        (5, {"x": "", "y": ""}),
        (7, {"x": " ", "y": " "}),
    ]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"x,y,x\n1,2,3\n", ":1: two columns have one name: 'x'. Give each its own."),
        (b"\nx,y\n1,2\n", ":2: no column 'text': there are 'x', 'y'. Name the field that is meant."),
        (b"sk-4815162342,y\n", ":1: no column 'text': there are a name of 13 characters, 'y'. Name the field"),
        (b"text,y\r1,2\r3,4\r", ":1: the header cannot be read: a lone CR outside of quotes, where rows end in LF or"),
        (b'"text","y"\r"1","2"\r', ":1: the header cannot be read: a lone CR outside of quotes, where rows end in LF"),
        (b"t\xe9xt,y\n", ":1: the header cannot be read: not utf-8: byte 0xe9 at column 2. Convert the file, or set"),
        (b'"text,y\n', ":1: the header cannot be read: a quote is not closed: before the file ends. Mend it, or set"),
    ],
)
def test_header_that_names_no_fields_is_an_error(tmp_path, data, told):
    assert failure(tmp_path / "a.csv", data, fields=("text",)).startswith(told)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "shift_jis", "utf-8-sig"])
def test_table_in_another_encoding(tmp_path, encoding):
    """In Shift JIS 0x7C, the delimiter here, is the second byte of a character."""
    text = 'x|y\n"ポ\n"|"b ""|"\n' if encoding == "shift_jis" else 'x|y\n"é\n"|"b ""|"\n'
    found = read(tmp_path / "a.csv", text.encode(encoding), encoding=encoding, delimiter="|")
    assert found == [(2, {"x": text[5:7], "y": 'b "|'})]


@pytest.mark.security
@pytest.mark.parametrize(
    ("inside", "end", "multiple"), [(b"x" * 4999 + b"\n", "", 3.2), (b"x" * 999 + b'""', "", 3.2), (b"x", "😀", 7.2)]
)
def test_field_of_50_mb_needs_a_small_multiple_of_it(tmp_path, inside, end, multiple):
    """The csv module refuses fields of 131,072 by default. One emoji alone makes a text of 4 bytes a character."""
    size = 50_000_000
    unit = unit_of(tmp_path / "a.csv", b'x,y\n1,"' + inside * (size // len(inside)) + end.encode() + b'"\n3,4\n')
    rows = tables.csv(unit, Reading(64 << 20))
    tracemalloc.start()
    line, value = next(rows)
    length, value = len(value["y"]), None
    assert next(rows)[1] == {"x": "3", "y": "4"}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (line, length) == (2, size // len(inside) * len(inside.replace(b'""', b'"')) + len(end))
    assert list(rows) == []
    assert peak < multiple * size
