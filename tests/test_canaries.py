"""Secrets planted wherever a user could leave one, and looked for in every file, log and reply of all stages."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import train_argv
from secret_grammar import private_key, secret_of
from served import Served

from codex_accel import tokenizer as tokenizers
from codex_accel.tokens import TokenStore

LENGTH, STRIDE = 10, 4  # pieces of a secret that are looked for: any 13 characters of it count as a leak
FORMATS = itertools.cycle(
    ["github personal", "openai project", "anthropic api", "google api", "slack bot", "hugging face", "stripe live",
     "github stateless", "gitlab runner", "npm", "jwt", "weights and biases", "groq", "xai"]
)  # fmt: skip
DRAW = random.Random(20261122)


class Canaries:
    """Planted secrets by place, so that one that is found tells where it came from."""

    def __init__(self) -> None:
        self.secrets: dict[str, str] = {}

    def plant(self, place: str, name: str | None = None) -> str:
        """A text with a new secret, for a place that is named."""
        text, secret = private_key(DRAW) if name == "private key" else secret_of(name or next(FORMATS), DRAW)
        self.secrets[place] = secret
        return text

    def found_in(self, data: str | bytes) -> list[str]:
        """The places whose secrets stand there."""
        data = data.encode() if isinstance(data, str) else data
        return [place for place, secret in self.secrets.items() if any(p in data for p in pieces(secret.encode()))]

    def found_below(self, root: Path) -> dict[str, list[str]]:
        """By file, the places whose secrets stand in its bytes or in its name."""
        files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        assert len(files) > 20
        data = {str(path.relative_to(root)): path.name.encode() + b"\n" + path.read_bytes() for path in files}
        return {name: places for name, each in data.items() if (places := self.found_in(each))}


def pieces(secret: bytes) -> list[bytes]:
    return [secret[start : start + LENGTH] for start in range(0, max(1, len(secret) - LENGTH + 1), STRIDE)]


def lines_of(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture(scope="module")
def planted(tmp_path_factory, fork_server, tiny, canaries) -> tuple[Path, Callable[[], str]]:
    """The folder in which every stage has worked, and what they have printed."""
    base = tmp_path_factory.mktemp("canaries")
    raw, root = base / "raw", base / "made"
    raw.mkdir()
    root.mkdir()
    environment = {
        "HF_TOKEN": canaries.plant("environment, by name"),
        "ACCELERATE_NOTE": canaries.plant("environment, by form"),
        "SLURM_DB_PASSWORD": canaries.plant("environment, password", "password, shell"),
        "WANDB_BASE_URL": canaries.plant("environment, address", "url, git"),
        "HOME": str(base / "home"),
    }
    words = (tiny / "corpus" / "modules.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [{"text": json.loads(line)["text"][:3000]} for line in words]
    documents += [{"text": f"# {canaries.plant(f'data {n}')}\n" * 20} for n in range(8)]
    documents += [{"text": f"key = '''\n{canaries.plant('data, private key', 'private key')}\n'''\n"}]
    documents += [{"text": f"{canaries.plant('data, assignment', 'password, python')}\n"}]
    data = lines_of(raw / "data.jsonl", documents)
    logs: list[Path] = []

    def run(script: str, *argv: str, expected: int = 0) -> None:
        job = fork_server.run(script, list(argv), environment=environment)
        logs.append(job.log)
        assert job.codes == [expected], job.output

    source = f"sources=[{{path: {data}}}]"
    run("train_tokenizer", f"output_dir={root}/tokenizer", source, "vocab_size=600")
    tokenizer = f"tokenizer={root}/tokenizer"
    split = "split={method: exact, ratios: {train: 0.8, validation: 0.1, test: 0.1}}"
    run("prepare_data", f"output_dir={root}/dataset", tokenizer, source, split)
    run(
        "prepare_data",
        f"output_dir={root}/clean",
        tokenizer,
        source,
        "safety.on_secret=quarantine",
        "max_bad_fraction=1",
    )
    config = raw / "train.yaml"
    config.write_text(f'tracking: {{project: "{canaries.plant("config", "github personal")}"}}\n', encoding="utf-8")
    training = train_argv(
        root, root / "run", "training.max_steps=4", "checkpoint.every_steps=2", "log.system_metrics=true",
        "tracking.log_with=[tensorboard, wandb, mlflow]", "model.config.n_positions=1024",
        f"callbacks={{sample_texts: {{prompts: ['{canaries.plant('sample prompt')}'], max_new_tokens: 4}}}}",
    )  # fmt: skip
    run("train", f"--config={config}", *training)
    run("train", f"--config={config}", *training)  # is complete: says so
    run("train", f"output_dir={root}/other", canaries.plant("argument"), expected=2)
    run("train", f"output_dir={root}/other", f"data.dataset={canaries.plant('path')}", expected=2)
    run("train", f"output_dir={root}/other", f"seed={canaries.plant('wrong value')}", expected=2)

    prompts = [{"prompt": canaries.plant(f"prompt {n}")} for n in range(3)]
    asked = lines_of(raw / "prompts.jsonl", prompts)
    run("generate", f"checkpoint={root}/run", f"prompts={asked}", f"output={root}/texts.jsonl", "max_new_tokens=4")
    run("generate", f"checkpoint={root}/run", f"prompt={canaries.plant('typed prompt')}", "max_new_tokens=4")
    questions = [
        {"q": f"{canaries.plant(f'question {n}')} is?", "a": f"it is {canaries.plant(f'reference {n}')}",
         "c": [canaries.plant(f"choice {n}.{m}") for m in range(2)]} for n in range(2)
    ]  # fmt: skip
    task = f"file: {{path: {lines_of(raw / 'questions.jsonl', questions)}}}, prompt: '{{{{ q }}}}'"
    tasks = f"{{open: {{{task}, target: '{{{{ a }}}}', sampling: {{max_new_tokens: 4}}, on_long: truncate}}, "
    tasks += f"closed: {{{task}, kind: choice, choices: c, target: '0', on_long: truncate}}}}"
    run("evaluate", f"checkpoint={root}/run", f"output_dir={root}/tasks", f"tasks={tasks}")
    answers = [
        {"prediction": canaries.plant(f"answer {n}"), "reference": canaries.plant(f"truth {n}")} for n in range(2)
    ]
    answered = lines_of(raw / "answers.jsonl", answers)
    run("evaluate", f"predictions={answered}", f"output_dir={root}/answers")
    held_out = lines_of(raw / "held_out.jsonl", documents[-4:])
    run("evaluate", f"checkpoint={root}/run", f"output_dir={root}/held_out", f"file={{path: {held_out}}}")
    run("compare_reports", f"{root}/tasks", f"{root}/tasks")
    run("export_model", f"checkpoint={root}/run", f"output_dir={root}/exported")

    made = Served(
        fork_server, root / "run", f"request_log={root}/requests.ndjson", "log_prompts=true", **environment
    )  # fmt: skip
    logs.append(made.job.log)
    replies = [str(made.infer(canaries.plant("request"), 4))]
    replies.append(
        str(made.ask("/v1/completions", {"model": "run", "prompt": canaries.plant("completion"), "stream": 1}))
    )
    replies.append(str(made.ask(f"/{canaries.plant('address')}")))
    replies.append(str(made.ask("/infer", {"prompt": 7, canaries.plant("unknown key"): canaries.plant("its value")})))
    replies.append(str(made.ask("/infer", {"prompt": "x"}, authorization=f"Bearer {canaries.plant('header')}")))
    replies.append(str(made.ask("/ready")))
    made.stop()
    return root, lambda: "\n".join([*replies, *(log.read_text(errors="replace") for log in logs)])


def test_no_file_of_any_stage_holds_a_secret(planted, canaries):
    root, _ = planted
    assert len(canaries.secrets) > 30
    assert canaries.found_below(root) == {}


def test_no_log_and_no_reply_holds_a_secret(planted, canaries):
    _, printed = planted
    text = printed()
    assert "[SECRET]" in text
    assert canaries.found_in(text) == []


def test_no_token_of_the_dataset_is_of_a_secret(planted, canaries):
    root, _ = planted
    loaded = tokenizers.load(root / "tokenizer")
    texts = {}
    for dataset, split in itertools.product(("dataset", "clean"), ("train", "validation", "test")):
        store = TokenStore(root / dataset, split)
        texts[dataset, split] = "\n".join(loaded.decode(document.input_ids) for document in store)
    assert any("[SECRET]" in text for (dataset, _), text in texts.items() if dataset == "dataset")
    assert {key: found for key, text in texts.items() if (found := canaries.found_in(text))} == {}


def test_what_is_looked_for_would_be_found(canaries, tmp_path):
    """This reader must not be blind."""
    place, secret = next(iter(canaries.secrets.items()))
    for number in range(21):
        (tmp_path / str(number)).write_bytes(b"\xff")
    (tmp_path / "a.bin").write_bytes(b"\x00\xff" + secret.encode())
    assert canaries.found_below(tmp_path) == {"a.bin": [place]}


# --- what is not masked, for a reason --------------------------------------------------------------------------------


def test_a_bypass_is_the_first_event_of_a_run_and_stands_in_its_manifests(fork_server, tiny, tmp_path):
    reason = "a check of the loader"
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=2", f"safety.bypass_reason={reason}")
    job = fork_server.run("train", argv, environment={"DISABLE_SECRET_FILTER": "1"})
    assert job.codes == [0], job.output
    assert f"warning: secrets are not masked: {reason}\n" in job.output
    first, *_ = (tmp_path / "run" / "events.ndjson").read_text().splitlines()
    event = json.loads(first)
    assert (event["kind"], event["message"]) == ("bypass", f"secrets are not masked: {reason}")
    facts = {"policy": None, "sha256": None, "bypass_reason": reason}
    for path in (tmp_path / "run" / "run.json", tmp_path / "run" / "final" / "manifest.json"):
        assert json.loads(path.read_text())["provenance"]["safety"] == facts
    assert json.loads((tiny / "dataset" / "manifest.json").read_text())["provenance"]["safety"]["policy"] == "built-in"


def test_a_bypass_without_a_reason_starts_nothing(fork_server, tiny, tmp_path):
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run"), environment={"DISABLE_SECRET_FILTER": "1"})
    assert job.codes == [2]
    assert "error: environment: DISABLE_SECRET_FILTER=1: asks for a bypass" in job.output
    assert not (tmp_path / "run").exists()
