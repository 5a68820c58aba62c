"""A warm process that has imported everything and forks a child for each run of a script: 0.1 s instead of 8 s a start.

Reads one JSON object a line from standard input: {"script", "argv", "env", "log", "phase", "cwd"} forks a child that
runs the script's main and answers {"pid"}; {"poll": pid} answers {"status"}, null while it runs (a negative number is a
signal). The child notes in the file `phase` what it is doing (step, save, prune, evaluate, start), for trials that ask
where they hit.
"""

import functools
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

from codex_accel import offline

os.environ["OMP_NUM_THREADS"] = "1"  # the parent must not start a thread pool: a fork does not inherit threads
offline.enforce(allow_network=False)

# ruff: noqa: E402
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

from codex_accel import checkpoint, cli, evaluation, generation, packing, provenance, run  # noqa: F401

provenance.collect()


def note_phases(path: str) -> None:
    """Write the name of the current phase into `path` whenever it changes."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)

    def mark(name: str) -> None:
        os.pwrite(descriptor, name.ljust(16).encode(), 0)

    def around(module: object, name: str, phase: str) -> None:
        function = getattr(module, name)

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            mark(phase)
            try:
                return function(*args, **kwargs)
            finally:
                mark("step")

        setattr(module, name, wrapped)

    mark("start")
    around(checkpoint, "save", "save")
    around(checkpoint, "prune", "prune")
    around(evaluation, "score", "evaluate")
    around(packing.Blocks, "batch", "step")


def child(job: dict) -> int:
    os.environ.update(job["env"])
    if job.get("cwd"):
        os.chdir(job["cwd"])
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if job.get("phase"):
        note_phases(job["phase"])
    spec = importlib.util.spec_from_file_location(Path(job["script"]).stem, job["script"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        cli.run(functools.partial(module.main, job["argv"]))
    except SystemExit as error:
        return int(error.code or 0)


def main() -> None:
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            pid, status = os.waitpid(job["poll"], os.WNOHANG)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status) if pid else None}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
