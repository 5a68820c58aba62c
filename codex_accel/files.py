"""Bytes on disk that survive a crash.

Rule: a file or folder with its final name is always whole. Everything is written under a temporary name beside it,
flushed to the disk, renamed, and then the parent folder is flushed, so that neither a kill nor a power cut leaves half.
"""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from codex_accel.errors import UserError

T = TypeVar("T")
TEMPORARY_PREFIX = ".tmp-"  # being written
TRASH_PREFIX = ".trash-"  # being deleted


def sha256_bytes(data: bytes) -> str:
    """Lower-case hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hexadecimal SHA-256 of the file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> list[str]:
    """Digests in the order of `paths`, hashed on all cores (hashlib releases the interpreter lock)."""
    return _on_all_cores(sha256_file, list(paths))


def flush_and_hash(paths: Sequence[Path]) -> list[str]:
    """As `sha256_files`; meanwhile a thread forces the same files to the disk, which waits and needs no core."""
    with ThreadPoolExecutor(max_workers=1) as flushing:
        flushed = flushing.map(fsync_path, _largest_first(paths))
        digests = _on_all_cores(sha256_file, paths)
        list(flushed)  # raises what it met
    return digests


def _on_all_cores(function: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        results = dict(zip(order := _largest_first(paths), pool.map(function, order), strict=True))
    return [results[path] for path in paths]


def _largest_first(paths: Sequence[Path]) -> list[Path]:
    """So that no large file is begun last, on one core, while the others wait."""
    return sorted(paths, key=lambda path: -path.stat().st_size)


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk. Raises: OSError that names the path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def write_durable(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a crash, sees the old bytes or the new ones and nothing between.

    Raises: OSError that names the path.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:  # of a write: it has no name
        raise OSError(error.errno, error.strerror, str(path)) from error


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` as a sorted list of relative names with forward slashes.

    Raises: UserError for a symbolic link, which could point outside the folder that a manifest vouches for, for a
    device, pipe or socket, which might never end, for a name that is not UTF-8, and for what cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from error

    names = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        for name in [*folders, *files]:
            path = Path(root, name)
            mode = path.lstat().st_mode
            if any("\ud800" <= character <= "\udfff" for character in name):  # stand for bytes that are not UTF-8
                raise UserError(f"{str(path)!a}: is no name in UTF-8, so it cannot be recorded. Rename the file.")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise UserError(f"{path}: is a device, pipe or socket, which an artefact may not hold. Remove it.")
            if stat.S_ISLNK(mode):
                raise UserError(f"{path}: is a symbolic link, which an artefact may not hold. Copy the file instead.")
        names += [Path(root, name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def remove_folder(folder: Path) -> None:
    """Delete `folder`; it loses its name first, so a half-deleted folder is never mistaken for a whole one."""
    shutil.rmtree(move_to_trash(folder))


def move_to_trash(folder: Path) -> Path:
    """Take the final name away from `folder`; returns the name under which `sweep`, or the caller, deletes it."""
    trash = _trash_name(folder)
    if trash.exists():  # left by a killed process of the same id, as the first in each container has
        shutil.rmtree(trash)
    os.rename(folder, trash)
    fsync_path(trash.parent)
    return trash


def _trash_name(folder: Path) -> Path:
    return folder.with_name(f"{TRASH_PREFIX}{folder.name}-{os.getpid()}")


def sweep(parent: Path) -> list[str]:
    """Remove what an interrupted write or deletion left in `parent`; returns the names removed."""
    leftovers = [p for p in parent.glob(".*") if p.name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))]
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):  # the probe of another start, which has removed it itself
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return sorted(path.name for path in leftovers)


def require_free(final: Path, *, overwrite: bool) -> None:
    """Raise UserError now, before any work, if `final` exists and may not be replaced, or cannot be written."""
    if final.exists() and not overwrite:
        raise UserError(f"output_dir = '{final}': exists. Choose another folder, or say overwrite=true to replace it.")
    if (
        not final.name
        or final.name == ".."
        or final.is_symlink()
        or (final.exists() and (not final.is_dir() or os.path.ismount(final)))
    ):
        raise UserError(f"output_dir = '{final}': is not a plain folder with a name. Choose another folder.")
    if final.exists() and any(final.iterdir()) and not (final / "manifest.json").exists():
        raise UserError(f"output_dir = '{final}': holds files that no stage made. Choose another folder.")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        probe = final.with_name(f"{TEMPORARY_PREFIX}probe-{os.getpid()}")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir = '{final}': cannot be written ({error.strerror}). Choose another folder."
        ) from error


def require_apart(final: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError if one of `inputs` is `final` or lies in it, so that overwriting would remove what was read."""
    for path in inputs:
        if path.resolve().is_relative_to(final.resolve()):
            raise UserError(f"output_dir = '{final}': is read, or holds what is ('{path}'). Choose another folder.")


@contextlib.contextmanager
def staged_folder(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling of `final` to fill; it takes the final name only if the block ends without an error.

    The caller flushes the files inside (`manifest.seal` does). On an error the temporary folder is removed and an
    existing `final` stands untouched. The work happens under names that `sweep` knows.
    """
    require_free(final, overwrite=overwrite)
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        take_name(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def take_name(temporary: Path, final: Path) -> None:
    """Give the whole folder `temporary` its final name, in place of a folder that stands there, or leave all as it was.

    The caller has flushed the files inside (`manifest.seal` does).
    """
    replaced, renamed = None, False
    try:
        replaced = move_to_trash(final) if final.exists() else None
        os.rename(temporary, final)
        renamed = True
        fsync_path(final.parent)
    except BaseException:
        if renamed:
            os.rename(final, temporary)  # its name may not be on the disk
        if not final.exists() and _trash_name(final).exists():
            os.rename(_trash_name(final), final)
        raise
    if replaced:
        shutil.rmtree(replaced)
