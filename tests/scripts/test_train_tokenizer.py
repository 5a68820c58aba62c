"""train_tokenizer: the same input is not trained on twice, another one is told, and nothing is left out in silence."""

import json

import pytest
import transformers
from conftest import run_script

from codex_accel import manifest, tokenizer
from codex_accel.errors import UserError
from codex_accel.schema import CorpusConfig

TEXT = '{"text": "All human beings are born free and equal"}\n' * 5


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text(TEXT)
    return path


def train(out, path, *options: str) -> int:
    return run_script("train_tokenizer", f"output_dir={out}", f"sources=[{{path: {path}}}]", "vocab_size=320", *options)


def refused(out, path, *options: str) -> str:
    with pytest.raises(UserError) as caught:
        train(out, path, *options)
    return "\n".join(caught.value.problems)


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("type=bpe",),
        ("type=unigram",),
        ("type=sentencepiece", "algorithm=bpe"),
        ("type=sentencepiece",),
        ("type=char",),
    ],
    ids=" ".join,
)
def test_every_type_gives_a_sealed_folder_that_loads(tmp_path, raw, options):
    assert train(tmp_path / "out", raw, *options) == 0
    assert manifest.problems_of(tmp_path / "out") == []
    document = manifest.read(tmp_path / "out")
    payload = {resource["name"] for resource in document["resources"] if resource["payload"]}
    assert payload == set(tokenizer.PAYLOAD) - ({"tokenizer.model"} if "type=sentencepiece" not in options else set())
    loaded = tokenizer.load(tmp_path / "out")
    assert document["facts"]["vocab_size"] == loaded.vocab_size
    assert (document["facts"]["engine"], document["facts"]["trained_on_bytes"]) == (loaded.engine, len(TEXT))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("born free")["input_ids"] == loaded.encode(["born free"])[0]


def test_training_twice_gives_the_same_content(tmp_path, raw):
    (tmp_path / "copy.jsonl").write_text(TEXT)
    for out, path in (("a", raw), ("b", tmp_path / "copy.jsonl")):
        train(tmp_path / out, path, "type=unigram")
    assert len({manifest.read(tmp_path / out)["content_digest"] for out in ("a", "b")}) == 1


def test_sources_are_recorded_with_their_records(tmp_path, raw):
    train(tmp_path / "out", raw)
    [source] = manifest.read(tmp_path / "out")["sources"]
    assert (source["format"], source["size"], source["num_records"]) == ("jsonl", len(TEXT), 5)


def test_pairs_and_messages_are_trained_on_by_their_words(tmp_path):
    pair = {"q": "zebra?", "a": "quagga!"}
    talk = {"messages": [{"role": "user", "content": "okapi"}, {"role": "assistant", "content": "wombat"}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk))
    listed = (
        f"sources=[{{path: {tmp_path}/pairs.jsonl, prompt: q, completion: a}}, "
        f"{{path: {tmp_path}/talk.jsonl, messages: messages}}]"
    )
    assert run_script("train_tokenizer", f"output_dir={tmp_path}/out", listed, "type=char") == 0
    known = set(tokenizer.load(tmp_path / "out").backend.get_vocab()) - {"[PAD]", "[BOS]", "[EOS]", "[UNK]"}
    assert known == set("zebra?quagga!okapiwombat")  # no role, no name of a field


def test_text_that_is_not_used_is_told(tmp_path, raw, capsys):
    train(tmp_path / "out", raw, "type=sentencepiece", "max_train_bytes=100")
    facts = manifest.read(tmp_path / "out")["facts"]
    assert (facts["num_lines"], facts["num_lines_left_out"], facts["bytes_left_out"]) == (5, 3, 120)
    assert "not used   num_lines_left_out 3, bytes_left_out 120" in capsys.readouterr().out


# --- the same again, and another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("overwrite=true",)], ids=" ".join)
def test_the_same_input_and_settings_are_not_trained_on_again(tmp_path, raw, capsys, options):
    train(tmp_path / "out", raw)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert train(tmp_path / "out", raw, *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_another_setting_is_named_and_refused(tmp_path, raw):
    train(tmp_path / "out", raw)
    told = refused(tmp_path / "out", raw, "min_frequency=3", "pre_tokenizer=gpt4")
    assert "min_frequency was 2, is 3" in told
    assert "pre_tokenizer was 'gpt2', is 'gpt4'" in told
    assert "say overwrite=true to train again" in told


def test_changed_input_is_named_and_refused(tmp_path, raw):
    train(tmp_path / "out", raw)
    raw.write_text(TEXT + '{"text": "more"}\n')
    told = refused(tmp_path / "out", raw)
    assert f"'{raw}' is new or has changed" in told
    assert "is gone ('../raw.jsonl')" in told


def test_another_field_is_refused(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text('{"text": "a", "other": "b"}\n')
    train(tmp_path / "out", path)
    with pytest.raises(UserError, match="how they are read"):
        run_script(
            "train_tokenizer",
            f"output_dir={tmp_path}/out",
            f"sources=[{{path: {path}, text: other}}]",
            "vocab_size=320",
        )


def test_changed_input_is_trained_on_if_overwriting(tmp_path, raw):
    train(tmp_path / "out", raw)
    before = manifest.read(tmp_path / "out")
    raw.write_text(TEXT + '{"text": "zebra zebra zebra zebra"}\n' * 9)
    assert train(tmp_path / "out", raw, "overwrite=true") == 0
    after = manifest.read(tmp_path / "out")
    assert after["content_digest"] != before["content_digest"]
    assert after["facts"]["input_digest"] != before["facts"]["input_digest"]
    assert manifest.problems_of(tmp_path / "out") == []


def test_a_damaged_folder_is_told_and_trained_anew_if_overwriting(tmp_path, raw):
    train(tmp_path / "out", raw)
    whole = (tmp_path / "out" / "tokenizer.json").read_bytes()
    (tmp_path / "out" / "tokenizer.json").write_bytes(whole[:-1] + b" ")
    assert "tokenizer.json: has changed" in refused(tmp_path / "out", raw)
    assert train(tmp_path / "out", raw, "overwrite=true") == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == whole


def test_another_kind_of_folder_is_told(tmp_path, raw):
    (tmp_path / "out").mkdir()
    config = CorpusConfig(output_dir=str(tmp_path / "out"))
    manifest.seal(tmp_path / "out", kind="corpus", final=tmp_path / "out", payload=(), config=config)
    assert "holds a corpus." in refused(tmp_path / "out", raw)


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_dry_run_writes_nothing(tmp_path, raw, capsys, trained_before):
    if trained_before:
        train(tmp_path / "out", raw)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(tmp_path / "out", raw, "min_frequency=5", "--dry-run") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    out = capsys.readouterr().out
    assert f"{len(TEXT)} bytes" in out
    assert ("min_frequency was 2, is 5" if trained_before else "does not exist yet. Nothing was written.") in out


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_bad_record_stops_and_leaves_no_folder(tmp_path, raw):
    raw.write_text(TEXT + "{")
    assert f"{raw}:6: " in refused(tmp_path / "out", raw)
    assert not (tmp_path / "out").exists()


def test_input_without_a_record_is_told(tmp_path, raw):
    raw.write_text("\n\n")
    assert "hold no record, only blank lines" in refused(tmp_path / "out", raw)
