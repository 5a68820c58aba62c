"""Prepared datasets that stand side by side in a folder.

Rule: the folders themselves are the index; what their manifests say is compared, so there is no list that could be out
of date.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codex_accel import dataset, files, manifest, plan
from codex_accel.errors import UserError
from codex_accel.tokens import TokenStore


def find(parent: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each prepared dataset in `parent` with its manifest, sorted by name; what cannot be read is left to `verify`."""
    for path in sorted(parent.glob(f"[!.]*/{manifest.MANIFEST}")):
        try:
            document = manifest.read(path.parent)
        except UserError:
            continue
        if document.get("kind") == "dataset" and "splits" in document.get("facts", ()):
            yield path.parent, document


def find_partial(parent: Path) -> Iterator[Path]:
    """Work folders of preparations that were stopped; while one is looked at, no process can go on with it."""
    for work in sorted(parent.glob(f"{plan.WORK_PREFIX}*")):
        try:
            held = plan.lock(work)
        except (UserError, PermissionError):  # it is being worked on, or is not ours
            continue
        yield work
        held.close()


def find_prepared(final: Path, input_digest: str) -> Path | None:
    """A whole dataset that was made from the same input with the same settings: `final`, or else one beside it."""
    for folder, document in sorted(find(final.parent), key=lambda found: found[0] != final):
        if document["facts"].get("input_digest") == input_digest and not manifest.problems_of(folder):
            return folder
    return None


def require_place(final: Path) -> None:
    """Raise UserError unless a dataset can be written to `final`, or replace one there."""
    files.require_free(final, overwrite=True)
    if final.name.startswith("."):
        raise UserError(f"output_dir = '{final}': is a hidden name, as unfinished work has. Choose another folder.")
    if (final / manifest.MANIFEST).exists() and (kind := manifest.read(final).get("kind")) != "dataset":
        raise UserError(
            f"output_dir = '{final}': holds a {kind}, and only a dataset is replaced. Choose another folder."
        )


def why_not(final: Path, input_digest: str) -> str:
    """The error for a folder that stands where the dataset is to be written and is not that dataset, whole."""
    same = any(
        folder == final and doc["facts"].get("input_digest") == input_digest for folder, doc in find(final.parent)
    )
    other = "exists, made from other input or settings." if any(final.iterdir()) else "exists."
    why = f"is damaged: {manifest.problems_of(final)[0]}" if same else other
    return f"output_dir = '{final}': {why} Choose another folder, or say overwrite=true to replace it."


def missing_parents(folder: Path, document: dict[str, Any]) -> list[Path]:
    """Raw files and parents of a dataset that are not where its manifest says, as its folder is named or truly lies."""
    records = document["sources"] + document["parents"]
    named, true = ([Path(os.path.normpath(at / each["path"])) for each in records] for at in (folder, folder.resolve()))
    return [path for path, other in zip(named, true, strict=True) if not path.exists() and not other.exists()]


def take(prepared: Path, todo: plan.Plan, final: Path, *, parents: list[Any]) -> None:
    """Make `final` from a dataset of the same input and settings, which may be `final` itself; print what was done.

    Its files are taken as hard links where the file system can, as copies elsewhere.
    """
    if prepared == final:
        print(f"nothing to do: the same input and settings are prepared in {final}")
        print(f"manifest {files.sha256_file(final / manifest.MANIFEST)}")
        files.remove_folder(todo.work)
        return
    print(f"the same input and settings are prepared in {prepared}; its files are taken")
    folder = todo.work / "taken"  # apart from what is written, which must not go through a link
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in prepared.iterdir():
        if path.name in (manifest.MANIFEST, manifest.SUMS, manifest.CONFIG, dataset.REPORT_JSON, dataset.REPORT_PAGE):
            continue
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
    report = json.loads((prepared / dataset.REPORT_JSON).read_bytes())
    dataset.write_report(folder, {**report, "name": final.name})
    document = manifest.read(prepared)
    read = [
        {**record, "path": str(facts.raw.path)}
        for record, facts in zip(document["sources"], todo.inventory, strict=True)
    ]
    digest = dataset.seal(todo, folder, final, parents=parents, sources=read, facts=document["facts"])
    dataset.print_summary(final, document["facts"])
    print(f"dataset  {final}\nmanifest {digest}")


def describe(folder: Path, document: dict[str, Any]) -> str:
    """A line for people: size, records, tokens, splits, content, and what is missing."""
    size = sum(resource["size"] for resource in document["resources"])
    facts = document["facts"]
    num_tokens = sum(split["num_tokens"] for split in facts["splits"].values())
    missing = missing_parents(folder, document)
    note = f"  without {', '.join(map(str, missing[:3]))}" if missing else ""
    secrets = facts.get("secrets", {})  # of older ones nothing is known
    if secrets.get("num_findings"):
        note += f"  {secrets['num_findings']:,} secrets {'masked' if secrets['action'] == 'redact' else 'set aside'}"
    if secrets.get("bypass_reason"):
        note += "  secrets not masked"
    return (
        f"{size:>15,} bytes  {facts['num_records']:>11,} records  {num_tokens:>13,} tokens  "
        f"{document['content_digest'][:12]}  {folder}{note}"
    )


def print_all(parent: Path) -> int:
    """Print each prepared dataset in `parent`, and each that was begun; returns the exit code."""
    lines = [describe(folder, document) for folder, document in find(parent)]
    lines += [f"unfinished: {work}; the same command goes on with it, --gc removes it" for work in find_partial(parent)]
    print("\n".join(lines) or f"{parent}: holds no prepared dataset.")
    return 0


def print_split(folder: Path, split: str, *, verify: bool) -> int:
    """Print the record ids of one split, one a line in the order of the store; returns the exit code."""
    manifest.require(folder, kinds=("dataset",), verify=verify, key="output_dir")
    for record_id in TokenStore(folder, split).record_ids():
        print(record_id)
    return 0


def collect_garbage(parent: Path, *, dry_run: bool) -> int:
    """Remove the datasets in `parent` whose raw files or tokenizer are gone, and what killed processes have left.

    Returns the exit code.
    """
    gone = (
        (folder, describe(folder, document)) for folder, document in find(parent) if missing_parents(folder, document)
    )
    unfinished = ((work, f"unfinished: {work}") for work in find_partial(parent))
    trash = ((path, f"half deleted: {path}") for path in sorted(parent.glob(f"{files.TRASH_PREFIX}*")))
    num_folders = freed = 0
    for folder, line in itertools.chain(gone, unfinished, trash):
        print(line)
        num_folders += 1
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if not dry_run:
            files.remove_folder(folder)
    print(f"{num_folders} folders, {freed:,} bytes {'would be removed' if dry_run else 'removed'}")
    return 0
