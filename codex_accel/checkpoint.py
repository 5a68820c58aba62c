"""Checkpoints of a run: Accelerate's `save_state` and `load_state` inside an envelope that nothing can half-write.

Rule: a folder named `step-N` is always whole. It is filled under a temporary name, hashed, flushed to the disk and
renamed; older ones go only after that. Each is also a `from_pretrained` folder, or an adapter that names its base, so
any of them can be evaluated or served. Of a model with an adapter, only what trains is stored.

The random states that Accelerate writes are left out: every draw comes from (seed, step, micro-batch), and the file is
a pickle.
"""

import errno
import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model

from codex_accel import adapters, events, files, manifest, redaction, run_folder, tokenizer
from codex_accel.errors import UserError
from codex_accel.events import LineLog
from codex_accel.train_schema import TrainConfig

TRAINER_STATE = "trainer_state.json"
BUILT_WITH = ("weight_decay", "rate_scale", "betas", "eps", "momentum")  # of a parameter group, from the configuration
OTHER_MODEL = "Put the model back, or choose another output_dir."
SUMMARY = ("step", "loss", "perplexity", "bits_per_byte", "token_accuracy")  # of a line of metrics, for the manifest
DAMAGED = "Restore the checkpoint from a copy, or delete it to go on from an older one."


class SaveFailed(UserError):
    """A checkpoint could not be written; the run's other checkpoints stand."""


@dataclass
class TrainerState:
    """All that the loop remembers besides weights and optimizer; everything else is a function of the step."""

    step: int = 0  # optimizer steps taken
    num_target_tokens: int = 0  # trained on so far
    num_skipped: int = 0  # steps without an update, for a non-finite gradient
    elapsed_s: float = 0.0  # training time, restarts included
    metrics_bytes: int = 0  # length of metrics.ndjson, of all its files
    evaluated_step: int = -1  # the last one whose evaluation stands in it
    end_reason: str = ""  # why a callback has ended the run early
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each of them remembers, as JSON


def register_hooks(accelerator: Accelerator) -> None:
    """Store weights under the names of the bare model, so that one process can load what two have saved.

    Of a model with an adapter, the adapter's two files are stored, and Accelerate is given nothing more to write. FSDP
    and DeepSpeed store sharded states of their own, which are left as they are.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return

    def save(models: list[torch.nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        bare = [accelerator.unwrap_model(model) for model in models]
        if not any(map(adapters.is_adapted, bare)):
            weights[:] = [_without_shared(accelerator.get_state_dict(model, unwrap=True)) for model in models]
            return
        weights.clear()
        if accelerator.is_main_process:
            adapters.write(bare[0], Path(folder))

    def load(models: list[torch.nn.Module], folder: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            path = Path(folder, adapters.WEIGHTS if adapters.is_adapted(model) else "model.safetensors")
            try:
                adapters.read(model, path.parent) if adapters.is_adapted(model) else load_model(model, path)
            except (OSError, SafetensorError, RuntimeError, ValueError) as error:
                raise UserError(f"{path}: does not fit this model ({_reason(error)}). {OTHER_MODEL}") from error

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _without_shared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor under its first name only; a tied output head is restored by the model's own tying."""
    owners: dict[tuple[int, torch.Size], str] = {}
    return {
        name: tensor
        for name, tensor in weights.items()
        if tensor.numel() == 0 or owners.setdefault((tensor.data_ptr(), tensor.shape), name) == name
    }


