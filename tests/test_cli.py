"""The command line that every script shares, as real processes and in process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from codex_accel import cli, evaluate_schema, schema
from codex_accel.config import StageConfig, keys_of, load
from codex_accel.errors import UserError
from codex_accel.yaml_reader import read_yaml

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "evaluate",
    "numpy",
    "pyarrow",
    "tokenizers",
    "safetensors",
}
ROOTS = [root for root in vars(schema).values() if isinstance(root, type) and root.__base__ is StageConfig]

STAGE = '''"""Say what the config holds.

Example: python scripts/stage.py runs/a prompt="a: [b"
"""

import atexit, sys

from codex_accel import cli
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig


def main(argv=None):
    config = cli.parse(GenerateConfig, argv, doc=__doc__, stage="stage", positional=["checkpoint"])
    match config.prompt:
        case "user mistake":
            raise UserError(config.problem("prompt", "is bad."), "second: problem.")
        case "defect":
            raise RuntimeError("ours")
        case "interrupt":
            raise KeyboardInterrupt
        case "seven":
            return 7
    print(config.model_dump_json())


if __name__ == "__main__":
    atexit.register(lambda: print("MODULES", *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr))
    cli.run(main)
'''


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "stage.py"
    path.write_text(STAGE)
    return path


def start(stage: Path, *arguments: str | Path, **environment: str) -> tuple[int, str, list[str], set[str]]:
    """Exit code, standard output, lines of standard error, and the modules that the process had imported."""
    done = subprocess.run(
        [sys.executable, stage, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    lines = done.stderr.splitlines()
    modules = {name for line in lines if line.startswith("MODULES ") for name in line.split()[1:]}
    assert modules or done.returncode, done.stderr
    return done.returncode, done.stdout, [line for line in lines if not line.startswith("MODULES ")], modules


def parse(*arguments: str, root=evaluate_schema.GenerateConfig, positional: Sequence[str] = ("checkpoint",)):
    return cli.parse(root, arguments, doc="Doc.", stage="stage", positional=positional)


def refused(*arguments: str, **keys) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(*arguments, **keys)
    return caught.value.problems


def printed(capsys, *arguments: str, **keys) -> str:
    """What a printing flag prints; it ends with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        parse(*arguments, **keys)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- processes ----------------------------------------------------------------------------------------------------


def test_help_is_printed_and_imports_nothing_heavy(stage):
    code, out, errors, modules = start(stage, "--help")
    assert (code, errors) == (0, [])
    assert out.startswith("usage: python scripts/stage.py --config FILE [section.key=value ...]")
    assert "pydantic" in modules
    assert not modules & HEAVY


def test_mistake_prints_every_problem_and_ends_with_2(stage):
    code, out, errors, modules = start(stage, "seed=x", "top_k=0", "tempratur=1")
    assert (code, out) == (2, "")
    assert len(errors) == 4
    assert all(line.startswith("error: ") for line in errors)
    assert "error: command line: tempratur: unknown key. Did you mean 'temperature'?" in errors
    assert not modules & HEAVY


def test_mistake_found_by_the_script_prints_its_problems_and_ends_with_2(stage):
    code, _, errors, _ = start(stage, "a", "prompt=user mistake")
    assert code == 2
    assert errors == ["error: command line: prompt: is bad.", "error: second: problem."]


def test_defect_of_ours_keeps_its_traceback(stage):
    code, _, errors, _ = start(stage, "a", "prompt=defect")
    assert code == 1
    assert errors[0] == "Traceback (most recent call last):"


def test_shell_arguments_arrive_as_written(stage):
    code, out, errors, _ = start(stage, "--checkpoint", "X", "--prompt", "a: [b\nno")
    assert (code, errors) == (0, [])
    assert (json.loads(out)["checkpoint"], json.loads(out)["prompt"]) == ("X", "a: [b\nno")


