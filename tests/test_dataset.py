"""Every record is counted once, in a split or in the quarantine; the bytes depend on the input and settings alone."""

import json

import numpy as np
import pytest
from conftest import run_script

from codex_accel import files, manifest, plan, tokenizer
from codex_accel.errors import UserError
from codex_accel.tokens import TokenStore

HALVES = "{train: 0.5, test: 0.5}"


def write_jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepare(tiny, output_dir, sources, *overrides):
    """Prepare with the tiny tokenizer; returns the facts of the manifest."""
    sources = sources if isinstance(sources, list) else [{"path": str(sources)}]
    argv = [f"tokenizer={tiny}/tokenizer", f"sources={json.dumps(sources)}", f"output_dir={output_dir}", *overrides]
    assert run_script("prepare_data", *argv) == 0
    return manifest.read(output_dir)["facts"]


def texts_of(tiny, folder, split) -> list[str]:
    loaded = tokenizer.load(tiny / "tokenizer")
    return [loaded.decode(document.input_ids.tolist()) for document in TokenStore(folder, split)]


def test_documents_of_the_splits_are_the_records(tiny, tmp_path):
    texts = [f"text {n} é 😀 {'x' * n}" for n in range(40)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    facts = prepare(tiny, tmp_path / "d", tmp_path / "a.jsonl", f"split={{ratios: {HALVES}}}")
    found = [texts_of(tiny, tmp_path / "d", split) for split in ("train", "test")]
    assert sorted(found[0] + found[1]) == sorted(texts)
    for split, there in zip(("train", "test"), found, strict=True):
        assert there == [text for text in texts if text in there]  # in order
        assert facts["splits"][split]["num_records"] == len(there)
        assert facts["splits"][split]["num_bytes"] == sum(len(text.encode()) for text in there)


def test_hash_keeps_a_record_in_its_split_when_files_are_added(tiny, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "before", tmp_path / "*.jsonl", f"split={{ratios: {HALVES}}}")
    write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(39, 80)])
    prepare(tiny, tmp_path / "after", tmp_path / "*.jsonl", f"split={{ratios: {HALVES}}}")
    for split in ("train", "test"):
        assert set(texts_of(tiny, tmp_path / "before", split)) <= set(texts_of(tiny, tmp_path / "after", split))


