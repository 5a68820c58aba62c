"""scripts/generate.py against a reference, and its options."""

import io
import json
import os
import pty
import shutil
import signal
import sys
import time

import pytest
from conftest import ROOT, run_script

from codex_accel.errors import UserError

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}said:{% endif %}"
)


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "models" / "stories260K"


def generate(fork_server, *argv: object) -> str:
    job = fork_server.run("generate", list(map(str, argv)))
    assert job.codes == [0], job.output
    return job.output


def answers(fork_server, tmp_path, prompts: list, *argv: object) -> list[dict]:
    """The lines that come of these prompts, written to a file."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    files = [f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/a.jsonl", "overwrite=true"]
    assert generate(fork_server, *files, *argv) == ""
    return [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]


def test_greedy_text_is_the_reference(fork_server, stories):
    """reference.json: greedy text of stories260K from BOS, by llama2.c's documentation."""
    text = json.loads((stories / "reference.json").read_text())["llama2c_doc_greedy_text"]
    assert generate(fork_server, f"checkpoint={stories}", "max_new_tokens=256").rstrip("\n") == text


def test_a_seed_decides_the_draws(fork_server, stories):
    options = [f"checkpoint={stories}", "temperature=1.0", "top_k=50", "max_new_tokens=40"]
    first, again, other = (generate(fork_server, *options, f"seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_a_prompt_may_hold_colons_and_brackets(fork_server, chain):
    out = generate(fork_server, f"checkpoint={chain}/run", "prompt=def f(x: [", "max_new_tokens=4")
    assert out.startswith("def f(x: [")


def test_too_many_tokens_are_refused(fork_server, chain):
    job = fork_server.run("generate", [f"checkpoint={chain}/run", "max_new_tokens=33"], cwd=ROOT)
    assert job.codes == [2]
    assert "Take 31 at most" in job.output


def test_nothing_to_start_from_is_an_error(fork_server, stories):
    job = fork_server.run("generate", [f"checkpoint={stories}", "add_bos=false"])
    assert job.codes == [2]
    assert "error: command line: prompt: is empty and there is no BOS token before it. Give a prompt." in job.output


# --- many prompts -----------------------------------------------------------------------------------------------------

PROMPTS = [
    "Once",
    {"prompt": "One day, a big dog went to the park. He saw", "id": "b"},
    {"prompt": "", "id": 3},
    "Lily",
]


@pytest.mark.parametrize("options", [["batch_tokens=1"], ["batch_tokens=64"], []])
def test_answers_come_in_the_order_of_the_prompts(fork_server, stories, tmp_path, options):
    """However they are put into batches; each is the text of that prompt alone."""
    found = answers(fork_server, tmp_path, PROMPTS * 3, f"checkpoint={stories}", "max_new_tokens=20", *options)
    assert [line.get("id") for line in found] == [None, "b", 3, None] * 3
    assert [line["prompt"] for line in found[:4]] == ["Once", PROMPTS[1]["prompt"], "", "Lily"]
    assert {line["finish_reason"] for line in found} == {"length"}
    assert {line["num_output_tokens"] for line in found} == {20}
    assert found[:4] == found[4:8] == found[8:]
    for line in found[:4]:
        alone = generate(fork_server, f"checkpoint={stories}", "max_new_tokens=20", f"prompt={line['prompt']}")
        assert alone == line["prompt"] + line["text"] + "\n"


def test_equal_prompts_have_draws_of_their_own(fork_server, stories, tmp_path):
    options = [f"checkpoint={stories}", "max_new_tokens=20", "temperature=1.0"]
    first, second = (answers(fork_server, tmp_path, ["Once"] * n, *options) for n in (2, 3))
    assert first[0]["text"] != first[1]["text"]
    assert first == second[:2]
    assert generate(fork_server, *options, "prompt=Once") == "Once" + first[0]["text"] + "\n"


def test_the_chat_template_is_put_around_prompts_and_messages(fork_server, stories, tmp_path):
    """A template of text alone: the answer is that to the same text as a plain prompt."""
    model = shutil.copytree(stories, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT)
    messages = [{"role": "system", "content": "Sad."}, {"role": "user", "content": "Lily"}]
    options = [f"checkpoint={model}", "max_new_tokens=20"]
    chat = answers(fork_server, tmp_path, ["Lily", {"messages": messages}], *options, "chat=true", "system=Old.")
    plain = answers(
        fork_server, tmp_path, [f"system: {word}\nuser: Lily\nsaid:" for word in ("Old.", "Sad.")], *options
    )
    assert [line["text"] for line in chat] == [line["text"] for line in plain]
    assert chat[1]["messages"] == messages
    out = generate(fork_server, *options, "chat=true", "system=Old.", "prompt=Lily")
    assert out == chat[0]["text"] + "\n"


def test_bad_prompts_are_told_together_before_any_work(fork_server, stories, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n{}\n')
    argv = [f"checkpoint={stories}", f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/a.jsonl"]
    job = fork_server.run("generate", argv)
    assert job.codes == [2]
    assert f"error: {tmp_path}/p.jsonl:2: field 'prompt' is of type int, not text.\n" in job.output
    assert f"error: {tmp_path}/p.jsonl:3: neither 'prompt' nor 'messages': there are none.\n" in job.output
    assert not (tmp_path / "a.jsonl").exists()


def test_prompts_without_room_are_told_together(fork_server, stories, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(word * 600) for word in ("a ", "a", "b ")) + '\n"a"\n')
    job = fork_server.run("generate", [f"checkpoint={stories}", f"prompts={tmp_path}/p.jsonl"])
    assert job.codes == [2]
    for line in (1, 2, 3):
        assert f"p.jsonl:{line}: max_new_tokens: 128 after 60" in job.output
    assert "beyond the model's 512 positions. Shorten the prompt." in job.output
    assert "3 bad prompts in all" in job.output


@pytest.mark.parametrize(("options", "told"), [
    (["output=P"], "output: 'P' exists. Name another file, or say overwrite=true."),
    (["output=P", "overwrite=true"], "output: 'P' holds the prompts. Name another file."),
    (["output=no/such/folder/x"], "output: 'no/such/folder/x': No such file or directory"),
    (["prompt=a"], "prompt and prompts are given. Give one of them."),
    (["overwrite=true"], "overwrite needs output"),
    (["prompts=null", "plain=true"], "plain needs prompts"),
    (["prompts=null", "system=a"], "system needs chat = true."),
])  # fmt: skip
def test_keys_that_cannot_be_together_are_told(fork_server, stories, tmp_path, options, told):
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n')
    argv = [f"checkpoint={stories}", f"prompts={path}", *(option.replace("=P", f"={path}") for option in options)]
    job = fork_server.run("generate", argv)
    assert job.codes == [2]
    assert told.replace("'P'", f"'{path}'") in job.output
    assert path.read_text() == '"a"\n'


@pytest.mark.parametrize("id_", ["\ud800", ["a\u2028b\x85"]])
def test_any_id_comes_back_in_one_line(stories, tmp_path, id_):
    """JSON may hold half of a surrogate pair; and line ends that only some readers take for such."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Once", "id": id_}) + "\n")
    files = [f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/a.jsonl"]
    assert run_script("generate", f"checkpoint={stories}", *files, "max_new_tokens=2") == 0
    [line] = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["id"] == id_


def test_prompts_that_a_pattern_names_are_never_overwritten(stories, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n')
    argv = [f"checkpoint={stories}", f"prompts={tmp_path}/*.jsonl", f"output={path}", "overwrite=true"]
    with pytest.raises(UserError, match="holds the prompts"):
        run_script("generate", *argv)
    assert path.read_text() == '"a"\n'


@pytest.mark.parametrize("before", [None, "earlier answers\n"])
def test_a_mistake_leaves_the_output_as_it_was(stories, tmp_path, before):
    """Prompts that do not fit are known only when the model is there."""
    (tmp_path / "p.jsonl").write_text('"a"\n')
    path = tmp_path / "a.jsonl"
    if before is not None:
        path.write_text(before)
    argv = [f"checkpoint={stories}", f"prompts={tmp_path}/p.jsonl", f"output={path}", f"overwrite={before is not None}"]
    with pytest.raises(UserError, match="max_new_tokens: 600 after"):
        run_script("generate", *argv, "max_new_tokens=600")
    assert (path.read_text() if path.exists() else None) == before


def test_a_folder_is_no_place_for_answers(stories, tmp_path):
    (tmp_path / "p.jsonl").write_text('"a"\n')
    argv = [f"checkpoint={stories}", f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}", "overwrite=true"]
    with pytest.raises(UserError, match="Is a directory"):
        run_script("generate", *argv)


# --- standard input and a terminal ------------------------------------------------------------------------------------


def test_prompts_come_from_standard_input(stories, monkeypatch, capsys):
    data = b'"Once"\n{"prompt": "Lily", "id": 7}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run_script("generate", f"checkpoint={stories}", "prompts=-", "max_new_tokens=6") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line.get("id")) for line in found] == [("Once", None), ("Lily", 7)]


def test_a_bad_line_of_standard_input_is_told(stories, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once\n")))
    with pytest.raises(UserError, match="standard input:1: not JSON"):
        run_script("generate", f"checkpoint={stories}", "prompts=-")


def test_lines_of_a_terminal_are_answered_one_by_one(stories, monkeypatch, capsys):
    master, terminal = pty.openpty()
    os.write(master, b"Once\n" + b"a" * 700 + b"\n\nLily\n\x04")
    with open(terminal) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run_script("generate", f"checkpoint={stories}", "prompts=-", "max_new_tokens=6") == 0
    os.close(master)
    out, error = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("upon a") or first.startswith(" upon a")
    assert second
    assert "standard input:2: max_new_tokens: 6 after " in error


def test_answers_to_a_terminal_have_no_file(stories, tmp_path, monkeypatch):
    master, terminal = pty.openpty()
    with open(terminal) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(UserError, match="output: prompts are typed"):
            run_script("generate", f"checkpoint={stories}", "prompts=-", f"output={tmp_path}/a.jsonl")
    os.close(master)
    assert not (tmp_path / "a.jsonl").exists()


def test_what_would_command_a_terminal_is_shown_instead(stories, monkeypatch):
    master, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_script("generate", f"checkpoint={stories}", "max_new_tokens=3", "prompt=a\x1b[2J\tb\u202e") == 0
        monkeypatch.undo()
        seen = os.read(master, 4096)
    os.close(master)
    assert b"\x1b" not in seen
    assert b"a\\x1b[2J\tb\\u202e" in seen


def test_text_is_shown_as_it_comes_and_an_interrupt_ends_the_line(fork_server, stories):
    argv = [f"checkpoint={stories}", "max_new_tokens=500", "temperature=1.0", "seed=4", "prompt=Once"]
    whole = generate(fork_server, *argv)
    assert len(whole) > 800
    job = fork_server.start("generate", argv)
    while not job.log.exists() or (len(job.output) < 20 and job.alive()):
        time.sleep(0.001)
    job.kill(signal.SIGINT)
    assert job.wait() == [130]
    *text, last = job.output.splitlines()
    assert last == "interrupted"
    assert whole.startswith("\n".join(text))
    assert len(whole) > len("\n".join(text)) + 1
