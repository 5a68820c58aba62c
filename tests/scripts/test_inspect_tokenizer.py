"""inspect_tokenizer: ids and texts as the libraries give them, and every reason against a tokenizer."""

import io
import json
import re
import shutil
import sys

import pytest
import tokenizers
from conftest import run_script
from tokenizers import models

from codex_accel import inspection, tokenizer, vocabulary
from codex_accel.errors import UserError
from codex_accel.schema import Source, TokenizerConfig


@pytest.fixture
def inspect(capsys, monkeypatch):
    """Run the script with this standard input; returns the exit code and the lines that it printed."""

    def run(*argv: object, stdin: bytes = b"") -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run_script("inspect_tokenizer", *argv)
        return code, capsys.readouterr().out.split("\n")[:-1]

    return run


@pytest.fixture(scope="module")
def char(tmp_path_factory):
    """A tokenizer that knows the letters a to z and the space."""
    folder = tmp_path_factory.mktemp("char")
    config = TokenizerConfig(output_dir="out", sources=[Source(path="x")], type="char")
    vocabulary.save(vocabulary.train(config, ["the quick brown fox jumps over the lazy dog"]), folder, config)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [("b", "the fox"), ("a", "dog"), ("b", "jumps")]
    path.write_text("".join(json.dumps({"lang": lang, "text": text}) + "\n" for lang, text in rows))
    return path


# --- encode and decode --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mistral_v1", "sentencepiece_unigram_botchan"])
def test_encode_gives_the_reference_ids(inspect, shared, name):
    """Single lines from standard input; a text of line ends as an option."""
    root = shared / "tokenizers"
    path = root / name / "reference_ids.jsonl"
    path = path if path.is_file() else root / f"{name}.reference_ids.jsonl"
    folder = root / name if (root / name).is_dir() else root / f"{name}.model"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    plain = [row for row in rows if not re.search("[\r\n]", row["text"])]
    stdin = "".join(row["text"] + "\n" for row in plain).encode()
    code, lines = inspect("encode", f"tokenizer={folder}", stdin=stdin)
    assert (code, [[int(word) for word in line.split()] for line in lines]) == (0, [row["ids"] for row in plain])
    several = next(row for row in rows if row["text"] == "\n\n")
    _, lines = inspect("encode", f"tokenizer={folder}", "text=\n\n")
    assert [int(word) for word in lines[0].split()] == several["ids"]


def test_decode_reads_both_ways_to_write_ids(inspect, char):
    code, lines = inspect("decode", f"tokenizer={char}", stdin=b"23 11\n[23, 11]\n\n")
    assert (code, lines) == (0, [tokenizer.load(char).decode([23, 11])] * 2 + [""])
    assert inspect("decode", f"tokenizer={char}", "ids=[23, 11]")[1] == lines[:1]


def test_decode_undoes_encode(inspect, char):
    _, [line] = inspect("encode", f"tokenizer={char}", "text=lazy dog")
    assert inspect("decode", f"tokenizer={char}", stdin=line.encode()) == (0, ["lazy dog"])


