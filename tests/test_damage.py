"""Every damage of a checkpoint is found before it is used, is named, and the next older checkpoint is taken."""

import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_script
from test_checkpoint import Run

from codex_accel import files, manifest, run_folder
from codex_accel.checkpoint import TRAINER_STATE, TrainerState

# As little as a checkpoint can be: 12 ids, one layer of width 2; some 28 kB, half of it the optimizer's archive.
TINIEST = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 2, "n_positions": 16}
STEPS = (1, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with two whole checkpoints, as small as they can be."""
    root, threads = tmp_path_factory.mktemp("damage"), torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "texts.jsonl").write_text('{"text": "abcdefgh"}\n')
    source = f"sources=[{{path: {root}/texts.jsonl}}]"
    run_script("train_tokenizer", f"output_dir={root}/tokenizer", source, "type=char")
    run = Run(root / "tokenizer", TINIEST)
    for step in STEPS:
        run.save(root / "run", TrainerState(step=step))
        assert manifest.problems_of(run_folder.checkpoint_path(root / "run", step)) == []
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    return root / "run"


@pytest.fixture
def run_dir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run", symlinks=True))


@dataclass(frozen=True)
class Damage:
    """A file of the newest checkpoint with one bit flipped, or cut to a length."""

    name: str
    bit: int | None = None
    length: int | None = None

    def do(self, folder: Path) -> Callable[[], None]:
        """Damage the file; returns what undoes it."""
        path = folder / self.name
        if self.bit is not None:
            flip(path, self.bit)
            return lambda: flip(path, self.bit)
        whole = path.read_bytes()
        os.truncate(path, self.length)

        def restore() -> None:
            path.write_bytes(whole)

        return restore


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b", buffering=0) as stream:
        [byte] = os.pread(stream.fileno(), 1, bit // 8)
        os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)


def sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in files.list_files(folder)}


def bits(folder: Path, *names: str) -> list[Damage]:
    """Every bit of these files, or of all."""
    return [Damage(name, bit=bit) for name, size in sizes(folder).items() if name in (names or [name])
            for bit in range(8 * size)]  # fmt: skip


def lengths(folder: Path, *names: str) -> list[Damage]:
    """Every length that is too short, of these files or of all."""
    return [Damage(name, length=length) for name, size in sizes(folder).items() if name in (names or [name])
            for length in range(size)]  # fmt: skip


def is_named(damage: Damage, problems: list[str], folder: Path) -> bool:
    """Whether the problems name the damaged file; two of them are lists, which name what does not agree with them."""
    text = "\n".join(problems)
    lists = (manifest.MANIFEST, manifest.SUMS)
    return f"{folder / damage.name}:" in text or (damage.name in lists and f" {damage.name}" in text)


def outcome(damage: Damage, folder: Path) -> str:
    """One of found, not named, undetected, by the check that each start makes; the folder is whole again after it."""
    undo = damage.do(folder)
    problems = manifest.problems_of(folder)
    undo()
    return "undetected" if not problems else "found" if is_named(damage, problems, folder) else "not named"


def step_back(damage: Damage, run_dir: Path) -> str:
    """As `outcome`, by all that a start does: the older one must be taken, and the damaged one set aside."""
    newest, older = (run_folder.checkpoint_path(run_dir, step) for step in sorted(STEPS, reverse=True))
    undo, told = damage.do(newest), {}
    chosen = run_folder.newest_whole(run_dir, lambda path, problems: told.update({path: problems}))
    aside = newest.with_name(f"{run_folder.DAMAGED_PREFIX}{newest.name}")
    right = chosen == older and list(told) == [newest] and aside.is_dir() and not newest.exists()
    if aside.exists():
        aside.rename(newest)
    undo()
    return "undetected" if not right else "found" if is_named(damage, told[newest], newest) else "not named"


def check_all(damages: list[Damage], run_dir: Path, *, step_back_every: int) -> Counter:
    """How many had which outcome; of each so many, one goes through all that a start does."""
    counts, folder = Counter(), run_folder.checkpoint_path(run_dir, max(STEPS))
    for number, damage in enumerate(damages):
        found = outcome(damage, folder) if number % step_back_every else step_back(damage, run_dir)
        counts[found] += 1
        assert found == "found" or counts.total() - counts["found"] < 20, f"{found}: {damage}, and 19 before it"
    assert manifest.problems_of(folder) == [], "the sweep has left damage of its own"
    return counts


def test_the_sweep_sees_a_check_that_is_blind(run_dir, monkeypatch):
    """Without hashes, a flipped bit of the weights would go unseen; the sweep must say so."""
    monkeypatch.setattr(manifest, "problems_of", manifest.problems_of_outline)
    folder = run_folder.checkpoint_path(run_dir, max(STEPS))
    weights = bits(folder, "model.safetensors")[-8:]
    assert (outcome(weights[0], folder), step_back(weights[0], run_dir)) == ("undetected", "undetected")
    with pytest.raises(AssertionError, match=r"undetected: Damage\(name='model\.safetensors'"):
        check_all(weights * 3, run_dir, step_back_every=100)


def test_damage_of_a_checkpoint_is_found_named_and_stepped_over(run_dir):
    """A bit of each byte of the trainer state, the lists and the config, and a sample of all others."""
    folder, draws = run_folder.checkpoint_path(run_dir, max(STEPS)), random.Random(0)
    damages = lengths(folder, TRAINER_STATE)
    for name in (TRAINER_STATE, manifest.SUMS, manifest.CONFIG):
        damages += [Damage(name, bit=8 * byte + draws.randrange(8)) for byte in range(sizes(folder)[name])]
    damages += draws.sample(bits(folder), 200) + draws.sample(lengths(folder), 100)
    draws.shuffle(damages)
    counts = check_all(damages, run_dir, step_back_every=50)
    assert counts == {"found": len(damages)}
    assert len(damages) > 2000


@pytest.mark.parametrize("name", [TRAINER_STATE, "model.safetensors", manifest.MANIFEST, manifest.SUMS])
def test_missing_file_of_a_checkpoint_is_named_and_stepped_over(run_dir, name):
    newest, older = (run_folder.checkpoint_path(run_dir, step) for step in (2, 1))
    (newest / name).unlink()
    told = []
    assert run_folder.newest_whole(run_dir, lambda path, problems: told.extend(problems)) == older
    assert any(f"{newest / name}: " in problem for problem in told)


def share(work: tuple[Path, Path, int, int]) -> Counter:
    """One process's share of all damages, on a copy of its own."""
    saved, root, number, total = work
    run_dir = Path(shutil.copytree(saved, root / str(number), symlinks=True))
    folder = run_folder.checkpoint_path(run_dir, max(STEPS))
    return check_all((bits(folder) + lengths(folder))[number::total], run_dir, step_back_every=100)


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one, for a million small writes."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    folder = Path("/dev/shm", f"codex-accel-damage-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_every_bit_and_every_length_of_a_checkpoint_is_found_and_named(saved, memory):
    """All by the check that every start makes; one of a hundred by all that a start does."""
    num_processes, started = os.cpu_count() or 1, time.monotonic()
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        work = [(saved, memory, number, num_processes) for number in range(num_processes)]
        counts = sum(pool.imap_unordered(share, work), Counter())
    size, seconds = sum(sizes(run_folder.checkpoint_path(saved, max(STEPS))).values()), time.monotonic() - started
    print(f"\n{counts['undetected']} undetected, {counts['not named']} not named of {counts.total():,} damages")
    print(f"all {8 * size:,} bits and all {size:,} lengths of {size:,} bytes, in {seconds:.0f} s")
    assert counts == {"found": 9 * size}
