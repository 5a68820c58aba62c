"""scripts/train.py as its users meet it."""

import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, metrics_of, train_argv

from codex_accel import run_folder
from codex_accel.errors import UserError


def refused(argv: list[str]) -> list[str]:
    """Problems that train.py finds in this process before it starts anything."""
    with pytest.raises(UserError) as caught:
        load_script("train").main(argv)
    return caught.value.problems


def test_a_copy_elsewhere_with_one_line_of_its_loop_edited_runs(fork_server, chain, tmp_path):
    source = (ROOT / "scripts" / "train.py").read_text()
    line = "learning_rate = config.optimizer.learning_rate * lr_schedule.scale_at(state.step)"
    assert source.count(line) == 1
    copy = tmp_path / "my_train.py"
    copy.write_text(source.replace(line, "learning_rate = 0.0125"))
    argv = train_argv(chain, tmp_path / "run", "training.max_steps=2", "evaluation.every_steps=null")
    job = fork_server.run(copy, argv, cwd=tmp_path)
    assert job.codes == [0], job.output
    assert [line["learning_rate"] for line in metrics_of(tmp_path / "run") if line["split"] == "train"] == [0.0125] * 2


def test_a_finished_run_says_so_and_changes_nothing(chain, capsys):
    before = {path: path.stat().st_mtime_ns for path in (chain / "run").rglob("*")}
    assert load_script("train").main(train_argv(chain, chain / "run", "training.max_steps=4")) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (chain / "run").rglob("*")} == before


def test_the_run_folder_holds_what_the_architecture_page_names(chain):
    run = chain / "run"
    names = {".lock", "config.yaml", "run.json", "metrics.ndjson", "events.ndjson", "checkpoints", "final"}
    assert {path.name for path in run.iterdir()} == names
    facts = json.loads((run / "run.json").read_text())
    assert facts["max_steps"] == 4
    assert facts["blocks"]["num_blocks"] > 100
    assert [json.loads(line)["kind"] for line in (run / "events.ndjson").read_text().splitlines()] == [
        "start", "save", "save", "end",
    ]  # fmt: skip
    for checkpoint in (run / "checkpoints").iterdir():
        assert not list(checkpoint.glob("*.pkl"))


