"""scripts/checkpoints.py as its users meet it."""

import json
import shutil

import pytest
from conftest import load_script, metrics_of, run_script, train_argv

from codex_accel import manifest, run_folder
from codex_accel.errors import UserError


@pytest.fixture(scope="module")
def made(fork_server, tiny, tmp_path_factory):
    """A finished run with checkpoints of steps 3, 6, ... 15, evaluated at 6, 12 and 15."""
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
    evaluation = "evaluation={every_steps: 6, batch_size: 8, max_windows: 16}"
    checkpoint = "checkpoint={every_steps: 3, keep_last: 9, keep_best: 1}"
    job = fork_server.run("train", train_argv(tiny, run_dir, "training.max_steps=15", evaluation, checkpoint))
    assert job.codes == [0], job.output
    return run_dir


@pytest.fixture
def run_dir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run", symlinks=True)


def listing(capsys, *argv: object) -> tuple[int, dict]:
    code = run_script("checkpoints", *argv, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_list_tells_size_score_and_why_each_stays(made, capsys):
    code, document = listing(capsys, made)
    assert code == 0
    rows = document["checkpoints"]
    assert [row["step"] for row in rows] == [15, 12, 9, 6, 3]
    evaluated = {line["step"]: line["loss"] for line in metrics_of(made) if line["split"] == "validation"}
    assert {row["step"]: row["score"] for row in rows if row["score"]} == evaluated
    best = min(evaluated, key=evaluated.get)
    assert [row["step"] for row in rows if "best" in row["kept_as"]] == [best]
    assert [row["step"] for row in rows if row["is_resume_point"]] == [15]
    for row in rows:
        folder = run_folder.checkpoint_path(made, row["step"])
        assert row["num_bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_lines_for_people_hold_the_same(made, capsys):
    assert run_script("checkpoints", made) == 0
    head, first, *_, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "MB", "loss", "written", "kept", "as"]
    assert first.split()[0] == "15"
    assert first.endswith("resume point")
    assert last == "5 checkpoints, 0 damaged; checked: names and sizes"


def test_verify_finds_a_flipped_bit_and_the_resume_point_behind_it(run_dir, capsys):
    weights = run_folder.checkpoint_path(run_dir, 15) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert listing(capsys, run_dir)[0] == 0  # names and sizes are right
    code, document = listing(capsys, run_dir, "verify")
    assert code == 1
    newest, before, *_ = document["checkpoints"]
    assert any("model.safetensors: has changed" in problem for problem in newest["problems"])
    assert (newest["is_resume_point"], before["is_resume_point"], before["step"]) == (False, True, 12)


def test_prune_follows_the_rules_given(run_dir, capsys):
    code, document = listing(capsys, run_dir, "prune", "keep_last=2", "keep_best=0")
    assert code == 0
    assert document["pruned"] == ["step-000000009", "step-000000006", "step-000000003"]
    assert run_folder.steps_saved(run_dir) == [15, 12]


def test_prune_without_rules_follows_the_run(run_dir, capsys):
    assert listing(capsys, run_dir, "prune")[1]["pruned"] == []
    assert len(run_folder.steps_saved(run_dir)) == 5


def test_prune_deletes_nothing_if_the_newest_is_damaged(run_dir):
    (run_folder.checkpoint_path(run_dir, 15) / "optimizer.bin").unlink()
    with pytest.raises(UserError, match=r"optimizer\.bin: is missing"):
        run_script("checkpoints", run_dir, "prune", "keep_last=1", "keep_best=0")
    assert len(run_folder.steps_saved(run_dir)) == 5


def test_prune_is_refused_while_the_run_trains(run_dir):
    with run_folder.held(run_dir), pytest.raises(UserError, match="works in it since"):
        run_script("checkpoints", run_dir, "prune")


def test_damaged_manifest_is_a_line_and_not_a_crash(run_dir, capsys):
    (run_folder.checkpoint_path(run_dir, 9) / "manifest.json").write_text("[]")
    assert run_script("checkpoints", run_dir) == 1
    assert "is not a manifest of this toolkit" in capsys.readouterr().out


def test_a_link_in_a_checkpoint_is_a_line_and_not_the_end(run_dir, capsys):
    (run_folder.checkpoint_path(run_dir, 9) / "link").symlink_to("/")
    code, document = listing(capsys, run_dir)
    assert code == 1
    assert [bool(row["problems"]) for row in document["checkpoints"]] == [False, False, True, False, False]


def test_a_checkpoint_that_is_pruned_meanwhile_is_not_damaged(run_dir, capsys, monkeypatch):
    """As the run does that trains while its checkpoints are hashed."""
    problems_of = manifest.problems_of

    def prune_before(path):
        shutil.rmtree(run_folder.checkpoint_path(run_dir, 6), ignore_errors=True)
        return problems_of(path)

    monkeypatch.setattr(manifest, "problems_of", prune_before)
    code, document = listing(capsys, run_dir, "verify")
    assert code == 0
    assert [row["step"] for row in document["checkpoints"]] == [15, 12, 9, 3]


def test_without_the_log_nothing_has_a_score_and_no_best_one_is_deleted(run_dir, capsys):
    (run_dir / run_folder.METRICS).unlink()
    code, document = listing(capsys, run_dir)
    assert (code, {row["score"] for row in document["checkpoints"]}) == (0, {None})
    with pytest.raises(UserError, match=r"metrics\.ndjson: no such file"):
        run_script("checkpoints", run_dir, "prune", "keep_last=1")
    assert len(run_folder.steps_saved(run_dir)) == 5


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        load_script("checkpoints").main([str(tmp_path)])


def test_third_argument_is_refused(made):
    with pytest.raises(UserError, match="run and action are already given"):
        load_script("checkpoints").main([str(made), "list", "prune"])
