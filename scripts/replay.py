"""Make a checkpoint again from the one before it, and compare: proof that this data and code gave these weights.

examples:
  python scripts/replay.py runs/quickstart/train/checkpoints/step-000002400
  python scripts/replay.py runs/quickstart/train/checkpoints/step-000002400 --start scratch

Trains the steps in between with the settings, the data and the number of processes and threads that the checkpoint
records. Exit code 0 if weights and optimizer state are equal to the bit, 1 if not: then the first step whose loss
differs is printed, and what is different about this machine.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codex_accel import cli, events, manifest, offline, run_folder
from codex_accel.errors import UserError
from codex_accel.schema import ReplayConfig

TRAIN = Path(__file__).with_name("train.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the replay; returns the exit code."""
    config = cli.parse(ReplayConfig, argv, doc=__doc__, stage="replay", positional=["checkpoint"])
    offline.enforce(allow_network=config.allow_network)
    path = Path(config.checkpoint).resolve()
    document = manifest.require(path, kinds=["checkpoint"], verify=config.verify, key="checkpoint")
    step, start = document["facts"]["step"], _start(config, path, document)
    first = manifest.read(start)["facts"]["step"] if start else 0
    if first >= step:
        what = f"'{start}' is at step {first}, not before step {step}. Take an older one, or scratch."
        raise UserError(config.problem("start", what))
    print(f"replay  step {first} to {step}, from {start or 'the first step'}", flush=True)

    run_dir = path.parent.parent
    with tempfile.TemporaryDirectory(prefix=".tmp-replay-", dir=run_dir.parent) as folder:
        replayed_dir = Path(config.output_dir or folder)
        overrides = _overrides(path, document) | {
            "output_dir": str(replayed_dir),
            "resume": str(start) if start else "never",
            "training.stop_at_step": str(step),
            "training.max_time_s": "null",
            "evaluation.every_steps": "null",
            "checkpoint": "{every_steps: null}",
        }
        command = [*_launcher(document["facts"]), str(TRAIN), "--config", str(path / manifest.CONFIG)]
        command += [f"{key}={value}" for key, value in overrides.items()]
        environment = os.environ | {"OMP_NUM_THREADS": str(document["facts"]["num_threads"])}
        if document["facts"]["device"] == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        code = subprocess.run(command, env=environment, check=False).returncode
        again = run_folder.checkpoint_path(replayed_dir, step)
        if not again.is_dir():
            raise UserError(f"{replayed_dir}: the replay ended with exit code {code} before step {step}. See above.")
        return _compare(
            path, document, again, losses=[_losses(folder, first, step) for folder in (run_dir, replayed_dir)]
        )


def _start(config: ReplayConfig, path: Path, document: dict[str, Any]) -> Path | None:
    """The whole checkpoint to start from: of this run, or of the run that it is a branch of; None for step 0."""
    if config.start == "scratch":
        return None
    if config.start != "auto":
        start = Path(config.start)
        manifest.require(start, kinds=["checkpoint"], verify=config.verify, key="start")
        return start.resolve()
    run_dir, step = path.parent.parent, document["facts"]["step"]
    older = [run_folder.checkpoint_path(run_dir, saved) for saved in run_folder.steps_saved(run_dir) if saved < step]
    branched = [_resolved(path, parent) for parent in document["parents"] if parent["kind"] == "checkpoint"]
    return next((folder for folder in [*older, *branched] if not manifest.problems_of(folder)), None)


def _resolved(path: Path, parent: dict[str, Any]) -> Path:
    return Path(os.path.normpath(path / parent["path"]))


def _overrides(path: Path, document: dict[str, Any]) -> dict[str, str]:
    """Where this machine has what the checkpoint was made from, and the precision that its launcher chose."""
    identity = json.loads((path / "trainer_state.json").read_bytes())["identity"]
    paths = {"data.dataset": str(_resolved(path, document["parents"][0]))}
    if document["config"]["model"]["path"] is not None:
        paths["model.path"] = str(_resolved(path, document["parents"][2]))  # after dataset and tokenizer
    return paths | {"training.mixed_precision": f"'{identity['mixed_precision']}'"}


def _launcher(facts: dict[str, Any]) -> list[str]:
    if facts["num_processes"] == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={facts['num_processes']}"]


def _losses(run_dir: Path, first: int, last: int) -> dict[int, float]:
    """Training loss of each logged step after `first` and up to `last`."""
    try:
        lines = [json.loads(line.text) for line in events.read(run_dir / run_folder.METRICS)]
    except FileNotFoundError:
        return {}
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train" and first < line["step"] <= last}


def _compare(path: Path, document: dict[str, Any], again: Path, *, losses: list[dict[int, float]]) -> int:
    """Print whether the two checkpoints are equal; returns the exit code."""
    made = manifest.read(again)
    then, now = losses
    common = sorted(set(then) & set(now))
    print(f"losses  {len(common)} logged steps compared" if common else "losses  none to compare: no metrics beside it")
    differing = [step for step in common if then[step] != now[step]]
    if differing:
        step = differing[0]
        print(f"differs first at step {step}: loss {then[step]!r} then, {now[step]!r} now")
    files = {r["name"]: r["digest"] for r in document["resources"] if r["payload"]}
    files_now = {r["name"]: r["digest"] for r in made["resources"] if r["payload"]}
    for name in sorted(set(files) | set(files_now)):
        if files.get(name) != files_now.get(name):
            print(f"differs {name}: sha256 {files.get(name, '-')[:12]} then, {files_now.get(name, '-')[:12]} now")
    if files == files_now and not differing:
        print(f"equal   {path}\ncontent {document['content_digest']}")
        return 0
    for line in _changed_surroundings(document, made):
        print(f"        {line}")
    return 1


def _changed_surroundings(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is another thing here than where the checkpoint was made, of what may change the numbers."""

    def facts(document: dict[str, Any]) -> dict[str, Any]:
        about = document["provenance"]
        packages = {name: about["packages"].get(name) for name in ("torch", "transformers", "accelerate", "numpy")}
        named = {key: document["facts"].get(key) for key in ("num_processes", "num_threads", "engine", "device")}
        return {"python": about["python"], "processor": about["hardware"]["processor"], **packages, **named} | {
            "code": about["code_version"],
            "git": about["git"],
        }

    old, new = facts(then), facts(now)
    lines = [f"{key}: {old[key]} then, {new[key]} now" for key in old if old[key] != new[key]]
    return lines or ["code, packages, processor, processes and threads are the same"]


if __name__ == "__main__":
    cli.run(main)
