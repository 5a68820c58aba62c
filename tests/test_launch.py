"""The launch configs: each is launched here, or, where it needs CUDA, refused by our own line under what it sets.

What accelerate launch would set is made by accelerate's own code from the file, so a key that it does not know, or no
longer reads, is found. FSDP2 runs here too, with gloo, where Accelerate is made to take it. What a GPU does with these
files is in tests/test_gpu.py.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ROOT, metrics_of, train_argv

from codex_accel import cli, preemption, processes
from codex_accel.errors import UserError
from codex_accel.train_schema import TrainConfig
from codex_accel.yaml_reader import read_yaml

BIN = Path(sys.executable).parent
FOLDER = ROOT / "accelerate_configs"
LAUNCH_CONFIGS = sorted(FOLDER.glob("*.yaml"))
NEEDS_CUDA = ("deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu", "single_gpu")
SHORT = ("training.max_steps=3", "evaluation.every_steps=null", "checkpoint.every_steps=null")
TIMEOUT_S = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(command: list[object], log: Path, **variables: str) -> subprocess.Popen:
    """A true process of a true launcher; it must be waited for.

    What we print goes to `log`; errors, and what torch and its launchers have to say, to `errors_of(log)`.
    """
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | variables
    with open(log, "wb") as output, open(errors_of(log), "wb") as errors:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=output, stderr=errors)


def errors_of(log: Path) -> Path:
    return log.with_name(f"{log.name}-errors")


def whole(*logs: Path) -> str:
    """All that was said, to be shown where a launch failed."""
    return "\n".join(path.read_text() for log in logs for path in (log, errors_of(log)))


def ended(launched: list[subprocess.Popen]) -> list[int]:
    """Exit codes; none of them is left if one hangs."""
    try:
        return [process.wait(TIMEOUT_S) for process in launched]
    finally:
        for process in launched:
            process.terminate()


def set_by_launch(name: str) -> dict[str, str]:
    """The variables that `accelerate launch` sets for the processes under this launch config."""
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), "scripts/train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(args)[1]
    else:
        found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if os.environ.get(name) != value and name != "PYTHONPATH"}


# --- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_a_launch_config_shows_its_command_and_what_it_needs(path):
    head = re.match(r"(?:#.*\n)+", path.read_text()).group()
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in head
    assert ("Needs CUDA" in head) == (path.stem in NEEDS_CUDA)


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_every_key_of_a_launch_config(path):
    """`accelerate launch` sets keys of the sections as arguments of its own parser, which knows them all."""
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "scripts/train.py"])
    )
    document = read_yaml(path)[0]
    for section in ("fsdp_config", "deepspeed_config"):
        known = vars(launch_command_parser().parse_args(["scripts/train.py"]))
        assert set(document.get(section, {})) <= set(known), section
    assert args.num_processes == document["num_processes"]
    assert defaults.distributed_type.value == document["distributed_type"]


# --- engines that need CUDA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
        ("deepspeed_zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("deepspeed_zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ],
)
def test_an_engine_that_needs_cuda_is_refused_without_it(fork_server, tiny, tmp_path, name, expected):
    """One line that names the variable and a way out, where Accelerate would train by DDP, or end in a traceback."""
    variables = set_by_launch(name)
    assert expected.items() <= variables.items()
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", *SHORT), environment=variables)
    assert job.codes == [2], job.output
    [error] = [line for line in job.output.splitlines() if line.startswith("error")]
    [variable] = [variable for variable in expected if variable.startswith("ACCELERATE_USE_")]
    assert f"environment: {variable} = true: " in error
    assert "choose another launch config." in error
    assert "Traceback" not in job.output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_true_launch_of_it_is_refused_too(tiny, tmp_path, name):
    """By us; or, without deepspeed, by `accelerate launch` itself, before any process of ours starts."""
    launch = ["accelerate", "launch", "--config_file", FOLDER / f"{name}.yaml", "--num_processes", 1]
    log = tmp_path / "log"
    [code] = ended([started([*launch, "scripts/train.py", *train_argv(tiny, tmp_path / "run", *SHORT)], log)])
    assert code != 0
    told = "ACCELERATE_USE_FSDP = true: asks for FSDP" if name == "fsdp2" else "DeepSpeed is not installed"
    assert told in errors_of(log).read_text()


# --- FSDP2, forced on a CPU -----------------------------------------------------------------------------------------

LLAMA = "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
LLAMA += "num_attention_heads: 2, max_position_embeddings: 32, tie_word_embeddings: true}"
STEPS = ("training.max_steps=6", "evaluation={every_steps: 3, max_windows: 20}", "checkpoint.every_steps=2")


def sharded(fork_server, argv: list[str], *, code: int = 0) -> str:
    """What a run of two processes under FSDP2 printed."""
    variables = {name: value for name, value in set_by_launch("fsdp2").items() if name.startswith(("FSDP", "ACCELER"))}
    driver = ROOT / "tests" / "forced_fsdp2.py"
    job = fork_server.run(driver, [json.dumps(variables), *argv], num_processes=2, timeout_s=60)
    assert job.codes == [code, code], job.output
    return job.output


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir)]


@pytest.mark.distributed
def test_fsdp2_trains_as_one_process_does_and_goes_on_exactly(fork_server, tiny, tmp_path):
    """With tied embeddings, accumulation, clipping, and an evaluation of three batches, which two cannot share."""
    job = fork_server.run("train", train_argv(tiny, tmp_path / "alone", LLAMA, *STEPS))
    assert job.codes == [0], job.output
    told = sharded(fork_server, train_argv(tiny, tmp_path / "whole", LLAMA, *STEPS))
    assert re.search(r"^engine  2 x cpu\S*, FSDP, mixed precision no", told, re.MULTILINE)
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-6)
    argv = train_argv(tiny, tmp_path / "broken", LLAMA, *STEPS)
    sharded(fork_server, [*argv, "training.stop_at_step=3"], code=preemption.EXIT_CODE)
    assert "resume" in sharded(fork_server, argv)
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "whole")
    final = Path("final", "model.safetensors")
    assert (tmp_path / "broken" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    told = fork_server.run("generate", [f"checkpoint={tmp_path}/whole", "max_new_tokens=2"])
    assert told.codes == [0], told.output


@pytest.mark.distributed
def test_fsdp2_in_bf16_does_not_round_a_loss_that_is_made_in_the_head(fork_server, tiny, tmp_path):
    """Accelerate's own policy does, to three digits (`processes.fit_engine`): 6e-4 of it here, instead of 1e-5."""
    more = ["training.mixed_precision=bf16", "training.loss_chunk_rows=16", *SHORT]
    job = fork_server.run("train", train_argv(tiny, tmp_path / "alone", LLAMA, *more))
    assert job.codes == [0], job.output
    sharded(fork_server, train_argv(tiny, tmp_path / "sharded", LLAMA, *more))
    assert losses_of(tmp_path / "sharded") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-4)


