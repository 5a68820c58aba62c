"""A training run's folder: where its checkpoints lie, which of them is whole, and who works in it.

Rule: one run at a time holds a folder. A folder named `step-N` is a checkpoint of this run; one that has been found
damaged loses that name, so that nothing counts it again.
"""

import contextlib
import datetime
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from codex_accel import files, manifest
from codex_accel.errors import UserError

CHECKPOINTS, METRICS, EVENTS, FINAL, LOCK = "checkpoints", "metrics.ndjson", "events.ndjson", "final", ".lock"
DAMAGED_PREFIX = "damaged-"
OWNER_LOOKS, OWNER_LOOK_S = 10, 0.1  # for the name of the run that holds a folder
NAME = re.compile(r"step-(\d{9})")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return run_dir / CHECKPOINTS / f"step-{step:09d}"


def steps_saved(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first; the names decide, not their contents."""
    found = (NAME.fullmatch(path.name) for path in (run_dir / CHECKPOINTS).glob("step-*"))
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def is_own(checkpoint_dir: Path, run_dir: Path) -> bool:
    """Whether a checkpoint lies in this run's folder."""
    return checkpoint_dir.resolve().parent == (run_dir / CHECKPOINTS).resolve()


def recorded_parents(run_dir: Path) -> list[str]:
    """Manifest digests of what the run in the folder was made from, as run.json says; none if it says nothing."""
    return [record["manifest_digest"] for record in _records(run_dir)]


def recorded_start(run_dir: Path) -> str | None:
    """The checkpoint of another run that the run in the folder is a branch of, as run.json says; None if of none."""
    return next((record["path"] for record in _records(run_dir) if record["kind"] == "checkpoint"), None)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads((run_dir / "run.json").read_bytes())["parents"]
        return [{key: record.get(key) for key in ("kind", "path", "manifest_digest")} for record in records]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def newest_whole(run_dir: Path, on_damaged: Callable[[Path, list[str]], None]) -> Path | None:
    """The newest checkpoint whose manifest verifies; each damaged one before it is told to `on_damaged`.

    If one is found, the damaged ones become `damaged-step-N`: they would count among the newest to keep otherwise, in
    the place of whole ones. If none is, all stay as they are.
    """
    damaged: list[Path] = []
    for step in steps_saved(run_dir):
        path = checkpoint_path(run_dir, step)
        if not (problems := manifest.problems_of(path)):
            for other in damaged:
                _set_aside(other)
            if damaged:
                point_latest(path)
            return path
        on_damaged(path, problems)
        damaged.append(path)
    return None


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
    if aside.exists():
        files.remove_folder(aside)
    os.rename(path, aside)
    files.fsync_path(path.parent)


def point_latest(path: Path) -> None:
    """Let the link `latest` lead to this checkpoint, if the disk takes it: for people, nothing here reads it."""
    link = path.with_name(f"{files.TEMPORARY_PREFIX}latest-{os.getpid()}")
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name("latest"))


def make(run_dir: Path) -> None:
    """Make the folder, or raise UserError before anything expensive if it cannot be written to."""
    probe = run_dir / CHECKPOINTS / f"{files.TEMPORARY_PREFIX}probe-{os.getpid()}"
    try:
        new = [folder for folder in run_dir.absolute().parents if not folder.exists()]
        probe.parent.mkdir(parents=True, exist_ok=True)
        files.write_durable(probe, b"x")
        probe.unlink(missing_ok=True)  # the run that holds the folder may have swept it
        for folder in (run_dir, run_dir.absolute().parent, *(folder.parent for folder in new)):
            with contextlib.suppress(PermissionError):  # a parent that may be entered but not read
                files.fsync_path(folder)  # or a power cut takes the run with its name
    except OSError as error:
        raise UserError(
            f"output_dir = '{run_dir}': cannot be written ({error.strerror}). Choose another folder."
        ) from error


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the folder for the time of the block; the lock of an owner that has died is free at once (flock).

    Raises: UserError naming host, process and start of the run that holds it.
    """
    with contextlib.ExitStack() as locks:
        _lock_folder(run_dir, locks)
        descriptor = _lock_file(run_dir, locks)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}).encode() + b"\n"
        os.pwrite(descriptor, owner, 0)
        os.ftruncate(descriptor, len(owner))
        yield


def _lock_folder(run_dir: Path, locks: contextlib.ExitStack) -> None:
    """Lock the folder itself, so that nobody gets in when somebody deletes the lock file.

    NFS has no locks on folders. The lock file is all that there is then; whatever else is wrong shows there, next.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(run_dir, os.O_RDONLY)
        locks.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held_by_another(run_dir) from error


def _lock_file(run_dir: Path, locks: contextlib.ExitStack) -> int:
    """Lock `.lock`, in which the owner's name stands; returns its descriptor."""
    path = run_dir / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            locks.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held_by_another(run_dir) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be locked ({error.strerror}). Choose a folder on another disk.") from error
        with contextlib.suppress(FileNotFoundError):  # removed in between: lock the one that has the name
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor


def _held_by_another(run_dir: Path) -> UserError:
    return UserError(f"output_dir = '{run_dir}': {_owner(run_dir / LOCK)} Wait for it, or choose another folder.")


def _owner(path: Path) -> str:
    """Who holds the folder, in a sentence; a name is believed once its process is seen, as a new owner writes late."""
    for _ in range(OWNER_LOOKS):
        time.sleep(OWNER_LOOK_S)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            owner = json.loads(path.read_bytes())
            process, host, since = int(owner["process"]), owner["host"], owner["since"]
            if host != socket.gethostname() or _is_alive(process):
                return f"process {process} on host {host} works in it since {since}."
    return "another process works in it."


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True
