"""Every line of a raw file is a record, a blank line, or a located bad record."""

import codecs
import gzip
import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import records
from codex_accel.errors import UserError
from codex_accel.records import BadRecord, Reader, Record
from codex_accel.schema import Source

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def reader(path, data: bytes | None = None, *, max_record_bytes: int = 1 << 20, key: str | None = None, **options):
    """A reader of the file at `path`, which gets `data` first."""
    if data is not None:
        path.write_bytes(data)
    [raw] = resolve(Source(path=str(path), **options))
    return Reader(raw, max_record_bytes=max_record_bytes, key=key)


def resolve(*sources: Source):
    return records.resolve(list(sources), config_problem=lambda key, what: f"{key}: {what}")


def read(path, data: bytes, **options) -> list:
    """(line, text) of each record, (line, reason) of each bad one."""
    return [
        (item.line, item.reason if isinstance(item, BadRecord) else item.parts[0][0])
        for item in reader(path, data, **options)
    ]


@pytest.fixture
def jsonl(tmp_path):
    return tmp_path / "a.jsonl"


@pytest.fixture
def txt(tmp_path):
    return tmp_path / "a.txt"


# --- lines --------------------------------------------------------------------------------------------------------


def test_lines_are_counted_from_one_and_blank_ones_are_neither_records_nor_errors(jsonl):
    data = b'\n{"text": "a"}\n  \t\n\r\n{"text": "b"}\n\n'
    assert read(jsonl, data) == [(2, "a"), (5, "b")]


def test_offsets_are_of_the_first_byte_of_a_record(jsonl):
    data = codecs.BOM_UTF8 + '{"text": "é"}\r\n\r\n{"text": "b"}\n{"text": "c"}'.encode()
    offsets = [item.offset for item in reader(jsonl, data)]
    assert offsets == [0, data.index(b'{"text": "b"'), data.index(b'{"text": "c"')]


@pytest.mark.parametrize("encoding", ["utf-8", "utf8", "UTF-8", "utf_8_sig"])
def test_byte_order_mark_is_no_text(jsonl, txt, encoding):
    assert read(jsonl, codecs.BOM_UTF8 + b'{"text": "a"}\n', encoding=encoding) == [(1, "a")]
    assert read(txt, codecs.BOM_UTF8 + b"a\n", encoding=encoding) == [(1, "a")]


def test_byte_order_mark_is_dropped_at_the_start_of_the_file_only(txt):
    """U+FEFF elsewhere is a zero-width no-break space, and text."""
    assert read(txt, codecs.BOM_UTF8 + b"a\n" + codecs.BOM_UTF8 + b"b\n") == [(1, "a"), (2, "\ufeffb")]


def test_crlf_is_a_line_end(jsonl, txt):
    assert read(jsonl, b'{"text": "a"}\r\n{"text": "b\\r\\n"}\r\n') == [(1, "a"), (2, "b\r\n")]
    assert read(txt, b"a\r\nb\rc\r\n") == [(1, "a"), (2, "b\rc")]


def test_last_line_needs_no_end(jsonl, txt):
    assert read(jsonl, b'{"text": "a"}') == [(1, "a")]
    assert read(txt, b"a\nb") == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("name", ["udhr_20lang.txt", "alice_pg11_utf8.txt", "botchan.txt"])
def test_lines_of_real_text_are_those_of_the_file(shared, name):
    """Against Python's own utf-8-sig and universal newlines; two of the files have a mark and CRLF."""
    path = shared / "text" / name
    with open(path, encoding="utf-8-sig") as stream:
        lines = [(number, line.removesuffix("\n")) for number, line in enumerate(stream, 1) if line.strip()]
    assert [(item.line, item.parts[0][0]) for item in reader(path)] == lines


@pytest.mark.parametrize(
    ("name", "field"), [("text/udhr_20lang.jsonl", "text"), ("instruct/gsm8k_train.jsonl", "answer")]
)
def test_real_jsonl_gives_what_json_gives(shared, name, field):
    path = shared / name
    expected = [json.loads(line)[field] for line in path.read_bytes().splitlines()]
    assert [item.parts[0][0] for item in reader(path, text=field)] == expected


