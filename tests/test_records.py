"""Every line of a raw file is a record, a blank line, or a located bad record."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import lines, records, sources
from codex_accel.errors import UserError
from codex_accel.records import BadRecord, Part, Reader, Record
from codex_accel.schema import Source

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def reader(path, data: bytes | None = None, *, max_record_bytes: int = 1 << 20, key=None, render=None, **options):
    """A reader of the file at `path`, which gets `data` first."""
    if data is not None:
        path.write_bytes(data)
    return Reader(sources.whole(raw_file(path, **options)), max_record_bytes=max_record_bytes, key=key, render=render)


def raw_file(path, **options):
    [raw] = sources.resolve([Source(path=str(path), **options)], config_problem=lambda key, what: f"{key}: {what}")
    return raw


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
    assert [item.parts for item in reader(path)] == [(Part(text, True),) for text in texts]


@given(data=st.binary(min_size=1), format_=st.sampled_from(["jsonl", "text"]), limit=st.integers(1, 40))
def test_any_bytes_are_read_to_the_end(tmp_path_factory, data, format_, limit):
    path = tmp_path_factory.mktemp("bytes") / "a"
    for unit in ("line", "paragraph", "file"):
        reading = reader(path, data, format=format_, unit=unit, max_record_bytes=limit)
        lines = [item.line for item in reading]
        assert lines == sorted(lines)
        assert reading.num_bytes == len(data)


def test_reading_twice_gives_the_same_and_counts_once(jsonl):
    reading = reader(jsonl, b'{"text": "a"}\n')
    assert list(reading) == list(reading)
    assert reading.num_bytes == 14


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
        (b'{"text": "a", "x": 1e999}', "number out of range"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "integer too long: 5000 digits"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deeply"),
        (b'{"a":' * 100_000, "JSON nested too deeply"),
        (b'{"text": "a', "not JSON: Unterminated string starting at column 10"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        (b"{'text': 'a'}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'["a"]', "a JSON list, not an object"),
        (b"17", "a JSON int, not an object"),
        (b"null", "a JSON null, not an object"),
        (b"{}", "no field 'text': there are none"),
        (b'{"txt": "a", "id": 1}', "no field 'text': there are 'txt', 'id'"),
        (b'{"text": ["a"]}', "field 'text' is of type list, not text"),
        (b'{"text": null}', "field 'text' is of type null, not text"),
        (b'{"text": "a\\ud800"}', "field 'text' holds a lone surrogate: at character 2"),
        (b'{"text": ""}', "field 'text' is empty, so nothing is a target"),
        (b'{"text": "\xff"}', "not utf-8: byte 0xff at column 11. Convert the file, or set encoding"),
        (b'{"text": "\xed\xa0\x80"}', "not utf-8: byte 0xed at column 11. Convert the file, or set encoding"),
        (b'{"text": "a\x00"}', "not JSON: Invalid control character at column 12"),
        (b"\xff\xfe", "not utf-8: byte 0xff at column 1. Convert the file, or set encoding"),
    ],
)
def test_bad_json_is_told_and_the_next_line_is_read(jsonl, line, reason):
    assert read(jsonl, b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n') == [(1, "a"), (2, reason), (3, "b")]


def test_numbers_within_range_are_accepted(jsonl):
    data = b'{"text": "a", "x": [1e308, ' + b"9" * 400 + b", -" + b"9" * 400 + b", -0.0, 5e-324]}\n"
    assert read(jsonl, data) == [(1, "a")]


def test_two_equal_records_differ_in_place_only(jsonl):
    first, second = reader(jsonl, b'{"text": "a", "n": 1}\n{"n": 2, "text": "a"}\n')
    assert first.id == second.id
    assert (first.line, second.line) == (1, 2)


def test_ids_tell_prompts_from_completions():
    """("ab", "c") and ("a", "bc") have the same characters, and so has a plain text of them."""
    shapes = [(("ab", False), ("c", True)), (("a", False), ("bc", True)), (("abc", True),), (("abc", True, True),)]
    assert len({Record("f", 1, tuple(Part(*part) for part in parts)).id for parts in shapes}) == 4


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
    assert item.parts == (Part("1+1?", False), Part("2", True))


def test_empty_prompt_is_good_and_empty_completion_is_bad(jsonl):
    first, second = reader(jsonl, b'{"q": "", "a": "2"}\n{"q": "1", "a": ""}\n', prompt="q", completion="a")
    assert first.parts == (Part("", False), Part("2", True))
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


# --- one content, many forms --------------------------------------------------------------------------------------


def test_gsm8k_as_jsonl_and_as_csv_with_mark_and_crlf_has_equal_ids(shared):
    lines = reader(shared / "instruct" / "gsm8k_train.jsonl", prompt="question", completion="answer")
    table = reader(shared / "instruct" / "gsm8k_train_first500_bom_crlf.csv", prompt="prompt", completion="completion")
    first = [item.id for item in lines][:500]
    assert [item.id for item in table] == first
    assert len(set(first)) == 500


def test_every_format_and_packing_gives_equal_ids(shared, tmp_path):
    """The Universal Declaration in 20 languages, written in each format that holds fields."""
    path = shared / "text" / "udhr_20lang.jsonl"
    values = [json.loads(line) for line in path.read_bytes().splitlines()]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(values[0]), delimiter="\t")
    writer.writeheader()
    writer.writerows(values)
    packed = pyarrow.compress(path.read_bytes(), codec="zstd", asbytes=True)
    for name, data in {
        "a.jsonl.gz": gzip.compress(path.read_bytes()),
        "a.ndjson.zst": packed,
        "a.json": json.dumps(values, indent=1).encode(),
        "a.json.gz": gzip.compress(json.dumps(values, ensure_ascii=False).encode()),
        "a.tsv": codecs.BOM_UTF8 + table.getvalue().encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    (tmp_path / "wide.jsonl").write_bytes(path.read_bytes().decode().encode("utf-16"))
    expected = [item.id for item in reader(path)]
    assert len(expected) == len(values) > 20
    for found in sorted(tmp_path.iterdir()):
        encoding = "utf-16" if found.stem == "wide" else "utf-8"
        assert [item.id for item in reader(found, encoding=encoding)] == expected, found.name


def test_id_is_a_stated_function_of_the_content():
    """Worked out by hand from the docstring: flags, length, UTF-8."""
    parts = (Part("é", False), Part("a", True), Part("<e>", True, True))
    data = b"\0" + b"\0" * 7 + b"\2\xc3\xa9" + b"\1" + b"\0" * 7 + b"\1a" + b"\3" + b"\0" * 7 + b"\3<e>"
    assert Record("f", 1, parts).id == hashlib.sha256(data).digest()[:16]


def test_botchan_loses_its_mark_and_keeps_its_paragraphs(shared):
    path = shared / "text" / "botchan.txt"
    assert path.read_bytes().startswith(codecs.BOM_UTF8)
    text = path.read_text(encoding="utf-8-sig")
    expected = [block.strip("\n") for block in re.split(r"\n(?:[ \t]*\n)+", text) if block.strip()]
    found = [item.parts[0].text for item in reader(path, unit="paragraph")]
    assert found == expected
    assert found[0].startswith("Project Gutenberg")


@pytest.mark.parametrize("name", ["text/udhr_20lang.txt", "text/python311_stdlib.jsonl", "instruct/gsm8k_train.jsonl"])
@pytest.mark.parametrize("unit_bytes", [1, 9_999, 100_000])
def test_units_together_give_the_records_of_the_file(shared, tmp_path, name, unit_bytes):
    path = tmp_path / Path(name).name
    path.write_bytes(b"".join((shared / name).read_bytes().splitlines(keepends=True)[:200]))
    for unit in ("line", "paragraph"):
        raw = raw_file(path, text="answer" if "gsm8k" in name else "text", unit=unit)
        units = sources.inventory(raw, unit_bytes=unit_bytes).units
        found = [item for unit in units for item in Reader(unit, max_record_bytes=1 << 20)]
        assert found == list(Reader(sources.whole(raw), max_record_bytes=1 << 20))
        assert len(units) > 1 or unit == "paragraph" or unit_bytes == 100_000
        assert found


@given(
    pieces=st.lists(
        st.sampled_from(
            [b'{"text": "a"}', b'"x"', b"\n", b"\r\n", b"\n\n", b"\xff", b"\0", b"[[", b" ", b"z" * 30, "é".encode()]
        ),
        min_size=1,
    ),
    unit_bytes=st.integers(1, 50),
    chunk_bytes=st.integers(1, 50),
    format_=st.sampled_from(["jsonl", "line", "paragraph"]),
)
def test_any_cut_of_any_bytes_gives_the_same_records(tmp_path_factory, pieces, unit_bytes, chunk_bytes, format_):
    path = tmp_path_factory.mktemp("cuts") / "a"
    path.write_bytes(b"".join(pieces))
    options = {"format": "jsonl"} if format_ == "jsonl" else {"format": "text", "unit": format_}
    raw = raw_file(path, **options)
    expected = list(Reader(sources.whole(raw), max_record_bytes=20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
        units = sources.inventory(raw, unit_bytes=unit_bytes).units
        assert [item for unit in units for item in Reader(unit, max_record_bytes=20)] == expected


# --- value, required, messages ------------------------------------------------------------------------------------


def test_value_takes_what_is_no_object(jsonl):
    data = b'"a"\n17\n{"value": "b"}\n["c"]\nnull\n'
    assert read(jsonl, data, text="value") == [
        (1, "a"),
        (2, "field 'value' is of type int, not text"),
        (3, "b"),
        (4, "field 'value' is of type list, not text"),
        (5, "field 'value' is of type null, not text"),
    ]
    assert read(jsonl, b'"a"\n', prompt="value", completion="value") == [(1, "a JSON str, not an object")]


def test_required_fields_must_be_there_and_not_null(jsonl):
    data = b'{"text": "a", "id": 1}\n{"text": "b"}\n{"text": "c", "id": null}\n{"text": "d", "id": ""}\n'
    expected = [(1, "a"), (2, "no field 'id': there are 'text'"), (3, "field 'id' is null"), (4, "d")]
    assert read(jsonl, data, required=["id", "text"]) == expected


def test_null_cell_of_parquet_is_a_missing_text(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"], "id": [1, 2, None]}), path)
    found = [(item.line, getattr(item, "reason", None)) for item in reader(path, required=["id"])]
    assert found == [(1, None), (2, "field 'text' is of type null, not text"), (3, "field 'id' is null")]


@pytest.mark.parametrize("name", ["model_config", "json", "__class__", "a b", "field_0", "", "self"])
def test_any_name_can_be_a_field(jsonl, name):
    """Names are aliases in the pydantic model, so none of its own is in the way."""
    assert read(jsonl, json.dumps({name: "a"}).encode(), text=name) == [(1, "a")]


def words(messages: list[dict[str, str]]) -> tuple[Part, ...]:
    """A template of the test: role, colon and content, of which the assistant's are targets."""
    if messages[0]["role"] == "alien":
        raise ValueError("the chat template refuses these messages: unknown role")
    return tuple(Part(f"{m['role']}: {m['content']}", m["role"] == "assistant") for m in messages)


