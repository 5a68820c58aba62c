"""An evaluation struck at its Nth file-changing call goes on to the report of one that was left alone."""

import json
from pathlib import Path

import faults
import pytest
from conftest import ForkServer

from codex_accel import manifest

pytestmark = pytest.mark.skipif(faults.library() is None, reason=faults.SKIP_REASON)
DISKS = ("ENOSPC_once", "EIO_once", "ENOSPC")


def argv_of(chain: Path, output_dir: Path) -> list[str]:
    return [f"checkpoint={chain}/run", f"output_dir={output_dir}", "batch_size=96", "num_resamples=50"]


@pytest.fixture(scope="module")
def undisturbed(fork_server, chain, tmp_path_factory) -> tuple[str, int]:
    """Content digest of the report, and the number of file-changing calls."""
    root = tmp_path_factory.mktemp("undisturbed")
    fault = {"root": str(root), "mode": "count", "at": 1, "report": f"{root}.calls"}
    job = fork_server.run("evaluate", argv_of(chain, root / "r"), fault=fault)
    assert job.codes == [0], job.output
    return content_digest(root / "r"), len(faults.calls_of(Path(f"{root}.calls")))


def content_digest(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["content_digest"]


def strike(server: ForkServer, chain: Path, root: Path, *, mode: str, at: int) -> tuple[int, str]:
    """Exit code and output of an evaluation that is struck, after which whatever stands under its name is whole."""
    root.mkdir()
    fault = {"root": str(root), "mode": mode, "at": at, "report": f"{root}.calls"}
    job = server.run("evaluate", argv_of(chain, root / "r"), fault=fault)
    assert any(call.hit for call in faults.calls_of(Path(f"{root}.calls")))
    if (root / "r").exists():
        assert manifest.problems_of(root / "r") == []
    return job.codes[0], job.output


def go_on(server: ForkServer, chain: Path, root: Path, wanted: str) -> None:
    """The same command again ends in the wanted report, and leaves nothing else."""
    if not (root / "r").exists():
        job = server.run("evaluate", argv_of(chain, root / "r"))
        assert job.codes == [0], job.output
    assert content_digest(root / "r") == wanted


def places(num_calls: int, step: int) -> list[int]:
    return list(range(1, num_calls + 1, step))


def sweep(server: ForkServer, chain: Path, folder: Path, undisturbed: tuple[str, int], *, mode: str, step: int) -> int:
    wanted, num_calls = undisturbed
    for at in places(num_calls, step):
        code, output = strike(server, chain, folder / str(at), mode=mode, at=at)
        if mode in DISKS:
            assert code in (0, 2), output
            assert code == 0 or "Traceback" not in output, output
        go_on(server, chain, folder / str(at), wanted)
    return len(places(num_calls, step))


@pytest.mark.parametrize("mode", ["kill", "torn", "power_names"])
def test_a_struck_evaluation_goes_on_to_the_same_report(fork_server, chain, tmp_path, undisturbed, mode):
    assert sweep(fork_server, chain, tmp_path, undisturbed, mode=mode, step=17) >= 3


@pytest.mark.parametrize("mode", DISKS)
def test_a_failing_disk_is_told_and_nothing_is_lost(fork_server, chain, tmp_path, undisturbed, mode):
    assert sweep(fork_server, chain, tmp_path, undisturbed, mode=mode, step=23) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "torn", "power", "power_names", "EDQUOT_once", *DISKS])
def test_an_evaluation_struck_at_any_call_goes_on(fork_server, chain, tmp_path, undisturbed, mode):
    assert sweep(fork_server, chain, tmp_path, undisturbed, mode=mode, step=1) > 30
