"""A run that is told to stop, at whatever moment and by whomever, saves and stops; the next start ends alike."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, metrics_of, train_argv

from codex_accel import files, preemption, run_folder

BIN = Path(sys.executable).parent
NUM_STEPS = 30
AIMS_S = {"start": 0.1, "step": 0.05, "accumulation": 0.01, "evaluate": 0.05, "save": 0.02, "prune": 0.002, "end": 0.05}


def outcome(run_dir: Path) -> tuple[str, list[dict]]:
    """Digest of the final weights, and all metrics."""
    return files.sha256_file(run_dir / "final" / "model.safetensors"), metrics_of(run_dir)


def last_step(run_dir: Path) -> int:
    """Last step with a whole line of the training split, 0 if there is none."""
    path = run_dir / run_folder.METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max([json.loads(line)["step"] for line in lines], default=0)


def hears(pid: int) -> bool:
    """Whether the process has a handler for SIGUSR1, so its listener stands."""
    try:
        caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    except OSError:
        return False
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def wait_for(condition, alive, *, timeout_s: float = 120) -> bool:
    """Wait until `condition` holds; whether it did, before the run ended."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {timeout_s} s"
        if not alive():
            return bool(condition())
        time.sleep(0.0005)
    return True


def tell_once(fork_server, tiny, run_dir: Path, *, num_processes: int, aim: str, draws: random.Random) -> str | None:
    """Start the run and send one of the signals to one of its processes, when the first of them is in phase `aim`.

    Returns the phase that it hit, None if none was sent. A run that a signal hit before its last step must save and
    end with code 75 on all processes; after that it may also end in peace.
    """
    phase = run_dir.with_name(f"{run_dir.name}-phase")
    first = Path(f"{phase}-0")
    first.unlink(missing_ok=True)
    job = fork_server.start("train", train_argv(tiny, run_dir), num_processes=num_processes, phase=phase)
    before = last_step(run_dir)
    at_least = draws.randint(min(before, NUM_STEPS - 1), NUM_STEPS - 1) if aim == "step" else 0

    def is_there() -> bool:
        if not all(hears(pid) for pid in job.pids):
            return False
        if aim == "end":
            return last_step(run_dir) == NUM_STEPS
        return first.exists() and first.read_text().strip() == aim and last_step(run_dir) >= at_least

    sent = None
    if wait_for(is_there, job.alive):
        time.sleep(draws.uniform(0, AIMS_S[aim]))
        sent, step = first.read_text().strip(), last_step(run_dir)
        number, pid = draws.choice(preemption.SIGNALS), draws.choice(job.pids)
        os.kill(pid, number)
        sent = "end" if step == NUM_STEPS else sent
    codes = job.wait()
    if sent is None or (sent == "end" and set(codes) == {0}):
        assert set(codes) == {0}, job.output
        return sent
    assert set(codes) == {preemption.EXIT_CODE}, f"missed {number.name} in {sent} at step {step}\n{job.output}"
    marker = json.loads((run_dir / preemption.MARKER).read_text())
    steps = run_folder.steps_saved(run_dir)
    assert marker["step"] == (steps[0] if steps else 0) >= step
    if pid == job.pids[0]:
        assert marker["reason"] == number.name
    return sent