def test_messages_are_rendered_with_role_and_content_alone(jsonl):
    turns = [{"role": "user", "content": "a", "name": "n"}, {"content": "b", "role": "assistant"}]
    [item] = reader(jsonl, json.dumps({"m": turns, "k": "v"}).encode(), messages="m", key="k", render=words)
    assert item == Record(str(jsonl), 1, (Part("user: a", False), Part("assistant: b", True)), "v")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("a", "field 'm' is no list of messages: it is of type str"),
        (None, "field 'm' is no list of messages: it is of type null"),
        ([], "field 'm' is no list of messages: it is empty"),
        (["a"], "field 'm' is no list of messages: message 1 is of type str, not an object"),
        ([{"role": "user"}], "field 'm' is no list of messages: message 1 has no 'content'"),
        (
            [{"role": "user", "content": "a"}, {"role": 1, "content": "b"}],
            "field 'm' is no list of messages: 'role' of message 2 is of type int, not text",
        ),
        (
            [{"role": "assistant", "content": None}],
            "field 'm' is no list of messages: 'content' of message 1 is of type null, not text",
        ),
        (
            [{"role": "user", "content": "a"}],
            "field 'm' has no assistant message with text, so nothing is a target",
        ),
        (
            [{"role": "assistant", "content": ""}],
            "field 'm' has no assistant message with text, so nothing is a target",
        ),
        ([{"role": "assistant", "content": "a\ud800"}], "field 'm' holds a lone surrogate: at character 2"),
        (
            [{"role": "alien", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the chat template refuses these messages: unknown role",
        ),
    ],
)
def test_bad_messages_are_told(jsonl, messages, reason):
    data = json.dumps({"m": messages}).encode()
    [item] = reader(jsonl, data, messages="m", render=words)
    assert item == BadRecord(str(jsonl), 1, reason)