# --- DeepSpeed, as far as it goes without it ------------------------------------------------------------------------


def under_deepspeed(*overrides: str) -> dict:
    """DeepSpeed's settings after `fit_engine`; Accelerate cannot make such an accelerator without deepspeed."""
    settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    precision = "fp16" if "training.mixed_precision=fp16" in overrides else "bf16"
    accelerator = SimpleNamespace(
        is_fsdp2=False,
        num_processes=1,
        distributed_type=DistributedType.DEEPSPEED,
        mixed_precision=precision,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings)),
    )
    argv = train_argv(Path("tiny"), Path("run"), *overrides)
    processes.fit_engine(accelerator, cli.parse(TrainConfig, argv, doc="", stage="train"))
    return settings


@pytest.mark.parametrize(("asked", "clipping"), [("0.5", 0.5), ("null", 0.0)])
def test_deepspeed_gets_micro_batch_and_clipping_of_the_training_config(asked, clipping):
    """Accelerate would want a loader for the one, and clip to a norm of 1."""
    settings = under_deepspeed(f"training.max_grad_norm={asked}")
    assert settings == {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": clipping}


@pytest.mark.parametrize("override", ["training.mixed_precision=fp16", "training.on_nonfinite=skip"])
def test_what_deepspeed_cannot_do_is_refused(override):
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=f"^command line: {key}: {value} does not go with DeepSpeed, .* or FSDP2.$"):
        under_deepspeed(override)


# --- several machines -----------------------------------------------------------------------------------------------


