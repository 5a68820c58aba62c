"""Secrets in raw data reach no file: not the tokens, not the lists, not the report, not a vocabulary."""

import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import run_script
from secret_grammar import FORMATS, fill, leaked, private_key, secret_of

from codex_accel import chat, manifest, redaction, screening, sources, tokenizer, tokens
from codex_accel.config import Safety
from codex_accel.errors import UserError
from codex_accel.records import BadRecord, Part, Reader
from codex_accel.schema import Source
from codex_accel.screening import Screen

HALVES = "split={ratios: {train: 0.5, test: 0.5}}"
FAMILIES = ("openai project", "anthropic api", "aws permanent id", "aws secret key, file", "google api",
            "github personal", "gitlab personal", "slack bot", "hugging face", "stripe live", "jwt, long",
            "url, postgres", "password, yaml", "api key, shell", "private key")  # fmt: skip
SECRET = "[SECRET]"


@pytest.fixture
def draw(request) -> random.Random:
    return random.Random(request.node.name)


def planted(draw: random.Random, names=FAMILIES) -> dict[str, tuple[str, str]]:
    """Of each format (the text that belongs to it, the secret in it), all new."""
    return {name: secret_of(name, draw) for name in names}


def read(path, data: str | bytes, *, on_secret="redact", render=None, **options) -> tuple[list, Screen]:
    """What comes through the screen, and the screen."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    (raw,) = sources.resolve([Source(path=str(path), **options)], config_problem=lambda key, what: f"{key}: {what}")
    screen = Screen(Reader(sources.whole(raw), max_record_bytes=1 << 20, render=render), on_secret=on_secret)
    return list(screen), screen


def texts(items) -> list[str]:
    return ["".join(part.text for part in item.parts) for item in items]


def as_lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def obey(tmp_path, *rules: str) -> None:
    """Let a policy of these rules hold."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: mine\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules))
    redaction.enforce(Safety(policy=str(path)))


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wikitext2_valid.txt", "tinyshakespeare.txt", "udhr_20lang.txt"])
def test_text_without_secrets_goes_through_as_it_is(shared, tmp_path, name):
    data = (shared / "text" / name).read_bytes()[:400_000].decode(errors="ignore")
    items, screen = read(tmp_path / "a.txt", data)
    assert items == list(screen.reader)
    assert screen.counts() == {"num_records": 0, "by_type": {}}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_masked_in_a_record(tmp_path, draw, name):
    text, secret = secret_of(name, draw)
    items, screen = read(tmp_path / "a.jsonl", as_lines([{"text": "no"}, {"text": f"a\n{text}\nb"}]))
    assert not leaked(secret, "\n".join(texts(items)))
    assert (len(items), screen.num_records) == (2, 1)


def test_value_in_the_completion_is_found_by_its_name_in_the_prompt(tmp_path, draw):
    secret = fill("{20:A}", draw)
    value = {"prompt": "Write it down. password: ", "completion": f"{secret} and no more"}
    (item,), screen = read(tmp_path / "a.jsonl", as_lines([value]), prompt="prompt", completion="completion")
    assert item.parts == (Part(value["prompt"], False), Part(f"{SECRET} and no more", True))
    assert screen.counts() == {"num_records": 1, "by_type": {"assignment": 1}}


def test_letters_of_the_prompt_do_not_hide_a_secret(tmp_path, draw):
    """Parts are encoded one by one, so the model writes the completion without the letters before it."""
    value = {"prompt": "Give me a token", "completion": fill("AKIA{16:K}", draw)}
    (item,), screen = read(tmp_path / "a.jsonl", as_lines([value]), prompt="prompt", completion="completion")
    assert item.parts == (Part("Give me a token", False), Part(SECRET, True))
    assert screen.by_type == {"aws-access-key-id": 1}


def test_secret_over_two_parts_is_masked_in_both_and_counted_once(tmp_path, draw):
    secret = fill("ghp_{36:A}", draw)
    value = {"prompt": f"it is {secret[:24]}", "completion": f"{secret[24:]} indeed"}
    (item,), screen = read(tmp_path / "a.jsonl", as_lines([value]), prompt="prompt", completion="completion")
    assert item.parts == (Part(f"it is {SECRET}", False), Part(f"{SECRET} indeed", True))
    assert screen.counts() == {"num_records": 1, "by_type": {"github": 1}}