def tell_often(fork_server, tiny, root: Path, *, num_processes: int, num_trials: int, seed: int) -> Counter:
    """Signals at random times until `num_trials` were sent; every run must end as the unbroken one. By phase."""
    unbroken = fork_server.run("train", train_argv(tiny, root / "unbroken"), num_processes=num_processes)
    assert unbroken.codes == [0] * num_processes, unbroken.output
    expected, draws, sent = outcome(root / "unbroken"), random.Random(seed), Counter()
    aims = list(AIMS_S)
    while sent.total() < num_trials:
        run_dir = root / f"told-{sent.total()}"
        while not (run_dir / "final").exists():
            if sent.total() < num_trials:
                aim = aims[sent.total() % len(aims)]
                phase = tell_once(fork_server, tiny, run_dir, num_processes=num_processes, aim=aim, draws=draws)
                sent.update([phase] if phase else [])
            else:
                done = fork_server.run("train", train_argv(tiny, run_dir), num_processes=num_processes)
                assert done.codes == [0] * num_processes, done.output
        assert outcome(run_dir) == expected, f"differs after {sent}"
        assert not (run_dir / preemption.MARKER).exists()
        assert not [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    return sent


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_signal_to_any_process_at_any_time_stops_all_and_loses_nothing(fork_server, tiny, tmp_path, num_processes):
    sent = tell_often(
        fork_server, tiny, tmp_path, num_processes=num_processes, num_trials=6 // num_processes, seed=num_processes
    )
    print(f"\n{num_processes} process(es): 0 missed of {sent.total()}, {dict(sent)}")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_hundred_signals(fork_server, tiny, tmp_path, num_processes):
    sent = tell_often(fork_server, tiny, tmp_path, num_processes=num_processes, num_trials=50, seed=8 + num_processes)
    print(f"\n{num_processes} process(es): 0 missed of {sent.total()}, {dict(sent)}")
    assert set(sent) >= {"start", "evaluate", "save", "accumulation", "end"}


@pytest.mark.distributed
def test_a_second_signal_stops_a_process_that_waits_for_another(fork_server, tiny, tmp_path):
    """Process 1 is stopped, so process 0 waits inside a collective, from which Python's handlers do not run."""
    job = fork_server.start("train", train_argv(tiny, tmp_path / "run", "training.max_steps=4000"), num_processes=2)
    first, second = job.pids
    assert wait_for(lambda: last_step(tmp_path / "run") >= 2, job.alive), job.output
    os.kill(second, signal.SIGSTOP)
    used = []

    def waits() -> bool:
        """No processor time between two looks 20 ms apart."""
        state, *rest = Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()
        used.append((state, rest[10], rest[11]))
        time.sleep(0.02)
        return len(used) > 2 and used[-1] == used[-2] == used[-3] and state == "S"

    assert wait_for(waits, job.alive)
    os.kill(first, signal.SIGTERM)
    assert wait_for(lambda: "once more stops at once" in job.output, job.alive)
    used.clear()
    assert wait_for(waits, job.alive), "the first signal has ended a process that waits"
    os.kill(first, signal.SIGTERM)
    told_s = time.monotonic()
    while (code := fork_server.poll(first)) is None and time.monotonic() < told_s + 10:
        time.sleep(0.001)
    print(f"\ngone {time.monotonic() - told_s:.3f} s after the second signal")
    os.kill(second, signal.SIGKILL)
    job.codes[0] = code
    assert job.wait() == [128 + signal.SIGTERM, -signal.SIGKILL]


def test_a_signal_ends_a_start_up_that_waits(fork_server, tiny, tmp_path):
    """The weights to start from are a pipe into which nobody writes, so the start-up would never end."""
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    argv = [value for value in train_argv(tiny, tmp_path / "run") if not value.startswith("model.config")]
    job = fork_server.start("train", [*argv, f"model.path={tmp_path}/model"])
    lock = tmp_path / "run" / run_folder.LOCK
    assert wait_for(lambda: lock.exists() and lock.read_bytes().endswith(b"\n"), job.alive), job.output
    job.kill(signal.SIGTERM)
    assert job.wait(20) == [preemption.EXIT_CODE], job.output
    assert "SIGTERM: stopped in start-up, with nothing to save" in job.output
    assert json.loads((tmp_path / "run" / preemption.MARKER).read_text()) == {"step": 0, "reason": "SIGTERM"}


def test_stop_at_step_leaves_the_schedule_and_the_next_start_ends_alike(fork_server, tiny, tmp_path):
    assert fork_server.run("train", train_argv(tiny, tmp_path / "unbroken")).codes == [0]
    argv = train_argv(tiny, tmp_path / "run")
    for step in (7, 10):
        job = fork_server.run("train", [*argv, f"training.stop_at_step={step}"])
        assert job.codes == [preemption.EXIT_CODE], job.output
        marker = json.loads((tmp_path / "run" / preemption.MARKER).read_text())
        assert marker == {"step": step, "reason": "training.stop_at_step"}
        assert "Raise or remove training.stop_at_step to go on." in job.output
        assert run_folder.steps_saved(tmp_path / "run")[0] == step
        lines = metrics_of(tmp_path / "run")
        assert lines == metrics_of(tmp_path / "unbroken")[: len(lines)]
        assert lines[-1]["step"] == step
    assert fork_server.run("train", argv).codes == [0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "unbroken")
    assert not (tmp_path / "run" / preemption.MARKER).exists()


# --- through the launchers, as true processes -----------------------------------------------------------------------

LAUNCHERS = {
    "accelerate": ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml"],
    "accelerate-2": ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"],
    "torchrun-2": ["torchrun", "--standalone", "--nproc_per_node", "2"],
}
SIGNALLED = ("SIGTERM to the launcher", "SIGINT to the group", "SIGKILL of the launcher", "SIGTERM to one worker")
IN_THE_SUITE = {("accelerate", "SIGINT to the group"), ("torchrun-2", "SIGKILL of the launcher")}
GRACE_S = 30  # torchrun kills after this


def processes_of(run_dir: Path) -> set[int]:
    """Every process that has the run folder on its command line, zombies left out."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(run_dir) in (path / "cmdline").read_bytes():
                found.add(int(path.name))
        except OSError:
            continue  # it has ended
    return found


def launches() -> list:
    """Every launcher with every way to end it, at the first step and in start-up; those of the suite are not slow."""
    found = []
    for launcher in LAUNCHERS:
        for signalled in (*SIGNALLED, "SIGTERM to all"):
            for moment in ("loop", "start"):
                short = moment == "loop" and (launcher, signalled) in IN_THE_SUITE
                marks = [] if short else [pytest.mark.slow]
                name = f"{launcher}-{signalled}-{moment}".replace(" ", "_")
                found.append(
                    pytest.param(launcher, signalled, moment, id=name, marks=[*marks, pytest.mark.distributed])
                )
    return found


@pytest.mark.parametrize(("launcher", "signalled", "moment"), launches())
def test_a_launched_run_stops_and_goes_on(fork_server, tiny, tmp_path, launcher, signalled, moment):
    """No process is left, the marker tells it, no checkpoint is damaged, and the next start goes on."""
    run_dir, num_processes = tmp_path / "run", 2 if launcher.endswith("-2") else 1
    argv = train_argv(tiny, run_dir, "training.max_steps=2000", "evaluation.every_steps=1000")
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if launcher == "torchrun-2" else {}
    log = open(tmp_path / "log", "wb")  # noqa: SIM115  the launched processes write into it
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], "scripts/train.py", *argv],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:

        def is_there() -> bool:
            if moment == "loop":
                return last_step(run_dir) >= 4
            workers = processes_of(run_dir) - {process.pid}
            time.sleep(0.05)
            return len(workers) == num_processes and all(hears(pid) for pid in workers)

        assert wait_for(is_there, lambda: process.poll() is None), (tmp_path / "log").read_text()
        workers = sorted(processes_of(run_dir) - {process.pid})
        assert len(workers) == num_processes
        for pid in workers:  # by these a run knows that a launcher started it
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert any(v.startswith(f"{n}=".encode()) for n in preemption.LAUNCHER_VARIABLES for v in variables)
        told_s = time.monotonic()
        if signalled == "SIGINT to the group":
            os.killpg(process.pid, signal.SIGINT)
        elif signalled == "SIGTERM to one worker":
            os.kill(workers[-1], signal.SIGTERM)
        elif signalled == "SIGTERM to all":
            for pid in (*workers, process.pid):
                os.kill(pid, signal.SIGTERM)
        else:
            process.send_signal(getattr(signal, signalled.split()[0]))
        while processes_of(run_dir) and time.monotonic() < told_s + GRACE_S + 10:
            process.poll()
            time.sleep(0.05)
        gone_s = time.monotonic() - told_s
        assert not processes_of(run_dir), f"left behind after {gone_s:.0f} s\n{(tmp_path / 'log').read_text()}"
    finally:
        log.close()
        for pid in processes_of(run_dir):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)
    print(f"\n{launcher}, {signalled}, in {moment}: gone after {gone_s:.1f} s")
    assert gone_s < GRACE_S
    assert process.returncode != 0
    marker = json.loads((run_dir / preemption.MARKER).read_text())
    steps = run_folder.steps_saved(run_dir)
    assert marker["step"] == (steps[0] if steps else 0)
    damaged = []
    run_folder.newest_whole(run_dir, lambda path, problems: damaged.append(path))
    assert damaged == []
    assert not [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    job = fork_server.run("train", [*argv, f"training.stop_at_step={marker['step'] + 2}"])
    assert job.codes == [preemption.EXIT_CODE], job.output
    assert re.search(f"^(resume|start) .*step {marker['step']}$", job.output, re.MULTILINE)
    assert run_folder.steps_saved(run_dir)[0] == marker["step"] + 2
