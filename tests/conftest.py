"""Fixtures: real tiny artefacts made once by the scripts themselves, and the warm process that forks runs."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import hypothesis
import pytest

from codex_accel import redaction
from codex_accel.config import Safety
from codex_accel.errors import UserError

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # tiny models: a second thread costs more than it gives


def load_script(name: str):
    """The module of scripts/<name>.py, whose main(argv) runs in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *argv: object) -> int:
    """Run a stage in this process; returns its exit code."""
    return load_script(name).main([str(argument) for argument in argv])


@pytest.fixture(scope="session")
def chain(tiny, fork_server) -> Path:
    """`tiny` with a run trained on it and an evaluation of that: every kind of artefact in one folder."""
    argv = train_argv(tiny, tiny / "run", "training.max_steps=4", "evaluation.every_steps=null")
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    job = fork_server.run("evaluate", [f"checkpoint={tiny}/run", f"output_dir={tiny}/report", "batch_size=64"])
    assert job.codes == [0], job.output
    return tiny


@pytest.fixture(autouse=True)
def built_in_policy() -> Iterator[None]:
    """What a test lets hold for the process ends with it."""
    yield
    redaction.enforce(Safety())


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared/data; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with corpus, tokenizer and dataset, made from a few modules of the standard library."""
    root = tmp_path_factory.mktemp("tiny")
    run_script("quickstart_corpus", f"output_dir={root}/corpus", "max_modules=24")
    source = f"sources=[{{path: {root}/corpus/modules.jsonl}}]"
    run_script("train_tokenizer", f"output_dir={root}/tokenizer", source, "vocab_size=512")
    split = "split={method: exact, ratios: {train: 0.8, validation: 0.1, test: 0.1}}"
    tokenizer = f"tokenizer={root}/tokenizer"
    run_script("prepare_data", f"output_dir={root}/dataset", tokenizer, source, split)
    return root


def train_argv(tiny: Path, output_dir: Path, *overrides: str) -> list[str]:
    """Arguments of a small training run with dropout, accumulation, evaluation, saving and pruning."""
    return [
        f"output_dir={output_dir}",
        f"data={{dataset: {tiny}/dataset, block_size: 32}}",
        "model.config={model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 32, resid_pdrop: 0.1, "
        "embd_pdrop: 0.1, attn_pdrop: 0.1}",
        "training={micro_batch_size: 2, global_batch_size: 8, max_steps: 30, mixed_precision: 'no'}",
        "optimizer={learning_rate: 3e-3}",
        "schedule={warmup: 4}",
        "evaluation={every_steps: 5, batch_size: 8, max_windows: 64}",
        "checkpoint={every_steps: 3, keep_last: 2}",
        "log={every_steps: 1}",
        *overrides,
    ]


class ForkServer:
    """Starts runs in forks of a warm process."""

    def __init__(self, log_dir: Path):
        self.log_dir = log_dir
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, cwd=ROOT, env=os.environ | faults.environment())
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, "the fork server has died"
        return json.loads(line)

    def _ask(self, job: dict) -> dict:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(
        self,
        script: str | Path,
        argv: list[str],
        *,
        num_processes: int = 1,
        phase: Path | None = None,
        trace: Path | None = None,
        cwd: Path = ROOT,
        environment: dict[str, str] | None = None,
        fault: dict | None = None,
        clock_offset_s: int = 0,
        limits: dict[str, int] | None = None,
    ) -> "Job":
        """Start a script (a stage's name, or a file) on so many processes, with gloo on the CPU if more than one.

        `fault` are the arguments of faults.arm, for the first process; `clock_offset_s` moves the clock of all, and
        `limits` are those of the resource module, as {"RLIMIT_FSIZE": bytes}. Process r notes what it is doing in
        `<phase>-r`, and what it trains on in `<trace>-r`.
        """
        path = script if isinstance(script, Path) else ROOT / "scripts" / f"{script}.py"
        environments: list[dict[str, str]] = [environment or {}]
        if num_processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
            environments = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_processes)]
        log = self.log_dir / f"{time.monotonic_ns()}.log"
        pids = []
        for rank, variables in enumerate(environments):
            job = {"script": str(path), "argv": argv, "env": variables, "log": str(log), "cwd": str(cwd)}
            job |= {name: f"{file}-{rank}" if file else None for name, file in (("phase", phase), ("trace", trace))}
            job |= {"clock_offset_s": clock_offset_s, "limits": limits or {}, "fault": None if rank else fault}
            pids.append(self._ask(job)["pid"])
        return Job(self, pids, log)

    def run(self, script: str | Path, argv: list[str], *, timeout_s: float = 90, **options) -> "Job":
        """Start and wait."""
        job = self.start(script, argv, **options)
        job.wait(timeout_s)
        return job

    def poll(self, pid: int) -> int | None:
        return self._ask({"poll": pid})["status"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


class Job:
    """One run: its processes and what they printed."""

    def __init__(self, server: ForkServer, pids: list[int], log: Path):
        self.server, self.pids, self.log = server, pids, log
        self.codes: list[int | None] = [None] * len(pids)

    def wait(self, timeout_s: float = 90) -> list[int]:
        """Exit codes of all processes, negative for a signal; kills the rest once one has failed, as launchers do."""
        deadline = time.monotonic() + timeout_s
        while None in self.codes:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    self.codes[rank] = self.server.poll(pid)
            if any(self.codes) and None in self.codes:
                deadline = min(deadline, time.monotonic() + 5)
            if time.monotonic() > deadline and None in self.codes:
                self.kill()
                assert any(self.codes), f"still running after {timeout_s} s\n{self.output}"
            time.sleep(0.005)
        return self.codes

    def kill(self, number: int = signal.SIGKILL) -> None:
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                os.kill(pid, number)

    def alive(self) -> bool:
        """Whether every process still runs (a zombie does not)."""
        try:
            states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in self.pids]
        except OSError:
            return False
        return "Z" not in states

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""  # the child makes it


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


TIMES = ("tokens_per_s", "elapsed_s")


def metrics_of(run_dir: Path) -> list[dict]:
    """Lines of metrics.ndjson without the fields that depend on the clock."""
    lines = (run_dir / "metrics.ndjson").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def fork(function: Callable[[], object]) -> int:
    """Start `function` in a child, which ends with code 0, 2 for a UserError, or 1; returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except UserError:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