def test_special_tokens_of_a_template_stay_whole(tmp_path, draw):
    """Even where their letters go on with a secret."""
    source = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}_end_{% endfor %}"
    names = ["<|user|>", "<|assistant|>", "_end_"]
    messages = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": fill("hf_{34:L}", draw)}]
    render = chat.template(source, names, where="a.jinja")
    data = as_lines([{"messages": messages}])
    (item,), screen = read(tmp_path / "a.jsonl", data, messages="messages", render=render)
    assert [part.text for part in item.parts] == ["<|user|>", "yes", "_end_", "<|assistant|>", SECRET, "_end_"]
    assert screen.by_type == {"huggingface": 1}


def test_what_a_template_says_of_a_record_is_masked(tmp_path, draw):
    secret = fill("ghp_{36:A}", draw)
    source = f"{{{{ raise_exception('no turn for {secret}') }}}}"
    data = as_lines([{"messages": [{"role": "assistant", "content": "yes"}]}])
    render = chat.template(source, [], where="a.jinja")
    (item,), _ = read(tmp_path / "a.jsonl", data, messages="messages", render=render)
    assert isinstance(item, BadRecord)
    assert not leaked(secret, item.reason)
    assert SECRET in item.reason


def test_own_rules_are_looked_for_at_the_ends_of_parts(tmp_path):
    obey(tmp_path, r"{id: start, action: redact, pattern: '\Axyzzy', replacement: '[X]'}")
    value = {"prompt": "say ", "completion": "xyzzy"}
    (item,), _ = read(tmp_path / "a.jsonl", as_lines([value]), prompt="prompt", completion="completion")
    assert item.parts[1].text == "[X]"


def test_the_records_beside_stay_as_they_are(tmp_path, draw):
    values = [f"text {n}" for n in range(5000)]
    values[4321] = fill("ghp_{36:A}", draw)
    items, screen = read(tmp_path / "a.jsonl", as_lines({"text": text} for text in values))
    assert texts(items) == [*values[:4321], SECRET, *values[4322:]]
    assert [item.line for item in items] == list(range(1, 5001))
    assert screen.num_records == 1


def test_reading_twice_counts_once(tmp_path, draw):
    _, screen = read(tmp_path / "a.jsonl", as_lines([{"text": fill("ghp_{36:A}", draw)}]))
    list(screen)
    assert screen.counts() == {"num_records": 1, "by_type": {"github": 1}}


# --- lines and paragraphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 100, 700, 3000, 1 << 15])
@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_private_key_over_many_records_is_masked_however_they_are_grouped(tmp_path, draw, monkeypatch, unit, together):
    monkeypatch.setattr(screening, "TOGETHER", together)
    keys = [private_key(draw) for _ in range(12)]
    words = [f"these are the plain words number {n}" for n in range(len(keys) + 1)]
    pieces = [words[0]]
    for (key, _), word in zip(keys, words[1:], strict=True):
        pieces += [key, word]
    items, screen = read(tmp_path / "a.txt", "\n".join(pieces).replace("these", "\nthese"), unit=unit)
    found = "\n".join(texts(items))
    assert [secret for _, secret in keys if leaked(secret, found, length=16)] == []
    assert [word for word in words if word not in found] == []
    assert screen.by_type == {"private-key": len(keys)}


@pytest.mark.parametrize("together", [1, 60, 1 << 15])
def test_lines_are_masked_as_their_whole_text_is(tmp_path, draw, monkeypatch, together):
    """Where every secret lies in a line, the lines of the masked text are the masked lines."""
    from codex_accel import safety

    monkeypatch.setattr(screening, "TOGETHER", together)
    lines = [f"line {n}" if n % 3 else f"{n}: {secret_of(draw.choice(FAMILIES[:-1]), draw)[0]}" for n in range(200)]
    items, screen = read(tmp_path / "a.txt", "\n".join(lines))
    masked = safety.mask("\n".join(lines))
    assert texts(items) == masked.text.split("\n")
    assert screen.by_type.total() == len(masked.findings)