def save(
    accelerator: Accelerator,
    run_dir: Path,
    state: TrainerState,
    *,
    model: Any,
    config: TrainConfig,
    log: LineLog,
    tokenizer_folder: Path,
    parents: list[dict[str, Any]],
    identity: dict[str, Any],
    write_state: Callable[[str], object] | None = None,
) -> None:
    """Write the checkpoint of `state.step`; older ones stay (`retention.prune` removes them afterwards).

    Every process must call this. `model` is the bare model, whose configuration goes in; `log` is metrics.ndjson.
    `write_state` fills a folder with weights and optimizer, together with the other processes; by default it is
    Accelerate's `save_state`, whatever the engine.

    Raises: SaveFailed on every process if the disk of one has not taken it; what stood before stands, whole.
    """
    final = run_folder.checkpoint_path(run_dir, state.step)
    main, needed = accelerator.is_main_process, expected_bytes(model)
    [pid] = broadcast_object_list([os.getpid()])
    temporary = final.with_name(f"{files.TEMPORARY_PREFIX}{final.name}-{pid}")

    def require_room() -> None:
        if shutil.disk_usage(final.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write() -> None:
        (write_state or accelerator.save_state)(str(temporary))

    def add_what_belongs_to_it() -> None:
        state.metrics_bytes = log.sync()
        for path in temporary.glob("random_states_*.pkl"):
            path.unlink()
        if not (temporary / adapters.CONFIG).exists():
            model.config.save_pretrained(temporary)
            model.generation_config.save_pretrained(temporary)
        let_others_read(temporary)
        copy_tokenizer(tokenizer_folder, temporary)
        text = json.dumps({**asdict(state), "identity": identity}, indent=2)
        (temporary / TRAINER_STATE).write_text(text + "\n", encoding="utf-8")

    def seal() -> None:
        facts = {
            "step": state.step,
            "num_target_tokens": state.num_target_tokens,
            "num_processes": accelerator.num_processes,
            "engine": accelerator.distributed_type.value,
            "device": accelerator.device.type,
            "num_threads": torch.get_num_threads(),
            **_base_facts(model, parents, temporary),
        }
        payload = [name for name in files.list_files(temporary) if name != TRAINER_STATE]
        manifest.seal(
            temporary,
            kind="checkpoint",
            final=final,
            payload=payload,
            config=config,
            parents=parents,
            facts=facts,
            known=digests,
        )
        files.take_name(temporary, final)
        if problems := manifest.problems_of_outline(final):
            os.rename(final, temporary)
            raise OSError(errno.EIO, "; ".join(problems))

    together = functools.partial(_together, accelerator, final, needed)
    try:
        together(require_room)
        together(write)
        together(add_what_belongs_to_it if main else _nothing)
        digests = {name: digest for share in together(_hash_share, temporary) for name, digest in share.items()}
        together(seal if main else _nothing)
    except SaveFailed:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)  # what cannot be removed is swept at the next start
        raise
    if main:
        run_folder.point_latest(final)


