"""What only a GPU can show, on the smallest models: `nox -s tests_gpu`.

Each run is a process of its own, as a user starts it: a process that has used CUDA must not fork. The engines are
launched by `accelerate launch` on all GPUs that there are, one too. Losses are compared with those of the CPU, or of
plain float32, on runs without dropout, whose masks differ between devices.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics_of, train_argv

from codex_accel import optim, preemption, run_folder
from codex_accel.train_schema import Data, Model, TrainConfig, Training

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="no CUDA device")]

LLAMA = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, "
LLAMA += "max_position_embeddings: 64, tie_word_embeddings: true}"
TIMEOUT_S = 300


def needs_package(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(CUDA and importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def argv_of(tiny: Path, run_dir: Path, *overrides: str) -> list[str]:
    """A tiny Llama without dropout in float32, twelve steps."""
    shape = [f"model.config={LLAMA}", "training.max_steps=12", "evaluation.every_steps=6", "checkpoint.every_steps=4"]
    return train_argv(tiny, run_dir, *shape, *overrides)


def command_of(argv: list[str], launch_config: str | None = None) -> list[str]:
    if launch_config is None:
        return [sys.executable, "scripts/train.py", *argv]
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    launch += [f"accelerate_configs/{launch_config}.yaml", "--num_processes", str(torch.cuda.device_count())]
    return [*launch, "scripts/train.py", *argv]


def trained(argv: list[str], launch_config: str | None = None, *, code: int = 0) -> str:
    """What a run printed; `code` is the exit code that it must have (launchers turn any but 0 into 1)."""
    done = subprocess.run(command_of(argv, launch_config), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def prepared(folder: Path, tokenizer: Path, *overrides: str) -> None:
    command = [sys.executable, "scripts/prepare_data.py", f"output_dir={folder}", f"tokenizer={tokenizer}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=TIMEOUT_S)


def facts_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir)]


def weights_of(run_dir: Path) -> bytes:
    return (run_dir / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> Path:
    """A run in float32 on one GPU."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    told = trained(argv_of(tiny, run_dir))
    assert "engine  1 x cuda" in told
    return run_dir


# --- one GPU --------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_cpu(tiny, plain, tmp_path):
    """Float32 without TF32 on both; sums are made in another order."""
    trained(argv_of(tiny, tmp_path / "run", "training.device=cpu"))
    assert facts_of(tmp_path / "run")["device"] == "cpu"
    assert facts_of(plain)["device"].startswith("cuda")
    assert losses_of(plain) == pytest.approx(losses_of(tmp_path / "run"), rel=1e-4)


def test_bf16_trains(tiny, plain, tmp_path):
    trained(argv_of(tiny, tmp_path / "run", "training.mixed_precision=bf16"))
    assert facts_of(tmp_path / "run")["mixed_precision"] == "bf16"
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(plain), rel=5e-3)
    assert losses_of(tmp_path / "run") != losses_of(plain)


def test_fp16_trains_with_a_scaler_that_goes_on_after_a_stop(tiny, plain, tmp_path):
    """Each overflow halves the scale of 65536 and skips its step; it would grow again after 2000 steps."""
    argv = argv_of(tiny, tmp_path / "run", "training.mixed_precision=fp16")
    trained([*argv, "training.stop_at_step=6"], code=preemption.EXIT_CODE)
    trained(argv)
    folder = run_folder.checkpoint_path(tmp_path / "run", 12)
    scale = torch.load(folder / "scaler.pt", weights_only=True)["scale"]
    assert json.loads((folder / "trainer_state.json").read_text())["num_skipped"] == math.log2(65536 / scale)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(plain), rel=2e-2)


def test_an_overflow_in_fp16_is_counted_and_does_not_stop_the_run(tiny, tmp_path):
    """One target a step: its gradient, near 1, times the first scale of 65536 and a normalized state is over 65504."""
    lines = [json.dumps({"prompt": f"The {number}th letter is", "completion": "e"}) for number in range(32)]
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    source = f"sources=[{{path: {tmp_path}/letters.jsonl, prompt: prompt, completion: completion}}]"
    prepared(tmp_path / "data", tiny / "tokenizer", source, "split.ratios={train: 1.0}", "add_eos=false")
    argv = argv_of(
        tiny,
        tmp_path / "run",
        f"data={{dataset: {tmp_path}/data, block_size: 32, packing: group_by_length, validation_split: null}}",
        "training={micro_batch_size: 1, global_batch_size: 1, max_steps: 8, mixed_precision: fp16}",
    )
    trained(argv)
    folder = run_folder.checkpoint_path(tmp_path / "run", 8)
    scale = torch.load(folder / "scaler.pt", weights_only=True)["scale"]
    assert scale < 65536
    assert json.loads((folder / "trainer_state.json").read_text())["num_skipped"] == math.log2(65536 / scale)


def test_compiled_training_gives_the_same_losses(tiny, plain, tmp_path):
    trained(argv_of(tiny, tmp_path / "run", "training.compile=true"))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(plain), rel=1e-4)


