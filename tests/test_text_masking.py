"""Secrets that a model writes, or that its prompts and references hold: in no output, journal, report or page."""

import itertools
import json
import random
import time
from pathlib import Path

import pytest
import tokenizers as tokenizers_
import torch
from conftest import run_script
from secret_grammar import leaked, private_key, secret_of
from test_callbacks import moment_of
from test_run import config as train_config
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from codex_accel import callbacks, generation, journal, redaction, report, tokenizer
from codex_accel.config import Safety
from codex_accel.text_stream import MaskedStream, masked

DRAW = random.Random(7)
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_REST = [c for c in ALPHANUMERIC if c not in "ghp"]
DRAW.shuffle(_REST)
KEY = "ghp_" + "".join(_REST[:36])  # a token of GitHub whose characters are all different
PASSWORD = "".join(_REST[36:52])  # a secret after `password=` only
CLEAN = "~}{" * 8
# What the parrot writes after a prompt, by the last character of it.
CHAINS = (f"?{KEY}.", f"={PASSWORD};", "!~}{~")


def given(name: str) -> str:
    """A new secret of this format."""
    return secret_of(name, DRAW)[1]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    """A model whose next character is a function of the last one: it writes what CHAINS says, and ends."""
    folder = tmp_path_factory.mktemp("parrot")
    letters = sorted(tokenizers_.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: id_ for id_, letter in enumerate([*letters, "<end>"])}
    made = tokenizers_.Tokenizer(tokenizers_.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers_.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers_.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
    size = len(vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=264, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=size - 1,
        )
    )  # fmt: skip
    layer = model.model.layers[0]
    for weights in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
        torch.nn.init.zeros_(weights)
    follows = {a: b for chain in CHAINS for a, b in itertools.pairwise(chain)}
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, 264))
        for last, id_ in vocabulary.items():
            model.lm_head.weight[vocabulary[follows.get(last, "<end>")], id_] = 1
    model.save_pretrained(folder)
    return folder


def policy(folder: Path, rules: str) -> str:
    """A policy file without the family of KEY, as an argument."""
    (folder / "policy.yaml").write_text(f"version: mine\noff: [github]\nrules: {rules}\n")
    return f"safety.policy={folder}/policy.yaml"