def same_as_one_process(fork_server, tiny: Path, run_dir: Path, log: str) -> None:
    """The run in `run_dir` was made by two processes, and its losses are those of one process to 1e-6."""
    assert re.search(r"^engine  2 x cpu\S*, MULTI_CPU, mixed precision no, 1 threads each", log, re.MULTILINE), log
    alone = run_dir.with_name("alone")
    job = fork_server.run("train", train_argv(tiny, alone, *SHORT))
    assert job.codes == [0], job.output
    losses, expected = ([line["loss"] for line in metrics_of(folder)] for folder in (run_dir, alone))
    assert len(losses) == len(expected) == 4  # three steps and the evaluation at the end
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
def test_two_machines_train_as_one_process_does(fork_server, tiny, tmp_path):
    """Two launches of multi_node.yaml that meet on this machine, each with one process, as on two hosts."""
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    launch = ["accelerate", "launch", "--config_file", FOLDER / "multi_node.yaml", *meeting]
    argv = ["scripts/train.py", *train_argv(tiny, tmp_path / "run", *SHORT)]
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    codes = ended([started([*launch, "--machine_rank", rank, *argv], log) for rank, log in enumerate(logs)])
    assert codes == [0, 0], whole(*logs)
    same_as_one_process(fork_server, tiny, tmp_path / "run", logs[0].read_text())
    assert logs[1].read_text() == ""  # only the first process of all speaks, whatever torch says at the end of another


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_of_torchrun_train_as_one_process_does(fork_server, tiny, tmp_path):
    meeting = ["--master_addr", "127.0.0.1", "--master_port", free_port(), "--nnodes", 2, "--nproc_per_node", 1]
    argv = ["scripts/train.py", *train_argv(tiny, tmp_path / "run", *SHORT)]
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    launched = [
        started(["torchrun", *meeting, "--node_rank", rank, *argv], log, ACCELERATE_USE_CPU="true")
        for rank, log in enumerate(logs)
    ]
    assert ended(launched) == [0, 0], whole(*logs)
    same_as_one_process(fork_server, tiny, tmp_path / "run", logs[0].read_text())
    assert logs[1].read_text() == ""


# --- SLURM ----------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_CPUS_PER_TASK": "32",
}
FAKES = {
    "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "127.0.0.1\\nnode2\\n" && seq -f "node%.0f" 3 40000',
    "srun": """shift
        for node in 0 1; do SLURM_NODEID=$node "$@" & started="$started $!"; done
        for process in $started; do wait $process || exit; done""",
    "accelerate": 'printf "%s\\037" "$OMP_NUM_THREADS" "$@" > "$SAID/$SLURM_NODEID"',
}


def cluster(folder: Path, *names: str) -> str:
    """A PATH on which these commands of a cluster are ours."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"#!/bin/bash\n{FAKES[name]}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{BIN}:{os.environ['PATH']}"


def test_the_slurm_script_starts_one_launcher_a_node(tmp_path):
    """With a fake cluster of two nodes: what reaches `accelerate launch` there, read by its own parser."""
    path = cluster(tmp_path / "bin", *FAKES)
    environment = os.environ | SLURM | {"PATH": path, "SAID": str(tmp_path)}
    del environment["OMP_NUM_THREADS"]
    argv = ["--config", "a b.yaml", "optimizer={learning_rate: 1e-3}"]
    subprocess.run(["bash", FOLDER / "slurm.sh", *argv], check=True, env=environment, cwd=ROOT, timeout=30)
    ports = set()
    for rank in (0, 1):
        threads, launch, *arguments = (tmp_path / str(rank)).read_text().split("\037")[:-1]
        assert (threads, launch) == ("8", "launch")
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
        assert (args.num_machines, args.num_processes, int(args.machine_rank)) == (2, 8, rank)
        assert args.main_process_ip == "127.0.0.1"
        assert args.training_script == "scripts/train.py"
        assert args.training_script_args == argv
        ports.add(args.main_process_port)
    assert len(ports) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_the_slurm_script_trains_as_one_process_does(fork_server, tiny, tmp_path):
    """The same fake cluster, whose two nodes are this machine, with the true `accelerate launch`."""
    path = cluster(tmp_path / "bin", "scontrol", "srun")
    environment = SLURM | {"PATH": path, "GPUS_PER_NODE": "1", "MAIN_PORT": str(free_port())}
    command = ["bash", FOLDER / "slurm.sh", *train_argv(tiny, tmp_path / "run", *SHORT)]
    log = tmp_path / "log"
    assert ended([started(command, log, **environment)]) == [0], whole(log)
    same_as_one_process(fork_server, tiny, tmp_path / "run", log.read_text())