def test_template_that_makes_no_target_makes_a_bad_record(jsonl):
    data = json.dumps({"m": [{"role": "assistant", "content": "a"}]}).encode()
    [item] = reader(jsonl, data, messages="m", render=lambda messages: (Part("a", False), Part("", True)))
    assert item.reason == "the chat template makes no text a target"


def test_messages_without_a_template_are_an_error(jsonl):
    with pytest.raises(UserError, match="messages need a chat template"):
        reader(jsonl, b"{}", messages="m")


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_reasons_repeat_no_data(tmp_path, name):
    """A secret in every place where a record may be bad: value, key, number, literal, and behind each fault."""
    secret = "AKIA4815162342XYZ"
    number = "4815162342" * 50
    faults = [
        f'{{"{secret}": 1}}', f'{{"{secret}": 1, "{secret}": 2}}', f'{{"text": {number}}}',
        f'{{"text": {number}.5e999}}',
        f'{{"text": ["{secret}"]}}', f'{{"text": "{secret}\\ud800"}}', f'{{"text": "{secret}"}} "{secret}"', secret,
        f'"{secret}"', f'{{"text": "{secret}\0"}}', f'{{"text": "", "a": "{secret}"}}', f'{{"text": {secret}}}',
    ]  # fmt: skip
    if name == "a.csv":
        faults = [f"{secret},{secret}", f'{secret}"', f'"{secret}"{secret}', f"{secret}\0", f"{secret}\r1"]
    if name == "a.txt":
        faults = [f"{secret}\0", secret * 20]
    text = {"a.json": "[" + ",\n".join(faults) + "]", "a.csv": "text\n" + "\n".join(faults)}.get(
        name, "\n".join(faults)
    )
    data = text.encode() + (b"" if name == "a.json" else b"\n" + secret.encode() + b"\xff\n")
    reasons = [
        item.reason for item in reader(tmp_path / name, data, max_record_bytes=300 if name == "a.txt" else 1 << 20)
    ]
    assert len(reasons) >= len(faults)
    assert not [reason for reason in reasons if "AKIA" in reason or "48151" in reason]


# --- descriptions -------------------------------------------------------------------------------------------------


def test_description_of_a_raw_file_is_its_size_and_digest(txt):
    txt.write_bytes(b"abc\n")
    digest = hashlib.sha256(b"abc\n").hexdigest()
    expected = {"path": str(txt), "format": "text", "size": 4, "sha256": digest}
    assert records.describe(raw_file(txt)) == expected
