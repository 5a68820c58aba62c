"""A killed run, started again, ends as if it had never been killed."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import metrics_of, train_argv

from codex_accel import files

NUM_KILLS = 10


def outcome(run_dir: Path) -> tuple[str, list[dict]]:
    return files.sha256_file(run_dir / "final" / "model.safetensors"), metrics_of(run_dir)


def last_step(run_dir: Path) -> int:
    """Last step with a line in metrics.ndjson, 0 if there is none."""
    try:
        lines = metrics_of(run_dir)
    except (OSError, ValueError):
        return 0
    return lines[-1]["step"] if lines else 0


def hits_of(fork_server, tiny, root: Path, *, num_processes: int, num_kills: int, seed: int) -> list[tuple[int, str]]:
    """Kill runs at random moments until `num_kills` fell between the first and the last step; all must end alike.

    Returns (last logged step, phase) of each counted hit.
    """
    argv = train_argv(tiny, root / "unbroken")
    unbroken = fork_server.run("train", argv, num_processes=num_processes)
    assert unbroken.codes == [0] * num_processes, unbroken.output
    expected = outcome(root / "unbroken")
    draws, hits, chain = random.Random(seed), [], 0
    while len(hits) < num_kills:
        chain += 1
        run_dir = root / f"killed-{chain}"
        while not (run_dir / "final").exists():
            phase = root / "phase"
            job = fork_server.start("train", train_argv(tiny, run_dir), num_processes=num_processes, phase=phase)
            before = last_step(run_dir)
            while job.alive() and last_step(run_dir) <= before and not (phase.exists() and "step" in phase.read_text()):
                time.sleep(0.002)
            if len(hits) < num_kills:
                time.sleep(draws.uniform(0.0, 0.35))
                if job.alive():
                    step, where = last_step(run_dir), phase.read_text().strip()
                    job.kill()
                    if 1 <= step < 30 and where != "start":
                        hits.append((step, where))
            assert set(job.wait()) <= {0, -9}, job.output
            phase.unlink(missing_ok=True)
        assert outcome(run_dir) == expected, f"differs after hits {hits}"
        assert not [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    return hits


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_ten_kills_end_in_the_same_weights_and_metrics(fork_server, tiny, tmp_path, num_processes, record_property):
    hits = hits_of(fork_server, tiny, tmp_path, num_processes=num_processes, num_kills=NUM_KILLS, seed=num_processes)
    assert len(hits) == NUM_KILLS
    print(f"\n{num_processes} process(es), {NUM_KILLS} hits (step, where): {hits}; {dict(Counter(w for _, w in hits))}")


@pytest.mark.distributed
def test_two_processes_see_the_same_samples_and_losses_as_one(fork_server, tiny, tmp_path):
    """1 process x accumulation 4 against 2 x 2: as many targets at each step, and losses equal to 1e-5."""
    overrides = ["training.max_steps=50", "checkpoint={every_steps: null}"]
    for num_processes in (1, 2):
        argv = train_argv(tiny, tmp_path / str(num_processes), *overrides)
        job = fork_server.run("train", argv, num_processes=num_processes)
        assert job.codes == [0] * num_processes, job.output
        assert f"engine  {num_processes} x cpu" in job.output
        assert f"accumulation {4 // num_processes}" in job.output
    one, two = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    assert len(one) == len(two) == 50 + 10
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a.get("num_target_tokens")) == (b["step"], b.get("num_target_tokens"))
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_signal_saves_and_the_next_start_ends_alike(fork_server, tiny, tmp_path):
    """SIGTERM: exit code 75, the `preempted` marker, and the same weights after going on."""
    assert fork_server.run("train", train_argv(tiny, tmp_path / "unbroken")).codes == [0]
    job = fork_server.start("train", train_argv(tiny, tmp_path / "told"))
    while last_step(tmp_path / "told") < 7:
        time.sleep(0.002)
    job.kill(15)
    assert job.wait() == [75], job.output
    assert (tmp_path / "told" / "preempted").exists()
    assert "saved. Run the same command again" in job.output
    assert fork_server.run("train", train_argv(tiny, tmp_path / "told")).codes == [0]
    assert outcome(tmp_path / "told") == outcome(tmp_path / "unbroken")
    assert not (tmp_path / "told" / "preempted").exists()


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(fork_server, tiny, tmp_path):
    run_dir = tmp_path / "run"
    argv = train_argv(tiny, run_dir, "training.max_steps=9", "evaluation.every_steps=null")
    assert fork_server.run("train", argv).codes == [0]
    expected = outcome(run_dir)
    files.remove_folder(run_dir / "final")
    weights = run_dir / "checkpoints" / "step-000000009" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    assert "checkpoint rejected" in job.output
    assert "step-000000009/model.safetensors" in job.output
    assert "step-000000006, step 6" in job.output
    assert outcome(run_dir) == expected


def test_other_settings_are_refused_unless_named(fork_server, tiny, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=3")
    assert fork_server.run("train", argv).codes == [0]
    files.remove_folder(tmp_path / "run" / "final")
    longer = train_argv(tiny, tmp_path / "run", "training.max_steps=6", "optimizer.learning_rate=1e-3")
    job = fork_server.run("train", longer)
    assert job.codes == [2]
    assert "training.max_steps: 3 -> 6" in job.output
    assert "optimizer.learning_rate: 0.003 -> 0.001" in job.output
    job = fork_server.run("train", [*longer, "allow_drift=[training.max_steps, optimizer.learning_rate]"])
    assert job.codes == [0], job.output
    assert metrics_of(tmp_path / "run")[-1]["step"] == 6