def save_final(
    run_dir: Path,
    *,
    model: Any,
    weights: dict[str, torch.Tensor],
    config: TrainConfig,
    tokenizer_folder: Path,
    parents: list[dict[str, Any]],
    facts: dict[str, Any],
) -> str:
    """Write `final`, a plain `from_pretrained` folder for everybody else; returns the digest of its manifest.

    Of a model with an adapter it is the adapter alone; `scripts/export_model.py` merges it into its base. The manifest
    gets the last value of each metric beside `facts`. The main process alone calls this. Raises: SaveFailed; the
    checkpoints stand.
    """
    final = run_dir / run_folder.FINAL
    try:
        with files.staged_folder(final, overwrite=True) as folder:
            if adapters.is_adapted(model):
                adapters.write(model, folder, weights)
            else:
                model.save_pretrained(folder, state_dict=weights)
            let_others_read(folder)
            copy_tokenizer(tokenizer_folder, folder)
            payload = files.list_files(folder)
            facts = {**facts, "metrics": _last_values(run_dir), **_base_facts(model, parents, folder)}
            return manifest.seal(
                folder, kind="model", final=final, payload=payload, config=config, parents=parents, facts=facts
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SaveFailed(_not_saved(final, expected_bytes(model), [_reason(error)])) from error


def _base_facts(model: Any, parents: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the manifest of an adapter says besides: its base and tokenizer by digest; nothing for other models."""
    if not adapters.is_adapted(model):
        return {}
    return {"adapter": adapters.facts(model, parents, tokenizer_digest=tokenizer.digest(folder))}


def _last_values(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The last line of metrics.ndjson of each split, without what the clock says."""
    lines = [json.loads(line.text) for line in events.read(run_dir / run_folder.METRICS)]
    return {line["split"]: {key: line[key] for key in SUMMARY if key in line} for line in lines if "split" in line}


def let_others_read(folder: Path) -> None:
    """Give weights the mode of the other files: safetensors 0.8 makes them readable to their owner alone."""
    config = next(path for path in (folder / "config.json", folder / adapters.CONFIG) if path.exists())
    for path in folder.glob("*.safetensors"):
        shutil.copymode(config, path)


def _nothing() -> None:
    """What the other processes do while the main process writes."""


def _together(
    accelerator: Accelerator, final: Path, needed: int, work: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """Results of `work` of all processes, in their order. Raises SaveFailed on all if it failed on any."""
    cause: Exception | None = None
    result, reason = None, ""
    try:
        result = work(*arguments)
    except (OSError, UserError, RuntimeError, SafetensorError) as error:  # torch tells a full disk by a RuntimeError
        cause, reason = error, _reason(error)
    outcomes = gather_object([(result, reason)])
    if reasons := [f"process {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason]:
        raise SaveFailed(_not_saved(final, needed, reasons)) from cause
    return [result for result, _ in outcomes]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return redaction.words(error, 200)


def _not_saved(final: Path, needed: int, reasons: list[str]) -> str:
    try:
        free = f"{shutil.disk_usage(final.parent).free:,}"
    except OSError:  # the folder is gone, or its disk does not answer
        free = "an unknown number"
    return (
        f"{final}: was not saved ({'; '.join(reasons)}). It needs about {needed:,} bytes, {free} are free. Older "
        "checkpoints stand. Mend the disk or make room, and run the same command again."
    )


def expected_bytes(model: torch.nn.Module) -> int:
    """Size of a checkpoint of `model` with AdamW: its weights, two moments of what trains, 1 MiB for the rest.

    Of a model with an adapter, the weights are what trains.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return (trainable if adapters.is_adapted(model) else weights) + 2 * trainable + (1 << 20)


def _hash_share(folder: Path) -> dict[str, str]:
    """Digests of this process's share of the files in `folder`, which it has forced to the disk."""
    process = PartialState()
    names = sorted(files.list_files(folder), key=lambda name: (-(folder / name).stat().st_size, name))
    mine = names[process.process_index :: process.num_processes]
    return dict(zip(mine, files.flush_and_hash([folder / name for name in mine]), strict=True))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer's files into a model folder, so that it loads on its own."""
    for name in tokenizer.FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def load(
    accelerator: Accelerator,
    folder: Path,
    *,
    options: Iterable[str] = (),
    read_state: Callable[[str], object] | None = None,
) -> None:
    """Bring model and optimizer to the checkpoint in `folder`; `read_state` is the counterpart of `write_state`.

    What the optimizer was built with stays, so that a setting that `allow_drift` names has its effect; `options` are
    the names of a plug-in's own.

    Raises: UserError for a pickle that Accelerate would run, and for weights or moments that do not fit.
    """
    made, now = manifest.read(folder)["facts"].get("engine"), accelerator.distributed_type.value
    if made != now and {made, now} & {"FSDP", "DEEPSPEED"}:
        raise UserError(f"{folder}: was saved under the engine {made}, which {now} cannot read. Launch it as before.")
    if pickles := sorted(folder.glob("*.pkl")):
        raise UserError(f"{pickles[0]}: is a pickle, which can run code when loaded. {DAMAGED}")
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    built = [{name: group[name] for name in (*BUILT_WITH, *options) if name in group} for group in groups]
    try:
        (read_state or accelerator.load_state)(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing. {DAMAGED}") from error
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:  # torch's own words advise to load it without care
        raise UserError(f"{folder}: the optimizer state (optimizer.bin) holds more than numbers. {DAMAGED}") from error
    except Exception as error:  # of a file that is no optimizer state, each its own kind
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise UserError(
            f"{folder}: the optimizer state (optimizer.bin) does not fit ({reason}). {OTHER_MODEL}"
        ) from error
    loaded = (group for optimizer in accelerator._optimizers for group in optimizer.param_groups)
    for group, values in zip(loaded, built, strict=True):
        group.update(values)
    accelerator.step = 0  # of its accumulation window


def stored_state(folder: Path) -> tuple[TrainerState, dict[str, Any]]:
    """The numbers of trainer_state.json and the identity. Raises UserError if a number is missing, odd or unknown."""
    path = folder / TRAINER_STATE
    wanted = {name: type(value) for name, value in asdict(TrainerState()).items()}
    try:
        stored = json.loads(path.read_bytes())
        identity = stored.pop("identity")
        right = {name: type(value) for name, value in stored.items()} == wanted and isinstance(identity, dict)
        numbers = {name: value for name, value in stored.items() if isinstance(value, int | float)}
        right = right and numbers.pop("evaluated_step") >= -1
        right = right and all(0 <= value < 1 << 63 for value in numbers.values())  # false for NaN too
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{path}: does not hold {', '.join(wanted)} and identity. {DAMAGED}")
    return TrainerState(**stored), identity
