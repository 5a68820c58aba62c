"""The page docs/lm_eval.md holds: lm-evaluation-harness reads our folders, and finds what `evaluate.py` finds.

It runs where lm_eval is installed: beside us, in the environment of benchmarks/perplexity_speed.py, or where
CODEX_ACCEL_LM_EVAL names a python that has it.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8")
PEER = ROOT / "runs" / "peers" / "lm_eval"


@pytest.fixture(scope="module")
def python_of_lm_eval() -> str:
    named = os.environ.get("CODEX_ACCEL_LM_EVAL")
    if named:
        return named
    if importlib.util.find_spec("lm_eval") is not None:
        return sys.executable
    if (PEER / "installed.txt").is_file():
        return str(PEER / "bin" / "python")
    pytest.skip("lm_eval is not installed; set CODEX_ACCEL_LM_EVAL to a python that has it")


@pytest.fixture(scope="module")
def texts(shared) -> list[str]:
    """One text within the context, one of a few windows, and one of other letters."""
    alice = (shared / "text" / "alice_pg11_utf8.txt").read_text(encoding="utf-8-sig")
    return [alice[2000:2300], alice[2300:5000], "Zażółć gęślą jaźń, 你好。 Γειά σου!"]


def scored_by_lm_eval(python: str, folder: Path, *, model: Path, texts: list[str]) -> tuple[dict, list[float]]:
    """(results, log-likelihoods of the texts) of the page's task and command, with `model` where the page has its."""
    [task] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    [line] = re.findall(r"^(.*lm_eval run .*)$", PAGE, re.MULTILINE)
    [path] = re.findall(r"pretrained=([^,]+)", line)
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "texts.yaml").write_text(task)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / path).parent.mkdir(parents=True)
    (folder / path).symlink_to(model)
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words[: words.index("lm_eval")])
    environment = os.environ | variables | {"HF_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "data")}
    command = [python, "-m", "lm_eval", *words[words.index("lm_eval") + 1 :]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [results] = folder.glob("runs/lm_eval/*/results_*.json")
    [samples] = folder.glob("runs/lm_eval/*/samples_texts_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"]["texts"], [float(line["resps"][0][0]) for line in lines]


def test_the_command_of_ours_scores_the_same_folder():
    """Else the page compares two models."""
    [theirs] = re.findall(r"pretrained=([^,]+)", PAGE)
    assert f"python scripts/evaluate.py --checkpoint {theirs} file.path=texts.jsonl" in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("which", ["external", "final"])
def test_lm_eval_finds_what_evaluate_finds(request, fork_server, python_of_lm_eval, texts, tmp_path, which):
    """stories260K, whose tokenizer adds BOS itself, and `final` of a run of ours, whose does not."""
    if which == "external":
        model = request.getfixturevalue("shared") / "models" / "stories260K"
    else:
        model = request.getfixturevalue("chain") / "run" / "final"
    results, loglikelihoods = scored_by_lm_eval(python_of_lm_eval, tmp_path / "theirs", model=model, texts=texts)
    argv = [f"checkpoint={model}", f"file.path={tmp_path}/theirs/texts.jsonl", f"output_dir={tmp_path}/ours"]
    job = fork_server.run("evaluate", argv)
    assert job.codes == [0], job.output
    metrics = json.loads((tmp_path / "ours" / "report.json").read_text())["metrics"]
    samples = [json.loads(line) for line in (tmp_path / "ours" / "samples.ndjson").read_text().splitlines()]
    assert [sample["nll"] for sample in samples] == pytest.approx([-value for value in loglikelihoods], rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(results["bits_per_byte,none"], rel=1e-5)
    assert 2 ** metrics["bits_per_byte"] == pytest.approx(results["byte_perplexity,none"], rel=1e-4)
    perplexity = math.exp(-sum(loglikelihoods) / metrics["num_target_tokens"])
    assert metrics["perplexity"] == pytest.approx(perplexity, rel=1e-4)
