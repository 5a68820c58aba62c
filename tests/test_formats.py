"""Each format gives its values with their lines, a bad one spoils no other, and what cannot be counted is an error."""

import csv
import io
import json
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import formats, lines, sources
from codex_accel.errors import UserError
from codex_accel.lines import Reading
from codex_accel.schema import Source

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


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


def failure(path, data: bytes | None = None, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, data, **options)
    return str(caught.value).removeprefix(str(path))


# --- JSON arrays --------------------------------------------------------------------------------------------------


def test_real_array_gives_what_json_gives_by_its_lines(shared):
    path = shared / "text" / "gemoji_emoji.json"
    found = read(path)
    assert [value for _, value in found] == json.loads(path.read_bytes())
    physical = path.read_bytes().split(b"\n")
    assert all(b"{" in physical[line - 1] for line, _ in found)


@pytest.mark.parametrize("chunk_bytes", [3, 5, 1 << 18])
def test_any_array_comes_back_however_it_is_cut(tmp_path, monkeypatch, chunk_bytes):
    """200 arrays of a seeded generator with every byte that means something to the scanner, in several layouts."""
    monkeypatch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
    draw = random.Random(0)

    def value(depth: int):
        kind = draw.random()
        if kind < 0.5 or depth > 3:
            return "".join(draw.choice('ab\\"[]{},\n\té𝄞') for _ in range(draw.randrange(12)))
        if kind < 0.7:
            return draw.choice([1, -2.5e3, None, True])
        if kind < 0.85:
            return [value(depth + 1) for _ in range(draw.randrange(3))]
        return {str(n): value(depth + 1) for n in range(draw.randrange(3))}

    for number in range(200):
        values = [value(0) for _ in range(draw.randrange(6))]
        text = json.dumps(values, indent=number % 3 or None, ensure_ascii=number % 2 == 0)
        assert [found for _, found in read(tmp_path / "a.json", text.encode())] == values