@pytest.mark.parametrize("unit_bytes", [100, 700, 3000])
def test_private_key_over_two_units_is_masked_and_counted_once(tmp_path, draw, unit_bytes):
    keys = [private_key(draw) for _ in range(8)]
    path = tmp_path / "a.txt"
    path.write_text("".join(f"words {n}\r\n{key}\r\nmore words {n}\n\n" for n, (key, _) in enumerate(keys)))
    (raw,) = sources.resolve([Source(path=str(path))], config_problem=lambda key, what: f"{key}: {what}")
    units = sources.inventory(raw, unit_bytes=unit_bytes).units
    assert len(units) > 2
    screens = [Screen(Reader(unit, max_record_bytes=1 << 20)) for unit in units]
    found = "\n".join(text for screen in screens for text in texts(screen))
    assert [secret for _, secret in keys if leaked(secret, found, length=16)] == []
    assert [n for n in range(len(keys)) if f"more words {n}" not in found] == []
    assert sum(screen.by_type["private-key"] for screen in screens) == len(keys)


def test_bad_lines_keep_their_places(tmp_path, draw):
    data = b"one\n\xff\n" + fill("ghp_{36:A}", draw).encode() + b"\n\xfe\ntwo"
    items, _ = read(tmp_path / "a.txt", data)
    assert [(item.line, isinstance(item, BadRecord)) for item in items] == [
        (1, False), (2, True), (3, False), (4, True), (5, False)
    ]  # fmt: skip
    assert texts(items[::2]) == ["one", SECRET, "two"]


# --- set aside --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_records_with_secrets_can_be_set_aside(tmp_path, draw, name):
    values = ["one", f"{fill('ghp_{36:A}', draw)} {fill('hf_{34:L}', draw)}", "two"]
    data = as_lines({"text": text} for text in values) if name == "a.jsonl" else "\n".join(values)
    items, screen = read(tmp_path / name, data, on_secret="quarantine")
    assert texts([items[0], items[2]]) == ["one", "two"]
    assert items[1] == BadRecord(str(tmp_path / name), 2, "secret: github, huggingface")
    assert screen.counts() == {"num_records": 1, "by_type": {"github": 1, "huggingface": 1}}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("together", [1, 1 << 15])
def test_a_rule_that_blocks_sets_its_record_aside_and_no_other(tmp_path, draw, monkeypatch, name, together):
    monkeypatch.setattr(screening, "TOGETHER", together)
    obey(tmp_path, "{id: marker, action: block, literals: ['[NOT FOR RELEASE]']}")
    secret = fill("ghp_{36:A}", draw)
    values = ["one", f"{secret} [NOT FOR RELEASE] {secret}", f"two {secret}", "[NOT FOR RELEASE]", "three"]
    data = as_lines({"text": text} for text in values) if name == "a.jsonl" else "\n".join(values)
    items, screen = read(tmp_path / name, data)
    assert [(item.line, getattr(item, "reason", "")) for item in items] == [
        (1, ""), (2, "blocked by a rule: marker"), (3, ""), (4, "blocked by a rule: marker"), (5, "")
    ]  # fmt: skip
    assert texts(items[::2]) == ["one", f"two {SECRET}", "three"]
    assert screen.by_type == {"marker": 2, "github": 2}


def test_a_rule_that_blocks_over_two_lines_sets_both_aside(tmp_path):
    obey(tmp_path, r"{id: marker, action: block, pattern: 'begin\nend'}")
    items, _ = read(tmp_path / "a.txt", "one\nto begin\nend it\ntwo")
    assert [isinstance(item, BadRecord) for item in items] == [False, True, True, False]


def test_record_of_which_nothing_is_left_is_bad(tmp_path):
    obey(tmp_path, "{id: name, action: redact, literals: [Nightjar], replacement: ''}")
    values = [{"text": "Nightjar"}, {"text": "Nightjar!"}]
    (bad, good), _ = read(tmp_path / "a.jsonl", as_lines(values))
    assert bad.reason == "secret: name; nothing else is a target"
    assert texts([good]) == ["!"]


# --- prepare_data -----------------------------------------------------------------------------------------------------


def argv(tiny, output_dir, source, *overrides) -> list[str]:
    return [f"tokenizer={tiny}/tokenizer", f"sources={json.dumps([source])}", f"output_dir={output_dir}", *overrides]


def prepare(tiny, output_dir, source, *overrides) -> dict:
    source = source if isinstance(source, dict) else {"path": str(source)}
    assert run_script("prepare_data", *argv(tiny, output_dir, source, *overrides)) == 0
    return manifest.read(output_dir)