def test_the_saved_config_is_itself_a_config(chain, capsys):
    with pytest.raises(SystemExit) as caught:
        load_script("train").main(["--config", str(chain / "run" / "config.yaml"), "--print-config"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == (chain / "run" / "config.yaml").read_text()


def test_a_missing_dataset_is_one_line(tmp_path):
    [problem] = refused(train_argv(tmp_path, tmp_path / "run"))
    assert "data.dataset" in problem
    assert "no such folder" in problem


def test_a_damaged_dataset_is_refused(chain, tmp_path):
    shutil.copytree(chain / "dataset", tmp_path / "dataset")
    shutil.copytree(chain / "tokenizer", tmp_path / "tokenizer")
    shard = next((tmp_path / "dataset").glob("train-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    problems = refused(train_argv(tmp_path, tmp_path / "run"))
    assert any(f"{shard.name}: has changed" in problem for problem in problems)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.global_batch_size=7", ["not a multiple", "global_batch_size = 8"]),
        ("training.max_steps=null", ["at least one of training.max_steps"]),
        ("optimizer.lr=1", ["learning_rate"]),
        ("model.path=x", ["exactly one of model.config"]),
        ("schedule.warmup=soon", ["'2 epochs'"]),
        ("data.block_size=64.5", ["data.block_size", "64.5"]),
    ],
)
def test_a_mistake_is_named_with_its_way_out(chain, tmp_path, override, words):
    problems = refused(train_argv(chain, tmp_path / "run", override))
    assert len(problems) == 1
    for word in words:
        assert word in problems[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.n_layers=2", ["model.config.n_layers", "Did you mean 'n_layer'"]),
        ("model.config.model_type=gpt3", ["unknown model type 'gpt3'"]),
        ("model.config.n_head=5", ["refused by transformers"]),
        ("data.block_size=64", ["max_position_embeddings = 32"]),
        ("data.train_split=training", ["no split 'training'", "train"]),
        ("resume=somewhere", ["resume = 'somewhere': no such folder"]),
    ],
)
def test_a_mistake_that_needs_the_libraries_is_also_one_line(fork_server, chain, tmp_path, override, words):
    job = fork_server.run("train", train_argv(chain, tmp_path / "run", override))
    assert job.codes == [2], job.output
    assert "Traceback" not in job.output
    for word in words:
        assert word in job.output


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_an_engine_that_is_not_in_use_is_refused(fork_server, chain, tmp_path, variable):
    """On a CPU Accelerate drops both without a word (DESIGN, section 10)."""
    argv = train_argv(chain, tmp_path / "run")
    job = fork_server.run("train", argv, environment={variable: "true"})
    assert job.codes == [2], job.output
    assert variable in job.output
    assert "Traceback" not in job.output


def test_a_diverging_run_stops_and_says_where_to_go_on(fork_server, chain, tmp_path):
    argv = train_argv(chain, tmp_path / "run", "optimizer.learning_rate=1e30", "training.max_grad_norm=null")
    job = fork_server.run("train", argv)
    assert job.codes == [2], job.output
    assert "the gradient norm is" in job.output
    assert "on_nonfinite=skip" in job.output


def test_bad_losses_in_fp16_are_skipped_one_after_the_other(fork_server, chain, tmp_path):
    """The first step ruins the weights, so every loss after it is NaN; the scaler has seen all those gradients."""
    wild = ["optimizer.learning_rate=1e30", "training.mixed_precision=fp16", "training.on_nonfinite=skip"]
    argv = train_argv(chain, tmp_path / "run", *wild, "training.max_steps=4", "evaluation.every_steps=null")
    job = fork_server.run(ROOT / "tests" / "forced_scaler.py", argv)
    assert job.codes == [0], job.output
    folder = run_folder.checkpoint_path(tmp_path / "run", 4)
    assert json.loads((folder / "trainer_state.json").read_text())["num_skipped"] == 3
    assert torch.load(folder / "scaler.pt", weights_only=True)["scale"] == 65536, "the loss was bad, not its scale"
    assert "3 of them without an update" in job.output


def test_fp16_without_a_gpu_is_refused(fork_server, chain, tmp_path):
    """Accelerate would train in float32 and say fp16."""
    job = fork_server.run("train", train_argv(chain, tmp_path / "run", "training.mixed_precision=fp16"))
    assert job.codes == [2], job.output
    told = "training.mixed_precision: fp16 needs a GPU, and this run computes on cpu. Take bf16 or no."
    assert job.output.splitlines()[-1] == f"error: command line: {told}"


def test_a_checkpoint_whose_evaluation_is_no_number_is_never_among_the_best(fork_server, chain, tmp_path):
    """The learning rate of an edited copy explodes at step 12, so every evaluation after that is NaN."""
    source = (ROOT / "scripts" / "train.py").read_text()
    line = "learning_rate = config.optimizer.learning_rate * lr_schedule.scale_at(state.step)"
    copy = tmp_path / "my_train.py"
    copy.write_text(source.replace(line, f"{line} * (1e30 if state.step >= 12 else 1.0)"))
    argv = train_argv(
        chain,
        tmp_path / "run",
        "training.max_steps=21",
        "training.on_nonfinite=skip",
        "evaluation.every_steps=3",
        "checkpoint={every_steps: 3, keep_last: 1, keep_best: 2}",
    )
    job = fork_server.run(copy, argv, cwd=tmp_path)
    assert job.codes == [0], job.output
    losses = {line["step"]: float(line["loss"]) for line in metrics_of(tmp_path / "run") if line["split"] != "train"}
    finite = sorted((step for step, loss in losses.items() if math.isfinite(loss)), key=losses.__getitem__)
    assert set(finite) == {3, 6, 9, 12}
    assert set(losses) - set(finite) == {15, 18, 21}
    assert set(run_folder.steps_saved(tmp_path / "run")) == {21, *finite[:2]}


def test_memory_that_runs_out_is_one_line_and_a_smaller_micro_batch_goes_on(fork_server, chain, tmp_path):
    """400 MiB of address space are left: too little for a micro-batch of 1024 sequences, enough for one of 64."""
    size = Path(f"/proc/{fork_server.process.pid}/status").read_text().split("VmSize:")[1].split()[0]
    limits = {"RLIMIT_AS": int(size) * 1024 + (400 << 20)}
    shape = ["training.global_batch_size=1024", "training.max_steps=2", "evaluation.every_steps=null"]
    argv = train_argv(chain, tmp_path / "run", *shape, "checkpoint.every_steps=1")
    job = fork_server.run("train", [*argv, "training.micro_batch_size=1024", "training.stop_at_step=1"])
    assert job.codes == [75], job.output
    job = fork_server.run("train", [*argv, "training.micro_batch_size=1024"], limits=limits)
    assert job.codes == [2], job.output
    assert "Traceback" not in job.output
    [error] = [line for line in job.output.splitlines() if "error" in line]
    assert "1024 sequences of 32 tokens do not fit into memory at step 1" in error
    assert "The checkpoint of step 1 stands." in error
    assert "Lower training.micro_batch_size" in error
    assert run_folder.steps_saved(tmp_path / "run") == [1]
    smaller = [*argv, "training.micro_batch_size=64", "allow_drift=[training.micro_batch_size]"]
    job = fork_server.run("train", smaller, limits=limits)
    assert job.codes == [0], job.output
    assert "step-000000001, step 1" in job.output
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2


def test_training_goes_on_from_a_local_folder(fork_server, chain, shared, tmp_path):
    """model.path: a from_pretrained folder without a manifest, its own tokenizer, prompt/completion records."""
    model = shared / "models" / "stories260K"
    records = shared / "instruct" / "self_instruct_seed_prompt_completion.jsonl"
    source = f"sources=[{{path: {records}, prompt: prompt, completion: completion}}]"
    job = fork_server.run("prepare_data", [f"output_dir={tmp_path}/data", f"tokenizer={model}", source])
    assert job.codes == [0], job.output
    argv = train_argv(tmp_path, tmp_path / "run", f"data.dataset={tmp_path}/data", "training.max_steps=12")
    argv = [argument for argument in argv if not argument.startswith("model.config")]
    job = fork_server.run("train", [*argv, f"model.path={model}", "data.block_size=256"])
    assert job.codes == [0], job.output
    losses = [line["loss"] for line in metrics_of(tmp_path / "run") if line["split"] == "validation"]
    assert losses[-1] < losses[0]
    kinds = [p["kind"] for p in json.loads((tmp_path / "run" / "final" / "manifest.json").read_text())["parents"]]
    assert kinds == ["dataset", "unverified", "unverified"]


@pytest.mark.distributed
def test_accelerate_launch_runs_it(chain, tmp_path):
    """The form that users type, as a true process through the true launcher."""
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "scripts/train.py"]
    argv = train_argv(chain, tmp_path / "run", "training.max_steps=2", "evaluation.every_steps=null")
    done = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert "Traceback" not in done.stderr


