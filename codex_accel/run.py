"""What one training run is: its length, its ancestors, where it goes on from, and what it says.

Rule: whatever stops a run tells where it can go on. The loop itself stands in `scripts/train.py`.
"""

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from codex_accel import (
    added_tokens,
    bases,
    checkpoint,
    cli,
    compiler,
    files,
    manifest,
    provenance,
    redaction,
    retention,
    run_folder,
)
from codex_accel import config as configuration
from codex_accel import events as logs
from codex_accel import tokenizer as tokenizers
from codex_accel.errors import UserError
from codex_accel.events import LineLog, event
from codex_accel.packing import Batch
from codex_accel.train_schema import TrainConfig


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


def on_cpu(config: TrainConfig) -> bool:
    """Whether the run computes on the CPU. Raises UserError if a device is asked for that is not there."""
    asked, found = config.training.device, torch.accelerator.is_available()
    if asked == "cuda" and not torch.cuda.is_available():
        what = f"cuda, but torch {torch.__version__} finds no CUDA device. Say cpu, or install torch with CUDA."
        raise UserError(config.problem("training.device", what))
    return asked == "cpu" or not found


def set_kernels(config: TrainConfig, accelerator: Accelerator) -> None:
    """Which kernels may be used: TF32 or not, compiled or not, and with `deterministic` only those of the same bits.

    Raises: UserError if FlashAttention, fp16 or torch.compile is asked for and cannot run here.
    """
    _require_flash_attention(config, accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:  # it would be float32 and say fp16
        what = f"fp16 needs a GPU, and this run computes on {accelerator.device.type}. Take bf16 or no."
        raise UserError(config.problem("training.mixed_precision", what))
    tf32 = config.training.tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if config.training.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if config.training.compile:
        compiler.set_up(config, accelerator.device)


def _require_flash_attention(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise UserError if it cannot run: transformers tells so late, or takes a kernel of the hub in its place."""
    if config.model.attention != "flash_attention_2":
        return
    if accelerator.device.type != "cuda":
        why = f"needs a CUDA device, and this run computes on {accelerator.device.type}"
    elif importlib.util.find_spec("flash_attn") is None:
        why = "needs the package flash_attn. Run `pip install flash-attn --no-build-isolation`"
    elif config.model.dtype == "float32" and accelerator.mixed_precision == "no":
        why = "computes in 16 bits only. Set training.mixed_precision=bf16"
    else:
        return
    raise UserError(config.problem("model.attention", f"flash_attention_2 {why}. Or say sdpa."))


def tokenizer_folder(dataset: Path, dataset_manifest: dict[str, Any], *, verify: bool) -> Path:
    """The tokenizer that the dataset was made with, checked against the dataset's record of it."""
    if not dataset_manifest["parents"]:
        raise UserError(f"{dataset / manifest.MANIFEST}: names no tokenizer as a parent. Prepare the data again.")
    record = dataset_manifest["parents"][0]  # prepare_data puts it first
    folder = Path(os.path.normpath(dataset / record["path"]))
    problems = manifest.check_tree(folder, recursive=False, expected=record).problems if verify else []
    if problems:
        raise UserError(*(f"data.dataset = '{dataset}': its tokenizer is not the one recorded. {p}" for p in problems))
    return folder


def require_fitting_tokenizer(start: Path, dataset: Path, *, key: str) -> None:
    """Raise UserError unless the dataset's tokenizer is the one beside `start`, or that one and added tokens.

    A `start` without a tokenizer has that of its base; if there is none either, nothing is compared.
    """
    start = bases.tokenizer_beside(start, key="model.path")
    if not tokenizers.defining_files(start):
        return
    folder = tokenizer_folder(dataset, manifest.read(dataset), verify=True)
    if tokenizers.digest(folder) == tokenizers.digest(start):
        return
    try:
        added_tokens.num_new(tokenizers.load(start, key="model.path"), tokenizers.load(folder))
    except ValueError as error:
        raise UserError(
            f"{key} = '{dataset}': was made with the tokenizer in '{folder}', which is neither the one in '{start}' "
            f"nor that with added tokens ({error}), so its ids mean other text to the model. Prepare the data again."
        ) from error


def require_same_tokenizer(model: Path, dataset: Path, *, key: str) -> None:
    """Raise UserError if the dataset was made with another tokenizer than the one beside the model."""
    folder = tokenizer_folder(dataset, manifest.read(dataset), verify=True)
    if tokenizers.digest(folder) != tokenizers.digest(model):
        raise UserError(
            f"{key} = '{dataset}': was made with the tokenizer in '{folder}', which is not the one in '{model}', so "
            "its ids mean other text to the model. Score the raw text with file.path, or prepare the data again."
        )


def parents(dataset: Path, tokenizer: Path, start: Path | None) -> list[dict[str, Any]]:
    """Records of what the model comes from: dataset, tokenizer, and the folder that it started from, if any.

    If that is an adapter from elsewhere, which names no base by digest, the base comes after it.
    """
    unnamed = bases.unnamed_bases(start) if start is not None else []
    return [manifest.as_parent(folder) for folder in (dataset, tokenizer, start, *unnamed) if folder is not None]


def branch_parents(chosen: Path, run_dir: Path) -> list[dict[str, Any]]:
    """The checkpoint of another run that this run branched from: `chosen`, or what `chosen` itself recorded."""
    if not run_folder.is_own(chosen, run_dir):
        return [manifest.as_parent(chosen)]
    records = [record for record in manifest.read(chosen)["parents"] if record["kind"] == "checkpoint"]
    return [{**record, "path": os.path.normpath(chosen / record["path"])} for record in records]


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


def open_logs(config: TrainConfig, run_dir: Path, *, enabled: bool) -> tuple[LineLog, LineLog]:
    """metrics.ndjson and events.ndjson; a bypass of the masking of secrets is told before anything else is."""
    names, limit_bytes = (run_folder.METRICS, run_folder.EVENTS), config.log.max_bytes
    metrics, events = (LineLog(run_dir / name, enabled=enabled, max_bytes=limit_bytes) for name in names)
    if (why := redaction.reason()) is not None:
        event(events, "bypass", f"secrets are not masked: {why}")
    return metrics, events


def record(config: TrainConfig, run_dir: Path, facts: dict[str, Any]) -> None:
    """Write config.yaml, and run.json with `facts` and where the run takes place."""
    settings = configuration.to_yaml(redaction.value(config.model_dump(mode="json")))
    files.write_durable(run_dir / "config.yaml", settings.encode())
    document = {**redaction.value(facts), "provenance": provenance.collect()}
    files.write_durable(run_dir / "run.json", json.dumps(document, indent=2).encode() + b"\n")


def find_start(config: TrainConfig, run_dir: Path, events: LineLog) -> Path | None:
    """Clear away what a kill has left, and choose the checkpoint to go on from; damaged ones are told."""

    def tell(path: Path, problems: list[str]) -> None:
        print(f"damaged checkpoint, stepping back: {'; '.join(problems)}")
        event(events, "damaged checkpoint", str(path), problems=problems)

    for name in files.sweep(run_dir / run_folder.CHECKPOINTS) + files.sweep(run_dir):
        event(events, "sweep", name)
    return choose_checkpoint(config, run_dir, tell)


def cut_back(config: TrainConfig, metrics: LineLog, events: LineLog, state: checkpoint.TrainerState) -> None:
    """Bring metrics.ndjson to where it was when `state` was saved.

    Raises: UserError if lines are lost that tell which checkpoints are the best, because those would be deleted.
    """
    if config.checkpoint.keep_best and not logs.reaches(metrics.path, state.metrics_bytes):
        what = (
            f"{config.checkpoint.keep_best}, but the scores are lost: {metrics.path} is shorter than it was at step "
            f"{state.step}. Restore it from a copy, or say checkpoint.keep_best=0."
        )
        raise UserError(config.problem("checkpoint.keep_best", what))
    if not metrics.cut_back(state.metrics_bytes):
        event(events, "lost metrics", f"{metrics.path} is shorter than at step {state.step}")
        print(f"{metrics.path} is shorter than it was at step {state.step}: lines before it are lost")


def choose_checkpoint(config: TrainConfig, run_dir: Path, on_damaged: Callable[[Path, list[str]], None]) -> Path | None:
    """Where to go on from: `resume: auto` the newest whole checkpoint of this run, or None for a fresh start.

    `resume: PATH` of another run begins a branch; said again, it goes on with that branch.
    """
    steps = run_folder.steps_saved(run_dir)
    if config.resume == "never":
        if steps:
            what = f"never, but {run_dir} holds a run at step {steps[0]}. Choose another output_dir, or resume=auto."
            raise UserError(config.problem("resume", what))
        return None
    if config.resume != "auto" and (named := _named_checkpoint(config, run_dir, steps)):
        return named
    found = run_folder.newest_whole(run_dir, on_damaged)
    if found is None and steps:
        what = f"no checkpoint in {run_dir} is whole. Restore one from a copy, or choose another output_dir."
        raise UserError(config.problem("resume", what))
    if found is None and (start := run_folder.recorded_start(run_dir)):
        what = f"auto, but {run_dir} is a branch of {start}. Say resume={start} again, or choose another output_dir."
        raise UserError(config.problem("resume", what))
    return found


def _named_checkpoint(config: TrainConfig, run_dir: Path, steps: list[int]) -> Path | None:
    """The checkpoint that `resume` names; None if this run is a branch of it and has checkpoints of its own."""
    path = Path(config.resume)
    step = manifest.require(path, kinds=["checkpoint"], verify=config.verify, key="resume")["facts"].get("step")
    if not isinstance(step, int):
        raise UserError(f"{path / manifest.MANIFEST}: has no step among its facts. Take another checkpoint.")
    if run_folder.is_own(path, run_dir):
        if steps and steps[0] > step:
            what = f"is at step {step}, but {run_dir} goes to step {steps[0]}. Choose another output_dir for a branch."
            raise UserError(config.problem("resume", what))
        return path
    begun = bool(steps) or logs.length(run_dir / run_folder.METRICS) > 0
    if begun and files.sha256_file(path / manifest.MANIFEST) not in run_folder.recorded_parents(run_dir):
        what = f"is of another run, but {run_dir} holds a run already. Choose another output_dir for the branch."
        raise UserError(config.problem("resume", what))
    return None if steps else path


def prune(config: TrainConfig, run_dir: Path, events: LineLog) -> None:
    """Delete the checkpoints that the configuration does not keep; a disk that refuses is tried again next time."""
    try:
        if pruned := retention.prune(run_dir, config.checkpoint):
            event(events, "prune", ", ".join(pruned))
    except (OSError, UserError) as error:
        place = run_dir / run_folder.CHECKPOINTS
        event(events, "failed prune", f"{place}: {error}")
        print(f"warning: {place}: old checkpoints cannot be deleted ({error}). The next save tries again.")


# --- what stops a run -----------------------------------------------------------------------------------------------


def stands(saved_step: int) -> str:
    """Which checkpoint a run that stops now can go on from, as a sentence."""
    return f"The checkpoint of step {saved_step} stands." if saved_step >= 0 else "No checkpoint was written yet."


def how_to_go_on(reason: str) -> str:
    """What to do after a stop for `reason`, as a sentence."""
    if reason == "training.stop_at_step":
        return "Raise or remove training.stop_at_step to go on."
    return "Run the same command again to go on."


def on_failed_save(config: TrainConfig, events: LineLog, error: checkpoint.SaveFailed) -> None:
    """Note a save that failed; raises it again if it is to stop the run."""
    event(events, "failed save", str(error), policy=config.checkpoint.on_failed_save)
    if config.checkpoint.on_failed_save == "stop":
        raise error
    if cli.is_main_process():
        print(f"warning: {error}")


def on_nonfinite(config: TrainConfig, events: LineLog, *, step: int, grad_norm: float, saved_step: int) -> None:
    """Note a non-finite loss or gradient at `step`; raises UserError if it is to stop the run."""
    found = "the loss is not finite" if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"
    event(events, "skip", f"{found} at step {step}", policy=config.training.on_nonfinite)
    if config.training.on_nonfinite == "stop":
        what = (
            f"stop: {found} at step {step}. {stands(saved_step)} "
            "Lower optimizer.learning_rate, or say training.on_nonfinite=skip."
        )
        raise UserError(config.problem("training.on_nonfinite", what))


def on_error(config: TrainConfig, error: Exception, *, step: int, saved_step: int) -> NoReturn:
    """Raise UserError if `error` says that memory ran out (CUDA, CPU allocator or NumPy), else `error` itself."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        batch, length = config.training.micro_batch_size, config.data.block_size
        what = (
            f"{batch} sequences of {length} tokens do not fit into memory at step {step} "
            f"({redaction.words(text, 160)}). {stands(saved_step)} Lower training.micro_batch_size: the batch of a "
            "step stays training.global_batch_size, by more accumulation; name it in allow_drift to go on. If it was "
            "in an evaluation, lower evaluation.batch_size."
        )
        raise UserError(config.problem("training.micro_batch_size", what)) from error
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # in the backward pass
        raise compiler.refused(config, error) from error
    raise error


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The arrays of a batch as tensors on `device`."""
    arrays = {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}
    return {
        name: None if array is None else torch.from_numpy(array).to(device, non_blocking=True)
        for name, array in arrays.items()
    }


# --- words ----------------------------------------------------------------------------------------------------------


def _threads(facts: dict[str, Any]) -> str:
    """How many threads a CPU process computes with, and what set it, because launchers set it to one."""
    if facts["device"].partition(":")[0] != "cpu":
        return ""
    set_by = f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})" if "OMP_NUM_THREADS" in os.environ else ""
    return f", {torch.get_num_threads()} threads each{set_by}"


