"""One run at a time works in a folder, and whoever comes second is told who that is."""

import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, code_of, fork, train_argv

from codex_accel import run_folder
from codex_accel.errors import UserError


class Owner:
    """A process that holds a folder until it is told to go on, or killed."""

    def __init__(self, run_dir: Path):
        readable, writable = os.pipe()
        self._wait, self.release = os.pipe()
        self.pid = fork(lambda: self._hold(run_dir, writable))
        os.close(writable)
        self.has_it = os.read(readable, 1) == b"h"
        os.close(readable)
        os.close(self._wait)

    def _hold(self, run_dir: Path, writable: int) -> None:
        os.close(self.release)
        with run_folder.held(run_dir):
            os.write(writable, b"h")
            os.read(self._wait, 1)

    def end(self, number: int | None = None) -> int:
        if number is not None:
            os.kill(self.pid, number)
        os.close(self.release)
        return code_of(self.pid)


@pytest.fixture
def owner(tmp_path):
    owner = Owner(tmp_path)
    yield owner
    owner.end(signal.SIGKILL)


def refusal(run_dir: Path) -> str:
    with pytest.raises(UserError) as caught, run_folder.held(run_dir):
        raise AssertionError("two runs hold one folder")
    return str(caught.value)


def test_the_second_is_told_host_process_and_start(owner, tmp_path):
    before = datetime.datetime.now(datetime.UTC)
    line = refusal(tmp_path)
    assert f"process {owner.pid} on host {socket.gethostname()} works in it since " in line
    since = datetime.datetime.fromisoformat(re.search(r"since (\S+)\. ", line).group(1))
    assert datetime.timedelta(0) <= before - since < datetime.timedelta(minutes=1)


def test_a_folder_is_free_when_its_owner_has_ended(tmp_path):
    with run_folder.held(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), run_folder.held(tmp_path):
        raise ZeroDivisionError
    with run_folder.held(tmp_path):
        pass


def test_a_killed_owner_leaves_the_folder_free_at_once(tmp_path):
    assert Owner(tmp_path).end(signal.SIGKILL) == -signal.SIGKILL
    with run_folder.held(tmp_path):
        pass


def test_the_message_names_the_true_owner_after_a_takeover(tmp_path):
    first = Owner(tmp_path)
    first.end(signal.SIGKILL)
    second = Owner(tmp_path)
    assert f"process {second.pid} on" in refusal(tmp_path)
    second.end()