def test_a_dry_run_tells_the_plan_and_writes_nothing(fork_server, chain, tmp_path):
    job = fork_server.run("train", [*train_argv(chain, tmp_path / "run"), "--dry-run"])
    assert job.codes == [0], job.output
    assert "30 steps of 256 tokens" in job.output
    assert not (tmp_path / "run").exists()


def test_latest_leads_to_the_newest_checkpoint(chain):
    link = chain / "run" / "checkpoints" / "latest"
    assert link.is_symlink()
    assert link.resolve().name == "step-000000004"


def test_an_output_folder_that_cannot_be_written_is_one_line(fork_server, chain, tmp_path):
    (tmp_path / "file").write_text("in the way")
    job = fork_server.run("train", train_argv(chain, tmp_path / "file" / "run"))
    assert job.codes == [2], job.output
    assert "cannot be written" in job.output


def test_a_damaged_start_model_is_refused(chain, tmp_path):
    shutil.copytree(chain / "run" / "final", tmp_path / "start")
    path = tmp_path / "start" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    argv = [a for a in train_argv(chain, tmp_path / "run") if not a.startswith("model.config")]
    problems = refused([*argv, f"model.path={tmp_path}/start"])
    assert any("model.safetensors: has changed" in problem for problem in problems)


def test_a_complete_run_with_other_settings_is_refused(chain):
    problems = refused(train_argv(chain, chain / "run", "training.max_steps=4", "optimizer.learning_rate=9.0"))
    assert problems[2].split() == ["optimizer.learning_rate", "0.003", "9.0"]


def test_drift_is_allowed_by_known_names_only(fork_server, chain, tmp_path):
    job = fork_server.run("train", train_argv(chain, tmp_path / "run", "allow_drift=[training.max_step]"))
    assert job.codes == [2]
    assert "Did you mean 'training.max_steps'" in job.output


def test_a_branch_names_the_checkpoint_it_came_from(fork_server, chain, tmp_path):
    drift = "allow_drift=[training.max_steps]"
    start = chain / "run" / "checkpoints" / "step-000000003"
    argv = train_argv(chain, tmp_path / "run", f"resume={start}", "training.max_steps=6", drift)
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    parents = json.loads((tmp_path / "run" / "final" / "manifest.json").read_text())["parents"]
    assert [parent["kind"] for parent in parents] == ["dataset", "tokenizer", "checkpoint"]
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    assert "is complete" in job.output
    other = chain / "run" / "checkpoints" / "step-000000004"
    job = fork_server.run(
        "train", train_argv(chain, tmp_path / "run", f"resume={other}", "training.max_steps=6", drift)
    )
    assert job.codes == [2]
    assert "holds a run already" in job.output


def test_a_second_run_in_one_folder_is_refused(fork_server, chain, tmp_path):
    first = fork_server.start("train", train_argv(chain, tmp_path / "run", "training.max_steps=4000"))
    while not (tmp_path / "run" / "run.json").exists():
        assert first.alive(), first.output
    second = fork_server.run("train", train_argv(chain, tmp_path / "run", "training.max_steps=4000"))
    first.kill()
    assert first.wait() == [-9]
    assert second.codes == [2]
    assert f"process {first.pids[0]} on host {socket.gethostname()} works in it since " in second.output
