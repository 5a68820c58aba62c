"""What one training run is: its length, its identity, its ancestors, and what it says at the start and the end.

Rule: everything here is decided before the first step; the loop itself stands in `scripts/train.py`.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from codex_accel import checkpoint, files, manifest
from codex_accel.errors import UserError
from codex_accel.evaluation import Scores
from codex_accel.events import LineLog, event
from codex_accel.packing import Batch
from codex_accel.schema import TrainConfig

# What must be equal for a checkpoint to belong to the same run; paths, logging and saving may change freely.
IDENTITY = {
    "training": ("micro_batch_size", "global_batch_size", "max_grad_norm", "on_nonfinite"),
    "data": ("train_split", "block_size", "isolate_documents"),
}


def accumulation_steps(config: TrainConfig) -> int:
    """Micro-batches of one process in a step. Raises UserError if the processes cannot share the batch evenly."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    if total % (micro * num_processes):
        what = (
            f"{total} cannot be shared by {num_processes} processes with training.micro_batch_size = {micro}. "
            f"Take a multiple of {micro * num_processes}."
        )
        raise UserError(config.problem("training.global_batch_size", what))
    return total // (micro * num_processes)


def make_folder(run_dir: Path) -> None:
    """Make the run folder, or raise UserError before anything expensive if it cannot be written to."""
    try:
        (run_dir / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        files.write_durable(run_dir / checkpoint.FOLDER / ".tmp-probe", b"")
        (run_dir / checkpoint.FOLDER / ".tmp-probe").unlink()
    except OSError as error:
        raise UserError(
            f"output_dir = '{run_dir}': cannot be written ({error.strerror}). Choose another folder."
        ) from error


def require_engine(accelerator: Accelerator) -> None:
    """Raise UserError if Accelerate has not taken the processes or the engine that the environment asks for.

    It says nothing then: each process would train alone into one run folder, or FSDP would be plain DDP.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise UserError(
            f"environment: WORLD_SIZE = {asked}: the launcher started {asked} processes, but accelerate has joined "
            f"{accelerator.num_processes}. On a CPU set ACCELERATE_USE_CPU=true before the launch command."
        )
    for variable, engine in (
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ):
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type != engine:
            raise UserError(
                f"environment: {variable} = true: asks for {engine.value}, but {accelerator.distributed_type.value} is "
                "in use. It needs a GPU; choose another launch config."
            )


def set_deterministic() -> None:
    """Deterministic kernels, the cuBLAS workspace they need, and no TF32."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def tokenizer_folder(dataset: Path, dataset_manifest: dict[str, Any], *, verify: bool) -> Path:
    """The tokenizer that the dataset was made with, checked against the dataset's record of it."""
    record = dataset_manifest["parents"][0]  # prepare_data puts it first
    folder = Path(os.path.normpath(dataset / record["path"]))
    problems = manifest.check_tree(folder, recursive=False, expected=record).problems if verify else []
    if problems:
        raise UserError(*(f"data.dataset = '{dataset}': its tokenizer is not the one recorded. {p}" for p in problems))
    return folder


def require_same_tokenizer(model: Path, dataset: Path) -> None:
    """Raise UserError if the dataset was made with another tokenizer than the one beside the model."""
    folder = tokenizer_folder(dataset, manifest.read(dataset), verify=True)
    if files.sha256_file(folder / "tokenizer.json") != files.sha256_file(model / "tokenizer.json"):
        raise UserError(
            f"dataset = '{dataset}': was made with the tokenizer in '{folder}', which is not the one in '{model}', so "
            "its ids mean other text to the model. Score the raw text with file.path, or prepare the data again."
        )


def parents(config: TrainConfig, dataset: Path, tokenizer: Path) -> list[dict[str, Any]]:
    """Records of what the model comes from: dataset, tokenizer, and the folder that it started from."""
    start = [Path(config.model.path)] if config.model.path is not None else []
    return [manifest.as_parent(folder) for folder in (dataset, tokenizer, *start)]


def identity(
    config: TrainConfig,
    dataset_manifest: dict[str, Any],
    parents: list[dict[str, Any]],
    model: Any,
    *,
    mixed_precision: str,
) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it, as plain JSON values."""
    settings = config.model_dump(mode="json")
    architecture = model.config.to_dict()
    architecture.pop("transformers_version", None)
    lengths = {key: settings["training"][key] for key in ("max_steps", "max_epochs", "max_tokens")}
    document = {
        "seed": config.seed,
        "dataset": dataset_manifest["content_digest"],
        "tokenizer": parents[1]["content_digest"],
        "model": {"path": config.model.path, "architecture": architecture},
        "optimizer": settings["optimizer"],
        "schedule": settings["schedule"],
        "data": {key: settings["data"][key] for key in IDENTITY["data"]},
        "mixed_precision": mixed_precision,
        "training": {**{key: settings["training"][key] for key in IDENTITY["training"]}, **lengths},
    }
    return json.loads(json.dumps(document, default=str))


def length(config: TrainConfig, *, num_blocks: int) -> tuple[int, float]:
    """(steps of the run, steps in an epoch); the run ends at the first of max_steps, max_epochs and max_tokens."""
    training = config.training
    steps_per_epoch = num_blocks / training.global_batch_size
    limits = [training.max_steps] if training.max_steps is not None else []
    if training.max_epochs is not None:
        limits.append(math.ceil(training.max_epochs * steps_per_epoch))
    if training.max_tokens is not None:
        limits.append(math.ceil(training.max_tokens / (training.global_batch_size * config.data.block_size)))
    return min(limits), steps_per_epoch


def choose_checkpoint(
    config: TrainConfig, run_dir: Path, on_rejected: Callable[[Path, list[str]], None]
) -> Path | None:
    """Where to go on from: `resume: auto` the newest whole checkpoint of this run, or None for a fresh start."""
    if config.resume == "never":
        if steps := checkpoint.steps_saved(run_dir):
            what = f"never, but {run_dir} holds a run at step {steps[0]}. Choose another output_dir, or resume=auto."
            raise UserError(config.problem("resume", what))
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        step = manifest.require(path, kinds=["checkpoint"], verify=config.verify, key="resume")["facts"]["step"]
        if newer := [saved for saved in checkpoint.steps_saved(run_dir) if saved > step]:
            what = (
                f"is at step {step}, but {run_dir} goes to step {newer[0]}. Choose another output_dir for the branch."
            )
            raise UserError(config.problem("resume", what))
        return path
    found = checkpoint.newest_whole(run_dir, on_rejected)
    if found is None and checkpoint.steps_saved(run_dir):
        what = f"no checkpoint in {run_dir} is whole. Restore one from a copy, or choose another output_dir."
        raise UserError(config.problem("resume", what))
    return found


def on_nonfinite(config: TrainConfig, events: LineLog, *, step: int, grad_norm: float, saved_step: int) -> None:
    """Note a non-finite gradient at `step`; raises UserError if it is to stop the run."""
    event(events, "skip", f"gradient norm {grad_norm} at step {step}", policy=config.training.on_nonfinite)
    if config.training.on_nonfinite == "stop":
        where = f"The checkpoint of step {saved_step} stands." if saved_step >= 0 else "No checkpoint was written yet."
        what = (
            f"stop: the gradient norm is {grad_norm} at step {step}. {where} "
            "Lower optimizer.learning_rate, or say training.on_nonfinite=skip."
        )
        raise UserError(config.problem("training.on_nonfinite", what))


# --- arithmetic over processes ------------------------------------------------------------------------------------


def sum_int(accelerator: Accelerator, value: int) -> int:
    """Sum of a whole number over processes."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="sum").item())


def sum_float(accelerator: Accelerator, value: torch.Tensor) -> float:
    """Sum of a scalar tensor over processes."""
    return float(value if accelerator.num_processes == 1 else accelerator.reduce(value, reduction="sum"))


def sum_over_processes(accelerator: Accelerator, scores: Scores) -> Scores:
    """Per-document sums over processes."""
    if accelerator.num_processes == 1:
        return scores
    arrays = (scores.nll, scores.num_targets, scores.num_correct)
    tensors = [torch.from_numpy(array).to(accelerator.device) for array in arrays]
    return Scores(*(accelerator.reduce(tensor, reduction="sum").cpu().numpy() for tensor in tensors))


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The arrays of a batch as tensors on `device`."""
    arrays = {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}
    return {
        name: None if array is None else torch.from_numpy(array).to(device, non_blocking=True)
        for name, array in arrays.items()
    }


def settle(accelerator: Accelerator) -> None:
    """Give gloo's threads the interpreter for a moment, so that they can drop the tensors of the last collective.

    Measured with torch 2.13: `~ProcessGroupGloo`, run while this thread holds the interpreter lock, waits for a thread
    that waits for the same lock to drop its tensor. About one in ten processes on two CPU cores hung at their end.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.2)


