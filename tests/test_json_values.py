"""JSON comes back as json gives it, a bad value spoils no other, and what cannot be counted is an error."""

import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_files import failure, read, unit_of

from codex_accel import json_values, lines
from codex_accel.errors import UserError
from codex_accel.lines import Reading

# --- arrays ----------------------------------------------------------------------------------------------------------


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


def test_wrong_byte_of_an_array_in_another_encoding_is_told_with_its_line(tmp_path):
    told = failure(tmp_path / "a.json", b'["a",\n"\xff"]', encoding="shift_jis")
    assert told == ":2: not shift-jis at byte 7 of the text. Convert the file, or set encoding."


@pytest.mark.parametrize("length", range(7, 12))
def test_limit_is_of_the_bytes_of_an_element(tmp_path, length):
    found = read(tmp_path / "a.json", b'[ "' + b"x" * (length - 2) + b'" ' + b" " * 99 + b"\n, 1]", limit=9)
    assert found == [(1, "x" * (length - 2) if length <= 9 else "! longer than max_record_bytes = 9"), (2, 1)]


@pytest.mark.security
@pytest.mark.parametrize("filler", [b"x", b'\\"', b"\\\\", b"[", b'"a",', b"\n"])
def test_memory_of_an_array_is_bounded(tmp_path, filler):
    """An element of 12 MB under a limit of 1 MB, whatever it is made of."""
    opener, closer = (b'["', b'"]') if filler in (b"x", b'\\"', b"\\\\") else (b"[[", b"1]]")
    if filler == b"[":
        closer = b"]" * (12 << 20) + b"]]"
    data = opener + filler * ((12 << 20) // len(filler)) + closer[:-1] + b", 5]"
    unit = unit_of(tmp_path / "a.json", data)
    size = len(data)
    del data, closer
    tracemalloc.start()
    found = [(line, str(value)) for line, value in json_values.array(unit, Reading(1 << 20))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [value for _, value in found] == ["longer than max_record_bytes = 1048576", "5"]
    assert peak < 8 << 20 < size


# --- values ----------------------------------------------------------------------------------------------------------


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
        assert (value == "! JSON nested too deeply") == (depth > json_values.MAX_DEPTH)


def test_brackets_in_text_are_no_depth(tmp_path):
    [(_, value)] = read(tmp_path / "a.jsonl", json.dumps(["[{" * 5000]).encode())
    assert value == ["[{" * 5000]
