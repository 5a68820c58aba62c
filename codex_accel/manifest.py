"""The manifest of an artefact folder: what is in it, and what it was made from.

Rule: a folder with a manifest is checked before it is used, and a change of one bit in it or in any of its ancestors
shows. `manifest.json` names every file with its SHA-256 and every parent by the SHA-256 of the parent's own
`manifest.json`; `SHA256SUMS` covers all of them for `sha256sum -c SHA256SUMS`.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from codex_accel import config as configuration
from codex_accel import files, provenance, redaction
from codex_accel.config import StageConfig
from codex_accel.errors import UserError

FORMAT, FORMAT_VERSION = "codex-accel-manifest", 1
MANIFEST, SUMS, CONFIG = "manifest.json", "SHA256SUMS", "config.yaml"
HARMLESS_SUFFIXES = (".md", ".log")  # notes that people put beside; nothing loads them


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def content_digest(resources: Iterable[dict[str, Any]]) -> str:
    """Root over the payload alone: SHA-256 of `<digest>  <name>\\n` of each payload file, sorted by name."""
    payload = sorted((r["name"], r["digest"]) for r in resources if r["payload"])
    return files.sha256_bytes("".join(f"{digest}  {name}\n" for name, digest in payload).encode())


def self_digest(document: dict[str, Any]) -> str:
    """SHA-256 of the manifest with its `self_digest` left empty: shows an edit by hand even where no child exists."""
    return files.sha256_bytes(_encode({**document, "self_digest": ""}))


def seal(
    folder: Path,
    *,
    kind: str,
    final: Path,
    payload: Iterable[str],
    config: StageConfig,
    parents: Iterable[dict[str, Any]] = (),
    sources: Iterable[dict[str, Any]] = (),
    facts: dict[str, Any] | None = None,
    known: dict[str, str] | None = None,
) -> str:
    """Write `config.yaml`, `manifest.json` and `SHA256SUMS` into the filled `folder` and flush it all to the disk.

    `payload` are the files that make up the content; all others are recorded but do not enter `content_digest`. `final`
    is the name that the folder will get, used to store parents' paths relative to it. `known` are the digests of files
    that `files.flush_and_hash` has done already. Returns the manifest digest.
    """
    settings = redaction.value(config.model_dump(mode="json"))
    (folder / CONFIG).write_text(configuration.to_yaml(settings), encoding="utf-8")
    names = files.list_files(folder)
    digests = dict(known or {})
    rest = [name for name in names if name not in digests]
    digests |= zip(rest, files.flush_and_hash([folder / name for name in rest]), strict=True)
    wanted = set(payload)
    resources = [
        {
            "name": name,
            "algorithm": "sha256",
            "digest": digests[name],
            "size": (folder / name).stat().st_size,
            "payload": name in wanted,
        }
        for name in names
    ]
    document: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "id": provenance.new_id(kind),
        "name": final.name,
        "self_digest": "",
        "content_digest": content_digest(resources),
        "resources": resources,
        "parents": [_relative_to(final, record) for record in parents],
        "sources": [_relative_to(final, record) for record in sources],
        "facts": redaction.value(facts or {}),
        "config": settings,
        "provenance": provenance.collect(),
    }
    document["self_digest"] = self_digest(document)
    data = _encode(document)
    (folder / MANIFEST).write_bytes(data)
    digests[MANIFEST] = files.sha256_bytes(data)
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    (folder / SUMS).write_text(lines, encoding="utf-8")
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in (folder / MANIFEST, folder / SUMS, *reversed(folders)):
        files.fsync_path(path)
    return digests[MANIFEST]


def _relative_to(final: Path, record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "path": os.path.relpath(record["path"], final)}


# --- reading ------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """The manifest as it stands, unchecked. Raises UserError if there is none or it is not one of ours."""
    path = folder / MANIFEST
    try:
        if path.is_fifo() or path.is_socket() or path.is_char_device():  # opening it might wait for ever
            raise UserError(f"{path}: is a device, pipe or socket. Restore the folder from a copy.")
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Give a folder made by this toolkit.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: not JSON ({error}). Restore the folder from a copy.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path}: is not a manifest of this toolkit (no format: {FORMAT}).")
    if document.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format version {document.get('format_version')!r}; this code reads {FORMAT_VERSION}."
        )
    records = {key: document.get(key) for key in ("resources", "parents", "sources")}
    for key, value in records.items():
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise UserError(f"{path}: is damaged: {key} is not a list of objects. Restore the folder from a copy.")
    for record in (*document["parents"], *document["sources"]):
        if not isinstance(place := record.get("path"), str) or "\0" in place:
            raise UserError(f"{path}: is damaged: {place!r} is no path. Restore the folder from a copy.")
    if not isinstance(document.get("facts"), dict) or any(
        not isinstance(r.get("kind"), str) for r in document["parents"]
    ):
        raise UserError(
            f"{path}: is damaged: its facts, or a parent's kind, are missing. Restore the folder from a copy."
        )
    return document


def problems_of(folder: Path) -> list[str]:
    """Everything wrong with one folder, by itself: one line a problem, empty if it is whole."""
    return _problems(folder, _changed)


def problems_of_outline(folder: Path) -> list[str]:
    """As `problems_of`, by names and sizes and the manifest itself: no payload is hashed."""
    return _problems(folder, lambda folder, listed, sums: _changed(folder, {MANIFEST: None}, sums))


def _problems(folder: Path, changed: Callable[[Path, dict[str, Any], dict[str, str]], list[str]]) -> list[str]:
    try:
        names, document, sums = files.list_files(folder), read(folder), _read_sums(folder)
    except UserError as error:
        return error.problems
    except OSError as error:
        return [f"{folder}: cannot be read ({error.strerror})."]
    try:
        listed = {r["name"]: r for r in document["resources"]}
        problems = [f"{folder / name}: is an unsafe name in {MANIFEST}." for name in listed if not _is_safe(name)]
        if problems:
            return problems
        problems += [f"{folder / name}: is missing." for name in sorted(set(listed) | set(sums)) if name not in names]
        for name in names:
            if name not in listed and name not in (MANIFEST, SUMS) and not _is_harmless(name):
                problems.append(f"{folder / name}: is not listed in {MANIFEST}. Remove it, nothing vouches for it.")
            if name in listed and (size := (folder / name).stat().st_size) != listed[name]["size"]:
                problems.append(f"{folder / name}: has {size} bytes, {listed[name]['size']} were written.")
        problems += changed(folder, {name: listed.get(name) for name in names if name in (MANIFEST, *listed)}, sums)
        if content_digest(document["resources"]) != document["content_digest"]:
            problems.append(f"{folder / MANIFEST}: content_digest does not follow from the listed files.")
        if self_digest(document) != document["self_digest"]:
            problems.append(f"{folder / MANIFEST}: was edited: self_digest does not follow from the other fields.")
    except OSError as error:
        return [f"{error.filename}: cannot be read ({error.strerror})."]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return [f"{folder / MANIFEST}: is damaged: {type(error).__name__} at {error}."]
    return problems


def _changed(folder: Path, present: dict[str, Any], sums: dict[str, str]) -> list[str]:
    """Lines for files whose SHA-256 is not the recorded one; `present` maps names to resources, or None."""
    problems = []
    for name, digest in zip(present, files.sha256_files(folder / name for name in present), strict=True):
        resource = present[name]
        if resource and digest != resource["digest"] and (folder / name).stat().st_size == resource["size"]:
            problems.append(f"{folder / name}: has changed: SHA-256 {digest}, {resource['digest']} was written.")
        if sums.get(name) != digest:
            problems.append(f"{folder / name}: SHA-256 {digest} is not the one in {SUMS} ({sums.get(name)}).")
    return problems


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing. Restore the folder from a copy.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is damaged: not UTF-8.") from error
    sums = {}
    *lines, rest = text.split("\n")  # not splitlines, which takes other characters for line ends too
    if rest:
        raise UserError(f"{path}: is damaged: the last line has no end.")
    for number, line in enumerate(lines, 1):
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not found or not _is_safe(found.group(2)):
            raise UserError(f"{path}:{number}: is not of the form '<sha256>  <name>'.")
        sums[found.group(2)] = found.group(1)
    return sums


def _is_safe(name: str) -> bool:
    """Whether a listed name stays inside the folder: relative, no `..`, no backslash, no control character."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and str(path) == name
        and not path.is_absolute()
        and ".." not in path.parts
        and (not re.search(r"[\\\x00-\x1f]", name))
    )