def test_hash_with_a_key_keeps_equal_keys_together(tiny, tmp_path):
    lines = [json.dumps({"text": f"{key} {n}", "path": f"k{key}"}) for n in range(5) for key in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(tiny, tmp_path / "d", tmp_path / "a.jsonl", f"split={{key: path, ratios: {HALVES}}}")
    keys = [{text.split()[0] for text in texts_of(tiny, tmp_path / "d", split)} for split in ("train", "test")]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == {str(key) for key in range(12)}


def test_exact_keeps_sizes_and_counts_duplicates_and_overlap(tiny, tmp_path):
    """20 records of 4 contents, 5 of each: with 12 and 8 the cut falls inside one content, 2 of it before, 3 after."""
    write_jsonl(tmp_path / "a.jsonl", [f"text {n % 4}" for n in range(20)])
    split = "split={method: exact, ratios: {train: 0.6, test: 0.4}}"
    facts = prepare(tiny, tmp_path / "d", tmp_path / "a.jsonl", split)
    splits = facts["splits"]
    assert [(part["num_records"], part["num_duplicates"], part["num_shared"]) for part in splits.values()] == [
        (12, 9, 2), (8, 6, 3),
    ]  # fmt: skip
    assert facts["duplicates"]["num_groups"] == 4


def test_position_takes_the_first_records_first(tiny, tmp_path):
    texts = [f"text {n}" for n in range(10)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(tiny, tmp_path / "d", tmp_path / "a.jsonl", "split={method: position, ratios: {train: 0.7, test: 0.3}}")
    assert texts_of(tiny, tmp_path / "d", "train") == texts[:7]
    assert texts_of(tiny, tmp_path / "d", "test") == texts[7:]


def test_position_cuts_a_single_text(tiny, tmp_path):
    text = "".join(chr(0x400 + n % 64) for n in range(1000))
    write_jsonl(tmp_path / "a.jsonl", [text])
    prepare(tiny, tmp_path / "d", tmp_path / "a.jsonl", "split={method: position, ratios: {train: 0.9, test: 0.1}}")
    assert texts_of(tiny, tmp_path / "d", "train") == [text[:900]]
    assert texts_of(tiny, tmp_path / "d", "test") == [text[900:]]


def test_position_cannot_cut_a_single_prompt(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": "2"}\n')
    source = [{"path": str(tmp_path / "a.jsonl"), "prompt": "q", "completion": "a"}]
    with pytest.raises(UserError, match=r"a\.jsonl:1: the only record has a prompt"):
        prepare(tiny, tmp_path / "d", source, "split={method: position}")


def test_given_takes_the_split_of_each_source(tiny, tmp_path):
    sources = [
        {"path": write_jsonl(tmp_path / f"{n}.jsonl", [f"text {n}"]), "split": split}
        for n, split in enumerate(["train", "hard-test", "train"])
    ]
    prepare(tiny, tmp_path / "d", sources, "split.method=given")
    assert texts_of(tiny, tmp_path / "d", "train") == ["text 0", "text 2"]
    assert texts_of(tiny, tmp_path / "d", "hard-test") == ["text 1"]


def test_given_and_split_keys_must_go_together(tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match=r"sources\.1\.split: split\.method: given needs a split"):
        prepare(tiny, tmp_path / "d", [{"path": path, "split": "a"}, {"path": path}], "split.method=given")
    with pytest.raises(UserError, match=r"sources\.0\.split: 'a' works with split\.method: given only, not hash"):
        prepare(tiny, tmp_path / "d", [{"path": path, "split": "a"}])


@pytest.mark.security
@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "a b", "a\n", "a" * 101])
def test_split_name_that_is_no_file_name_is_refused(tiny, tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match="names no split"):
        prepare(tiny, tmp_path / "d", [{"path": path}], f"split={json.dumps({'ratios': {name: 1.0}})}")
    with pytest.raises(UserError, match="names no split"):
        prepare(tiny, tmp_path / "d", [{"path": path, "split": name}], "split.method=given")
    assert not (tmp_path / "d").exists()


def test_key_needs_records_with_fields(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"split\.key: 'path' is a field, and the text file"):
        prepare(tiny, tmp_path / "d", tmp_path / "a.txt", "split.key=path")


def test_empty_split_is_an_error(tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(UserError, match=r"split\.ratios: b came out empty from 2 records"):
        prepare(tiny, tmp_path / "d", path, "split={method: exact, ratios: {a: 0.9, b: 0.1}}")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    sources = [{"path": path, "split": "a"}, {"path": str(tmp_path / "blank.jsonl"), "split": "b"}]
    with pytest.raises(UserError, match=r"sources: b came out empty from 2 records\. Name other files"):
        prepare(tiny, tmp_path / "d", sources, "split.method=given")
    assert not (tmp_path / "d").exists()


def test_only_blank_lines_are_an_error(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no usable record in 0"):
        prepare(tiny, tmp_path / "d", tmp_path / "a.txt")


# --- quarantine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path):
    """Four good records, three bad ones and a blank line."""
    lines = [b'{"text": "a"}', b"{", b'{"text": "b"}', b"", b'{"txt": 1}', b'{"text": "\xff"}', b'{"text": "c"}']
    path = tmp_path / "spoilt.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"text": "d"}\n']))
    return path


def test_quarantine_names_file_line_and_reason(tiny, tmp_path, spoilt):
    facts = prepare(tiny, tmp_path / "d", spoilt, "max_bad_fraction=0.5", "split.ratios={all: 1.0}")
    lines = [json.loads(line) for line in (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [(str(spoilt), n) for n in (2, 5, 6)]
    assert [line["reason"].split(":")[0] for line in lines] == ["not JSON", "no field 'text'", "not utf-8"]
    assert facts["bad_by_reason"] == {"not JSON": 1, "no field 'text'": 1, "not utf-8": 1}


def test_records_and_bad_records_add_up_to_the_lines(tiny, tmp_path, spoilt):
    facts = prepare(tiny, tmp_path / "d", spoilt, "max_bad_fraction=0.5", "split.ratios={all: 1.0}")
    assert (facts["num_records"], facts["num_bad"]) == (4, 3)
    assert facts["splits"]["all"]["num_records"] + facts["num_bad"] == 7
    [source] = manifest.read(tmp_path / "d")["sources"]
    assert (source["num_records"], source["num_bad"], source["size"]) == (4, 3, spoilt.stat().st_size)
    assert source["sha256"] == files.sha256_file(spoilt)


def test_too_many_bad_records_are_an_error(tiny, tmp_path, spoilt):
    with pytest.raises(
        UserError, match=r"max_bad_fraction: 3 of 7 records are bad, more than max_bad_fraction = 0\.42"
    ):
        prepare(tiny, tmp_path / "d", spoilt, "max_bad_fraction=0.42")
    prepare(tiny, tmp_path / "d", spoilt, "max_bad_fraction=0.43", "split.ratios={all: 1.0}")


def test_first_bad_record_can_stop_the_run(tiny, tmp_path, spoilt):
    with pytest.raises(UserError, match=r"spoilt\.jsonl:2: not JSON.* on_bad_record=quarantine"):
        prepare(tiny, tmp_path / "d", spoilt, "on_bad_record=error")


def test_no_quarantine_is_written_where_nothing_is_bad(tiny):
    assert not (tiny / "dataset" / "quarantine.jsonl").exists()


def test_long_record_is_bad(tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b" * 100])
    options = ("max_record_bytes=50", "max_bad_fraction=0.5", "split.ratios={all: 1.0}")
    assert prepare(tiny, tmp_path / "d", path, *options)["bad_by_reason"] == {"longer than max_record_bytes = 50": 1}


# --- bytes --------------------------------------------------------------------------------------------------------


def test_preparing_twice_gives_the_same_content(tiny, tmp_path):
    for name in ("a", "b"):
        prepare(tiny, tmp_path / name, tiny / "corpus" / "modules.jsonl", f"split={{ratios: {HALVES}}}")
    digests = {manifest.read(tmp_path / name)["content_digest"] for name in ("a", "b")}
    assert len(digests) == 1


def test_small_units_give_several_shards_and_the_same_documents(tiny, tmp_path):
    source = tiny / "corpus" / "modules.jsonl"
    split = f"split={{ratios: {HALVES}}}"
    prepare(tiny, tmp_path / "one", source, split)
    prepare(tiny, tmp_path / "many", source, split, "unit_bytes=100000")
    size = source.stat().st_size
    units = {int(path.stem.split("-")[1]) for path in (tmp_path / "many").glob("*.arrow")}
    assert len(units) > 2
    assert max(units) <= size // 100_000
    for name in ("train", "test"):
        one, many = TokenStore(tmp_path / "one", name), TokenStore(tmp_path / "many", name)
        assert one.lengths.tolist() == many.lengths.tolist()
        np.testing.assert_array_equal(one.tokens(0, one.num_tokens), many.tokens(0, many.num_tokens))


def test_shards_do_not_depend_on_how_many_records_are_encoded_at_once(tiny, tmp_path, monkeypatch):
    source = tiny / "corpus" / "functions.jsonl"
    options = ("split.ratios={all: 1.0}", "unit_bytes=50000")
    sources = [{"path": str(source), "prompt": "prompt", "completion": "completion"}]
    prepare(tiny, tmp_path / "a", sources, *options)
    monkeypatch.setattr(plan, "BLOCK_RECORDS", 7)
    monkeypatch.setattr(plan, "BLOCK_CHARACTERS", 1000)
    prepare(tiny, tmp_path / "b", sources, *options)
    digests = {manifest.read(tmp_path / name)["content_digest"] for name in ("a", "b")}
    assert len(digests) == 1


def test_tokens_take_two_bytes(tiny):
    facts = manifest.read(tiny / "dataset")["facts"]
    num_tokens = sum(split["num_tokens"] for split in facts["splits"].values())
    num_bytes = sum(path.stat().st_size for path in (tiny / "dataset").glob("*.arrow"))
    assert 2 * num_tokens < num_bytes < 2.1 * num_tokens


# --- targets ------------------------------------------------------------------------------------------------------


def test_completion_and_end_are_the_targets(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "prompt", "a": "completion é"}\n')
    sources = [{"path": str(tmp_path / "a.jsonl"), "prompt": "q", "completion": "a"}]
    facts = prepare(tiny, tmp_path / "d", sources, "split.ratios={all: 1.0}")
    loaded = tokenizer.load(tiny / "tokenizer")
    prompt, completion = loaded.encode(["prompt", "completion é"])
    [document] = TokenStore(tmp_path / "d", "all")
    assert document.input_ids.tolist() == [1, *prompt, *completion, 2]
    assert document.target_spans == ((1 + len(prompt), len(document.input_ids)),)
    assert document.num_bytes == len("completion é".encode())
    assert facts["splits"]["all"]["num_target_tokens"] == len(completion) + 1


def test_everything_but_the_first_token_of_a_text_is_a_target(tiny):
    for split in manifest.read(tiny / "dataset")["facts"]["splits"].values():
        assert split["num_target_tokens"] == split["num_tokens"] - split["num_records"]


def test_begin_and_end_can_be_left_out(tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["some text"])
    prepare(tiny, tmp_path / "d", path, "split.ratios={all: 1.0}", "add_bos=false", "add_eos=false")
    [document] = TokenStore(tmp_path / "d", "all")
    assert document.input_ids.tolist() == tokenizer.load(tiny / "tokenizer").encode(["some text"])[0]


def test_statistics_are_those_of_the_documents(tiny):
    facts = manifest.read(tiny / "dataset")["facts"]["splits"]
    for name, split in facts.items():
        store = TokenStore(tiny / "dataset", name)
        assert (split["num_records"], split["num_tokens"]) == (store.num_documents, store.num_tokens)
        assert split["length_percentiles"]["max"] == store.lengths.max()
        assert split["length_percentiles"]["p50"] == sorted(store.lengths)[(store.num_documents - 1) // 2]
        assert split["num_bytes"] == sum(document.num_bytes for document in store)
        assert split["bytes_per_token"] == pytest.approx(split["num_bytes"] / split["num_tokens"])


def test_unknown_characters_are_counted(tmp_path):
    (tmp_path / "known.txt").write_text("abc\n")
    (tmp_path / "all.txt").write_text("abxy\ncab\n")
    known = f"sources=[{{path: {tmp_path}/known.txt}}]"
    run_script("train_tokenizer", f"output_dir={tmp_path}/tokenizer", known, "type=char")
    facts = prepare(tmp_path, tmp_path / "d", tmp_path / "all.txt", "split.ratios={all: 1.0}")
    assert facts["splits"]["all"]["num_unknown_tokens"] == 2
