"""What one training run is: its folder, its length, its identity, its ancestors, and what it says.

Rule: a run is the same run only if its identity is; a difference is told, never taken over in silence. The loop itself
stands in `scripts/train.py`.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from codex_accel import checkpoint, files, manifest
from codex_accel import tokenizer as tokenizers
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.events import LineLog, event
from codex_accel.packing import Batch
from codex_accel.schema import TrainConfig
from codex_accel.yaml_reader import read_yaml

# What must be equal for a checkpoint to belong to the same run; paths, logging and saving may change freely.
LOCK = ".lock"
SECTIONS = ("seed", "model", "data", "training", "optimizer", "schedule")
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


def make_folder(run_dir: Path) -> Any:
    """Make the run folder and lock it; the lock lasts as long as the returned file is open, or the process lives.

    Raises: UserError before anything expensive if it cannot be written to, or another process trains in it.
    """
    try:
        (run_dir / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        files.write_durable(run_dir / checkpoint.FOLDER / ".tmp-probe", b"")
        (run_dir / checkpoint.FOLDER / ".tmp-probe").unlink()
        lock = open(run_dir / LOCK, "a+")  # noqa: SIM115  kept open for as long as the run lasts
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"output_dir = '{run_dir}': another process trains in it. Wait for it, or choose another."
        ) from error
    except OSError as error:
        raise UserError(
            f"output_dir = '{run_dir}': cannot be written ({error.strerror}). Choose another folder."
        ) from error
    return lock


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


def require_same_tokenizer(model: Path, dataset: Path, *, key: str) -> None:
    """Raise UserError if the dataset was made with another tokenizer than the one beside the model."""
    folder = tokenizer_folder(dataset, manifest.read(dataset), verify=True)
    if tokenizers.digest(folder) != tokenizers.digest(model):
        raise UserError(
            f"{key} = '{dataset}': was made with the tokenizer in '{folder}', which is not the one in '{model}', so "
            "its ids mean other text to the model. Score the raw text with file.path, or prepare the data again."
        )


def parents(dataset: Path, tokenizer: Path, start: Path | None) -> list[dict[str, Any]]:
    """Records of what the model comes from: dataset, tokenizer, and the folder that it started from, if any."""
    return [manifest.as_parent(folder) for folder in (dataset, tokenizer, start) if folder is not None]


def branch_parents(chosen: Path, run_dir: Path) -> list[dict[str, Any]]:
    """The checkpoint of another run that this run branched from: `chosen`, or what `chosen` itself recorded."""
    if not is_own(chosen, run_dir):
        return [manifest.as_parent(chosen)]
    records = [record for record in manifest.read(chosen)["parents"] if record["kind"] == "checkpoint"]
    return [{**record, "path": os.path.normpath(chosen / record["path"])} for record in records]


def is_own(checkpoint_dir: Path, run_dir: Path) -> bool:
    """Whether a checkpoint lies in this run's folder."""
    return checkpoint_dir.resolve().parent == (run_dir / checkpoint.FOLDER).resolve()


def is_complete(config: TrainConfig, run_dir: Path) -> bool:
    """Whether `final` stands and was made with these settings.

    Raises: UserError with the differences if it was made with others that `allow_drift` does not name.
    """
    if config.resume != "auto" or not (run_dir / "final" / manifest.CONFIG).exists():
        return False
    saved, _, _ = read_yaml(run_dir / "final" / manifest.CONFIG)
    now = config.model_dump(mode="json")
    before, after = ({key: values[key] for key in SECTIONS} for values in (saved, now))
    require_same(run_dir, before, after, allowed=config.allow_drift)
    return before == after


def require_same(place: Path, before: dict[str, Any], now: dict[str, Any], *, allowed: list[str]) -> None:
    """Raise UserError with a line for each difference that `allowed` does not name."""
    if differing := checkpoint.differences(before, now, allowed=allowed):
        raise UserError(
            f"{place}: was made with other settings, so going on from it would not be the same run.",
            *(f"  {line}" for line in differing),
            "Put them back, name each in allow_drift, or choose another output_dir.",
        )


def require_known_drift(config: TrainConfig, identity: dict[str, Any]) -> None:
    """Raise UserError if `allow_drift` names something that is not part of a run's identity."""
    names = list(_names(identity))
    unknown = [name for name in config.allow_drift if name not in names]
    if unknown:
        raise UserError(
            *(config.problem("allow_drift", f"{n!r}: no such key. {did_you_mean(n, names)}") for n in unknown)
        )


def _names(identity: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in identity.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and prefix.count(".") < 1:
            yield from _names(value, f"{prefix}{key}.")


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
        "model": {"start": [p["content_digest"] for p in parents[2:]], "architecture": architecture},
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
        if not is_own(path, run_dir) and (run_dir / "metrics.ndjson").stat().st_size:
            what = f"is of another run, but {run_dir} holds a run already. Choose another output_dir for the branch."
            raise UserError(config.problem("resume", what))
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
    warmup = facts["schedule"]["warmup_steps"]
    if warmup >= facts["max_steps"]:
        print(f"note    warm-up takes {warmup} steps, so the learning rate never reaches its peak")


def print_end(run_dir: Path, state: checkpoint.TrainerState, digest: str) -> None:
    """The last losses and where everything lies."""
    lines = [json.loads(line) for line in (run_dir / "metrics.ndjson").read_text(encoding="utf-8").splitlines()]
    for split in dict.fromkeys(line["split"] for line in lines):
        values = [line for line in lines if line["split"] == split][-1]
        print(f"{split:<12} loss {values['loss']:.4f} at step {values['step']}")
    print(f"done     {state.step} steps, {state.num_target_tokens:,} target tokens in {state.elapsed_s:.0f} s")
    print(f"model    {run_dir / 'final'}\nmanifest {digest}")