def told(tiny, folder) -> str:
    """All that a dataset folder says: its files, and the text of its tokens."""
    loaded = tokenizer.load(tiny / "tokenizer")
    files = [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
    splits = manifest.read(folder)["facts"]["splits"]
    documents = [document for name in splits for document in tokens.TokenStore(folder, name)]
    stored = [loaded.decode(document.input_ids.tolist()) for document in documents]
    return "\n".join([*files, *stored])


def write(path, kind: str, canaries: list[str]) -> dict:
    """Records in a format, each canary in one of them, between plain ones; returns the source."""
    rows = [
        f"{n} a\n{text}\nb" if n % 2 else f"{n} plain" for n, text in enumerate(t for c in canaries for t in (c, c))
    ]
    if kind == "jsonl":
        path.write_text(as_lines({"text": text, "of": text} for text in rows))
        return {"path": str(path), "format": "jsonl"}
    if kind == "pairs":
        path.write_text(as_lines({"q": f"say {text}", "a": text} for text in rows))
        return {"path": str(path), "prompt": "q", "completion": "a", "format": "jsonl"}
    if kind == "messages":
        template = path.with_suffix(".jinja")
        template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[EOS]{% endfor %}")
        path.write_text(as_lines(
            {"m": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in rows
        ))  # fmt: skip
        return {"path": str(path), "messages": "m", "chat_template": str(template), "format": "jsonl"}
    if kind == "csv":
        path.write_text("text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in rows))
        return {"path": str(path), "format": "csv"}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
        return {"path": str(path), "format": "parquet"}
    path.write_text("\n\n".join(rows))
    return {"path": str(path), "format": "text", "unit": kind}


KINDS = {"jsonl": 1, "pairs": 2, "messages": 2, "csv": 1, "parquet": 1, "line": 1, "paragraph": 1, "file": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_no_canary_reaches_a_file(tiny, tmp_path, draw, kind):
    canaries = planted(draw)
    source = write(tmp_path / "a", kind, [text for text, _ in canaries.values()])
    split = "split={ratios: {train: 0.5, test: 0.5}, key: of}" if kind == "jsonl" else HALVES
    split = "split={ratios: {train: 1.0}}" if kind == "file" else split
    more = ("duplicates=remove", "near_duplicates=0.9", "unit_bytes=2000")
    facts = prepare(tiny, tmp_path / "d", source, split, *more)["facts"]
    found = told(tiny, tmp_path / "d")
    assert {name: piece for name, (_, secret) in canaries.items() if (piece := leaked(secret, found))} == {}
    assert SECRET in found
    assert facts["secrets"]["num_findings"] == len(canaries) * KINDS[kind]
    assert facts["num_bad"] == 0


def mixed(draw: random.Random, number: int = 60) -> list[str]:
    """Records of which every fifth holds a secret and every tenth another one too."""
    rows = [f"record {n} and more words of it" for n in range(number)]
    for n in range(0, number, 5):
        rows[n] += fill(" ghp_{36:A}", draw) + (fill(" hf_{34:L}", draw) if n % 10 == 0 else "")
    return rows


def write_jsonl(path, rows) -> str:
    path.write_text(as_lines({"text": text} for text in rows))
    return str(path)


def test_secrets_are_counted_by_type_in_manifest_report_and_console(tiny, tmp_path, draw, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", mixed(draw))
    facts = prepare(tiny, tmp_path / "d", source, HALVES, "unit_bytes=500")["facts"]["secrets"]
    assert facts == {
        "action": "redact", "policy": "built-in", "sha256": redaction.facts()["sha256"], "bypass_reason": None,
        "num_records": 12, "num_findings": 18, "by_type": {"github": 12, "huggingface": 6},
    }  # fmt: skip
    assert json.loads((tmp_path / "d" / "report.json").read_bytes())["secrets"] == facts
    line = "18 in 12 records, masked: 12 x github, 6 x huggingface\n"
    assert line in capsys.readouterr().out
    run_script("prepare_data", *argv(tiny, tmp_path / "d", {"path": source}), "list=true")
    assert "18 secrets masked" in capsys.readouterr().out


def test_records_with_secrets_go_into_the_quarantine_if_asked(tiny, tmp_path, draw):
    rows = mixed(draw)
    options = (write_jsonl(tmp_path / "a.jsonl", rows), HALVES, "safety.on_secret=quarantine")
    facts = prepare(tiny, tmp_path / "d", *options, "max_bad_fraction=0.5")["facts"]
    assert (facts["num_records"], facts["num_bad"], facts["bad_by_reason"]) == (48, 12, {"secret": 12})
    assert (facts["secrets"]["action"], facts["secrets"]["num_findings"]) == ("quarantine", 18)
    lines = [json.loads(line) for line in (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 61, 5))
    assert {line["reason"] for line in lines} == {"secret: github", "secret: github, huggingface"}
    found = told(tiny, tmp_path / "d")
    assert SECRET not in found
    assert [row for row in rows[::5] if leaked(row.split()[7], found)] == []


def test_work_that_was_stopped_holds_no_secret(tiny, tmp_path, draw):
    rows = mixed(draw)
    with pytest.raises(UserError, match=r"12 of 60 records are bad.*12 x secret") as caught:
        prepare(tiny, tmp_path / "d", write_jsonl(tmp_path / "a.jsonl", rows), HALVES, "safety.on_secret=quarantine")
    message = str(caught.value)
    del caught  # it holds the lock
    work = [path.read_bytes().decode("latin-1") for path in (tmp_path / ".partial-d").rglob("*") if path.is_file()]
    assert len(work) > 3
    assert [row for row in rows[::5] if leaked(row.split()[7], "".join([*work, message]))] == []


def write_policy(path, rule: str) -> str:
    path.write_text(f"version: mine\nrules:\n  - {rule}\n")
    return f"safety.policy={path}"


def test_a_block_rule_sets_aside_whatever_is_done_with_secrets(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" + " NIGHTJAR" * (n == 7) for n in range(40)])
    chosen = write_policy(tmp_path / "p.yaml", "{id: bird, action: block, literals: [NIGHTJAR]}")
    facts = prepare(tiny, tmp_path / "d", source, HALVES, "max_bad_fraction=0.1", chosen)["facts"]
    assert facts["bad_by_reason"] == {"blocked by a rule": 1}
    assert (facts["secrets"]["by_type"], facts["secrets"]["policy"]) == ({"bird": 1}, "mine")
    (line,) = (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file": source, "line": 8, "reason": "blocked by a rule: bird"}
    assert "NIGHTJAR" not in told(tiny, tmp_path / "d")


def test_another_policy_prepares_again_and_the_same_rules_elsewhere_do_not(tiny, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n} Nightjar" for n in range(40)])
    rule = "{id: bird, action: redact, literals: [Nightjar], replacement: '[BIRD]'}"
    first = prepare(tiny, tmp_path / "d", source, HALVES, write_policy(tmp_path / "p.yaml", rule))
    assert prepare(tiny, tmp_path / "d", source, HALVES, write_policy(tmp_path / "q.yaml", rule)) == first
    assert "nothing to do" in capsys.readouterr().out
    changed = write_policy(tmp_path / "changed.yaml", rule.replace("BIRD", "X"))
    same = f"safety.policy={tmp_path}/p.yaml"
    for other in ([changed], [same, "safety.on_secret=quarantine"], [same, "safety.bypass_reason=a test"], []):
        with pytest.raises(UserError, match="made from other input or settings"):
            prepare(tiny, tmp_path / "d", source, HALVES, *other)
    again = prepare(tiny, tmp_path / "d", source, HALVES, "overwrite=true")
    assert again["content_digest"] != first["content_digest"]


def test_another_policy_does_not_go_on_with_what_was_begun(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", *(f"text {n} Nightjar" for n in range(40))])
    with pytest.raises(UserError, match="max_bad_fraction"):
        prepare(tiny, tmp_path / "d", source, HALVES)
    chosen = write_policy(tmp_path / "p.yaml", "{id: bird, action: redact, literals: [Nightjar]}")
    facts = prepare(tiny, tmp_path / "d", source, HALVES, "max_bad_fraction=0.1", chosen)["facts"]
    assert facts["secrets"]["by_type"] == {"bird": 40}
    assert "Nightjar" not in told(tiny, tmp_path / "d")


class Stopped(BaseException):
    """What a process feels that is stopped."""


def test_stopped_anywhere_it_goes_on_with_equal_counts_and_bytes(tiny, tmp_path, draw, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", mixed(draw))
    options = (source, HALVES, "unit_bytes=900", "num_threads=1", "duplicates=remove")
    left = [10**9]

    def fsync(descriptor: int, flush=os.fsync) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    expected = prepare(tiny, tmp_path / "expected" / "d", *options)
    for number in range(5, 10**9 - left[0], 7):
        left[0] = number
        with pytest.raises(Stopped):
            prepare(tiny, tmp_path / str(number) / "d", *options)
        left[0] = 10**9
        again = prepare(tiny, tmp_path / str(number) / "d", *options)
        assert (again["content_digest"], again["facts"]) == (expected["content_digest"], expected["facts"]), number
    assert expected["facts"]["secrets"]["num_findings"] == 18


@pytest.mark.distributed
def test_two_processes_write_the_same_bytes_and_counts(tiny, tmp_path, draw, fork_server):
    source = write_jsonl(tmp_path / "a.jsonl", mixed(draw))
    options = (HALVES, "unit_bytes=900", "duplicates=remove")
    one = prepare(tiny, tmp_path / "one" / "d", source, *options)
    job = fork_server.run("prepare_data", argv(tiny, tmp_path / "d", {"path": source}, *options), num_processes=2)
    assert job.codes == [0, 0], job.output
    two = manifest.read(tmp_path / "d")
    assert (two["content_digest"], two["facts"]) == (one["content_digest"], one["facts"])


def test_a_bypass_keeps_secrets_and_says_why(tiny, tmp_path, draw, capsys):
    rows = mixed(draw)
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    facts = prepare(tiny, tmp_path / "d", source, HALVES, "safety.bypass_reason=a test of it")["facts"]
    assert facts["secrets"] == {
        "action": None, "policy": None, "sha256": None, "bypass_reason": "a test of it", "num_records": None,
        "num_findings": None, "by_type": {},
    }  # fmt: skip
    found = told(tiny, tmp_path / "d")
    assert [row for row in rows if row not in found] == []
    assert "not looked for: a test of it" in capsys.readouterr().out
    assert "a test of it" in (tmp_path / "d" / "report.html").read_text()
    with pytest.raises(UserError, match="made from other input or settings"):
        prepare(tiny, tmp_path / "d", source, HALVES, "safety.bypass_reason=another reason")


# --- train_tokenizer --------------------------------------------------------------------------------------------------


def train(output_dir, source, *overrides) -> dict:
    options = [f"output_dir={output_dir}", f"sources=[{{path: {source}}}]", "vocab_size=400", *overrides]
    assert run_script("train_tokenizer", *options) == 0
    return manifest.read(output_dir)


@pytest.mark.parametrize("type_", ["bpe", "unigram", "sentencepiece", "char"])
def test_a_secret_that_repeats_is_no_entry_of_the_vocabulary(tmp_path, draw, capsys, type_):
    secret = "ghp_" + fill("{36:L}", draw).swapcase()
    source = write_jsonl(tmp_path / "a.jsonl", [f"words and words {n % 7} {secret}" for n in range(200)])
    facts = train(tmp_path / "t", source, f"type={type_}", "pre_tokenizer=whitespace")["facts"]
    written = "".join(path.read_bytes().decode("latin-1") for path in (tmp_path / "t").iterdir())
    assert leaked(secret, written, length=5) is None
    assert (facts["secrets"]["num_records"], facts["secrets"]["by_type"]) == (200, {"github": 200})
    assert "200 in 200 records, masked: 200 x github" in capsys.readouterr().out


def test_under_a_bypass_the_vocabulary_holds_what_repeats(tmp_path, draw):
    """Else the test before this one could not fail."""
    secret = "ghp_" + fill("{36:L}", draw)
    source = write_jsonl(tmp_path / "a.jsonl", [f"words and words {n % 7} {secret}" for n in range(200)])
    facts = train(tmp_path / "t", source, "pre_tokenizer=whitespace", "safety.bypass_reason=a test")["facts"]
    assert leaked(secret, (tmp_path / "t" / "tokenizer.json").read_text(), length=20)
    assert (facts["secrets"]["bypass_reason"], facts["secrets"]["num_findings"]) == ("a test", None)


def test_a_tokenizer_is_trained_again_under_another_policy(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["words and words and a Nightjar"] * 50)
    first = train(tmp_path / "t", source)
    assert train(tmp_path / "t", source) == first
    assert "nothing to do" in capsys.readouterr().out
    chosen = write_policy(tmp_path / "p.yaml", "{id: bird, action: redact, literals: [Nightjar]}")
    with pytest.raises(UserError, match="how secrets are masked is another"):
        train(tmp_path / "t", source, chosen)


def test_a_blocked_record_stops_the_training(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["words", "and a Nightjar"])
    chosen = write_policy(tmp_path / "p.yaml", "{id: bird, action: block, literals: [Nightjar]}")
    with pytest.raises(UserError, match=r"a\.jsonl:2: blocked by a rule: bird\. Mend it"):
        train(tmp_path / "t", source, chosen)