def _is_harmless(name: str) -> bool:
    """Whether nothing loads a file of this name; `.metadata` of torch's sharded checkpoints is a pickle that is."""
    last = PurePosixPath(name).name
    return last != ".metadata" and (last.startswith(".") or name.endswith(HARMLESS_SUFFIXES))


def require(folder: Path, *, kinds: Collection[str], verify: bool, key: str = "") -> dict[str, Any]:
    """The manifest of a folder that is about to be used, checked if `verify`; no links and pipes in any case.

    Raises: UserError naming `key`, the folder and the first damaged file, or a kind that does not fit.
    """
    where = f"{key} = '{folder}': " if key else f"{folder}: "
    if not folder.is_dir():
        raise UserError(f"{where}no such folder. Run the stage before this one, or give the right path.")
    document = read(folder)
    if document.get("kind") not in kinds:
        raise UserError(f"{where}holds a {document.get('kind')}, not a {' or '.join(kinds)}.")
    if verify and (problems := problems_of(folder)):
        raise UserError(*(f"{where}is damaged. {problem}" for problem in problems))
    files.list_files(folder)
    return document


def as_parent(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """How a child records `folder`: kind, path, digest of its manifest, digest of its content.

    A folder without a manifest (a downloaded model) is hashed and recorded as `unverified`, with its files.
    """
    if not (folder / MANIFEST).exists():
        return {
            "kind": "unverified",
            "path": str(folder),
            "manifest_digest": None,
            "content_digest": _digest_unverified(folder),
        }
    if verify and (problems := problems_of(folder)):
        raise UserError(*problems)
    document = read(folder)  # before its digest: what is no file must not be hashed
    return {
        "kind": document["kind"],
        "path": str(folder),
        "manifest_digest": files.sha256_file(folder / MANIFEST),
        "content_digest": document["content_digest"],
    }


def _digest_unverified(folder: Path) -> str:
    names = files.list_files(folder)
    digests = files.sha256_files(folder / name for name in names)
    return content_digest({"name": n, "digest": d, "payload": True} for n, d in zip(names, digests, strict=True))


def holds_model(folder: Path) -> bool:
    """Whether a folder is that of a model or of an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def find_model(path: Path, *, verify: bool, key: str) -> Path:
    """The folder to load a model from: `path` itself, or the `final` of the run folder that it is; checked if `verify`.

    Raises: UserError if there is nothing to load, or if a folder with a manifest is damaged.
    """
    folder = path / "final" if holds_model(path / "final") else path
    if not folder.is_dir():
        raise UserError(f"{key} = '{path}': no such folder. Give a checkpoint, a model or a run folder.")
    if not holds_model(folder):
        raise UserError(f"{key} = '{folder}': has no config.json. Give a folder that from_pretrained loads.")
    if (folder / MANIFEST).exists():
        require(folder, kinds=("checkpoint", "model"), verify=verify, key=key)
    else:
        files.list_files(folder)  # refuses links and what is no file
    return folder


def parent_path(folder: Path, *, kind: str, hint: str) -> Path:
    """Where the manifest of `folder` says its parent of this kind lies. Raises: UserError with `hint` if nowhere."""
    records = read(folder)["parents"] if (folder / MANIFEST).exists() else []
    for record in records:
        if record["kind"] == kind:
            return Path(os.path.normpath(folder / record["path"]))
    raise UserError(f"{folder}: names no {kind} that it was made from. {hint}")


def parents_of_sources(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Records of the artefact folders (a corpus, say) that raw files lie in, each once."""
    folders = dict.fromkeys(path.parent for path in paths if (path.parent / MANIFEST).exists())
    return [as_parent(folder, verify=True) for folder in folders]


# --- the tree of parents ------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One artefact or raw file in the chain of custody, with what is wrong with it."""

    label: str
    problems: list[str] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)

    def all_problems(self) -> list[str]:
        """The problems of this node and of everything below it."""
        return self.problems + [problem for child in self.children for problem in child.all_problems()]


