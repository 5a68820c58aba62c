"""Gradient checkpointing, FlashAttention, TF32 and deterministic kernels: by configuration, or refused in a line."""

import json
import os
import re
import types

import pytest
import torch
from accelerate import Accelerator
from conftest import metrics_of, train_argv

from codex_accel import files, run
from codex_accel.errors import UserError
from codex_accel.train_schema import Data, Model, TrainConfig, Training

SHORT = ("training.max_steps=4", "evaluation.every_steps=null", "evaluation.max_windows=8")


def config_of(*, attention="sdpa", dtype="float32", **training) -> TrainConfig:
    return TrainConfig(
        output_dir="out",
        model=Model(config={"model_type": "gpt2"}, attention=attention, dtype=dtype),
        data=Data(dataset="data", block_size=16),
        training=Training(**{"max_steps": 1, **training}),
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_gradient_checkpointing_changes_no_number(chain, fork_server, tmp_path, adapter):
    """Losses, gradient norms and weights to the last bit, with dropout, whose draws are made again.

    Under an adapter the embeddings are frozen, so no gradient flows into the first block.
    """
    for name in ("plain", "checkpointed"):
        argv = train_argv(chain, tmp_path / name, *SHORT)
        if adapter:
            argv = [argument for argument in argv if not argument.startswith("model.config")]
            peft = "peft={r: 2, target_modules: [c_attn], lora_dropout: 0.1}"
            argv += [f"model.path={chain}/run/final", peft]
        on = str(name == "checkpointed").lower()
        job = fork_server.run("train", [*argv, f"training.gradient_checkpointing={on}"])
        assert job.codes == [0], job.output
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "checkpointed")
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    digests = {files.sha256_file(tmp_path / name / "final" / weights) for name in ("plain", "checkpointed")}
    assert len(digests) == 1


def test_gradient_checkpointing_takes_less_memory(tiny, fork_server, tmp_path):
    taken = []
    for on in ("false", "true"):
        argv = train_argv(
            tiny,
            tmp_path / "run",
            "model.config={model_type: gpt2, n_layer: 8, n_head: 2, n_embd: 64, n_positions: 32}",
            "training={micro_batch_size: 64, global_batch_size: 64, max_steps: 3}",
            "data.validation_split=null",
            "evaluation.every_steps=null",
            f"training.gradient_checkpointing={on}",
            "--dry-run",
        )
        job = fork_server.run("train", argv)
        assert job.codes == [0], job.output
        taken.append(float(re.search(r"([\d.]+) MB  activations and the rest", job.output).group(1)))
    assert taken[1] <= 0.6 * taken[0]


def test_model_without_gradient_checkpointing_is_told(tiny, fork_server, tmp_path):
    argv = [
        *train_argv(tiny, tmp_path / "run", "training.gradient_checkpointing=true", "data.isolate_documents=false"),
        "model.config={model_type: openai-gpt, n_layer: 1, n_head: 1, n_embd: 8, n_positions: 32}",
        "model.attention=eager",
    ]
    job = fork_server.run("train", [argument for argument in argv if "gpt2" not in argument])
    assert job.codes == [2], job.output
    assert job.output.strip().splitlines()[-1] == (
        "error: command line: training.gradient_checkpointing: true, but openai-gpt models cannot do it. Say false."
    )


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "why"),
    [
        ("cpu", "float32", "bf16", "needs a CUDA device, and this run computes on cpu. Or say sdpa."),
        ("cuda", "float32", "bf16", "needs the package flash_attn. Run `pip install flash-attn"),
    ],
)
def test_flash_attention_that_cannot_run_is_refused(device, dtype, precision, why):
    here = types.SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    config = config_of(attention="flash_attention_2", dtype=dtype)
    with pytest.raises(UserError, match=re.escape(f"model.attention: flash_attention_2 {why}")):
        run.set_kernels(config, here)


def test_flash_attention_in_float32_is_refused(tmp_path, monkeypatch):
    """With a package of that name, which is found and not imported."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    here = types.SimpleNamespace(device=torch.device("cuda"), mixed_precision="no")
    with pytest.raises(UserError, match=r"computes in 16 bits only\. Set training\.mixed_precision=bf16\. Or say sdpa"):
        run.set_kernels(config_of(attention="flash_attention_2"), here)
    run.set_kernels(config_of(attention="flash_attention_2", dtype="bfloat16"), here)


def test_flash_attention_is_refused_before_the_model_is_built(tiny, fork_server, tmp_path):
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", "model.attention=flash_attention_2"))
    assert job.codes == [2], job.output
    assert job.output.startswith("error: command line: model.attention: flash_attention_2 needs a CUDA device")
    assert len(job.output.splitlines()) == 1


@pytest.fixture
def switches():
    """Puts back what is one for the whole process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("asked", [False, True])
def test_tf32_is_as_asked(switches, asked):
    run.set_kernels(config_of(tf32=asked), Accelerator(cpu=True))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (asked, asked)


def test_deterministic_takes_no_other_kernels(switches, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    run.set_kernels(config_of(), Accelerator(cpu=True))
    assert not torch.are_deterministic_algorithms_enabled()
    run.set_kernels(config_of(deterministic=True), Accelerator(cpu=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_tf32_does_not_go_with_deterministic():
    with pytest.raises(ValueError, match=r"training\.tf32 does not go with training\.deterministic"):
        Training(max_steps=1, tf32=True, deterministic=True)


def test_choices_are_recorded(chain):
    settings = json.loads((chain / "run" / "checkpoints" / "latest" / "trainer_state.json").read_text())["identity"]
    assert (settings["training"]["compile"], settings["training"]["tf32"]) == (False, False)
    assert settings["model"]["attention"] == "sdpa"