@pytest.mark.parametrize("flag", ["--help", "--schema"])
def test_reader_that_has_gone_is_no_error(stage, flag):
    """As in `... --help | head -1`: here the reading end is closed before the process starts."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, stage, flag], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("MODULES ")] == []


@pytest.mark.parametrize("script", SCRIPTS or [None], ids=lambda script: script.name if script else "none")
def test_help_of_every_script_imports_nothing_heavy(script, tmp_path):
    """What keeps it under 0.35 s of CPU time; `python benchmarks/help_time.py` measures that."""
    assert script, "there is no script in scripts/"
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python scripts/{script.name} --config FILE")
    modules = {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)}
    assert {"codex_accel", "pydantic"} <= modules
    assert sorted(modules & HEAVY) == []


# --- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (7, 7), (75, 75)])
def test_exit_code_is_what_main_returns(returned, code):
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: returned)
    assert caught.value.code == code


def test_interrupt_ends_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_processes_name_themselves(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: parse("seed=x", "checkpoint=a"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("[process 1] error: command line: seed")


def test_only_the_main_process_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys, "--help") == ""


# --- forms of an argument -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["checkpoint=X"], ["--checkpoint", "X"], ["--checkpoint=X"], ["X"]],
    ids=" ".join,
)
def test_every_form_of_an_argument_means_the_same(arguments):
    assert parse(*arguments).checkpoint == "X"


def test_dashes_in_a_flag_stand_for_underscores():
    config = parse("X", "--max-new-tokens", "5", "--top-k=3", "--max_new_tokens=6")
    assert (config.max_new_tokens, config.top_k) == (6, 3)


def test_negative_number_is_a_value():
    assert parse("X", "--seed", "-3").seed == -3


def test_value_may_hold_an_equals_sign():
    assert parse("X", "prompt=a=b").prompt == "a=b"
    assert parse("X", "--prompt=--a=b").prompt == "--a=b"


@pytest.mark.parametrize(
    ("arguments", "recursive", "path"),
    [
        (["--recursive", "A"], True, "A"),
        (["A", "--recursive"], True, "A"),
        (["--recursive", "false", "A"], False, "A"),
        (["--recursive", "true", "A"], True, "A"),
        (["--recursive=false", "A"], False, "A"),
        (["A"], False, "A"),
    ],
)
def test_bool_flag_needs_no_value(arguments, recursive, path):
    config = parse(*arguments, root=schema.VerifyConfig, positional=["path"])
    assert (config.recursive, config.path) == (recursive, path)


def test_second_bare_argument_is_refused():
    """As in `verify.py runs/*`: checking the last of them alone would look like a check of all."""
    assert refused("A", "B", root=schema.VerifyConfig, positional=["path"]) == [
        "command line: 'B': path is already given. Run once for each."
    ]


def test_bare_argument_without_a_place_is_refused():
    assert refused("checkpoint=a", "X", positional=[]) == [
        "command line: 'X': is not of the form section.key=value. See --help."
    ]


@pytest.mark.parametrize("arguments", [["X", "--prompt"], ["X", "--prompt", "--seed", "3"]], ids=["last", "flag next"])
def test_flag_without_its_value_is_refused(arguments):
    assert refused(*arguments) == ["command line: --prompt: needs a value. Write --prompt VALUE or prompt=VALUE."]


def test_config_flag_without_its_file_is_refused():
    problem, missing = refused("--config")
    assert problem.startswith("command line: --config: needs a file.")
    assert "checkpoint: required" in missing


def test_argument_and_config_problems_are_told_together():
    problems = refused("seed=x", "checkpoint=a", "--top-k", positional=[])
    assert [problem.split(": ")[1] for problem in problems] == ["--top-k", "seed = 'x'"]


@pytest.mark.parametrize("form", [["--config", "FILE"], ["--config=FILE"]], ids=" ".join)
def test_command_line_wins_over_the_file(tmp_path, form):
    (tmp_path / "c.yaml").write_text("checkpoint: a\nseed: 1\ntop_k: 5\n")
    config = parse(*[part.replace("FILE", str(tmp_path / "c.yaml")) for part in form], "seed=2")
    assert (config.checkpoint, config.seed, config.top_k) == ("a", 2, 5)


def test_missing_config_file_names_its_near_neighbour(tmp_path):
    (tmp_path / "generate.yaml").touch()
    (problem,) = refused("--config", str(tmp_path / "generat.yaml"))
    assert problem.endswith(f"no such file. Did you mean '{tmp_path / 'generate.yaml'}'?")


# --- what the printing flags print --------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_help_names_every_key_with_its_type_default_and_meaning(root, capsys):
    words = " ".join(printed(capsys, "--help", root=root).split())
    for key in keys_of(root):
        default = "required" if key.default is None else f"default {key.default}"
        assert " ".join(f"{key.key} ({key.type}, {default}) {key.meaning}".split()) in words
    for flag in cli.FLAGS:
        assert flag in words


def test_help_works_beside_broken_arguments(capsys):
    assert printed(capsys, "seed=x", "--nothing", "--help").startswith("usage: ")


def test_printed_config_is_a_config_file_that_gives_the_same_config(tmp_path, capsys):
    arguments = ["X", "prompt=1e5", "--temperature", "1e-3", "top_p=.5"]
    (tmp_path / "c.yaml").write_text(printed(capsys, *arguments, "--print-config"))
    again = parse("--config", str(tmp_path / "c.yaml"))
    assert again.model_dump() == parse(*arguments).model_dump()
    assert (again.prompt, again.temperature, again.top_p) == ("1e5", 0.001, 0.5)


def test_config_is_checked_before_it_is_printed():
    assert refused("seed=x", "checkpoint=a", "--print-config")


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_schema_is_a_json_schema_of_every_key(root, capsys):
    document = json.loads(printed(capsys, "--schema", root=root))
    assert set(document["properties"]) == set(root.model_fields)
    assert document["additionalProperties"] is False


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_defaults_are_the_base_yaml(root, capsys):
    assert printed(capsys, "--defaults", root=root) == cli.base_yaml(root, "Doc.")


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_base_yaml_holds_every_default_and_names_every_required_key(root, tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(cli.base_yaml(root, "Title"), encoding="utf-8")
    values, _, problems = read_yaml(path)
    assert problems == []
    text = path.read_text(encoding="utf-8")
    inside_lists = {key.key for key in keys_of(root) if "[]" in key.key or key.key.startswith("file.")}
    for key in keys_of(root):
        assert f"# {key.meaning} ({key.type})" in text or f"# required: {key.meaning} ({key.type})" in text
        if key.default is None or key.key in inside_lists:
            continue
        node = values
        for part in key.key.split("."):
            node = node[part]
        assert node == read_default(key.default, tmp_path)


def read_default(text: str, folder: Path):
    (folder / "default.yaml").write_text(f"value: {text}\n", encoding="utf-8")
    return read_yaml(folder / "default.yaml")[0]["value"]


def test_base_yaml_is_a_config_once_the_required_keys_are_given(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(cli.base_yaml(schema.VerifyConfig, "Title"))
    config = load(schema.VerifyConfig, path=path, overrides=[("path", "A")])
    assert config.model_dump() == schema.VerifyConfig(path="A").model_dump()