def test_a_dead_owner_is_not_named_while_the_new_one_has_not_written_yet(owner, tmp_path):
    """The new owner has the lock, but its record is still that of the one before, which has died."""
    dead = fork(lambda: None)
    assert code_of(dead) == 0
    record = {"host": socket.gethostname(), "process": dead, "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / run_folder.LOCK).write_text(json.dumps(record))
    assert "another process works in it." in refusal(tmp_path)


@pytest.mark.parametrize(
    "record", [b"", b"[]", b'{"host": 1}', b'{"host": "h", "process": 1e400, "since": 1}', b"\xff", b"[" * 100_000]
)
def test_a_record_that_is_none_still_refuses(owner, tmp_path, monkeypatch, record):
    monkeypatch.setattr(run_folder, "OWNER_LOOKS", 1)
    (tmp_path / run_folder.LOCK).write_bytes(record)
    assert "another process works in it." in refusal(tmp_path)


def test_a_deleted_lock_file_lets_nobody_in(owner, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "OWNER_LOOKS", 1)
    (tmp_path / run_folder.LOCK).unlink()
    assert "another process works in it." in refusal(tmp_path)


def test_the_lock_file_alone_keeps_the_second_out(owner, tmp_path, monkeypatch):
    """NFS refuses locks on a folder."""
    monkeypatch.setattr(run_folder, "_lock_folder", lambda run_dir, locks: None)
    assert f"process {owner.pid} on" in refusal(tmp_path)


def round_of_starts(root: Path, draws: random.Random) -> tuple[int, int]:
    """Two to eight starts at one moment on one folder; (owners in turn, starts refused). Two at a time is an error.

    An owner proves that it is alone by a file which must not exist; in some rounds the lock file is deleted meanwhile,
    or owners are killed. A killed owner's file is removed by its killer, once the process is gone.
    """
    run_dir, proof = root / "run", root / "proof"
    run_dir.mkdir(parents=True)
    ready, go = os.pipe()
    deletes, kills = draws.random() < 0.3, draws.random() < 0.3
    num_owners = root / "owners"

    def start(work_s: float) -> None:
        os.close(go)
        os.read(ready, 1)  # the gate: all go on when it is closed
        with run_folder.held(run_dir):
            os.close(os.open(proof, os.O_CREAT | os.O_EXCL))  # FileExistsError, code 1: two owners
            with open(num_owners, "a") as stream:
                stream.write(f"{os.getpid()}\n")
            deadline = time.monotonic() + work_s
            while time.monotonic() < deadline:
                if deletes:
                    (run_dir / run_folder.LOCK).unlink(missing_ok=True)
            if kills:
                proof.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            proof.unlink()

    starts = [fork(lambda: start(draws.uniform(0, 0.01))) for _ in range(draws.randint(2, 8))]
    os.close(ready)
    os.close(go)
    codes = [code_of(pid) for pid in starts]
    owners = num_owners.read_text().split()
    assert set(codes) <= {0, 2, -signal.SIGKILL}, f"two owners: {codes}"
    assert len(owners) == sum(code != 2 for code in codes) > 0, codes
    assert not proof.exists()
    return len(owners), codes.count(2)


@pytest.mark.parametrize("num_rounds", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_of_simultaneous_starts_one_at_a_time_owns_the_folder(tmp_path, monkeypatch, num_rounds):
    monkeypatch.setattr(run_folder, "OWNER_LOOK_S", 0.001)
    draws = random.Random(9)
    rounds = [round_of_starts(tmp_path / str(number), draws) for number in range(num_rounds)]
    owners, refused = (sum(values) for values in zip(*rounds, strict=True))
    print(f"\n{num_rounds} rounds: {owners} starts owned in turn, {refused} were refused, 0 double owners")
    assert refused >= num_rounds  # the starts did meet


def script(*argv: str) -> tuple[float, subprocess.CompletedProcess]:
    """Seconds that the real scripts/train.py took, and what it said."""
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return time.monotonic() - started, done


def test_the_second_run_stops_within_two_seconds(owner, tiny, tmp_path):
    seconds, done = min(script(*train_argv(tiny, tmp_path)) for _ in range(3))
    assert done.returncode == 2
    assert f"process {owner.pid} on host {socket.gethostname()} works in it since" in done.stderr
    assert done.stderr.count("\n") == 1
    print(f"\nthe second start stopped after {seconds:.2f} s")
    assert seconds < 2


# --- a folder that cannot be written --------------------------------------------------------------------------------


@pytest.fixture(params=["below a file", "read-only mount", "proc", "sys"])
def unwritable(request, tmp_path):
    """A folder in which nothing can be made."""
    if request.param == "below a file":
        (tmp_path / "file").write_text("in the way")
        yield tmp_path / "file" / "run"
    elif request.param == "read-only mount":
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not possible here")
        yield tmp_path / "run"
        subprocess.run(["umount", str(tmp_path)], check=True)
    else:
        place = Path("/", request.param)
        if not place.is_mount():
            pytest.skip(f"{place} is not a mounted pseudo file system here")
        yield place / "codex" / "run"


def test_a_folder_that_cannot_be_written_is_refused(unwritable):
    with pytest.raises(UserError, match="cannot be written") as caught:
        run_folder.make(unwritable)
    assert str(caught.value).startswith(f"output_dir = '{unwritable}': ")


def test_a_folder_of_another_user_is_refused(tmp_path):
    tmp_path.chmod(0o500)

    def make() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # mode bits do not hold back root
        run_folder.make(tmp_path / "run")

    assert code_of(fork(make)) == 2
    assert not (tmp_path / "run").exists()


def test_it_is_refused_before_anything_heavy_is_imported(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    program = "import sys, runpy; main = runpy.run_path(sys.argv[1])['main']\n"
    program += "try: main(sys.argv[2:])\nexcept Exception as error: print(error, 'torch' in sys.modules)"
    argv = [str(ROOT / "scripts" / "train.py"), *train_argv(tiny, tmp_path / "file" / "run")]
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=60)
    assert "cannot be written (Not a directory). Choose another folder. False" in done.stdout, done.stderr


def test_a_missing_folder_is_made_with_its_parents(tmp_path):
    run_folder.make(tmp_path / "a" / "b" / "run")
    assert list((tmp_path / "a" / "b" / "run" / run_folder.CHECKPOINTS).iterdir()) == []


# --- which checkpoint is the newest whole one ----------------------------------------------------------------------


def test_names_decide_which_steps_are_saved(tmp_path):
    for name in ("step-000000003", "step-000000012", "damaged-step-000000020", ".tmp-step-000000030-7", "step-4"):
        (tmp_path / run_folder.CHECKPOINTS / name).mkdir(parents=True)
    assert run_folder.steps_saved(tmp_path) == [12, 3]


def test_a_damaged_checkpoint_loses_its_name_once_a_whole_one_is_found(chain, tmp_path):
    shutil.copytree(chain / "run" / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    newest = run_folder.checkpoint_path(tmp_path, 4)
    (newest / "model.safetensors").write_bytes(b"")
    told = []
    found = run_folder.newest_whole(tmp_path, lambda path, problems: told.append((path, problems)))
    assert found == run_folder.checkpoint_path(tmp_path, 3)
    assert [path for path, _ in told] == [newest]
    assert run_folder.steps_saved(tmp_path) == [3]
    assert (newest.parent / "damaged-step-000000004").is_dir()


def test_if_none_is_whole_all_keep_their_names(chain, tmp_path):
    shutil.copytree(chain / "run" / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    for step in (3, 4):
        (run_folder.checkpoint_path(tmp_path, step) / "model.safetensors").write_bytes(b"")
    told = []
    assert run_folder.newest_whole(tmp_path, lambda path, problems: told.append(path)) is None
    assert len(told) == 2
    assert run_folder.steps_saved(tmp_path) == [4, 3]
