"""Prepared datasets that stand side by side in a folder.

Rule: the folders themselves are the index; what their manifests say is compared, so there is no list that could be out
of date.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codex_accel import dataset, files, manifest
from codex_accel.tokens import TokenStore


def find(parent: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each prepared dataset in `parent` with its manifest, sorted by name. The folders themselves are the index."""
    for path in sorted(parent.glob(f"[!.]*/{manifest.MANIFEST}")):
        document = manifest.read(path.parent)
        if document.get("kind") == "dataset":
            yield path.parent, document


def find_prepared(parent: Path, input_digest: str) -> Path | None:
    """A whole dataset in `parent` that was made from the same input with the same settings."""
    for folder, document in find(parent):
        if document["facts"].get("input_digest") == input_digest and not manifest.problems_of(folder):
            return folder
    return None


def missing_parents(folder: Path, document: dict[str, Any]) -> list[Path]:
    """Raw files and parents of a dataset that are not where its manifest says."""
    paths = [Path(os.path.normpath(folder / record["path"])) for record in document["sources"] + document["parents"]]
    return [path for path in paths if not path.exists()]


def copy_prepared(prepared: Path, folder: Path, *, name: str) -> None:
    """Fill `folder` with the files of a prepared dataset, as hard links where the file system can."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in prepared.iterdir():
        if path.name in (manifest.MANIFEST, manifest.SUMS, manifest.CONFIG, dataset.REPORT_JSON, dataset.REPORT_PAGE):
            continue
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    dataset.write_report(folder, {**json.loads((prepared / dataset.REPORT_JSON).read_bytes()), "name": name})


def describe(folder: Path, document: dict[str, Any]) -> str:
    """A line for people: size, records, tokens, splits, content, and what is missing."""
    size = sum(resource["size"] for resource in document["resources"])
    facts = document["facts"]
    num_tokens = sum(split["num_tokens"] for split in facts["splits"].values())
    missing = missing_parents(folder, document)
    note = f"  without {', '.join(map(str, missing[:3]))}" if missing else ""
    return (
        f"{size:>15,} bytes  {facts['num_records']:>11,} records  {num_tokens:>13,} tokens  "
        f"{document['content_digest'][:12]}  {folder}{note}"
    )


def print_all(parent: Path) -> int:
    """Print each prepared dataset in `parent`; returns the exit code."""
    lines = [describe(folder, document) for folder, document in find(parent)]
    print("\n".join(lines) or f"{parent}: holds no prepared dataset.")
    return 0


def print_split(folder: Path, split: str, *, verify: bool) -> int:
    """Print the record ids of one split, one a line in the order of the store; returns the exit code."""
    manifest.require(folder, kinds=("dataset",), verify=verify, key="output_dir")
    for record_id in TokenStore(folder, split).record_ids():
        print(record_id)
    return 0


def collect_garbage(parent: Path, *, dry_run: bool) -> int:
    """Remove the datasets in `parent` whose raw files or tokenizer are gone; returns the exit code."""
    gone = [(folder, document) for folder, document in find(parent) if missing_parents(folder, document)]
    for folder, document in gone:
        print(describe(folder, document))
        if not dry_run:
            files.remove_folder(folder)
    freed = sum(resource["size"] for _, document in gone for resource in document["resources"])
    print(f"{len(gone)} datasets, {freed:,} bytes {'would be removed' if dry_run else 'removed'}")
    return 0