@pytest.mark.parametrize(
    ("argv", "stdin", "reason"),
    [
        (["decode"], b"1\n1 x\n", "standard input:2: is no list of ids"),
        (["decode"], b"[1, -1]\n", "standard input:1: is no list of ids"),
        (["decode"], b"[true]\n", "standard input:1: is no list of ids"),
        (["decode"], b"1\n99\n", "standard input:2: id 99 is none of the 31 of"),
        (["decode", "ids=[99]"], b"", "command line: ids: id 99 is none of the 31 of"),
        (["decode"], b"[" * 100_000, "standard input:1: is no list of ids"),
        (["encode"], b"a\n\xff\n", "standard input:2: not UTF-8"),
        (["encode", "text=a\udcff"], b"", "command line: text: is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(inspect, char, argv, stdin, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        inspect(*argv, f"tokenizer={char}", stdin=stdin)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "action: required and not given"),
        (["encode"], "encode needs tokenizer"),
        (["validate", "tokenizer=t"], "validate needs texts"),
        (["ecnode"], "Did you mean 'encode'?"),
    ],
)
def test_what_is_missing_on_the_command_line_is_told(inspect, argv, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        inspect(*argv)


# --- validate -----------------------------------------------------------------------------------------------------


def test_compression_is_reported_by_group_beside_the_reference(inspect, char, texts, shared):
    """The char tokenizer gives a byte a token; Mistral's: the | f | ox, dog, j | umps."""
    reference = shared / "tokenizers" / "mistral_v1"
    assert [len(ids) for ids in tokenizer.load(reference).encode(["the fox", "dog", "jumps"])] == [3, 1, 2]
    code, lines = inspect(
        "validate", f"tokenizer={char}", f"file={{path: {texts}}}", "by=lang", f"reference={reference}"
    )
    assert code == 0
    table = [line.split() for line in lines[2:6]]
    assert table[0] == ["lang", "texts", "bytes", "tokens", "bytes/token", "reference", "ratio", "unknown", "changed"]
    assert table[1] == ["a", "1", "3", "3", "1.000", "3.000", "0.33", "0", "0"]
    assert table[2] == ["b", "2", "12", "12", "1.000", "2.400", "0.42", "0", "0"]
    assert table[3] == ["all", "3", "15", "15", "1.000", "2.500", "0.40", "0", "0"]
    assert lines[6] == "✓ nothing speaks against it"


def test_all_of_the_declaration_is_measured_by_language(inspect, shared):
    """Sums of the groups are the sums of the file."""
    path = shared / "text" / "udhr_20lang.jsonl"
    code, lines = inspect("validate", f"tokenizer={shared}/tokenizers/mistral_v1", f"file={{path: {path}}}", "by=lang")
    assert code == 0
    *groups, every = [line.replace(",", "").split() for line in lines[2:-1]]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [group[0] for group in groups] == sorted({row["lang"] for row in rows})
    assert int(every[2]) == sum(int(group[2]) for group in groups) == sum(len(row["text"].encode()) for row in rows)
    assert int(every[3]) == sum(int(group[3]) for group in groups)


def problem_lines(inspect, folder, texts, *argv) -> list[str]:
    code, lines = inspect("validate", f"tokenizer={folder}", f"file={{path: {texts}}}", *argv)
    assert code == 1
    return [line.removeprefix("✗ ") for line in lines if line.startswith("✗")]


def test_tokenizer_without_an_end_is_refused(inspect, char, texts, tmp_path):
    shutil.copytree(char, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}")
    assert problem_lines(inspect, tmp_path / "t", texts) == ["has no EOS token, so no document can end"]


def test_two_tokens_of_one_id_are_refused(inspect, char, texts, tmp_path):
    shutil.copytree(char, tmp_path / "t")
    document = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    document["model"]["vocab"]["é"] = document["model"]["vocab"]["x"]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(document))
    assert (
        problem_lines(inspect, tmp_path / "t", texts)[0]
        == f"id {document['model']['vocab']['x']} stands for 'x' and 'é'"
    )


def test_ids_beyond_the_model_are_refused(inspect, texts, shared):
    model = shared / "models" / "stories260K"
    told = problem_lines(inspect, shared / "tokenizers" / "mistral_v1", texts, f"model={model}")
    assert told == [f"has ids up to 31999, the model '{model}' only below 512"]


def test_texts_that_do_not_come_back_are_refused(inspect, char, tmp_path):
    (tmp_path / "t.txt").write_text("fox\nDOG\nCAT\n")
    assert problem_lines(inspect, char, tmp_path / "t.txt") == ["2 texts do not come back, the first is 'DOG'"]


@pytest.mark.parametrize(
    ("text", "reason"), [("", "no such file"), ("{}", "has no vocab_size"), ("[", "has no vocab_s")]
)
def test_a_model_without_a_vocabulary_size_is_told(inspect, char, texts, tmp_path, text, reason):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        inspect("validate", f"tokenizer={char}", f"file={{path: {texts}}}", f"model={tmp_path}")


@pytest.mark.parametrize(("text", "reason"), [("{\n", "t.jsonl:1: "), ("\n", "holds no record")])
def test_a_file_that_cannot_be_measured_is_told(inspect, char, tmp_path, text, reason):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(UserError, match=reason):
        inspect("validate", f"tokenizer={char}", f"file={{path: {tmp_path}/t.jsonl}}")


def test_collisions_are_found_in_every_form_of_a_vocabulary(tmp_path, shared):
    """A list with scores and a sentencepiece model have none, as the place is the id; GPT-2's two files may."""
    backend = tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, shared / "tokenizers" / "sentencepiece_unigram_botchan.model"):
        assert inspection.collisions(tokenizer.load(path)) == {}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "c": 1}')
    assert inspection.collisions(tokenizer.load(tmp_path)) == {1: ["b", "c"]}