def files_below(folder: Path) -> str:
    """All that stands in the files of a folder, however deep."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


# --- a text as it may be shown ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "password=", "My key is " + KEY[:20], f"This is {KEY}", "a[SECRET]", "Once"])
def test_every_cut_of_a_text_is_shown_alike(before):
    text = f"{KEY[20:]} and {PASSWORD}, {given('openai project')} at last, password={PASSWORD}"
    whole = masked(text, before=before)
    for _ in range(30):
        cuts = sorted(DRAW.sample(range(len(text) + 1), DRAW.randrange(8)))
        stream = MaskedStream(redaction.policy(), before)
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(map(stream.feed, pieces)) + stream.finish() == whole.text
        assert stream.num_findings == whole.num_findings


@pytest.mark.parametrize("before", ["password=", "export DB_PASSWORD=", '{"password": "', f"{KEY}\npassword: "])
def test_what_only_the_prompt_makes_a_secret_is_one(before):
    assert masked(PASSWORD).text == PASSWORD
    assert masked(f"{PASSWORD}\nmore", before=before).text == "[SECRET]\nmore"


def test_a_secret_that_begins_in_the_prompt_is_masked_to_its_end():
    assert masked(f"{KEY[12:]} it is", before=f"It is {KEY[:12]}").text == "[SECRET] it is"
    block, lines = private_key(random.Random(4))
    shown = masked(block[len(block) // 2 :] + "\nand more", before=block[: len(block) // 2])
    assert leaked(lines, shown.text) is None
    assert shown.text.endswith("\nand more")
    assert shown.num_findings == 1


@pytest.mark.parametrize("glued", ["Once", "x", "1", "Слово", "_"])
def test_a_whole_secret_is_masked_though_the_prompt_ends_in_a_letter(glued):
    for name in ("aws permanent id", "github personal", "stripe live", "npm"):
        assert masked(f"{given(name)} is", before=glued).text == "[SECRET] is"


@pytest.mark.parametrize(
    "before",
    ["Once upon", "the sk", "my pass", "password", "-----BEGIN", "eyJ", f"{KEY}", f"a {KEY} ", "see http://u:"],
)
def test_of_the_prompt_nothing_is_repeated_or_counted(before):
    stream = MaskedStream(redaction.policy(), before)
    assert "".join(map(stream.feed, " upon a time")) + stream.finish() == " upon a time"
    assert (stream.num_findings, stream.blocked) == (0, None)
    assert MaskedStream(redaction.policy(), before).finish() == ""


def test_a_blocked_prompt_leaves_its_answer(tmp_path):
    redaction.enforce(Safety(policy=policy(tmp_path, "[{id: m, action: block, literals: [STOP]}]").partition("=")[2]))
    assert masked("go on STOP here", before="it STOP s").text == "go on "
    assert masked("OP here", before="here: ST").text == ""
    assert masked("OP here", before="here: ST").blocked == "m"


def test_behind_a_blocked_text_the_prompt_still_tells_secrets(tmp_path):
    redaction.enforce(Safety(policy=policy(tmp_path, "[{id: m, action: block, literals: [STOP]}]").partition("=")[2]))
    assert masked(f"{PASSWORD} and", before="it STOP s, password=").text == "[SECRET] and"


def test_a_copy_goes_on_by_itself():
    first = MaskedStream(redaction.policy(), "password=")
    second = first.copy()
    assert (first.finish(f"{PASSWORD} x"), first.num_findings) == ("[SECRET] x", 1)
    assert (second.finish("none"), second.num_findings) == ("none", 0)


def test_under_a_bypass_all_is_shown():
    redaction.enforce(Safety(bypass_reason="a test"))
    stream = MaskedStream(redaction.policy(), "password=")
    assert stream.feed(KEY) + stream.finish() == KEY
    assert (stream.num_findings, stream.blocked) == (0, None)


# --- generate --------------------------------------------------------------------------------------------------------


def answers(fork_server, parrot, folder: Path, *argv: str, prompts: list) -> tuple[list[dict], str]:
    """The lines that come of these prompts, and what was printed."""
    (folder / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    files = [f"prompts={folder}/p.jsonl", f"output={folder}/a.jsonl", "overwrite=true", "max_new_tokens=60"]
    job = fork_server.run("generate", [f"checkpoint={parrot}", *files, *argv])
    assert job.codes == [0], job.output
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()], job.output


def test_a_secret_that_a_model_writes_is_in_no_answer(fork_server, parrot, tmp_path):
    canary = given("aws permanent id")
    prompts = ["What?", {"prompt": f"{canary} !", "id": given("slack bot")}, "password="]
    lines, output = answers(fork_server, parrot, tmp_path, prompts=prompts)
    assert [line["text"] for line in lines] == ["[SECRET].", CLEAN[:3] * 20, "[SECRET];"]
    assert [line["num_findings"] for line in lines] == [1, 0, 1]
    assert [line["num_output_tokens"] for line in lines] == [42, 60, 18]
    assert lines[1]["prompt"] == "[SECRET] !"
    assert lines[1]["id"] == "[SECRET]"
    assert "note: 2 secrets masked in what the model wrote" in output
    for secret in (KEY, PASSWORD, canary):
        assert leaked(secret, (tmp_path / "a.jsonl").read_text() + output) is None


def test_a_secret_does_not_change_what_others_in_its_batch_become(parrot):
    from codex_accel import model as models

    model, known = models.load(parrot).eval(), tokenizer.load(parrot)
    requests = [generation.Request(tuple(known.encode([text])[0]), 60) for text in ("a!", "b?", "bb!")]
    found = generation.generate(model, known, requests)
    shown = [generation.shown(one, request, known) for one, request in zip(found, requests, strict=True)]
    alone = generation.generate(model, known, requests[:1])[0]
    assert shown[0].ids == alone.ids
    assert [one.ids is None for one in shown] == [False, True, False]
    assert [one.num_tokens for one in shown] == [60, 42, 60]


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ("[{id: a, action: allow, literals: [%s]}]", f"{KEY}.", "eos"),
        ("[{id: a, action: redact, literals: [%s], replacement: '<key>'}]", "<key>.", "eos"),
        ("[{id: a, action: block, literals: [%s]}]", "", "content_filter"),
        (f"[{{id: a, action: block, literals: ['{KEY[8:12]}']}}]", KEY[:8], "content_filter"),
    ],
)  # fmt: skip
def test_the_policy_says_what_becomes_of_it(fork_server, parrot, tmp_path, rules, text, reason):
    rules = rules.replace("%s", KEY)
    [line], _ = answers(fork_server, parrot, tmp_path, policy(tmp_path, rules), prompts=["What?"])
    assert (line["text"], line["finish_reason"], line["num_findings"]) == (text, reason, int("allow" not in rules))
    job = fork_server.run("generate", [f"checkpoint={parrot}", policy(tmp_path, rules), "prompt=What?"])
    shown, _, notes = job.output.partition("\n")
    assert shown == f"What?{text}"
    assert ("forbids more" in notes) == (reason == "content_filter")


def test_a_secret_is_not_shown_token_by_token(fork_server, parrot):
    job = fork_server.run("generate", [f"checkpoint={parrot}", "prompt=What?", "max_new_tokens=60"])
    assert job.codes == [0], job.output
    assert job.output == "What?[SECRET].\nnote: 1 secret masked in what the model wrote\n"
    cut = fork_server.run("generate", [f"checkpoint={parrot}", f"prompt={KEY} ?", "max_new_tokens=40"])
    assert cut.output.startswith("[SECRET] ?[SECRET]\n")


def test_a_bypass_shows_what_a_model_writes(fork_server, parrot, tmp_path):
    lines, output = answers(fork_server, parrot, tmp_path, "safety.bypass_reason=a test", prompts=["What?"])
    assert (lines[0]["text"], lines[0]["num_findings"]) == (f"{KEY}.", 0)
    assert "secrets are not masked: a test" in output


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path) -> tuple[list[str], list[str]]:
    """Arguments of an evaluation whose records, settings and model hold secrets, and the secrets."""
    secrets = [given(name) for name in ("aws permanent id", "gitlab personal", "npm", "stripe live", "google api")]
    records = [
        {"q": "What?", "a": "[SECRET].", "wrong": "no"},
        {"q": f"{secrets[0]} !", "a": secrets[1], "wrong": secrets[2]},
        {"q": "password=", "a": f"{PASSWORD};", "wrong": "none"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shared = f"file: {{path: {tmp_path}/q.jsonl}}, prompt: '{{{{ q }}}}'"
    texts = f"{shared}, target: '{{{{ a }}}}', sampling: {{max_new_tokens: 60, stop: ['{secrets[3]}']}}"
    choices = f"{shared}, kind: choice, choices: '[a, wrong]', target: '{{{{ a }}}}', delimiter: ''"
    numbers = f"metrics: {{numeric_answer: {{take: marked, marker: '{secrets[4]}'}}}}"
    tasks = f"tasks={{writes: {{{texts}}}, counts: {{{texts}, {numbers}}}, chooses: {{{choices}}}}}"
    return [tasks, "batch_size=1", "device=cpu"], [*secrets, KEY, PASSWORD]


def test_an_evaluation_shows_no_secret(fork_server, parrot, questions, tmp_path):
    argv, secrets = questions
    argv = [f"checkpoint={parrot}", *argv, "self_check=3", f"output_dir={tmp_path}/r"]
    job = fork_server.run("evaluate", argv)
    assert job.codes == [0], job.output
    written = files_below(tmp_path / "r") + job.output
    assert [secret for secret in secrets if leaked(secret, written)] == []
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["counts"]["writes"]["num_masked_outputs"] == 2
    assert found["metrics"]["writes"]["exact_match"] == pytest.approx(1 / 3)  # masked before it is scored
    assert found["self_check"]["writes"]["num_other_texts"] == 0
    assert found["settings"]["safety"]["policy"] == "built-in"
    assert found["overview"]["writes"]["num_findings"] == 5  # two outputs, a prompt, two references
    lines = [json.loads(line) for line in (tmp_path / "r" / "samples.ndjson").read_text().splitlines()]
    assert lines[1]["prompt"] == "[SECRET] !"
    assert lines[1]["prompt_sha256"] == report.files.sha256_bytes(b"[SECRET] !")
    assert lines[2]["references"] == ["[SECRET];"]  # which only the prompt's end makes a secret
    assert lines[2]["references_sha256"] == report.files.sha256_bytes(b'["[SECRET];"]')
    assert "Secrets masked in the texts of samples" in (tmp_path / "r" / "report.html").read_text()


def test_a_bypass_is_told_and_shows_all(fork_server, parrot, questions, tmp_path):
    argv, _ = questions
    argv = [f"checkpoint={parrot}", *argv, f"output_dir={tmp_path}/r", "safety.bypass_reason=only a test"]
    job = fork_server.run("evaluate", argv)
    assert job.codes == [0], job.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["settings"]["safety"] == {"policy": None, "sha256": None, "bypass_reason": "only a test"}
    assert found["counts"]["writes"]["num_masked_outputs"] == 0
    assert KEY in (tmp_path / "r" / "samples.ndjson").read_text()
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Secrets are not masked: " in page
    assert "only a test" in page
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["provenance"]["safety"]["bypass_reason"] == "only a test"


def test_a_killed_evaluation_leaves_no_secret_and_another_policy_takes_nothing_from_it(fork_server, parrot, tmp_path):
    records = [{"q": f"{number}: What?", "a": "x"} for number in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = f"{{file: {{path: {tmp_path}/q.jsonl}}, prompt: '{{{{ q }}}}', target: '{{{{ a }}}}'}}"
    argv = [f"checkpoint={parrot}", f"tasks={{t: {task}}}", "batch_size=1", "device=cpu", f"output_dir={tmp_path}/r"]
    job = fork_server.start("evaluate", argv)
    while not any(path.read_bytes().count(b"\n") > 2 for path in tmp_path.glob(f"{journal.PREFIX}*/*.ndjson")):
        assert job.alive(), job.output
        time.sleep(0.002)
    job.kill()
    while job.alive():
        time.sleep(0.01)
    [place] = tmp_path.glob(f"{journal.PREFIX}*")
    kept = [each for results in journal.read(place).values() for each in results]
    assert {(each["text"], each["ids"], each["num_findings"]) for each in kept} == {("[SECRET].", None, 1)}
    assert leaked(KEY, files_below(place)) is None
    ids = json.dumps(tokenizer.load(parrot).encode([KEY])[0])
    assert ids[1:-1] not in files_below(place)
    other = fork_server.run("evaluate", [*argv, "safety.bypass_reason=a test"])
    assert other.codes == [0], other.output
    assert f"{place.name} is of an unfinished evaluation with other settings" in other.output


def test_predictions_are_scored_as_they_are_and_shown_masked(fork_server, tmp_path):
    one, other, third = given("npm"), given("npm"), given("gitlab personal")
    lines = [
        {"prediction": one, "reference": one, "id": third},
        {"prediction": one, "references": [other, "no"]},
        {"prediction": PASSWORD, "reference": PASSWORD, "prompt": "password="},
        {"prediction": "yes", "reference": "yes"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [f"predictions={tmp_path}/a.jsonl", "metrics={exact_match: {}}", f"output_dir={tmp_path}/r"]
    job = fork_server.run("evaluate", argv)
    assert job.codes == [0], job.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["metrics"]["exact_match"] == 0.75
    assert found["overview"]["num_findings"] == 7
    written = files_below(tmp_path / "r") + job.output
    assert [secret for secret in (one, other, third, PASSWORD) if leaked(secret, written)] == []


def test_a_comparison_shows_no_secret_of_reports_that_do(tmp_path, capsys):
    secret = given("openai project")
    for name, before in (("a", "x" * 70), ("b", "y" * 70)):
        line = {"prediction": f"{before} {secret}", "reference": secret, "id": 1}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
        argv = [f"predictions={tmp_path}/{name}.jsonl", "metrics={exact_match: {}}", f"output_dir={tmp_path}/{name}"]
        run_script("evaluate", *argv, "safety.bypass_reason=a test")
    capsys.readouterr()
    for more in ([], ["as_json=true"]):  # of which the first shows the beginnings of texts
        run_script("compare_reports", tmp_path / "a", tmp_path / "b", *more)
        shown = capsys.readouterr().out
        assert "xxx [SECRET]" in shown
        assert leaked(secret, shown) is None


def test_a_number_that_masking_changes_is_told_as_that(tmp_path, capsys):
    lines = [{"prediction": given("npm"), "reference": given("npm")}, {"prediction": "a", "reference": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_script("evaluate", f"predictions={tmp_path}/a.jsonl", "metrics={exact_match: {}}", f"output_dir={tmp_path}/a")
    run_script("compare_reports", tmp_path / "a", tmp_path / "a")
    assert "exact_match of a is 0.5 here and 0.0 in its report, secrets are masked in its texts." in (
        capsys.readouterr().out
    )


# --- training --------------------------------------------------------------------------------------------------------


def test_samples_of_a_run_hold_no_secret(parrot, tmp_path):
    from codex_accel import model as models

    settings = train_config().model_copy(update={"output_dir": str(tmp_path)})
    called = callbacks.sample_texts(settings, prompts=["What?", "password="])
    model, known = models.load(parrot).eval(), tokenizer.load(parrot)
    moment = moment_of("on_evaluate", settings=settings, split=settings.data.validation_split)
    called["on_evaluate"](callbacks.dataclasses.replace(moment, model=model, tokenizer=known))
    lines = [json.loads(line) for line in (tmp_path / callbacks.SAMPLES).read_text().splitlines()]
    assert [line["text"] for line in lines] == ["[SECRET].", "[SECRET];"]
