"""Where a run starts from: a local folder of weights, named by path or by an alias.

Rule: an alias is resolved before anything else, so what is recorded is what was used, and the configuration that is
saved needs no file of aliases. Nothing here imports torch, looks into the network, or runs code of a model folder.
"""

import json
import os
from pathlib import Path
from typing import Any

from codex_accel import config as configuration
from codex_accel import manifest, redaction, run_folder
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.train_schema import TrainConfig
from codex_accel.yaml_reader import KeyPath, Reader, dotted

KEYS = ("path", "dtype", "attention", "quantization")  # of an alias; `notes` are for people
CONFIG, WEIGHTS, INDEX = "config.json", "*.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # beside weights of an adapter, which have no config.json
COPY = "Copy the model's config.json, *.safetensors and tokenizer.json there."


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with `model.alias` replaced by what the file of aliases says of it; keys that were given win.

    Each value taken over has its line in that file as its origin. Paths there are relative to the current folder, as in
    every configuration; `~` is the home folder.

    Raises: UserError for a file, an alias or a value that is not right, for a precision that does not go together, and
    for a secret where it cannot be masked.
    """
    if config.model.alias is not None:
        config = _without_alias(config, config.model.alias)
    precision = config.training.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.model.dtype == "bfloat16" and precision == "fp16":
        what = "bfloat16, but mixed precision is fp16, whose gradient scaler takes float32 weights only. "
        raise UserError(config.problem("model.dtype", f"{what}Say training.mixed_precision=bf16, or dtype float32."))
    for key, given in (("model.config", config.model.config), ("peft", config.peft)):
        if redaction.value(given) != given:
            what = "holds a secret, and libraries write it into checkpoints as it stands. Remove it."
            raise UserError(config.problem(key, what))
    return config


def _without_alias(config: TrainConfig, alias: str) -> TrainConfig:
    """The configuration read anew with the entry's values in its section `model`."""
    entries, origins = aliases(config)
    if alias not in entries:
        what = f"{alias!r} is no model of '{config.model.aliases}'. {did_you_mean(alias, entries)}"
        raise UserError(config.problem("model.alias", what))
    values = config.model_dump(exclude_unset=True)
    merged = {path: origin for path, origin in config._origins.items() if path != ("model", "alias")}
    del values["model"]["alias"]
    for key in KEYS:
        if key in entries[alias] and key not in config.model.model_fields_set:
            value = entries[alias][key]
            values["model"][key] = os.path.expanduser(value) if key == "path" and isinstance(value, str) else value
            merged[("model", key)] = origins[(alias, key)]
    return configuration.build(TrainConfig, values, merged, [])


def aliases(config: TrainConfig) -> tuple[dict[str, dict[str, Any]], dict[KeyPath, str]]:
    """The entries of the file `model.aliases` by name, their keys known, and the origin of each value.

    Raises: UserError with all problems: a file that is not there or not YAML, unknown keys, an entry without a path.
    """
    path = Path(config.model.aliases)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        what = f"'{path}' cannot be read ({reason}). Run from the folder that it lies in, or give its path."
        raise UserError(config.problem("model.aliases", what)) from error
    reader = Reader(str(path), with_lines=True)
    entries = reader.read(text)
    problems = reader.problems
    if not isinstance(entries, dict):
        raise UserError(*problems, f"{path}:1: must be a mapping of names to models. See configs/models.yaml.")
    for name, entry in entries.items():
        where = reader.origins[(name,)]
        if not isinstance(entry, dict):
            problems.append(f"{where}: {name}: must be a mapping with a path, not {type(entry).__name__}.")
            continue
        if not isinstance(entry.get("path"), str) or not entry["path"]:
            problems.append(f"{where}: {name}: has no path. Give the local folder of the model.")
        for key in sorted(entry.keys() - {*KEYS, "notes"}):
            what = f"unknown key of a model. {did_you_mean(key, (*KEYS, 'notes'))}"
            problems.append(f"{reader.origins[(name, key)]}: {dotted((name, key))}: {what}")
    if problems:
        raise UserError(*problems)
    return entries, reader.origins


def find(config: TrainConfig) -> Path | None:
    """The verified folder that the weights come from; None for random weights.

    Raises: UserError that says which path was looked for, and what to copy there, if the folder or a file is missing.
    """
    if config.model.path is None:
        return None
    path = Path(config.model.path)
    if missing := _missing(path):
        raise UserError(config.problem("model.path", f"'{path}' {missing} Looked for {path.absolute()}."))
    return manifest.find_model(path, verify=config.verify, key="model.path")


def _missing(path: Path) -> str:
    """What of a model is not in the folder, and what to do, in words; empty if it is all there."""
    folder = path / run_folder.FINAL if (path / run_folder.FINAL).is_dir() else path
    if not folder.is_dir():
        return f"is no folder. {COPY}"
    if not (folder / CONFIG).is_file() and not (folder / ADAPTER).is_file():
        if (path / run_folder.CHECKPOINTS).is_dir():
            return f"is a run that has not ended. Name one of its {run_folder.CHECKPOINTS}, or run it to its end."
        return f"has no {CONFIG}. {COPY}"
    if not any(folder.glob(WEIGHTS)):
        return f"has no {WEIGHTS} (pickled weights, *.bin or *.pt, are not loaded). {COPY}"
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        lost = sorted(name for name in names if not (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""  # there is none, or model.load tells what is wrong with it
    return f"lacks {', '.join(lost[:3])}, named in {INDEX}. Copy there all {len(names)} files of it." if lost else ""
