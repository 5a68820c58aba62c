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
    own = [manifest.as_parent(path) for path in folders]
    starts = _starts(folders, known={record["content_digest"] for record in own})
    made_of = [*folders, *(path for path, record in starts if _is_unchanged(path, record))]
    named = [*zip(_kinds(folders), folders, own, strict=True)]
    named += [("start", path, record) for path, record in starts]
    named += [("dataset", path, manifest.as_parent(path)) for path in _datasets(made_of)]
    rows = [f"| {kind} | {_name(path)} | {record['content_digest']} |" for kind, path, record in named]
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
            *([f"- {line}" for line in (*_trainings(made_of), *_splits(made_of))] or ["Not recorded."]),
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


def _parents(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The parents that the manifest of `folder` names, if it has one, and where they lie."""
    return [
        (Path(os.path.normpath(folder / record["path"])), record)
        for _, document in _manifests([folder])
        for record in document["parents"]
    ]


def _is_unchanged(path: Path, record: dict[str, Any]) -> bool:
    """Whether a folder with the recorded manifest is still there."""
    there = (path / manifest.MANIFEST).is_file()
    return there and files.sha256_file(path / manifest.MANIFEST) == record["manifest_digest"]


def _starts(folders: Sequence[Path], *, known: set[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The models that `folders`, of content `known`, were trained or exported from, and so on; each once."""
    found: list[tuple[Path, dict[str, Any]]] = []
    waiting = list(folders)
    for folder in waiting:  # which grows
        parents = _parents(folder)
        is_run = bool(parents) and parents[0][1]["kind"] == "dataset"  # whose second parent is the tokenizer
        for path, record in parents[2 if is_run else 0 :]:
            if record["content_digest"] not in known:
                known = known | {record["content_digest"]}
                found.append((path, record))
                waiting += [path] if _is_unchanged(path, record) else []
    return found


def _datasets(folders: Sequence[Path]) -> list[Path]:
    """The datasets that the manifests name and that are still there, unchanged; each once."""
    found = [(path, record) for folder in folders for path, record in _parents(folder) if record["kind"] == "dataset"]
    return list(dict.fromkeys(path for path, record in found if _is_unchanged(path, record)))


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
