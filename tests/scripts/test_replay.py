"""scripts/replay.py: the same data and code give the same checkpoint, and a difference is found."""

import json
import shutil

import pytest
from conftest import load_script, train_argv

from codex_accel import manifest, run_folder
from codex_accel.errors import UserError
from codex_accel.yaml_reader import read_yaml


def replay(capfd, *argv: object) -> tuple[int, str]:
    """Exit code and what was printed, by the training below it too."""
    code = load_script("replay").main([str(argument) for argument in argv])
    return code, capfd.readouterr().out


@pytest.fixture(scope="module")
def run_dir(fork_server, tiny, tmp_path_factory):
    """A run on one process with checkpoints of steps 4, 8 and 12."""
    run_dir = tmp_path_factory.mktemp("replay") / "run"
    checkpoint = "checkpoint={every_steps: 4, keep_last: 3}"
    argv = train_argv(
        tiny, run_dir, "training.max_steps=12", "evaluation.every_steps=6", "training.max_time_s=600", checkpoint
    )
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    return run_dir


@pytest.fixture(scope="module")
def replayed(run_dir, tmp_path_factory):
    """The replay of step 12, kept."""
    folder = tmp_path_factory.mktemp("replayed") / "again"
    path = run_folder.checkpoint_path(run_dir, 12)
    assert load_script("replay").main([str(path), f"output_dir={folder}"]) == 0
    return folder


def test_steps_between_two_checkpoints_give_the_second_again(run_dir, replayed):
    paths = [run_folder.checkpoint_path(folder, 12) for folder in (run_dir, replayed)]
    then, now = (manifest.read(path)["content_digest"] for path in paths)
    assert then == now
    events = [json.loads(line) for line in (replayed / "events.ndjson").read_text().splitlines()]
    assert [line["kind"] for line in events] == ["resume", "save", "preempted"]
    assert events[0]["checkpoint"] == str(run_folder.checkpoint_path(run_dir, 8))
    assert [path.name for path in run_dir.parent.iterdir()] == ["run"]


def test_no_clock_ends_a_replay(run_dir, replayed):
    limits = [read_yaml(folder / manifest.CONFIG)[0]["training"]["max_time_s"] for folder in (run_dir, replayed)]
    assert limits == [600, None]


def test_it_starts_from_before_the_checkpoint(run_dir):
    older, newer = (str(run_folder.checkpoint_path(run_dir, step)) for step in (8, 12))
    for start in (older, newer):
        with pytest.raises(UserError, match=r"start: '.*' is at step \d+, not before step 8\."):
            load_script("replay").main([older, f"start={start}"])


def compare(run_dir, replayed, capfd) -> tuple[int, list[str]]:
    """What the replay prints about step 12 of `run_dir`, given the replayed run."""
    script = load_script("replay")
    path = run_folder.checkpoint_path(run_dir, 12)
    losses = [script._losses(folder, 8, 12) for folder in (run_dir, replayed)]
    code = script._compare(path, manifest.read(path), run_folder.checkpoint_path(replayed, 12), losses=losses)
    return code, capfd.readouterr().out.splitlines()


def test_equal_is_said_with_the_content_digest(run_dir, replayed, capfd):
    code, lines = compare(run_dir, replayed, capfd)
    assert code == 0
    assert lines[0] == "losses  4 logged steps compared"
    assert lines[1].startswith("equal ")
    assert lines[2].split()[1] == manifest.read(run_folder.checkpoint_path(run_dir, 12))["content_digest"]


def test_half_a_line_of_a_run_that_was_killed_is_not_compared(run_dir, replayed, tmp_path, capfd):
    other = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    with open(other / "metrics.ndjson", "ab") as log:
        log.write(b'{"step": 13, "spl')
    assert compare(other, replayed, capfd)[0] == 0


def test_first_step_whose_loss_differs_is_named(run_dir, replayed, tmp_path, capfd):
    other = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    lines = [json.loads(line) for line in (other / "metrics.ndjson").read_text().splitlines()]
    for line in lines:
        if line["step"] >= 10:
            line["loss"] += 2**-40
    (other / "metrics.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, told = compare(other, replayed, capfd)
    assert code == 1
    assert told[1].startswith("differs first at step 10: loss ")


def test_other_weights_are_named_with_what_changed(run_dir, replayed, tmp_path, capfd):
    other = shutil.copytree(replayed, tmp_path / "again", symlinks=True)
    path = run_folder.checkpoint_path(other, 12) / "manifest.json"
    document = json.loads(path.read_text())
    for resource in document["resources"]:
        if resource["name"] == "model.safetensors":
            resource["digest"] = "0" * 64
    document["facts"]["num_threads"] = 64
    path.write_text(json.dumps(document))
    code, told = compare(run_dir, other, capfd)
    assert code == 1
    assert told[1].startswith("differs model.safetensors: sha256 ")
    assert "        num_threads: 1 then, 64 now" in told


def test_damaged_checkpoint_is_refused(run_dir, tmp_path):
    copy = shutil.copytree(run_folder.checkpoint_path(run_dir, 12), tmp_path / "step-000000012")
    (copy / "optimizer.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer\.bin: has 0 bytes"):
        load_script("replay").main([str(copy)])


@pytest.mark.slow
@pytest.mark.distributed
def test_run_of_two_processes_is_replayed_on_two(fork_server, tiny, tmp_path, capfd):
    checkpoint = "checkpoint={every_steps: 4, keep_last: 3}"
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=8", checkpoint)
    assert fork_server.run("train", argv, num_processes=2).codes == [0, 0]
    code, out = replay(capfd, run_folder.checkpoint_path(tmp_path / "run", 8))
    assert code == 0
    assert "engine  2 x cpu" in out


@pytest.mark.slow
def test_from_scratch_the_first_checkpoint_is_made_again(run_dir, capfd):
    code, out = replay(capfd, run_folder.checkpoint_path(run_dir, 4))
    assert code == 0
    assert "step 0 to 4, from the first step" in out