@given(data=st.lists(st.sampled_from(['"', "\\", "[", "]", "{", "}", ",", "1", "\n", " ", "é"])).map("".join))
def test_array_of_any_bytes_is_read_or_told_and_never_misread(tmp_path_factory, data):
    """What json accepts comes back; of the rest each piece is a value, a reason, or a located error."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = f"[{data}"
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = [value for _, value in read(path, text.encode())]
    except UserError:
        found = None
    if expected is not None and all(not isinstance(value, dict) for value in expected):
        assert found == expected
    elif expected is None and found is not None:
        assert any(isinstance(value, str) and value.startswith("! ") for value in found)


def test_bad_element_spoils_no_other(tmp_path):
    data = b'[{"a": 1},\n {"a": 1, "a": 2},\n\n {"b": "\xff"}, NaN, "\\x", tru, 1 2, {"c": 3]\n, [4}, 5]'
    assert read(tmp_path / "a.json", data) == [
        (1, {"a": 1}),
        (2, "! duplicate key: 'a'"),
        (4, "! not utf-8: byte 0xff at column 8. Convert the file, or set encoding"),
        (4, "! NaN is not a JSON number"),
        (4, "! not JSON: Invalid \\escape at character 2"),
        (4, "! not JSON: Expecting value at character 1"),
        (4, "! not JSON: Extra data at character 3"),
        (4, "! not JSON: Expecting ',' delimiter at character 8"),
        (5, "! not JSON: Expecting ',' delimiter at character 3"),
        (5, 5),
    ]


def test_missing_elements_are_bad_and_an_empty_array_has_none(tmp_path):
    missing = "! not JSON: no value before a comma or after the last one"
    assert read(tmp_path / "a.json", b"[1,,2,\n]") == [(1, 1), (1, missing), (1, 2), (2, missing)]
    assert read(tmp_path / "a.json", b" [\n ] \n") == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'{"a": 1}', ":1: begins with a JSON object, not with an array. Set format: jsonl"),
        (b'\n\n"a"', ":3: does not begin with the [ of a JSON array. Set format: jsonl"),
        (b" \n", ":2: holds no JSON array, only white space. Set format: jsonl"),
        (b"[1]\n\n[2]", ":3: goes on after the end of its JSON array. Give one array a file, or set format: jsonl."),
        (b"[1,\n2,\n3", ":3: the JSON array is not closed: its last element begins in line 3. Mend the file"),
        (b'[1,\n"2, 3]\n', ":3: the JSON array is not closed: its last element begins in line 2. Mend the file"),
        (b'["\\', ":1: the JSON array is not closed: its last element begins in line 1. Mend the file"),
        (b"[", ":1: the JSON array is not closed: its last element begins in line 1. Mend the file"),
    ],
)
def test_what_is_no_whole_array_is_an_error(tmp_path, data, told):
    assert failure(tmp_path / "a.json", data).startswith(told)


def test_array_in_another_encoding(tmp_path):
    """The second byte of a Shift JIS character may be a backslash (0x5C) or a bracket (0x5B)."""
    text = '["表ー", "ソ"]'
    data = text.encode("shift_jis")
    assert b"\\" in data
    assert b"[" in data[1:]
    assert read(tmp_path / "a.json", data, encoding="shift_jis") == [(1, "表ー"), (1, "ソ")]
    assert read(tmp_path / "a.json", text.encode("utf-16"), encoding="utf-16") == [(1, "表ー"), (1, "ソ")]
    assert read(tmp_path / "a.json", b"\xef\xbb\xbf" + text.encode()) == [(1, "表ー"), (1, "ソ")]


@pytest.mark.parametrize("length", range(7, 12))
def test_limit_is_of_the_bytes_of_an_element(tmp_path, length):
    found = read(tmp_path / "a.json", b'[ "' + b"x" * (length - 2) + b'" ' + b" " * 99 + b"\n, 1]", limit=9)
    assert found == [(1, "x" * (length - 2) if length <= 9 else "! longer than max_record_bytes = 9"), (2, 1)]


@pytest.mark.security
@pytest.mark.parametrize("filler", [b"x", b'\\"', b"\\\\", b"[", b'"a",', b"\n"])
def test_memory_of_an_array_is_bounded(tmp_path, filler):
    """An element of 24 MB under a limit of 1 MB, whatever it is made of."""
    opener, closer = (b'["', b'"]') if filler in (b"x", b'\\"', b"\\\\") else (b"[[", b"1]]")
    if filler == b"[":
        closer = b"]" * (24 << 20) + b"]]"
    data = opener + filler * ((24 << 20) // len(filler)) + closer[:-1] + b", 5]"
    unit = unit_of(tmp_path / "a.json", data)
    size = len(data)
    del data, closer
    tracemalloc.start()
    found = [(line, str(value)) for line, value in formats.json_array(unit, Reading(1 << 20))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [value for _, value in found] == ["longer than max_record_bytes = 1048576", "5"]
    assert peak < 8 << 20 < size


# --- JSON values --------------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize("depth", [399, 400, 401, 900, 100_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_depth_has_one_limit_on_any_stack(tmp_path, depth, pair):
    opener = pair[0] if pair == "[]" else '{"a":'
    text = opener * depth + "1" + pair[1] * depth

    def deeper(levels: int):
        return deeper(levels - 1) if levels else read(tmp_path / "a.jsonl", text.encode())

    for levels in (0, 300):
        [(line, value)] = deeper(levels)
        assert line == 1
        assert (value == "! JSON nested too deeply") == (depth > formats.MAX_DEPTH)


def test_brackets_in_text_are_no_depth(tmp_path):
    [(_, value)] = read(tmp_path / "a.jsonl", json.dumps(["[{" * 5000]).encode())
    assert value == ["[{" * 5000]


# --- tables -------------------------------------------------------------------------------------------------------


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
        b'"h\ni",\0\n3,4\r5\n"last",1\n"never,1\ngood,"2"'
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
        (22, "! a quote is not closed: before the file ends"),
        (23, {"x": "good", "y": "2"}),
    ]


def test_open_quote_spoils_its_line_alone_under_the_limit_too(tmp_path):
    rows = b"".join(b"%d,%d\n" % (n, n) for n in range(100))
    data = b'x,y\n"open,1\n' + rows + b'"' + b"z" * 300 + b'",1\n"a\n",2\n' + rows
    found = read(tmp_path / "a.csv", data, limit=200)
    good = [{"x": str(n), "y": str(n)} for n in range(100)]
    assert [value for _, value in found] == [
        "! a quote is not closed: within max_record_bytes = 200",
        *good,
        "! longer than max_record_bytes = 200",
        {"x": "a\n", "y": "2"},
        *good,
    ]
    assert [line for line, _ in found] == [2, *range(3, 103), 103, 104, *range(106, 206)]


def test_long_line_within_open_quotes_is_counted_too(tmp_path):
    found = read(tmp_path / "a.csv", b'x\n"open\na\n' + b"z" * 99 + b"\nb\n", limit=50)
    assert found == [
        (2, "! a quote is not closed: within max_record_bytes = 50"),
        (3, {"x": "a"}),
        (4, "! longer than max_record_bytes = 50"),
        (5, {"x": "b"}),
    ]


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


@pytest.mark.parametrize("inside", [b"x" * 4999 + b"\n", b"x" * 999 + b'""'])
def test_field_of_50_mb_needs_a_small_multiple_of_it(tmp_path, inside):
    """The csv module needs 4 bytes a character and more while it grows, and refuses fields of 131,072 by default."""
    size = 50_000_000
    unit = unit_of(tmp_path / "a.csv", b'x,y\n1,"' + inside * (size // len(inside)) + b'"\n3,4\n')
    rows = formats.csv(unit, Reading(64 << 20))
    tracemalloc.start()
    line, value = next(rows)
    length, value = len(value["y"]), None
    assert next(rows)[1] == {"x": "3", "y": "4"}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (line, length) == (2, size // len(inside) * len(inside.replace(b'""', b'"')))
    assert list(rows) == []
    assert peak < 4.2 * size


# --- text ---------------------------------------------------------------------------------------------------------


def test_nul_is_bad_text_with_its_line(tmp_path):
    data = b"a\n\nb\nc\0\n\nd\n"
    bad = (4, "! raw NUL byte: at column 2")
    assert read(tmp_path / "a.txt", data) == [(1, "a"), (3, "b"), bad, (6, "d")]
    assert read(tmp_path / "a.txt", data, unit="paragraph") == [(1, "a"), bad, (6, "d")]
    assert read(tmp_path / "a.txt", data, unit="file") == [bad]


def test_whitespace_of_any_script_is_blank(tmp_path):
    assert read(tmp_path / "a.txt", "\u3000\n \x0b\na\n".encode()) == [(3, "a")]


# --- Parquet ------------------------------------------------------------------------------------------------------


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_rows_are_numbered_from_one_over_row_groups(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[str(n) for n in range(8)], other=range(8))
    assert read(path, fields=("text",)) == [(n + 1, {"text": str(n)}) for n in range(8)]


def test_nested_columns_and_nulls_come_as_python_values(tmp_path):
    turns = [[{"role": "user", "content": "a"}], None, []]
    path = parquet(tmp_path / "a.parquet", m=turns, n=["a", None, "b"])
    assert [value for _, value in read(path, fields=("m",), present=("n",))] == [
        {"n": True, "m": turns[0]},
        {"n": None, "m": None},
        {"n": True, "m": []},
    ]


def test_cell_that_is_not_utf_8_spoils_its_row_alone(tmp_path):
    texts = pyarrow.array([b"a", b"b\xff", b"c"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = parquet(tmp_path / "a.parquet", text=pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers()))
    assert [value for _, value in read(path, fields=("text",))] == [
        {"text": "a"},
        "! not utf-8: byte 0xff at byte 2 of a cell",
        {"text": "c"},
    ]


def test_large_cells_are_over_the_limit(tmp_path):
    path = parquet(tmp_path / "a.parquet", m=[["é" * 5], ["é" * 6]])
    found = [value for _, value in read(path, fields=("m",), limit=10)]
    assert found == [{"m": ["é" * 5]}, "! longer than max_record_bytes = 10"]


def test_column_that_is_missing_or_twice_is_an_error(tmp_path):
    path = parquet(tmp_path / "a.parquet", a=["x"], b=[1])
    assert failure(path, fields=("text",)) == (": no column 'text': there are 'a', 'b'. Name the field that is meant.")
    assert "no column 'c'" in failure(path, fields=("a",), present=("c",))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(twice, path)
    assert failure(path, fields=("a",)).startswith(": two columns have one name: 'a'")


@pytest.mark.security
def test_damaged_parquet_is_an_error(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[str(n) * 50 for n in range(99)])
    data = path.read_bytes()
    for damaged in (b"no parquet\n", data[:-20], data[:4] + b"\xff" * 400 + data[404:]):
        told = failure(path, damaged, fields=("text",))
        assert "is no Parquet file that can be read" in told, told
        assert told.endswith("Fetch or make it again.")


def test_parquet_that_changed_is_an_error(tmp_path):
    unit = unit_of(parquet(tmp_path / "a.parquet", text=["a"]))
    parquet(tmp_path / "a.parquet", text=["b"])
    with pytest.raises(UserError, match="has changed while it was being read"):
        list(formats.parquet(unit, Reading(99, fields=("text",))))


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text", "'text'"),
        ("input_text-2 b", "'input_text-2 b'"),
        ("größe", "'größe'"),
        ("x" * 32, repr("x" * 32)),
        ("x" * 33, "a name of 33 characters"),
        ("ab1234", "a name of 6 characters"),
        ("a@b.c", "a name of 5 characters"),
        ("a\nb", "a name of 3 characters"),
        ("\ud800", "a name of 1 characters"),
        ("", "a name of 0 characters"),
    ],
)
def test_only_plain_short_names_are_repeated(name, expected):
    assert formats.shown(name) == expected