def print_start(config: TrainConfig, facts: dict[str, Any]) -> None:
    """What is about to run, on a few lines."""
    blocks, sequences, size = facts["blocks"], config.training.global_batch_size, config.data.block_size
    alone = config.data.packing == "group_by_length"
    laid = f"{'rows of at most' if alone else 'blocks of'} {size}"
    fed = f"{sequences:,} rows" if alone else f"{sequences * size:,} tokens"
    print(
        f"model   {facts['num_parameters']:,} parameters, {facts['num_trainable_parameters']:,} train\n"
        f"data    {blocks['num_tokens']:,} tokens in {blocks['num_blocks']:,} {laid}, {blocks['padding_tokens']:,} "
        f"places of padding, {blocks['documents_cut']:,} documents cut\n"
        f"run     {facts['max_steps']:,} steps of {fed}, "
        f"{facts['max_steps'] / facts['steps_per_epoch']:.2f} epochs, accumulation {facts['accumulation_steps']}\n"
        f"engine  {facts['num_processes']} x {facts['device']}, {facts['engine']}, mixed precision "
        f"{facts['mixed_precision']}{_threads(facts)}"
    )
    if lost := blocks.get("tokens_dropped"):
        what = f"{blocks['num_over_long']:,} of {blocks['num_documents']:,} documents are longer than {size}"
        print(f"note    {what}: {config.data.overlong} leaves out {lost:,} tokens")
    if facts["loss"]["note"]:
        print(f"loss    {facts['loss']['note']}")
    warmup = facts["schedule"]["warmup_steps"]
    if warmup >= facts["max_steps"]:
        print(f"note    warm-up takes {warmup} steps, so the learning rate never reaches its peak")


def print_end(run_dir: Path, state: checkpoint.TrainerState, digest: str) -> None:
    """The last losses and where everything lies."""
    lines = [json.loads(line.text) for line in logs.read(run_dir / run_folder.METRICS)]
    for split in dict.fromkeys(line["split"] for line in lines):
        values = [line for line in lines if line["split"] == split][-1]
        print(f"{split:<12} loss {float(values['loss']):.4f} at step {values['step']}")
    if state.end_reason:
        print(f"ended    by {state.end_reason}")
    skipped = f", {state.num_skipped} of them without an update" if state.num_skipped else ""
    print(f"done     {state.step} steps{skipped}, {state.num_target_tokens:,} target tokens in {state.elapsed_s:.0f} s")
    print(f"model    {run_dir / run_folder.FINAL}\nmanifest {digest}")
