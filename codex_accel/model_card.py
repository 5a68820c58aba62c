"""The model card of an exported model: what its manifests record of where it comes from.

Rule: a number is here only if a manifest holds it; nothing is measured or guessed, and the licence is left to people.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from codex_accel import __version__, files, manifest


def text(name: str, folders: Sequence[Path], *, model_type: str, num_parameters: int, dtype: str) -> str:
    """The card in Markdown. `folders` is what was exported: a model, or an adapter and its bases down to the model."""
    named = [*zip(_kinds(folders), folders, strict=True), *(("dataset", path) for path in _datasets(folders))]
    rows = [f"| {kind} | {_name(path)} | {manifest.as_parent(path)['content_digest']} |" for kind, path in named]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {name}",
            "",
            f"A {model_type} model with {num_parameters:,} parameters in {dtype}, by codex-accel {__version__}.",
            "",
            "## Made from",
            "",
            "| what | name | SHA-256 of its content |",
            "|---|---|---|",
            *rows,
            "",
            "The whole chain, back to the raw files: `python scripts/verify.py FOLDER --recursive`.",
            "",
            "## Data and training",
            "",
            *([f"- {line}" for line in (*_trainings(folders), *_splits(folders))] or ["Not recorded."]),
            "",
            "## License",
            "",
            "Not stated. It must agree with those of the base and of the data.",
            "",
        ]
    )


def _kinds(folders: Sequence[Path]) -> list[str]:
    return [*["adapter"] * (len(folders) - 1), "base" if len(folders) > 1 else "model"]


def _name(folder: Path) -> str:
    """The last part of a folder's path, or the last two if a run has named it."""
    folder = folder.resolve()
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}/{folder.name}"
    return f"{folder.parent.name}/{folder.name}" if folder.name == "final" else folder.name


def _manifests(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    return ((folder, manifest.read(folder)) for folder in folders if (folder / manifest.MANIFEST).exists())


def _datasets(folders: Sequence[Path]) -> list[Path]:
    """The datasets that the manifests name and that are still there, unchanged; each once."""
    found = []
    for folder, document in _manifests(folders):
        for record in document["parents"]:
            path = Path(os.path.normpath(folder / record["path"]))
            there = record["kind"] == "dataset" and (path / manifest.MANIFEST).is_file()
            if there and files.sha256_file(path / manifest.MANIFEST) == record["manifest_digest"]:
                found.append(path)
    return list(dict.fromkeys(found))


def _trainings(folders: Sequence[Path]) -> Iterator[str]:
    """A line a folder that a run has made: its steps and last metrics."""
    for folder, document in _manifests(folders):
        facts = document["facts"]
        if "step" in facts:
            yield f"{_name(folder)}: {facts['step']:,} steps"
        for split, values in facts.get("metrics", {}).items():
            shown = [f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)]
            yield f"{_name(folder)}, {split} at step {values['step']:,}: {', '.join(shown)}"


def _splits(folders: Sequence[Path]) -> Iterator[str]:
    """A line a split of each dataset: its records and tokens."""
    for path in _datasets(folders):
        for split, facts in manifest.read(path)["facts"]["splits"].items():
            yield f"{_name(path)}, {split}: {facts['num_records']:,} records, {facts['num_tokens']:,} tokens"
