"""A save that is killed, cut off from power or refused by the disk at any file-changing call loses nothing.

The sweeps go over the calls that tests/fault_shim.c counts: the short forms over every so many, the slow forms over all
of them, and print their figures.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
from conftest import TIMES, train_argv

from codex_accel import files, manifest, run_folder

SAVER = Path(__file__).with_name("saver.py")
OLDEST, OLD, NEW = 3, 5, 7  # steps: two checkpoints stand, the third is being saved
YEAR_S = 365 * 24 * 3600

needs_shim = pytest.mark.skipif(faults.library() is None, reason=faults.SKIP_REASON)


@dataclass
class Bench:
    """A run folder to copy for each trial, and what a start must find at each step."""

    server: object
    tokenizer: Path
    folder: Path
    digests: dict[int, str]

    def start_save(self, run_dir: Path, *options: str, step: int = NEW, **job):
        argv = ["save", str(self.tokenizer), str(run_dir), str(step), *options]
        return self.server.start(SAVER, argv, **job)

    def fresh(self, run_dir: Path) -> Path:
        return Path(shutil.copytree(self.folder, run_dir, symlinks=True))

    def start_start(self, run_dir: Path, **job):
        return self.server.start(SAVER, ["start", str(self.tokenizer), str(run_dir)], **job)

    def problems(self, job, run_dir: Path, steps: Iterable[int]) -> list[str]:
        """What is wrong after the start `job`: it must load one of `steps` bit for bit and leave only whole folders."""
        if job.wait() != [0]:
            return [f"the start ended with {job.codes}: {job.output[-600:]}"]
        found = json.loads(job.output.splitlines()[-1])
        problems = [f"damaged: {line}" for line in found["damaged"]]
        if found["step"] not in steps:
            problems.append(f"step {found['step']} was loaded")
        elif found["digest"] != self.digests[found["step"]]:
            problems.append(f"a mix was loaded as step {found['step']}")
        elif not found["metrics"]:
            problems.append(f"metrics.ndjson is shorter than at step {found['step']}")
        for folder in (run_dir, run_dir / run_folder.CHECKPOINTS):
            names = [p.name for p in folder.iterdir()]
            left = [n for n in names if n.startswith((files.TEMPORARY_PREFIX, files.TRASH_PREFIX))]
            problems += [f"{name} is left" for name in left]
        for step in run_folder.steps_saved(run_dir):
            problems += manifest.problems_of(run_folder.checkpoint_path(run_dir, step))
        return problems


@pytest.fixture(scope="module")
def bench(tiny, fork_server, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    bench = Bench(fork_server, tiny / "tokenizer", folder / "run", {})
    for step in (OLDEST, OLD, NEW):
        run_dir = bench.folder if step < NEW else bench.fresh(folder / "after")
        assert bench.start_save(run_dir, step=step).wait() == [0]
        job = bench.start_start(run_dir)
        assert job.wait() == [0], job.output
        found = json.loads(job.output)
        assert found["step"] == step
        bench.digests[step] = found["digest"]
    assert len(set(bench.digests.values())) == 3
    return bench


def fault(run_dir: Path, mode: str, at: int = 0) -> dict[str, object]:
    return {"root": str(run_dir), "mode": mode, "at": at, "report": str(run_dir.with_suffix(".report"))}


def calls_of(run_dir: Path) -> list[faults.Call]:
    return faults.calls_of(run_dir.with_suffix(".report"))


def count_calls(bench: Bench, root: Path, *options: str) -> list[faults.Call]:
    """The file-changing calls of a save that nothing disturbs."""
    run_dir = bench.fresh(root / "counted")
    job = bench.start_save(run_dir, *options, fault=fault(run_dir, "count"))
    assert job.wait() == [0], job.output
    return calls_of(run_dir)


def every(stride: int, calls: list[faults.Call], first: int = 1) -> list[int]:
    """Every `stride`th call and the one after the last, at which nothing strikes any more."""
    return [*range(first, len(calls) + 1, stride), len(calls) + 1]


def in_pairs(points: Iterable[int], begin: Callable, end: Callable) -> None:
    """Do begin(point), then end(point, its value) for all points, two at a time."""
    points = list(points)
    for i in range(0, len(points), 2):
        begun = [(point, begin(point)) for point in points[i : i + 2]]
        for point, value in begun:
            end(point, value)


def sweep(
    bench: Bench, root: Path, mode: str, points: Iterable[int], *options: str, stop_at_first: bool = False
) -> list[str]:
    """Strike a save at each point, then start; returns a line for each point after which the start is wrong."""
    bad = []
    last = max(points)

    def save(at: int):
        run_dir = bench.fresh(root / f"{mode}-{at}")
        return run_dir, bench.start_save(run_dir, *options, fault=fault(run_dir, mode, at))

    def start(at: int, saved: tuple) -> None:
        run_dir, job = saved
        assert job.wait() == [0 if at == last else -9], job.output
        hit = [call for call in calls_of(run_dir) if call.hit]
        assert len(hit) == (at != last), f"point {at} of {mode} was not reached"
        problems = bench.problems(bench.start_start(run_dir), run_dir, (OLD, NEW) if hit else (NEW,))
        bad.extend(f"{mode} at {hit[0] if hit else 'the end'}: {problem}" for problem in problems[:1])
        for path in (run_dir, Path(f"{run_dir}.lost")):
            shutil.rmtree(path, ignore_errors=True)

    points = list(points)
    for i in range(0, len(points), 2):
        in_pairs(points[i : i + 2], save, start)
        if bad and stop_at_first:
            break
    return bad


def tell(what: str, bad: list[str], num_points: int) -> None:
    print(f"\n{what}: {len(bad)} bad of {num_points} points")
    assert bad == []


# --- promise 1: SIGKILL -------------------------------------------------------------------------------------------


@needs_shim
@pytest.mark.parametrize("keep_last", ["1", "2"])
def test_killed_save_leaves_the_old_or_the_new_checkpoint(bench, tmp_path, keep_last):
    calls = count_calls(bench, tmp_path, "--keep-last", keep_last)
    points = every(8, calls, first=3 * int(keep_last))
    bad = sweep(bench, tmp_path, "kill", points, "--keep-last", keep_last)
    tell(f"SIGKILL of a save, keep_last {keep_last}", bad, len(points))


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("keep_last", ["1", "2"])
@pytest.mark.parametrize("mode", ["kill", "torn", "power", "power_names"])
def test_save_struck_at_every_call_leaves_the_old_or_the_new_checkpoint(bench, tmp_path, mode, keep_last):
    points = every(1, count_calls(bench, tmp_path, "--keep-last", keep_last))
    bad = sweep(bench, tmp_path, mode, points, "--keep-last", keep_last)
    tell(f"{mode} of a save at every call, keep_last {keep_last}", bad, len(points))


@needs_shim
def test_save_killed_in_the_middle_of_a_write_leaves_the_old_checkpoint(bench, tmp_path):
    calls = count_calls(bench, tmp_path)
    writes = [call.number for call in calls if call.name in ("write", "writev", "sendfile")]
    points = [*writes[::5], len(calls) + 1]
    tell("SIGKILL in the middle of a write", sweep(bench, tmp_path, "torn", points), len(points))


def starts_killed(bench: Bench, root: Path, *, save_stride: int, start_stride: int) -> tuple[list[str], int]:
    """Kill a save, kill the start after it at each of its own calls, start again; returns (bad, number of points)."""
    bad, num_points = [], 0
    calls = count_calls(bench, root, "--keep-last", "1")
    for at in range(6, len(calls) + 1, save_stride):
        left = bench.fresh(root / f"left-{at}")
        assert bench.start_save(left, "--keep-last", "1", fault=fault(left, "kill", at)).wait() == [-9]
        counted = Path(shutil.copytree(left, root / f"counted-{at}", symlinks=True))
        assert bench.start_start(counted, fault=fault(counted, "count")).wait() == [0]

        def kill(n: int, left: Path = left, at: int = at):
            run_dir = Path(shutil.copytree(left, root / f"start-{at}-{n}", symlinks=True))
            return run_dir, bench.start_start(run_dir, fault=fault(run_dir, "kill", n))

        def again(n: int, killed: tuple, at: int = at) -> None:
            run_dir, job = killed
            assert job.wait() == [-9], job.output
            problems = bench.problems(bench.start_start(run_dir), run_dir, (OLD, NEW))
            bad.extend(f"save killed at {at}, start at {n}: {problem}" for problem in problems)
            shutil.rmtree(run_dir)

        points = range(1, len(calls_of(counted)) + 1, start_stride)
        num_points += len(points)
        in_pairs(points, kill, again)
    return bad, num_points


@needs_shim
def test_start_killed_in_its_own_sweep_is_made_good_by_the_next(bench, tmp_path):
    bad, num_points = starts_killed(bench, tmp_path, save_stride=33, start_stride=5)
    assert num_points > 3
    tell("SIGKILL of the start after a killed save", bad, num_points)


@pytest.mark.slow
@needs_shim
def test_start_killed_at_every_call_is_made_good_by_the_next(bench, tmp_path):
    bad, num_points = starts_killed(bench, tmp_path, save_stride=5, start_stride=1)
    tell("SIGKILL of the start after a killed save, every call", bad, num_points)


def portable_kills(bench: Bench, root: Path, *, first: int, stride: int) -> tuple[list[str], int]:
    bad, at, codes = [], first, [-9]
    num_points = 0
    while codes == [-9]:
        run_dir = bench.fresh(root / f"portable-{at}")
        codes = bench.start_save(run_dir, "--keep-last", "1", "--kill-at", str(at)).wait()
        problems = bench.problems(bench.start_start(run_dir), run_dir, (OLD, NEW) if codes == [-9] else (NEW,))
        bad += [f"call {at} from Python: {problem}" for problem in problems]
        num_points, at = num_points + 1, at + stride
        shutil.rmtree(run_dir)
    assert codes == [0]
    return bad, num_points


def test_killed_save_loses_nothing_without_a_compiler_too(bench, tmp_path):
    """The calls that are seen by patching Python: fewer, but on any system."""
    bad, num_points = portable_kills(bench, tmp_path, first=2, stride=8)
    assert num_points > 5
    tell("SIGKILL of a save, patched Python", bad, num_points)


@pytest.mark.slow
def test_killed_save_loses_nothing_at_every_call_from_python(bench, tmp_path):
    tell("SIGKILL of a save, patched Python, every call", *portable_kills(bench, tmp_path, first=1, stride=1))


# --- promise 2: power loss ----------------------------------------------------------------------------------------


@needs_shim
@pytest.mark.parametrize(("mode", "first"), [("power", 3), ("power_names", 6)])
def test_power_cut_in_a_save_leaves_the_old_or_the_new_checkpoint(bench, tmp_path, mode, first):
    points = every(8, count_calls(bench, tmp_path, "--keep-last", "1"), first)
    tell(f"{mode} in a save", sweep(bench, tmp_path, mode, points, "--keep-last", "1"), len(points))


def points_before_the_end(bench: Bench, root: Path, *options: str) -> list[int]:
    """From the last call backwards, where a careless saver has lost most; the end itself is not a point to strike."""
    calls = count_calls(bench, root, *options)
    return [*range(len(calls), 0, -3), len(calls) + 1]


@needs_shim
@pytest.mark.parametrize(
    ("mode", "without"), [("power", "fsync"), ("power_names", "fsync"), ("power_names", "folder_fsync")]
)
def test_power_cut_catches_a_saver_without_fsync(bench, tmp_path, mode, without):
    """So the sweep above can fail: with os.fsync patched away, a start finds cut or half-deleted folders."""
    options = ("--keep-last", "1", "--without", without)
    points = points_before_the_end(bench, tmp_path, *options)
    assert sweep(bench, tmp_path, mode, points, *options, stop_at_first=True) != []


@needs_shim
def test_kill_catches_a_saver_without_rename(bench, tmp_path):
    """With folders filled under their final names, a start finds one that is not whole."""
    options = ("--keep-last", "2", "--without", "rename")
    calls = count_calls(bench, tmp_path, *options)
    inside = [
        call.number for call in calls if f"step-{NEW:09d}/" in call.path and call.path.startswith("checkpoints/st")
    ]
    points = [inside[len(inside) // 2], len(calls) + 1]
    assert sweep(bench, tmp_path, "kill", points, *options, stop_at_first=True) != []


# --- promise 3: the disk refuses ----------------------------------------------------------------------------------


def problems_of_refusal(bench: Bench, job, run_dir: Path) -> list[str]:
    """What is wrong with a save that the disk refused.

    Exit 2 and a message with path and bytes, and the old checkpoint stands; or, where it was only the deletion of an
    older one that was refused, exit 0, a message with the path, and the new one stands.
    """
    code = job.wait()[0]
    problems = [f"exit {code}"] if code not in (0, 2) else []
    if "Traceback" in job.output:
        problems.append(f"a traceback ending in {job.output.splitlines()[-1]!r}")
    if f"{run_dir}/" not in job.output:
        problems.append(f"the message names no path: {job.output!r}")
    if code == 2 and not re.search(r"needs about [\d,]+ bytes", job.output):
        problems.append(f"the message names no bytes: {job.output!r}")
    return problems + bench.problems(bench.start_start(run_dir), run_dir, (NEW,) if code == 0 else (OLD, NEW))


def refusals(bench: Bench, root: Path, mode: str, points: Iterable[int]) -> list[str]:
    """Refuse a save from each point on (or only there); returns a line for each point at which something is wrong."""
    bad = []

    def save(at: int):
        run_dir = bench.fresh(root / f"{mode}-{at}")
        return run_dir, bench.start_save(run_dir, "--keep-last", "1", fault=fault(run_dir, mode, at))

    def start(at: int, saved: tuple) -> None:
        run_dir, job = saved
        job.wait()
        hit = [call for call in calls_of(run_dir) if call.hit]
        if job.codes == [0] and run_folder.steps_saved(run_dir) == [NEW]:
            # saved and pruned in spite of it: a log line that waited, a copy made another way, the link for people
            problems = bench.problems(bench.start_start(run_dir), run_dir, (NEW,))
        else:
            problems = problems_of_refusal(bench, job, run_dir)
        if problems:
            bad.append(f"{mode} at {hit[0] if hit else 'no call'}: {'; '.join(problems)}")
        shutil.rmtree(run_dir)

    in_pairs(points, save, start)
    return bad


def points_of_refusal(bench: Bench, root: Path, stride: int, first: int) -> list[int]:
    """From the line of metrics before the save; opening the logs, the calls before it, is no part of it."""
    calls = count_calls(bench, root, "--keep-last", "1")
    begin = next(call.number for call in calls if (call.name, call.path) == ("write", run_folder.METRICS))
    return every(stride, calls, begin + first)


@needs_shim
@pytest.mark.parametrize(("mode", "first"), [("ENOSPC", 0), ("EIO", 3), ("EROFS", 6), ("ENOSPC_once", 9)])
def test_refused_save_says_why_and_the_old_checkpoint_stands(bench, tmp_path, mode, first):
    points = points_of_refusal(bench, tmp_path, 13, first)
    tell(f"{mode} in a save", refusals(bench, tmp_path, mode, points), len(points))


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("mode", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "ENOSPC_once", "EIO_once"])
def test_save_refused_at_every_call_says_why_and_the_old_checkpoint_stands(bench, tmp_path, mode):
    points = points_of_refusal(bench, tmp_path, 1, 0)
    tell(f"{mode} in a save, every call", refusals(bench, tmp_path, mode, points), len(points))


@pytest.mark.parametrize("limit", [4096, 20000, 40000])
def test_file_size_limit_says_why_and_the_old_checkpoint_stands(bench, tmp_path, limit):
    """RLIMIT_FSIZE below the manifest, the weights and the optimizer."""
    run_dir = bench.fresh(tmp_path / "run")
    job = bench.start_save(run_dir, limits={"RLIMIT_FSIZE": limit})
    assert problems_of_refusal(bench, job, run_dir) == []


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of so many bytes (and inodes) and returns its folder; unmounted at the end."""
    mounted = []

    def mount(size_bytes: int, num_inodes: int = 0) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = f"size={size_bytes},nr_inodes={num_inodes}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", str(folder)], check=True)


