"""The filter of a process: what holds, what it writes, and how a bypass is known."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from secret_grammar import leaked, private_key, secret_of

from codex_accel import redaction
from codex_accel.config import Safety, to_yaml
from codex_accel.errors import UserError
from codex_accel.schema import PrepareConfig

REPOSITORY = Path(__file__).parents[1]
DRAW = random.Random(7)
TEXT, SECRET = secret_of("github personal", DRAW)


def written(program: str, **environment: str) -> tuple[str, str, int]:
    """Output, errors and exit code of a program that runs as a script does, under `cli.run`."""
    text = f"from codex_accel import cli\n\ndef main():\n{program}\n\ncli.run(main)\n"
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", text], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


# --- what holds ------------------------------------------------------------------------------------------------------


def test_a_bypass_needs_a_reason():
    assert redaction.bypass_reason(None, environment={}) is None
    assert redaction.bypass_reason(None, environment={"DISABLE_SECRET_FILTER": "0"}) is None
    assert redaction.bypass_reason(" a false alarm ", environment={}) == "a false alarm"
    assert redaction.bypass_reason("test", environment={"DISABLE_SECRET_FILTER": "1"}) == "test"
    with pytest.raises(UserError, match=r"DISABLE_SECRET_FILTER=1: .* Give safety\.bypass_reason="):
        redaction.bypass_reason(None, environment={"DISABLE_SECRET_FILTER": "1"})
    with pytest.raises(UserError, match=r"safety\.bypass_reason: is empty"):
        redaction.bypass_reason(" ", environment={})
    with pytest.raises(UserError, match=r"'yes': is neither 0 nor 1"):
        redaction.bypass_reason("test", environment={"DISABLE_SECRET_FILTER": "yes"})


def test_the_built_in_policy_holds_until_another_one_does(tmp_path):
    assert redaction.text(TEXT) == "[SECRET]"
    file = tmp_path / "policy.yaml"
    file.write_text("version: mine\noff: [github]\nrules:\n  - {id: a, action: redact, literals: [tulip]}\n")
    redaction.enforce(Safety(policy=str(file)))
    assert redaction.text(f"{TEXT} and a tulip") == f"{TEXT} and a [SECRET]"
    assert redaction.facts()["policy"] == "mine"
    redaction.enforce(Safety())
    assert redaction.text(f"{TEXT} and a tulip") == "[SECRET] and a tulip"


def test_a_policy_that_cannot_be_used_leaves_what_holds_as_it_is(tmp_path):
    with pytest.raises(UserError, match=r"^safety\.policy = .*none\.yaml': is no file."):
        redaction.enforce(Safety(policy=str(tmp_path / "none.yaml"), bypass_reason="a test"))
    assert not redaction.is_bypassed()
    assert redaction.text(TEXT) == "[SECRET]"


def test_a_policy_that_looks_for_no_secrets_needs_a_reason(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text('version: "1"\nsecrets: false\n')
    with pytest.raises(UserError, match=r"says secrets: false, .* give safety\.bypass_reason\.$"):
        redaction.enforce(Safety(policy=str(file)))
    redaction.enforce(Safety(policy=str(file), bypass_reason="made-up data"))
    assert redaction.facts()["bypass_reason"] == "made-up data"


def test_the_version_of_a_policy_is_recorded_without_secrets(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text(f"version: of {SECRET}\n")
    redaction.enforce(Safety(policy=str(file)))
    assert redaction.facts()["policy"] == "of [SECRET]"


def test_under_a_bypass_nothing_is_masked_and_the_facts_say_why():
    redaction.enforce(Safety(bypass_reason=f"looks at {SECRET}"))
    assert redaction.text(TEXT) == TEXT
    assert redaction.value({"password": SECRET}) == {"password": SECRET}
    assert redaction.policy() is None
    assert redaction.facts() == {"policy": None, "sha256": None, "bypass_reason": "looks at [SECRET]"}


def test_a_masked_configuration_is_still_one(tmp_path):
    values = {
        "tokenizer": "t",
        "output_dir": "d",
        "sources": [{"path": f"https://a:{SECRET}@host/x", "format": "text"}],
    }
    config = PrepareConfig.model_validate(values)
    text = to_yaml(redaction.value(config.model_dump(mode="json")))
    assert SECRET not in text
    assert "https://a:[SECRET]@host/x" in text


# --- the console -----------------------------------------------------------------------------------------------------


def test_what_is_printed_is_masked_line_by_line():
    program = f"""
    import sys
    print("a", {TEXT!r}, "b", flush=True)
    for piece in {[SECRET[:9], SECRET[9:], chr(10), "rest"]!r}:
        sys.stderr.write(piece)
    """
    output, errors, code = written(program)
    assert (output, errors, code) == ("a [SECRET] b\n", "[SECRET]\nrest", 0)


def test_a_key_of_many_lines_that_is_printed_at_once_is_masked():
    text, _ = private_key(DRAW)
    output, _, _ = written(f"    print({text!r} + '\\nafter')")
    assert leaked(text, output, length=12) is None
    assert output.endswith("after\n")


@pytest.mark.parametrize("how", ["ValueError", "OSError", "UserError"])
def test_no_error_shows_a_secret(how):
    program = f"    from codex_accel.errors import UserError\n    raise {how}('cannot use {SECRET} here')"
    output, errors, code = written(program)
    assert SECRET not in output + errors
    assert "cannot use [SECRET] here" in errors
    assert ("Traceback" in errors) is (how != "UserError")
    assert code == (2 if how == "UserError" else 1)


def test_warnings_and_logging_are_masked():
    program = f"""
    import logging, warnings
    logging.basicConfig()
    logging.getLogger("a").error("token %s", {SECRET!r})
    warnings.warn({TEXT!r})
    """
    _, errors, _ = written(program)
    assert SECRET not in errors
    assert errors.count("[SECRET]") >= 2


def test_a_progress_line_shows_before_its_end():
    program = """
    import os, sys
    sys.stdout.write("50 %")
    sys.stdout.flush()
    os._exit(0)
    """
    assert written(program)[0] == "50 %"


@pytest.mark.parametrize("num", [53, 270, 300])
def test_a_text_is_masked_before_it_is_cut(num):
    assert SECRET[:12] not in redaction.words(f"{'p' * num} {SECRET}")
    assert redaction.words("a\n b", 3) == "a b"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_console_changes_no_exit_code(closed):
    command = f"{sys.executable} scripts/verify.py nothing {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True).returncode == 2
    command = f"{sys.executable} scripts/verify.py --help {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True).returncode == 0


def test_many_small_writes_take_no_longer_than_their_length():
    program = """
    import io, sys, time
    from codex_accel import redaction

    def taken_s(num_writes):
        stream = redaction._Console(io.StringIO())
        start = time.process_time()
        for _ in range(num_writes):
            stream.write(".")
        stream.write("\\n" * num_writes + "x" * (10 * num_writes))
        return time.process_time() - start

    taken_s(100)
    print(taken_s(100_000) < 40 * taken_s(10_000) + 0.1)
    """
    output, errors, _ = written(program)
    assert (output, errors) == ("True\n", "")


def test_a_configuration_is_printed_without_secrets_and_a_bypass_is_told():
    argv = [sys.executable, "scripts/train_tokenizer.py", "--print-config", f"output_dir=runs/{SECRET}"]
    argv += ["sources.0.path=a.txt", "sources.0.format=text"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "output_dir: runs/[SECRET]\n" in done.stdout
    argv.append("safety.bypass_reason=to see it")
    env = {**os.environ, "DISABLE_SECRET_FILTER": "1"}
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    assert f"output_dir: runs/{SECRET}\n" in done.stdout
    assert done.stderr == "warning: secrets are not masked: to see it\n"


def test_help_does_not_load_the_families():
    program = (
        "    import sys\n    from codex_accel import cli\n    from codex_accel.schema import PrepareConfig\n    try:\n"
    )
    program += "        cli.parse(PrepareConfig, ['--help'], doc='x', stage='y')\n    finally:\n"
    program += "        assert 're2' not in sys.modules"
    output, errors, code = written(program)
    assert (errors, code) == ("", 0)
    assert output.startswith("usage")


def test_the_facts_are_plain_values():
    assert json.loads(json.dumps(redaction.facts())) == redaction.facts()