@given(texts=st.lists(TEXT.filter(bool)), ascii_=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_texts_written_as_jsonl_come_back_in_order(tmp_path_factory, texts, ascii_, end):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    data = "".join(json.dumps({"text": text}, ensure_ascii=ascii_) + end for text in texts).encode()
    path.write_bytes(data or b"\n")
    assert [item.parts for item in reader(path)] == [((text, True),) for text in texts]


@given(data=st.binary(min_size=1), format_=st.sampled_from(["jsonl", "text"]), limit=st.integers(1, 40))
def test_any_bytes_are_read_to_the_end_with_their_digest(tmp_path_factory, data, format_, limit):
    path = tmp_path_factory.mktemp("bytes") / "a"
    for unit in ("line", "paragraph", "file"):
        reading = reader(path, data, format=format_, unit=unit, max_record_bytes=limit)
        lines = [item.line for item in reading]
        assert lines == sorted(lines)
        assert (reading.num_bytes, reading.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_reading_twice_gives_the_same_and_counts_once(jsonl):
    reading = reader(jsonl, b'{"text": "a"}\n')
    assert list(reading) == list(reading)
    assert (reading.num_bytes, reading.sha256) == (14, hashlib.sha256(b'{"text": "a"}\n').hexdigest())


# --- length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("length", range(8, 15))
def test_limit_is_of_the_bytes_between_the_line_ends(txt, mark, end, length):
    found = read(txt, mark + b"x" * length + end, max_record_bytes=10)
    assert found == [(1, "x" * length if length <= 10 else "longer than max_record_bytes = 10")]


@pytest.mark.parametrize("long", [b"x" * 50, b"ab" + b"\r" * 50 + b"cd", codecs.BOM_UTF8 * 9])
def test_reading_goes_on_after_a_line_that_is_too_long(txt, long):
    found = read(txt, b"a\n" + long + b"\nb\n", max_record_bytes=10)
    assert found == [(1, "a"), (2, "longer than max_record_bytes = 10"), (3, "b")]


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_memory_is_bounded_by_the_limit(txt, unit):
    """A file of 48 MiB in one line, or in long lines without a blank one, under a limit of 64 KiB."""
    for line in (b"x" * (1 << 20), b"x" * 65535 + b"\n"):
        if unit == "line" and line.endswith(b"\n"):
            continue  # lines within the limit are good records
        with open(txt, "wb") as stream:
            for _ in range(48):
                stream.write(line * ((1 << 20) // len(line)))
        reading = reader(txt, unit=unit, max_record_bytes=1 << 16)
        tracemalloc.start()
        found = [item.reason for item in reading]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == ["longer than max_record_bytes = 65536"]
        assert peak < 8 << 20


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a", "text": "b"}', "duplicate key: 'text'"),
        (b'{"text": "a", "x": {"y": 1, "y": 1}}', "duplicate key: 'y'"),
        (b'{"text": "a", "x": NaN}', "NaN is not a JSON number"),
        (b'{"text": "a", "x": Infinity}', "Infinity is not a JSON number"),
        (b'{"text": "a", "x": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"text": "a", "x": 1e999}', "number out of range: 1e999"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "integer too long: 5000 digits"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deeply"),
        (b'{"a":' * 100_000, "JSON nested too deeply"),
        (b'{"text": "a', "not JSON: Unterminated string starting at at column 10"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        (b"{'text': 'a'}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'["a"]', "a JSON list, not an object"),
        (b"17", "a JSON int, not an object"),
        (b"null", "a JSON NoneType, not an object"),
        (b"{}", "no field 'text': there are none"),
        (b'{"txt": "a", "id": 1}', "no field 'text': there are 'txt', 'id'"),
        (b'{"text": ["a"]}', "field 'text' is of type list, not text"),
        (b'{"text": null}', "field 'text' is of type NoneType, not text"),
        (b'{"text": "a\\ud800"}', "field 'text' holds a lone surrogate: at character 2"),
        (b'{"text": ""}', "field 'text' is empty, so nothing is a target"),
        (b'{"text": "\xff"}', "not utf-8: byte 0xff at column 11. Convert the file, or set encoding"),
        (b'{"text": "\xed\xa0\x80"}', "not utf-8: byte 0xed at column 11. Convert the file, or set encoding"),
        (b'{"text": "a\x00"}', "not JSON: Invalid control character at at column 12"),
        (b"\xff\xfe", "not utf-8: byte 0xff at column 1. Convert the file, or set encoding"),
    ],
)
def test_bad_json_is_told_and_the_next_line_is_read(jsonl, line, reason):
    assert read(jsonl, b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n') == [(1, "a"), (2, reason), (3, "b")]


def test_numbers_within_range_are_accepted(jsonl):
    data = b'{"text": "a", "x": [1e308, ' + b"9" * 400 + b", -0.0, 5e-324]}\n"
    assert read(jsonl, data) == [(1, "a")]


def test_two_equal_records_differ_in_place_only(jsonl):
    first, second = reader(jsonl, b'{"text": "a", "n": 1}\n{"n": 2, "text": "a"}\n')
    assert first.id == second.id
    assert (first.line, second.line) == (1, 2)


def test_ids_tell_prompts_from_completions():
    """("ab", "c") and ("a", "bc") have the same characters, and so has a plain text of them."""
    shapes = [(("ab", False), ("c", True)), (("a", False), ("bc", True)), (("abc", True),)]
    assert len({Record("f", 1, 0, parts).id for parts in shapes}) == 3


def test_reasons_are_few_kinds_whatever_the_data_holds(jsonl):
    """What stands before the colon is counted; a kind for each record would fill the manifest."""
    lines = [json.dumps({f"key{n}" * 50: n}).encode() for n in range(20)]
    lines += [b'{"text": "' + b"a" * n + b'\xff"}' for n in range(20)]
    lines += [b'{"text": "' + b"a" * n + b'\\ud800"}' for n in range(20)]
    lines += [b'{"k%d": 1, "k%d": 2}' % (n, n) for n in range(20)]
    reasons = [item.reason for item in reader(jsonl, b"\n".join(lines))]
    assert len(reasons) == 80
    assert len({reason.split(":")[0] for reason in reasons}) == 4
    assert max(map(len, reasons)) < 200


# --- shapes -------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_parts_of_which_the_second_is_a_target(jsonl):
    [item] = reader(jsonl, b'{"q": "1+1?", "a": "2"}\n', prompt="q", completion="a")
    assert item.parts == (("1+1?", False), ("2", True))


def test_empty_prompt_is_good_and_empty_completion_is_bad(jsonl):
    first, second = reader(jsonl, b'{"q": "", "a": "2"}\n{"q": "1", "a": ""}\n', prompt="q", completion="a")
    assert first.parts == (("", False), ("2", True))
    assert second.reason == "field 'a' is empty, so nothing is a target"


def test_key_comes_with_the_record_and_is_needed(jsonl):
    first, second = reader(jsonl, b'{"text": "a", "path": "p"}\n{"text": "b"}\n', key="path")
    assert first.key == "p"
    assert second.reason == "no field 'path': there are 'text'"


# --- text ---------------------------------------------------------------------------------------------------------

PARAGRAPHS = b"\n\none\ntwo\n\n \r\nthree\r\nfour\n"


def test_unit_line_gives_each_line_without_its_end(txt):
    assert read(txt, PARAGRAPHS) == [(3, "one"), (4, "two"), (7, "three"), (8, "four")]


def test_unit_paragraph_gives_the_lines_between_blank_ones(txt):
    assert read(txt, PARAGRAPHS, unit="paragraph") == [(3, "one\ntwo"), (7, "three\nfour")]
    assert [item.offset for item in reader(txt, unit="paragraph")] == [2, PARAGRAPHS.index(b"three")]


def test_unit_file_gives_the_whole_text_with_newlines(txt):
    assert read(txt, PARAGRAPHS, unit="file") == [(1, PARAGRAPHS.decode().replace("\r\n", "\n"))]


def test_spaces_at_the_ends_of_a_line_are_text(txt):
    assert read(txt, b"  a \n") == [(1, "  a ")]


@pytest.mark.parametrize(("unit", "left"), [("line", [(2, "b"), (4, "d")]), ("paragraph", [(4, "d")]), ("file", [])])
def test_bad_byte_in_text_spoils_its_unit_and_no_other(txt, unit, left):
    found = read(txt, b"a\xff\nb\n\nd\n", unit=unit)
    assert found == [(1, "not utf-8: byte 0xff at column 2. Convert the file, or set encoding"), *left]


def test_latin_1_has_a_character_for_each_byte(txt):
    data = bytes(b for b in range(1, 256) if b not in b"\r\n")
    assert read(txt, data, encoding="latin-1") == [(1, data.decode("latin-1"))]


# --- sources ------------------------------------------------------------------------------------------------------


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


def test_all_problems_of_sources_are_told_at_once(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "good.txt").write_text("a\n")
    sources = [Source(path=str(tmp_path / name)) for name in ("none", "empty.txt", "table.csv")]
    encodings = ["no-such", "utf-16", "base64", "undefined", "a\0b"]
    sources += [Source(path=str(tmp_path / "good.txt"), encoding=encoding) for encoding in encodings]
    with pytest.raises(UserError) as caught:
        resolve(*sources)
    told = [problem.split(" ")[0] for problem in caught.value.problems]
    assert told == [f"sources.{n}.path:" for n in range(3)] + [f"sources.{n}.encoding:" for n in range(3, 8)]
    assert "no file matches" in caught.value.problems[0]
    assert "is empty" in caught.value.problems[1]
    assert "cannot tell the format" in caught.value.problems[2]
    assert "unknown encoding 'no-such'" in caught.value.problems[3]
    assert "does not write a line end as one byte" in caught.value.problems[4]


def test_compressed_file_is_not_read_as_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\n"))
    with pytest.raises(UserError, match="cannot tell the format"):
        resolve(Source(path=str(tmp_path / "a.txt.gz")))


def test_format_given_wins_over_the_suffix(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    assert [raw.format for raw in resolve(Source(path=str(tmp_path / "a.csv"), format="text"))] == ["text"]


def test_description_of_a_raw_file_is_its_size_and_digest(txt):
    txt.write_bytes(b"abc\n")
    [raw] = resolve(Source(path=str(txt)))
    digest = hashlib.sha256(b"abc\n").hexdigest()
    assert records.describe(raw) == {"path": str(txt), "format": "text", "size": 4, "sha256": digest}