def size_on_tmpfs(folder: Path) -> int:
    """Bytes that the files of `folder` take in whole pages."""
    return sum(-(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def fill_disks(bench: Bench, small_disk: Callable, spaces: Iterable[int]) -> tuple[list[str], int]:
    """Save with so many bytes free; returns what is wrong and how many saves were refused."""
    bad, num_refused = [], 0
    used = size_on_tmpfs(bench.folder)
    for free in spaces:
        run_dir = bench.fresh(small_disk(used + free) / "run")
        job = bench.start_save(run_dir, "--keep-last", "1", "--without", "look")
        if job.wait() == [0]:
            problems = bench.problems(bench.start_start(run_dir), run_dir, (NEW,))
        else:
            num_refused += 1
            problems = problems_of_refusal(bench, job, run_dir)
        bad += [f"{free} bytes free: {'; '.join(problems)}"] if problems else []
    return bad, num_refused


def test_full_disk_says_why_and_the_old_checkpoint_stands(bench, small_disk):
    """A real small disk that fills up in the save: 0 to 192 KiB free, of the 150 KiB that a checkpoint takes."""
    spaces = range(0, 200_000, 48 * 1024)
    bad, num_refused = fill_disks(bench, small_disk, spaces)
    assert 0 < num_refused < len(spaces)
    tell("a full tmpfs", bad, len(spaces))


@needs_shim
def test_free_space_is_looked_at_before_the_save(bench, small_disk):
    """On a disk with room for half of it, nothing is written: the bytes needed and free are told."""
    run_dir = bench.fresh(small_disk(size_on_tmpfs(bench.folder) + (1 << 19)) / "run")
    job = bench.start_save(run_dir, "--keep-last", "1", fault=fault(run_dir, "count"))
    assert problems_of_refusal(bench, job, run_dir) == []
    assert job.codes == [2]
    assert not [call for call in calls_of(run_dir) if ".tmp-step" in call.path and call.name != "mkdir"]


@pytest.mark.slow
def test_disk_that_is_full_anywhere_says_why_and_the_old_checkpoint_stands(bench, small_disk):
    spaces = range(0, 200_000, 4096)
    bad, num_refused = fill_disks(bench, small_disk, spaces)
    assert 0 < num_refused < len(spaces)
    tell("a full tmpfs, page by page", bad, len(spaces))


def test_disk_without_inodes_says_why_and_the_old_checkpoint_stands(bench, small_disk):
    """Bytes are free, but no file can be made."""
    num_there = sum(1 for _ in bench.folder.rglob("*")) + 2
    run_dir = bench.fresh(small_disk(1 << 24, num_there + 5) / "run")
    job = bench.start_save(run_dir, "--keep-last", "1")
    assert problems_of_refusal(bench, job, run_dir) == []


# --- the whole train.py -------------------------------------------------------------------------------------------


Unbroken = tuple[list[faults.Call], tuple[str, list[dict]]]


def small_train(tiny: Path, run_dir: Path, *more: str) -> list[str]:
    """Six steps with dropout, accumulation, evaluation, saves and pruning."""
    overrides = ("training.max_steps=6", "schedule.warmup=2", "checkpoint={every_steps: 2, keep_last: 1}")
    return train_argv(tiny, run_dir, *overrides, "evaluation.every_steps=3", "evaluation.max_windows=8", *more)


def outcome(run_dir: Path) -> tuple[str, list[dict]]:
    """Digest of the weights, and the lines of all files of the log without the fields that depend on the clock."""
    log = b"".join(
        path.read_bytes() for path in [*sorted(run_dir.glob("metrics.*.ndjson")), run_dir / "metrics.ndjson"]
    )
    lines = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in log.splitlines()]
    return files.sha256_file(run_dir / "final" / "model.safetensors"), lines


def run_unbroken(fork_server, tiny: Path, root: Path, *more: str) -> Unbroken:
    """The file-changing calls of a run that nothing disturbs, and its outcome."""
    root.mkdir()
    job = fork_server.run("train", small_train(tiny, root / "run", *more), fault=fault(root, "count"))
    assert job.codes == [0], job.output
    return calls_of(root), outcome(root / "run")


@pytest.fixture(scope="module")
def unbroken(tiny, fork_server, tmp_path_factory) -> Unbroken:
    return run_unbroken(fork_server, tiny, tmp_path_factory.mktemp("unbroken") / "root")


def train_struck(
    fork_server, tiny: Path, root: Path, unbroken: Unbroken, mode: str, points: Iterable[int], *more: str
) -> list[str]:
    """Strike train.py at each point, start it again; returns a line for each point that ends in another outcome."""
    _, expected = unbroken
    bad = []

    def strike(at: int):
        folder = root / f"train-{mode}-{at}"
        folder.mkdir()
        argv = small_train(tiny, folder / "run", *more)
        return folder, fork_server.start("train", argv, fault=fault(folder, mode, at))

    def go_on(at: int, struck: tuple) -> None:
        folder, job = struck
        assert job.wait() == [-9], job.output
        hit = calls_of(folder)[-1]
        job = fork_server.run("train", small_train(tiny, folder / "run", *more))
        if job.codes != [0]:
            bad.append(f"{mode} at {hit}: the next start ended with {job.codes}: {job.output[-600:]}")
        elif outcome(folder / "run") != expected:
            bad.append(f"{mode} at {hit}: the next start ended in another outcome")
        shutil.rmtree(folder)

    in_pairs(points, strike, go_on)
    return bad


@needs_shim
def test_train_killed_at_any_call_ends_as_if_it_had_not_been(fork_server, tiny, tmp_path, unbroken):
    points = range(7, len(unbroken[0]) + 1, len(unbroken[0]) // 9)
    tell("SIGKILL of train.py", train_struck(fork_server, tiny, tmp_path, unbroken, "kill", points), len(points))


def train_refused(
    fork_server, tiny: Path, root: Path, unbroken: Unbroken, mode: str, policy: str, points: Iterable[int], *more: str
) -> list[str]:
    """Let the disk refuse from each point on, or once; returns a line for each point that is not told or not made good.

    A run with `go_on` may end well all by itself; any other must end with one line, and the next start as if unbroken.
    """
    _, expected = unbroken
    bad = []

    def strike(at: int):
        folder = root / f"train-{mode}-{policy}-{at}"
        folder.mkdir()
        argv = [*small_train(tiny, folder / "run", *more), f"checkpoint.on_failed_save={policy}"]
        return folder, argv, fork_server.start("train", argv, fault=fault(folder, mode, at))

    def go_on(at: int, struck: tuple) -> None:
        folder, argv, job = struck
        codes, told = job.wait(), job.output
        if codes not in ([0], [2]) or "Traceback" in told or str(folder) not in told:
            bad.append(f"{mode} at {calls_of(folder)[-1]}, {policy}: {codes} {told[-600:]}")
        job = fork_server.run("train", argv)
        if job.codes != [0] or outcome(folder / "run") != expected:
            bad.append(f"{mode} at {calls_of(folder)[-1]}, {policy}: the next start {job.codes} {job.output[-600:]}")
        shutil.rmtree(folder)

    in_pairs(points, strike, go_on)
    return bad


def in_the_loop(unbroken: Unbroken) -> int:
    """The first call after the start-up: the first line of metrics."""
    return next(n for n, call in enumerate(unbroken[0], 1) if call.name == "write" and "metrics" in call.path)


@needs_shim
@pytest.mark.parametrize(("mode", "policy"), [("ENOSPC", "stop"), ("EIO_once", "stop"), ("ENOSPC_once", "go_on")])
def test_train_that_is_refused_says_so_and_ends_as_if_it_had_not_been(
    fork_server, tiny, tmp_path, unbroken, mode, policy
):
    first = in_the_loop(unbroken)
    points = range(first, len(unbroken[0]) + 1, (len(unbroken[0]) - first) // 4)
    bad = train_refused(fork_server, tiny, tmp_path, unbroken, mode, policy, points)
    tell(f"{mode} in train.py, on_failed_save={policy}", bad, len(points))


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("policy", ["stop", "go_on"])
@pytest.mark.parametrize("mode", ["ENOSPC", "EIO", "ENOSPC_once", "EIO_once"])
def test_train_refused_at_every_so_many_calls_ends_as_if_not(fork_server, tiny, tmp_path, unbroken, mode, policy):
    points = range(1, len(unbroken[0]) + 1, 7)
    bad = train_refused(fork_server, tiny, tmp_path, unbroken, mode, policy, points)
    tell(f"{mode} in train.py, every 7 calls, on_failed_save={policy}", bad, len(points))


ROTATING = "log.max_bytes=1024"  # of some 2 kB of metrics


@pytest.fixture(scope="module")
def rotated(tiny, fork_server, tmp_path_factory) -> Unbroken:
    """As `unbroken`, with numbered logs; their lines are the same."""
    return run_unbroken(fork_server, tiny, tmp_path_factory.mktemp("rotated") / "root", ROTATING)


def around_the_new_file(rotated: Unbroken) -> list[int]:
    """The calls that begin a second file of metrics, and some up to the save after it: a start cuts back to the first.

    fsync, rename, fsync of the folder, open, write; then the save, whose checkpoint counts both files.
    """
    [at] = [call.number for call in rotated[0] if call.name == "rename" and "metrics.0" in call.path]
    save = next(call.number for call in rotated[0][at:] if call.name == "rename" and "/step-" in call.path)
    return [*range(at - 1, at + 4), (at + save) // 2, save, save + 2]


@needs_shim
def test_a_log_of_several_files_holds_the_same_lines(unbroken, rotated):
    assert rotated[1] == unbroken[1]
    assert "run/metrics.000001.ndjson" in {call.path for call in rotated[0] if call.name == "rename"}


@needs_shim
@pytest.mark.parametrize("mode", ["kill", "power_names"])
def test_train_struck_while_a_log_gets_its_number_ends_as_if_not(fork_server, tiny, tmp_path, rotated, mode):
    points = around_the_new_file(rotated)[mode == "kill" :: 2]
    bad = train_struck(fork_server, tiny, tmp_path, rotated, mode, points, ROTATING)
    tell(f"{mode} of train.py with numbered logs", bad, len(points))


@needs_shim
def test_train_that_is_refused_the_new_file_of_a_log_ends_as_if_not(fork_server, tiny, tmp_path, rotated):
    points = around_the_new_file(rotated)[1:4:2]
    bad = train_refused(fork_server, tiny, tmp_path, rotated, "EIO", "stop", points, ROTATING)
    tell("EIO in train.py with numbered logs", bad, len(points))


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize(("mode", "stride"), [("kill", 3), ("torn", 13), ("power", 7), ("power_names", 7)])
def test_train_with_numbered_logs_struck_at_every_so_many_calls(fork_server, tiny, tmp_path, rotated, mode, stride):
    points = range(1, len(rotated[0]) + 1, stride)
    bad = train_struck(fork_server, tiny, tmp_path, rotated, mode, points, ROTATING)
    tell(f"{mode} of train.py with numbered logs, every {stride} of {len(rotated[0])} calls", bad, len(points))


@needs_shim
def test_power_cut_at_the_end_of_a_run_leaves_its_checkpoints(fork_server, tiny, tmp_path, unbroken):
    """All names on the way are safe: a new run folder does not vanish with what was saved in it."""
    root = tmp_path / "root"
    root.mkdir()
    job = fork_server.run("train", small_train(tiny, root / "run"), fault=fault(root, "power_names", len(unbroken[0])))
    assert job.codes == [-9], job.output
    assert run_folder.steps_saved(root / "run") == [6]


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize(("mode", "stride"), [("kill", 2), ("torn", 11), ("power", 5), ("power_names", 5)])
def test_train_struck_at_every_so_many_calls_ends_as_if_not(fork_server, tiny, tmp_path, unbroken, mode, stride):
    points = range(1, len(unbroken[0]) + 1, stride)
    bad = train_struck(fork_server, tiny, tmp_path, unbroken, mode, points)
    tell(f"{mode} of train.py, every {stride} of its {len(unbroken[0])} calls", bad, len(points))


@needs_shim
def test_clock_moved_back_and_forward_changes_nothing(fork_server, tiny, tmp_path, unbroken):
    """Killed, resumed a year ago, killed, resumed in a year: the newest checkpoint is the one of the highest step."""
    calls, expected = unbroken
    root = tmp_path / "root"
    root.mkdir()
    argv, at = small_train(tiny, root / "run"), len(calls) // 3
    assert fork_server.run("train", argv, fault=fault(root, "kill", at)).codes == [-9]
    job = fork_server.run("train", argv, fault=fault(root, "kill", at), clock_offset_s=-YEAR_S)
    assert job.codes == [-9], job.output
    job = fork_server.run("train", argv, clock_offset_s=YEAR_S)
    assert job.codes == [0], job.output
    assert "resume" in job.output
    assert outcome(root / "run") == expected