# --- list ---------------------------------------------------------------------------------------------------------


def test_what_is_at_hand_is_listed_with_what_is_missing(inspect, shared, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    shutil.copytree(shared / "models" / "stories260K", tmp_path / "m" / "whole")
    shutil.copytree(shared / "models" / "stories260K", tmp_path / "m" / "weightless")
    (tmp_path / "m" / "weightless" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "m" / "weightless", tmp_path / "m" / "shards")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "m" / "shards" / "model.safetensors.index.json").write_text(json.dumps(shards))
    (tmp_path / "m" / "shards" / "model-1.safetensors").touch()
    (tmp_path / "m" / "shards" / "tokenizer.json").unlink()
    code, lines = inspect("list", f"folders=[{tmp_path}/m, {shared}/tokenizers, {tmp_path}/nowhere]")
    words = [re.split(" {2,}", line.strip()) for line in lines]
    assert code == 0
    assert words == [
        [f"{tmp_path}/m/"],
        ["model llama", f"{tmp_path}/m/shards", "missing: a tokenizer, model-2.safetensors"],
        ["model llama + tokenizer.json", f"{tmp_path}/m/weightless", "missing: weights"],
        ["model llama + tokenizer.json", f"{tmp_path}/m/whole"],
        [f"{shared}/tokenizers/"],
        ["vocab.json, merges.txt", f"{shared}/tokenizers/gpt2"],
        ["tokenizer.model", f"{shared}/tokenizers/mistral_v1"],
        [f"{tmp_path}/nowhere: no such folder"],
        [f"{tmp_path}/none: nothing is cached"],
    ]


def test_the_cache_of_hugging_face_is_listed_by_name(inspect, shared, tmp_path, monkeypatch):
    """As huggingface_hub lays it out: refs/main names the snapshot, whose files link to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    whole, broken = tmp_path / "models--org--whole", tmp_path / "models--org--broken"
    for repository in (whole, broken):
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        (repository / "blobs").mkdir()
    (whole / "snapshots" / "abc").mkdir(parents=True)
    for path in (shared / "models" / "stories260K").iterdir():
        shutil.copy(path, whole / "blobs" / path.name)
        (whole / "snapshots" / "abc" / path.name).symlink_to(whole / "blobs" / path.name)
    (broken / "blobs" / "0123456789abcdef.incomplete").touch()
    _, lines = inspect("list", "folders=[]")
    assert [re.split(" {2,}", line.strip()) for line in lines] == [
        [f"{tmp_path}/"],
        [
            "nothing",
            "org/broken",
            f"in {broken}",
            "missing: any tokenizer or model of revision main, an unfinished download, 0123456789ab",
        ],
        ["model llama + tokenizer.json", "org/whole", f"in {whole}/snapshots/abc"],
    ]