def test_loss_by_chunks_is_that_of_full_logits(tiny, plain, tmp_path):
    trained(argv_of(tiny, tmp_path / "run", "training.loss_chunk_rows=16"))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(plain), rel=1e-5)


def test_adamw_is_fused_on_the_gpu():
    config = TrainConfig(
        output_dir="run",
        model=Model(config={"model_type": "llama"}),
        data=Data(dataset="d", block_size=8),
        training=Training(max_steps=1),
    )
    optimizer = optim.build(config, torch.nn.Linear(4, 4, device="cuda"))
    assert all(group["fused"] for group in optimizer.param_groups)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(state["exp_avg"].device.type == "cuda" for state in optimizer.state.values())


def test_deterministic_mode_gives_the_same_weights_twice_and_after_a_kill(tiny, tmp_path):
    """SIGKILL in the loop, after a checkpoint; with dropout, bf16, packing and gradient checkpointing."""
    gpt2 = "model.config={model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 32, resid_pdrop: 0.1}"
    more = ["training.deterministic=true", "training.mixed_precision=bf16", "training.gradient_checkpointing=true"]
    more += ["data.packing=best_fit", "training.max_steps=60"]
    for name in ("first", "second"):
        trained(argv_of(tiny, tmp_path / name, gpt2, *more))
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second")
    argv = argv_of(tiny, tmp_path / "killed", gpt2, *more)
    process = subprocess.Popen(command_of(argv), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_S
    while not run_folder.steps_saved(tmp_path / "killed") and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "resume" in trained(argv)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "first")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "first")


@needs_package("bitsandbytes")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_learns_on_a_quantized_base(tiny, shared, tmp_path, quantization):
    """QLoRA on stories260K: the loss falls, what is saved is the adapter alone, and it goes on after a stop."""
    model, records = shared / "models" / "stories260K", shared / "instruct" / "gsm8k_train.jsonl"
    prepared(tmp_path / "data", model, f"sources=[{{path: {records}, prompt: question, completion: answer}}]")
    argv = train_argv(
        tiny,
        tmp_path / "run",
        f"data={{dataset: {tmp_path}/data, block_size: 256, packing: best_fit}}",
        "training={micro_batch_size: 4, global_batch_size: 8, max_steps: 20, mixed_precision: bf16}",
        "peft={r: 8, lora_alpha: 16, target_modules: [q_proj, k_proj, v_proj, o_proj]}",
        "optimizer.learning_rate=1e-2",
        "evaluation.every_steps=10",
        "checkpoint.every_steps=10",
    )
    argv = [argument for argument in argv if not argument.startswith("model.config")]
    argv += [f"model={{path: {model}, quantization: {quantization}}}"]
    trained([*argv, "training.stop_at_step=10"], code=preemption.EXIT_CODE)
    trained(argv)
    first, last = (line["loss"] for line in metrics_of(tmp_path / "run") if line["split"] == "validation")
    assert last < first
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").stat().st_size < 1_044_992 / 2
    assert not (tmp_path / "run" / "final" / "model.safetensors").exists()


# --- engines --------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="one CUDA device")
def test_several_gpus_train_as_one_does(tiny, plain, tmp_path):
    told = trained(argv_of(tiny, tmp_path / "run", "training.micro_batch_size=1"), "multi_gpu")
    assert f"engine  {torch.cuda.device_count()} x cuda" in told
    assert ", MULTI_GPU, " in told
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(plain), rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp2_trains_as_one_gpu_does_and_goes_on_exactly(tiny, plain, tmp_path, precision):
    """Deterministic, so that the weights after a stop are bit for bit those of the unbroken run."""
    more = [f"training.mixed_precision={precision}", "training.deterministic=true", "training.micro_batch_size=1"]
    told = trained(argv_of(tiny, tmp_path / "whole", *more), "fsdp2")
    assert f"engine  {torch.cuda.device_count()} x cuda" in told
    assert f", FSDP, mixed precision {precision}" in told
    assert losses_of(tmp_path / "whole") == pytest.approx(losses_of(plain), rel=1e-4 if precision == "no" else 5e-3)
    argv = argv_of(tiny, tmp_path / "broken", *more)
    trained([*argv, "training.stop_at_step=6"], "fsdp2", code=1)
    assert (tmp_path / "broken" / preemption.MARKER).exists()
    trained(argv, "fsdp2")
    assert weights_of(tmp_path / "broken") == weights_of(tmp_path / "whole")


@pytest.mark.distributed
@needs_package("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_gpu_does(tiny, plain, tmp_path, stage):
    more = ["training.mixed_precision=bf16", "training.micro_batch_size=1"]
    told = trained(argv_of(tiny, tmp_path / "run", *more), f"deepspeed_zero{stage}")
    assert ", DEEPSPEED, mixed precision bf16" in told
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(plain), rel=2e-2)
    argv = argv_of(tiny, tmp_path / "broken", *more)
    trained([*argv, "training.stop_at_step=6"], f"deepspeed_zero{stage}", code=1)
    trained(argv, f"deepspeed_zero{stage}")
    assert losses_of(tmp_path / "broken") == pytest.approx(losses_of(tmp_path / "run"), rel=1e-3)