def check_tree(folder: Path, *, recursive: bool, expected: dict[str, Any] | None = None) -> Node:
    """Check `folder`, and if `recursive` every ancestor back to the raw files.

    `expected` is the record that a child keeps of this folder. Shared ancestors are checked each time they are met.
    """
    if expected and expected["kind"] == "unverified":
        return _check_unverified(folder, expected)
    node = Node(f"{folder}")
    if not folder.is_dir():
        node.problems.append(f"{folder}: is missing, a {expected['kind'] if expected else 'folder'} is expected there.")
        return node
    node.problems = problems_of(folder)
    if expected and (folder / MANIFEST).is_file():
        digest = files.sha256_file(folder / MANIFEST)
        if digest != expected["manifest_digest"]:
            node.problems.append(
                f"{folder / MANIFEST}: SHA-256 {digest} is not what its child recorded ({expected['manifest_digest']})."
            )
            recursive = False  # whose ancestors these are nobody knows; and so a circle ends
    try:
        document = read(folder)
    except UserError:
        return node  # already among the problems
    try:
        node.label = f"{document['kind']}  {folder}  content {document['content_digest'][:12]}"
        if recursive:
            for parent in document["parents"]:
                path = Path(os.path.normpath(folder / parent["path"]))
                node.children.append(check_tree(path, recursive=True, expected=parent))
            node.children += [_check_source(folder, source) for source in document["sources"]]
    except (KeyError, TypeError, AttributeError) as error:
        node.problems.append(f"{folder / MANIFEST}: is damaged: {type(error).__name__} at {error}.")
    return node


def _check_unverified(folder: Path, expected: dict[str, Any]) -> Node:
    node = Node(f"model without a manifest  {folder}  content {expected['content_digest'][:12]}")
    try:
        if not folder.is_dir():
            node.problems.append(f"{folder}: is missing.")
        elif _digest_unverified(folder) != expected["content_digest"]:  # whatever a manifest there says now
            node.problems.append(f"{folder}: its files have changed since they were recorded.")
    except UserError as error:
        node.problems += error.problems
    return node


def _check_source(folder: Path, source: dict[str, Any]) -> Node:
    path = Path(os.path.normpath(folder / source["path"]))
    node = Node(f"raw  {path}  sha256 {source['sha256'][:12]}")
    if not path.is_file():
        node.problems.append(f"{path}: is missing.")
    elif (size := path.stat().st_size) != source["size"]:  # before hashing: /proc/kcore has no end
        node.problems.append(f"{path}: has {size:,} bytes, {source['size']:,} were read.")
    elif files.sha256_file(path) != source["sha256"]:
        node.problems.append(f"{path}: has changed since it was read.")
    return node
