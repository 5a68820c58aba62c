"""What an unfinished evaluation has scored so far, batch by batch.

Rule: a batch stands in the journal whole, with its digest, or it is scored again. Each process appends to a file of its
own and whoever goes on reads all of them, so the number of processes may change. The journal is named after all that
decides its numbers: another evaluation never takes from it.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from codex_accel import files
from codex_accel.errors import UserError

PREFIX = ".unfinished-"
MOST_OF_NAME = 40  # characters, of up to 4 bytes each


def path_of(final: Path, identity: Mapping[str, Any]) -> Path:
    """Folder beside `final` of the evaluation with this `identity` (JSON): all that its numbers depend on."""
    return final.with_name(f"{_begin(final)}{_digest(identity)}")


def others(final: Path, mine: Path) -> list[Path]:
    """Journals of evaluations with the same output folder and other settings; they are kept."""
    name = re.compile(re.escape(_begin(final)) + "[0-9a-f]{16}")
    return sorted(path for path in final.parent.iterdir() if name.fullmatch(path.name) and path != mine)


def _begin(final: Path) -> str:
    """How the names of its journals begin; of a long name a part, so that theirs are none too long for the disk."""
    return f"{PREFIX}{final.name[:MOST_OF_NAME]}-"


def make(place: Path) -> None:
    """Make the folder, if it is not there. Raises: UserError if that fails."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made beside the output folder ({error.strerror}). Choose another output_dir."
        raise UserError(f"{place}: {what}") from error


def _digest(value: Any) -> str:
    return files.sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())[:16]


def unit_key(*parts: Any) -> str:
    """Name of a batch: a digest of what is in it (JSON)."""
    return _digest(parts)


class Journal:
    """Results of whole batches, by key: those that stood in the folder when it was opened, and those added since."""

    def __init__(self, folder: Path, *, process_index: int = 0):
        make(folder)
        self.folder = folder
        self.done, self.num_damaged = _read(folder)
        self._path = folder / f"{process_index:05d}.ndjson"

    def add(self, key: str, results: list[Any]) -> None:
        """Append the results of a batch, which are JSON, and force them to the disk.

        Raises: UserError if the disk does not take them; what stands in the journal stays.
        """
        line = json.dumps({"unit": key, "sha256": _digest(results), "results": results}, ensure_ascii=False)
        try:
            with open(self._path, "ab", buffering=0) as stream:
                if stream.tell() and not _ends_line(self._path):
                    stream.write(b"\n")  # after the half line of a killed process
                data = line.encode() + b"\n"
                while data:
                    data = data[stream.write(data) :]
                os.fsync(stream.fileno())
        except OSError as error:
            what = f"cannot be written ({error.strerror}). Mend the disk and run the same command again: it goes on."
            raise UserError(f"{self._path}: {what}") from error
        self.done[key] = results

    def left(self, keys: Collection[str], *, process_index: int, num_processes: int) -> list[str]:
        """The batches that this process has to do, in order, of those that no process had done when it was opened."""
        return [key for key in keys if key not in self.done][process_index::num_processes]


def read(folder: Path) -> dict[str, list[Any]]:
    """All whole batches of all processes."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[dict[str, list[Any]], int]:
    """Whole batches by key, and the number of lines that are none."""
    done: dict[str, list[Any]] = {}
    num_damaged = 0
    for path in sorted(folder.glob("*.ndjson")):
        for line in path.read_bytes().split(b"\n"):
            try:
                found = json.loads(line) if line.strip() else None
                if found is not None and _digest(found["results"]) == found["sha256"]:
                    done[found["unit"]] = found["results"]
                elif found is not None:
                    num_damaged += 1
            except (ValueError, TypeError, KeyError, RecursionError):
                num_damaged += 1
    return done, num_damaged


def _ends_line(path: Path) -> bool:
    with open(path, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
