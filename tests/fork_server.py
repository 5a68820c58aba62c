"""A warm process that has imported everything and forks a child for each run of a script: 0.1 s instead of 8 s a start.

Reads one JSON object a line from standard input: {"script", "argv", "env", "log", "phase", "trace", "cwd", "fault",
"clock_offset_s", "limits"} forks a child that runs the script's main and answers {"pid"}; {"poll": pid} answers
{"status"}, null while it runs (a negative number is a signal). The child notes in the file `phase` what it is doing
(start, step, accumulation, save, prune, evaluate), for trials that ask where they hit; in `trace` what it trains on.
"""

import functools
import importlib.util
import json
import os
import resource
import sys
import traceback
from pathlib import Path

from codex_accel import offline

os.environ.pop("LD_PRELOAD", None)  # tests/faults.py is for this process and its forks, not for what they start
os.environ["OMP_NUM_THREADS"] = "1"  # the parent must not start a thread pool: a fork does not inherit threads
offline.enforce(allow_network=False)

# ruff: noqa: E402
import faults
import peft  # noqa: F401
import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from accelerate import Accelerator

from codex_accel import (  # noqa: F401
    admission,
    checkpoint,
    cli,
    evaluation,
    generation,
    loss,
    packing,
    provenance,
    retention,
    run,
    seeds,
    server,
    service,
)

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
    around(retention, "prune", "prune")
    around(evaluation, "score", "evaluate")
    around(packing.Blocks, "batch", "step")
    # the first micro-batch has its loss, and the gradients of the window have not met
    sum_of_losses, clip_grad_norm = loss.sum_of_losses, Accelerator.clip_grad_norm_

    def then_accumulates(*args, **kwargs):
        result = sum_of_losses(*args, **kwargs)
        mark("accumulation")
        return result

    def ends_accumulation(*args, **kwargs):
        mark("step")
        return clip_grad_norm(*args, **kwargs)

    loss.sum_of_losses, Accelerator.clip_grad_norm_ = then_accumulates, ends_accumulation


def trace_micro_batches(path: str) -> None:
    """Append a line to `path` for each micro-batch that goes into the model.

    {"step", "number" (of the micro-batch in its step, over all processes), "indices" (of its blocks), "num_processes",
    "backend" (of torch.distributed, null without it)}.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    fetch, derive, to_device = packing.Blocks.batch, seeds.derive, run.to_device
    fetched: dict[int, tuple[packing.Batch, list[int]]] = {}
    current: dict[str, int] = {}

    def batch(blocks, indices):
        result = fetch(blocks, indices)
        fetched[id(result)] = (result, indices.tolist())
        return result

    def derived(seed, *names):
        if names[0] == "dropout":
            current.update(step=names[1], number=names[2])
        return derive(seed, *names)

    def moved(batch, device):
        joined = torch.distributed.is_initialized()
        line = {
            **current,
            "indices": fetched.pop(id(batch))[1],
            "num_processes": torch.distributed.get_world_size() if joined else 1,
            "backend": torch.distributed.get_backend() if joined else None,
        }
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        return to_device(batch, device)

    packing.Blocks.batch, seeds.derive, run.to_device = batch, derived, moved


def make_trouble(job: dict) -> None:
    """What the job asks for: limits of the process, another time of day, a fault at the Nth file-changing call."""
    for name, value in job.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if job.get("clock_offset_s"):
        faults.move_clock(job["clock_offset_s"])
    if job.get("fault"):
        faults.arm(**job["fault"])


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
    if job.get("trace"):
        trace_micro_batches(job["trace"])
    spec = importlib.util.spec_from_file_location(Path(job["script"]).stem, job["script"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make_trouble(job)
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