def end(accelerator: Accelerator) -> None:
    """Wait for all processes, then take the process group down."""
    accelerator.wait_for_everyone()
    settle(accelerator)
    accelerator.end_training()


# --- words ----------------------------------------------------------------------------------------------------------


def _threads(facts: dict[str, Any]) -> str:
    """How many threads a CPU process computes with, and what set it, because launchers set it to one."""
    if facts["device"].partition(":")[0] != "cpu":
        return ""
    set_by = f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})" if "OMP_NUM_THREADS" in os.environ else ""
    return f", {torch.get_num_threads()} threads each{set_by}"


def print_start(config: TrainConfig, facts: dict[str, Any]) -> None:
    """What is about to run, on a few lines."""
    tokens = config.training.global_batch_size * config.data.block_size
    print(
        f"model   {facts['num_parameters']:,} parameters, {facts['num_trainable_parameters']:,} train\n"
        f"data    {facts['blocks']['num_tokens']:,} tokens in {facts['blocks']['num_blocks']:,} blocks of "
        f"{config.data.block_size}\n"
        f"run     {facts['max_steps']:,} steps of {tokens:,} tokens, "
        f"{facts['max_steps'] / facts['steps_per_epoch']:.2f} epochs, accumulation {facts['accumulation_steps']}\n"
        f"engine  {facts['num_processes']} x {facts['device']}, {facts['engine']}, mixed precision "
        f"{facts['mixed_precision']}{_threads(facts)}"
    )


def print_end(run_dir: Path, state: checkpoint.TrainerState, digest: str) -> None:
    """The last losses and where everything lies."""
    lines = [json.loads(line) for line in (run_dir / "metrics.ndjson").read_text(encoding="utf-8").splitlines()]
    for split in dict.fromkeys(line["split"] for line in lines):
        values = [line for line in lines if line["split"] == split][-1]
        print(f"{split:<12} loss {values['loss']:.4f} at step {values['step']}")
    print(f"done     {state.step} steps, {state.num_target_tokens:,} target tokens in {state.elapsed_s:.0f} s")
    print(f"model    {run_dir / 'final'}\nmanifest {digest}")
