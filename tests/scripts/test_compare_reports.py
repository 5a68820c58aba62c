"""scripts/compare_reports.py on real evaluations and runs."""

import json
import shutil

import pytest
from conftest import run_script, train_argv
from evaluations import of_predictions, text_line, write

from codex_accel.errors import UserError


def compare(capsys, *argv: object) -> str:
    assert run_script("compare_reports", "num_resamples=300", *argv) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def longer(chain, fork_server, tmp_path_factory):
    """A folder with a run of two steps more than `chain`'s, and its evaluation."""
    folder = tmp_path_factory.mktemp("longer")
    argv = train_argv(chain, folder / "run", "training.max_steps=6", "evaluation.every_steps=null")
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    job = fork_server.run("evaluate", [f"checkpoint={folder}/run", f"output_dir={folder}/report"])
    assert job.codes == [0], job.output
    return folder


def test_two_evaluations_of_the_same_documents(chain, longer, capsys):
    out = compare(capsys, chain / "report", longer / "report")
    reports = [json.loads((each / "report" / "report.json").read_text()) for each in (chain, longer)]
    [line] = [line.split() for line in out.splitlines() if line.split()[:1] == ["loss"]]
    assert [float(cell) for cell in line[1:3]] == pytest.approx([r["metrics"]["loss"] for r in reports], rel=1e-5)
    assert f"{reports[0]['counts']['num_documents']} documents in both" in out
    assert "digests.model" in out
    assert "note:" not in out


def test_json_has_what_the_lines_tell(chain, longer, capsys):
    document = json.loads(compare(capsys, chain / "report", longer / "report", "--json"))
    assert document["kind"] == "evaluations"
    value = document["parts"][""]["metrics"]["loss"]
    assert value["difference"] == value["b"] - value["a"]
    assert value["low"] <= value["difference"] <= value["high"]
    assert [one["key"] for one in document["differences"]] == ["digests.model"]


def test_two_runs(chain, longer, capsys):
    out = compare(capsys, chain / "run", longer / "run")
    assert "step 4, complete" in out
    assert "step 6, complete" in out
    assert ["training.max_steps", "4", "6"] in [line.split() for line in out.splitlines()]
    assert "output_dir" not in out
    document = json.loads(compare(capsys, chain / "run", longer / "run", "--json"))
    last = [json.loads((each / "run" / "metrics.ndjson").read_text().splitlines()[-1]) for each in (chain, longer)]
    assert [one["loss"] for one in document["splits"]["validation"]["last"]] == [line["loss"] for line in last]


def test_a_run_and_an_evaluation_are_refused(chain):
    with pytest.raises(UserError, match=r"is a training run and .* is none"):
        run_script("compare_reports", chain / "report", chain / "run")


def test_what_is_missing_or_damaged_is_told(chain, tmp_path):
    with pytest.raises(UserError, match="nowhere': no such folder"):
        run_script("compare_reports", chain / "report", tmp_path / "nowhere")
    shutil.copytree(chain / "report", tmp_path / "report")
    (tmp_path / "report" / "report.csv").write_text("changed")
    with pytest.raises(UserError, match=r"b = .*is damaged.*report\.csv"):
        run_script("compare_reports", chain / "report", tmp_path / "report")


def predictions(folder, outputs: list[str]):
    lines = [text_line(n, output, ["red sky"], id=f"q{n}") for n, output in enumerate(outputs, 1)]
    return write(folder, of_predictions(lines, {"exact_match": {}, "f1": {}}), lines)


def test_changed_samples_are_shown_where_they_differ(tmp_path, capsys):
    long = "the same words again and again " * 20
    a = predictions(tmp_path / "a", [long + "end", "red sky", "blue"])
    b = predictions(tmp_path / "b", [long + "finish", "blue", "blue"])
    out = compare(capsys, a, b, "show=2")
    assert "2 of 3 samples changed" in out
    [row] = [line.split() for line in out.splitlines() if line.split()[:1] == ["exact_match"]]
    assert row[1] == "0.333333"
    assert row[-2:] == ["0", "1"]
    lines = [line.strip() for line in out.splitlines()]
    start = lines.index("line 2  id q2  exact_match 1 -> 0  f1 1 -> 0")
    assert lines[start + 1 : start + 4] == ["ref   red sky", "a     red sky", "b     blue"]
    assert lines[start + 4] == "line 1  id q1  same scores"
    assert lines[start + 6].startswith("a     ...")
    assert lines[start + 6].endswith("again end")
    assert lines[start + 7].endswith("again finish")


def test_show_limits_the_samples(tmp_path, capsys):
    a, b = predictions(tmp_path / "a", ["x"] * 5), predictions(tmp_path / "b", ["y"] * 5)
    assert compare(capsys, a, b, "show=3").count("same scores") == 3
    assert compare(capsys, a, b, "show=0").count("same scores") == 0


@pytest.mark.security
def test_text_of_samples_cannot_control_the_terminal(tmp_path, capsys):
    a = predictions(tmp_path / "a", ["\x1b[2J\x07\r\u202egnp.exe\u2028"])
    b = predictions(tmp_path / "b", ["x\ny"])
    out = compare(capsys, a, b)
    assert "\\x1b[2J\\x07\\r\\u202egnp.exe\\u2028" in out
    assert "x\\ny" in out
    assert all(character.isprintable() or character == "\n" for character in out)
