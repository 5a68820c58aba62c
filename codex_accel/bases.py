"""Bases of adapters: where each lies, and that it is the one whose digest the adapter names.

Rule: an adapter is loaded on the base that it was trained on, or not at all.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from codex_accel import adapters, manifest, redaction, tokenizer
from codex_accel.errors import UserError

DIGESTS = ("kind", "manifest_digest", "content_digest")  # of a parent, in a manifest


def chain(folder: Path, *, verify: bool, key: str, base: Path | None = None) -> list[Path]:
    """`folder`, its base, and so on while that is an adapter too; the last is a plain model.

    `base` is where the base of `folder` lies now, if not where its manifest says. Each is checked against the digests
    that its child recorded, if `verify`; that of a child without a manifest, against what was recorded with that child.
    """
    found: list[Path] = [folder]
    recorded: list[dict[str, Any]] = []
    while ((child := found[-1]) / adapters.CONFIG).exists():
        found.append(_base_of(child, verify=verify, key=key, base=base if child is folder else None))
        if found[-1] in found[:-1]:
            raise UserError(f"{key} = '{found[-1] / adapters.CONFIG}': names itself as its base. Give the right base.")
        if (child / manifest.MANIFEST).exists():
            recorded = manifest.read(child)["parents"]
        elif verify and recorded:
            _require_recorded(found[-1], recorded, key=key, child=child)
    return found


def unnamed_bases(folder: Path, *, base: Path | None = None) -> list[Path]:
    """Bases of `folder` that no manifest names, because an adapter from elsewhere has none; `base` as in `chain`."""
    folders = chain(folder, verify=False, key="checkpoint", base=base)
    return [place for child, place in itertools.pairwise(folders) if not (child / manifest.MANIFEST).exists()]


def tokenizer_beside(folder: Path, *, key: str = "checkpoint", base: Path | None = None) -> Path:
    """`folder` or the nearest of its bases that holds a tokenizer, which peft stores none of; `folder` if none does."""
    folders = chain(folder, verify=False, key=key, base=base)
    return next((path for path in folders if tokenizer.defining_files(path)), folder)


def _require_recorded(place: Path, recorded: list[dict[str, Any]], *, key: str, child: Path) -> None:
    """Raise UserError unless `place` is among these records by its digests."""
    now = manifest.as_parent(place)
    if not any(all(record.get(name) == now[name] for name in DIGESTS) for record in recorded):
        what = f"its base '{place}' is not the one recorded: its files have changed. Put them back"
        raise UserError(f"{key} = '{child}': {what}, or say verify=false.")


def _base_of(folder: Path, *, verify: bool, key: str, base: Path | None) -> Path:
    if (folder / "config.json").exists():
        what = "lies beside config.json, so this is a model or an adapter, and nobody knows which. Remove one of them."
        raise UserError(f"{key} = '{folder / adapters.CONFIG}': {what}")
    if not (folder / manifest.MANIFEST).exists():
        name = read_config(folder, key=key).get("base_model_name_or_path")
        place = base or (Path(name) if isinstance(name, str) and name else None)
        if place is None or not place.is_dir():
            what = f"names {name!r} as its base, which is no local folder. Merge them: scripts/export_model.py"
            raise UserError(f"{key} = '{folder / adapters.CONFIG}': {what} --checkpoint {folder} --base FOLDER.")
        return manifest.find_model(place, verify=verify, key="base")
    record = _recorded_base(folder, key=key)
    place = base or Path(os.path.normpath(folder / record["path"]))
    if not place.is_dir():
        what = f"its base is no longer at '{place}'. Put it back, or merge them: scripts/export_model.py"
        raise UserError(f"{key} = '{folder}': {what} --checkpoint {folder} --base FOLDER.")
    if verify and (problems := manifest.check_tree(place, recursive=False, expected=record).problems):
        raise UserError(*(f"{key} = '{folder}': its base is not the one recorded. {problem}" for problem in problems))
    return place


def _recorded_base(folder: Path, *, key: str) -> dict[str, Any]:
    """The parent of `folder` that its manifest names as the base, by all of its digests."""
    document = manifest.read(folder)
    adapter = document["facts"].get("adapter")
    base = adapter.get("base") if isinstance(adapter, dict) else None
    if isinstance(base, dict) and isinstance(base.get("content_digest"), str):
        for record in document["parents"]:
            if all(name in record and record[name] == base.get(name) for name in DIGESTS):
                return record
    raise UserError(f"{key} = '{folder / manifest.MANIFEST}': names no base. Give an adapter of this toolkit.")


def read_config(folder: Path, *, key: str) -> dict[str, Any]:
    """The values of adapter_config.json."""
    try:
        values = json.loads((folder / adapters.CONFIG).read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        what = f"is no configuration of an adapter ({redaction.words(error, 200)}). Copy the folder again."
        raise UserError(f"{key} = '{folder / adapters.CONFIG}': {what}") from error
    return values
