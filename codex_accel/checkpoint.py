"""Checkpoints of a run: Accelerate's `save_state` and `load_state` inside an envelope that nothing can half-write.

Rule: a folder named `step-N` is always whole. It is filled under a temporary name, hashed, flushed to the disk and
renamed; older ones go only after that. Each is also a `from_pretrained` folder, so any of them can be evaluated or
served.

The random states that Accelerate writes are left out: every draw comes from (seed, step, micro-batch), and the file is
a pickle.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_model

from codex_accel import files, manifest, tokenizer
from codex_accel.config import StageConfig
from codex_accel.errors import UserError

FOLDER, TRAINER_STATE = "checkpoints", "trainer_state.json"
NAME = re.compile(r"step-(\d{9})")


@dataclass
class TrainerState:
    """All that the loop remembers besides weights and optimizer; everything else is a function of the step."""

    step: int = 0  # optimizer steps taken
    num_target_tokens: int = 0  # trained on so far
    num_skipped: int = 0  # steps without an update, for a non-finite gradient
    elapsed_s: float = 0.0  # training time, restarts included
    metrics_bytes: int = 0  # length of metrics.ndjson


def register_hooks(accelerator: Accelerator) -> None:
    """Store weights under the names of the bare model, so that one process can load what two have saved."""

    def save(models: list[torch.nn.Module], weights: list[dict[str, Any]], _: str) -> None:
        weights[:] = [_without_shared(accelerator.get_state_dict(model, unwrap=True)) for model in models]

    def load(models: list[torch.nn.Module], folder: str) -> None:
        while models:
            load_model(accelerator.unwrap_model(models.pop()), Path(folder, "model.safetensors"))

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


def path_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return run_dir / FOLDER / f"step-{step:09d}"


def save(
    accelerator: Accelerator,
    run_dir: Path,
    state: TrainerState,
    *,
    model: Any,
    config: StageConfig,
    tokenizer_folder: Path,
    parents: list[dict[str, Any]],
    identity: dict[str, Any],
    keep_last: int,
) -> list[str]:
    """Write the checkpoint of `state.step`, then prune to the newest `keep_last`; returns the names pruned.

    Every process must call this. `model` is the bare model, whose configuration goes in.
    """
    final = path_of(run_dir, state.step)
    needed = 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if (free := shutil.disk_usage(run_dir).free) < needed:
        raise UserError(f"{final}: needs about {needed:,} bytes, {free:,} are free. Make room; the older ones stand.")
    [pid] = broadcast_object_list([os.getpid()])
    temporary = final.with_name(f"{files.TEMPORARY_PREFIX}{final.name}-{pid}")
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    pruned: list[str] = []
    if accelerator.is_main_process:
        for path in temporary.glob("random_states_*.pkl"):
            path.unlink()
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        copy_tokenizer(tokenizer_folder, temporary)
        payload = files.list_files(temporary)
        text = json.dumps({**asdict(state), "identity": identity}, indent=2)
        (temporary / TRAINER_STATE).write_text(text + "\n", encoding="utf-8")
        facts = {"step": state.step, "num_target_tokens": state.num_target_tokens}
        manifest.seal(
            temporary, kind="checkpoint", final=final, payload=payload, config=config, parents=parents, facts=facts
        )
        if final.exists():  # a broken one that resuming has stepped back over
            files.remove_folder(final)
        os.rename(temporary, final)
        files.fsync_path(final.parent)
        point_latest(final)
        pruned = prune(run_dir, keep_last=keep_last)
    accelerator.wait_for_everyone()
    return pruned


def point_latest(final: Path) -> None:
    """Let the link `latest` lead to `final`: for people; the toolkit itself goes by the folders' names."""
    link = final.with_name(f"{files.TEMPORARY_PREFIX}latest-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.with_name("latest"))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer's files into a model folder, so that it loads on its own."""
    for name in tokenizer.FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def steps_saved(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first; the names decide, not their contents."""
    found = (NAME.fullmatch(path.name) for path in (run_dir / FOLDER).glob("step-*"))
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def prune(run_dir: Path, *, keep_last: int) -> list[str]:
    """Delete all but the newest `keep_last` checkpoints; returns their names."""
    old = [path_of(run_dir, step) for step in steps_saved(run_dir)[keep_last:]]
    for path in old:
        files.remove_folder(path)
    return [path.name for path in old]


def newest_whole(run_dir: Path, on_rejected: Callable[[Path, list[str]], None]) -> Path | None:
    """The newest checkpoint whose manifest verifies; each broken one is told to `on_rejected` and skipped."""
    for step in steps_saved(run_dir):
        path = path_of(run_dir, step)
        if not (problems := manifest.problems_of(path)):
            return path
        on_rejected(path, problems)
    return None


def load(accelerator: Accelerator, folder: Path) -> tuple[TrainerState, dict[str, Any]]:
    """Bring model and optimizer to the checkpoint in `folder`; returns the state and the identity it was saved with.

    Raises: UserError for a pickle that Accelerate would run.
    """
    if pickles := sorted(folder.glob("*.pkl")):
        raise UserError(f"{pickles[0]}: is a pickle, which can run code when loaded. Remove this checkpoint.")
    stored = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    identity = stored.pop("identity")
    accelerator.load_state(str(folder))
    accelerator.step = 0  # of its accumulation window
    return TrainerState(**stored), identity


def differences(before: dict[str, Any], now: dict[str, Any], *, allowed: list[str], prefix: str = "") -> list[str]:
    """Lines `key: before -> now` where two identities differ, leaving out allowed keys and what lies below them."""
    lines = []
    for key in sorted(set(before) | set(now)):
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if name in allowed or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, allowed=allowed, prefix=f"{name}.")
        else:
            lines.append(f"{name}: {old!r} -> {new!r}")
    return lines
