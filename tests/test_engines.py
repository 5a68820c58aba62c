"""Sharded states go through the same envelope as Accelerate's own.

What runs here: two gloo processes on the CPU, a tiny GPT-2 wrapped by torch's own `fully_shard` (FSDP2), AdamW over
DTensors, and torch.distributed.checkpoint (DCP) as the `write_state` and `read_state` of `checkpoint.save` and
`checkpoint.load`: each process writes its shards and hashes its share of the files, one manifest covers them all.

What does not run here: Accelerate's FSDP and DeepSpeed plugins, which it ignores on a CPU (DESIGN, section 10), and so
`accelerator.save_state` for those engines; `scripts/train.py` refuses such a launch config there
(tests/scripts/test_train.py). Nothing is shown about GPUs, NCCL, or a load on another number of processes.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, ForkServer

from codex_accel import manifest, run_folder

pytestmark = pytest.mark.distributed
DRIVER = ROOT / "tests" / "sharded.py"


def said(fork_server: ForkServer, *argv: object) -> dict:
    """What the driver says after running on two processes."""
    job = fork_server.run(DRIVER, [str(argument) for argument in argv], num_processes=2)
    assert job.codes == [0, 0], job.output
    return json.loads(next(line for line in job.output.splitlines() if line.startswith('{"digest"')))


@pytest.fixture(scope="module")
def saved(fork_server, tiny, tmp_path_factory) -> tuple[dict, Path]:
    """What the driver said on saving, and its run folder."""
    run_dir = tmp_path_factory.mktemp("sharded") / "run"
    return said(fork_server, "save", tiny / "tokenizer", run_dir), run_dir


def test_both_processes_hold_a_half_of_every_parameter(saved):
    """GPT-2 is FSDP2's class on both, and gloo joins them; Accelerate itself takes this for plain DDP on a CPU."""
    document, _ = saved
    assert len(document["processes"]) == 2
    for facts in document["processes"]:
        assert facts["num_processes"] == 2
        assert facts["backend"] == "gloo"
        assert facts["engine"] == "MULTI_CPU"
        assert facts["wrapped"] == "FSDPModule"
        assert facts["all_sharded"]
        assert facts["local_share"] == pytest.approx(0.5, abs=0.01)


def test_one_manifest_covers_the_shards_of_both(saved):
    _, run_dir = saved
    folder = run_folder.checkpoint_path(run_dir, 1)
    names = [resource["name"] for resource in manifest.read(folder)["resources"]]
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "trainer_state.json", "config.json"} <= set(names)
    assert manifest.problems_of(folder) == []
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest.read(folder)["facts"]["num_processes"] == 2


def test_fresh_processes_go_on_bit_for_bit(fork_server, tiny, saved):
    """Other weights and moments before the load; then all of them equal, and so are the next loss and what follows."""
    before, run_dir = saved
    after = said(fork_server, "load", tiny / "tokenizer", run_dir)
    for key in ("digest", "next_loss", "next_digest"):
        assert after[key] == before[key]


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_flipped_bit_in_a_shard_is_found(saved, tmp_path, name):
    _, run_dir = saved
    folder = Path(shutil.copytree(run_folder.checkpoint_path(run_dir, 1), tmp_path / "copy"))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    problems = manifest.problems_of(folder)
    assert any(f"{name}: has changed" in problem for problem in problems), problems


def test_a_disk_that_is_full_for_one_process_ends_the_save_of_both(fork_server, tiny, tmp_path):
    """Each says whose disk it was, none waits for the other, and nothing is left."""
    job = fork_server.run(DRIVER, ["refuse", str(tiny / "tokenizer"), str(tmp_path / "run")], num_processes=2)
    assert job.codes == [2, 2], job.output
    told = [line for line in job.output.splitlines() if "was not saved" in line]
    assert len(told) == 2
    assert all("step-000000001: was not saved (process 1: No space left on device). It needs" in line for line in told)
    assert list((tmp_path / "run" / run_folder.CHECKPOINTS).iterdir()) == []
