"""The identity of a run: all that a checkpoint must share with the run that goes on from it.

Rule: a difference is told, in one table, and never taken over in silence. Paths, logging and saving may change freely.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codex_accel import config as configuration
from codex_accel import files, manifest, redaction, run_folder
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.train_schema import TrainConfig

SETTINGS = {
    "training": (
        "micro_batch_size", "global_batch_size", "max_grad_norm", "on_nonfinite", "max_steps", "max_epochs",
        "max_tokens", "deterministic", "loss_chunk_rows", "compile", "tf32",
    ),
    "data": ("train_split", "block_size", "packing", "overlong", "isolate_documents"),
}  # fmt: skip
MODEL = ("attention", "dtype", "quantization")
LIBRARIES = ("torch", "transformers", "accelerate")  # whose major version may change the numbers


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration, as plain values, that enters the identity, masked as in manifests."""
    whole = {name: settings[name] for name in ("seed", "optimizer", "schedule", "peft")}
    whole |= {section: {key: settings[section][key] for key in keys} for section, keys in SETTINGS.items()}
    return dict(redaction.value(whole))


def of(
    config: TrainConfig,
    dataset_manifest: dict[str, Any],
    parents: list[dict[str, Any]],
    model: Any,
    *,
    mixed_precision: str,
) -> dict[str, Any]:
    """The identity as plain JSON values; `parents` are dataset, tokenizer and, if any, the model started from."""
    architecture = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        architecture.pop(name, None)
    document = {
        **decisive(config.model_dump(mode="json")),
        "dataset": dataset_manifest["content_digest"],
        "tokenizer": parents[1]["content_digest"],
        "model": {
            "start": [p["content_digest"] for p in parents[2:]],
            **{name: getattr(config.model, name) for name in MODEL},
            "architecture": architecture,
        },
        "mixed_precision": mixed_precision,
        "libraries": {name: importlib.metadata.version(name).partition(".")[0] for name in LIBRARIES},
    }
    return json.loads(json.dumps(document, default=str))


def differences(before: dict[str, Any], now: dict[str, Any], *, allowed: list[str]) -> list[tuple[str, Any, Any]]:
    """(key, before, now) where two identities differ, leaving out allowed keys and what lies below them."""
    found = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if key in allowed or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            below = [name.removeprefix(f"{key}.") for name in allowed if name.startswith(f"{key}.")]
            found += [(f"{key}.{name}", *values) for name, *values in differences(old, new, allowed=below)]
        else:
            found.append((key, old, new))
    return found


def require_same(place: Path, before: dict[str, Any], now: dict[str, Any], *, allowed: list[str]) -> None:
    """Raise UserError with a table of all differences that `allowed` does not name."""
    if not (differing := differences(before, now, allowed=allowed)):
        return
    rows = [("key", "then", "now"), *((key, _shown(old), _shown(new)) for key, old, new in differing)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    raise UserError(
        f"{place}: was made with other settings, so going on from it would not be the same run.",
        *(f"  {key:<{first}}   {old:<{second}}   {new}" for key, old, new in rows),
        "Put them back, name each in allow_drift, or choose another output_dir.",
    )


def _shown(value: Any) -> str:
    text = "null" if value is None else redaction.text(str(value))
    return text if len(text) <= 64 else f"{text[:61]}..."


def is_complete(config: TrainConfig, run_dir: Path) -> bool:
    """Whether `final` stands and was made with these settings and contents, from the checkpoint that `resume` names.

    A dataset or a start that is no longer there is not compared: a run that is complete may outlive them.

    Raises: UserError with the differences if it was made with others that `allow_drift` does not name.
    """
    final = run_dir / run_folder.FINAL
    if config.resume == "never" or not (final / manifest.CONFIG).is_file():
        return False
    if config.resume != "auto":
        branched = Path(config.resume) / manifest.MANIFEST
        if not branched.is_file() or files.sha256_file(branched) not in run_folder.recorded_parents(run_dir):
            return False
    saved = configuration.load(TrainConfig, path=final / manifest.CONFIG)
    recorded = [record["content_digest"] for record in manifest.read(final)["parents"]]  # dataset, tokenizer, start
    start = recorded[2:3] if saved.model.path is not None else []
    before = _outline(saved, dataset=recorded[0], start=start)
    if config.model.path is None:
        start = []
    elif content := _content(config.model.path):
        start = [content]
    after = _outline(config, dataset=_content(config.data.dataset) or recorded[0], start=start)
    require_same(run_dir, before, after, allowed=config.allow_drift)
    return before == after


def _outline(config: TrainConfig, *, dataset: str, start: list[str]) -> dict[str, Any]:
    """What can be told of an identity before anything heavy is imported, under the same names."""
    settings = config.model_dump(mode="json")
    model = {name: settings["model"][name] for name in MODEL} | {"start": start}
    model["architecture"] = settings["model"]["config"]
    return {**decisive(settings), "dataset": dataset, "model": redaction.value(model)}


def _content(path: str) -> str | None:
    """Digest of the content of a dataset, or of the model that `model.path` names; None if it is not there."""
    folder = Path(path)
    if manifest.holds_model(folder / run_folder.FINAL):
        folder /= run_folder.FINAL
    return manifest.as_parent(folder)["content_digest"] if folder.is_dir() else None


def require_known_drift(config: TrainConfig, identity: dict[str, Any]) -> None:
    """Raise UserError if `allow_drift` names something that is not part of a run's identity."""
    names = list(_names(identity))
    short = [name for name in names if name.count(".") < 2]  # a model's configuration has some fifty more
    unknown = {name: names if name.count(".") > 1 else short for name in config.allow_drift if name not in names}
    if unknown:
        problems = (f"{name!r}: no such key. {did_you_mean(name, choices)}" for name, choices in unknown.items())
        raise UserError(*(config.problem("allow_drift", problem) for problem in problems))


def _names(identity: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in identity.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
