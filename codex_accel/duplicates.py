"""Records of equal content, found whatever their number.

Rule: every record leaves one entry, in sorted runs on disk; they are merged by ranges of the id, so that
memory is bounded by `RANGE_BYTES` (and by the largest group of equal records), not by the number of records.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from codex_accel import files

# The id's 16 bytes as two numbers, then where the record stands and the number of its split.
ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("unit", "<u4"), ("index", "<u4"), ("line", "<u8"), ("split", "u1")])
REMOVED = 255  # instead of a split's number
RUN_ENTRIES = 1 << 17  # sorted and written at once
RANGE_BYTES, MAX_RANGES = 1 << 20, 1000  # merged at once; more bytes where there would be too many ranges
NUM_LARGEST = 10


class RunWriter:
    """Entries of one unit's records in their order, kept as sorted runs of at most `RUN_ENTRIES`."""

    def __init__(self, folder: Path, unit: int):
        self.folder, self.unit = folder, unit
        self._pending: list[np.ndarray] = []
        self._num_pending = self._num_before = self._num_runs = 0

    def add(self, ids: Sequence[bytes], lines: Sequence[int], numbers: Sequence[int]) -> None:
        """Append records: ids of 16 bytes, lines, and the numbers of their splits."""
        found = np.empty(len(ids), dtype=ENTRY)
        halves = np.frombuffer(b"".join(ids), dtype=">u8").reshape(-1, 2)
        found["high"], found["low"] = halves[:, 0], halves[:, 1]
        found["unit"], found["line"], found["split"] = self.unit, lines, numbers
        found["index"] = np.arange(len(ids)) + self._num_before + self._num_pending
        self._pending.append(found)
        self._num_pending += len(found)
        if self._num_pending >= RUN_ENTRIES:
            self._flush()

    def close(self) -> None:
        """Write what is pending."""
        if self._num_pending:
            self._flush()

    def _flush(self) -> None:
        found = np.concatenate(self._pending)
        found = found[np.lexsort([found["low"], found["high"]])]  # stable, so in order of the index
        files.write_durable(self.folder / f"{self.unit:05d}-{self._num_runs:04d}.run", found.tobytes())
        self._num_before += self._num_pending
        self._num_runs += 1
        self._pending, self._num_pending = [], 0


def read_unit(folder: Path, unit: int) -> Iterator[np.ndarray]:
    """The entries of one unit in the order of its records, a run at a time."""
    for path in sorted(folder.glob(f"{unit:05d}-*.run")):
        found = np.fromfile(path, dtype=ENTRY)
        yield found[np.argsort(found["index"], kind="stable")]


def num_entries(folder: Path, unit: int) -> int:
    """How many records a unit has."""
    return sum(path.stat().st_size for path in folder.glob(f"{unit:05d}-*.run")) // ENTRY.itemsize


def ranges(runs: Sequence[Path]) -> Iterator[np.ndarray]:
    """All entries in order of (id, unit, index), in stretches that never part equal ids."""
    total_bytes = sum(path.stat().st_size for path in runs)
    num_ranges = min(MAX_RANGES, max(1, -(-total_bytes // RANGE_BYTES)))
    starts = [0] * len(runs)
    for number in range(1, num_ranges + 1):
        pieces = [np.empty(0, dtype=ENTRY)]
        for place, path in enumerate(runs):
            with open(path, "rb") as stream:
                stop = _first_at_least(stream, (number << 64) // num_ranges)
                stream.seek(starts[place] * ENTRY.itemsize)
                pieces.append(np.fromfile(stream, dtype=ENTRY, count=stop - starts[place]))
            starts[place] = stop
        found = np.concatenate(pieces)
        yield found[np.lexsort([found[name] for name in ("index", "unit", "low", "high")])]


def _first_at_least(run: BinaryIO, head: int) -> int:
    """Place of the first entry whose id begins with `head` or more; read by halves, for a map would count as memory."""
    low, high = 0, os.fstat(run.fileno()).st_size // ENTRY.itemsize
    while low < high:
        middle = (low + high) // 2
        found = int.from_bytes(os.pread(run.fileno(), 8, middle * ENTRY.itemsize), "little")
        low, high = (middle + 1, high) if found < head else (low, middle)
    return low


def groups(found: np.ndarray) -> np.ndarray:
    """For each entry of a sorted stretch, the number of its group of equal ids: int64 (N,)."""
    differs = (found["high"][1:] != found["high"][:-1]) | (found["low"][1:] != found["low"][:-1])
    return np.concatenate([[0], np.cumsum(differs)])[: len(found)]


def superfluous(runs: Sequence[Path], *, prefer_last_split: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(unit, indices) of the records to remove so that one of each content is left; a unit may come several times.

    The first is kept; with `prefer_last_split` the first of those in the split named last, so that a test split keeps
    what training gives away.
    """
    for found in ranges(runs):
        group = groups(found)
        rank = -found["split"].astype(np.int64) if prefer_last_split else np.zeros(len(found))
        order = np.lexsort((rank, group))  # stable, so places decide between equals
        is_kept = np.ones(len(found), dtype=bool)
        is_kept[1:] = np.diff(group[order]) != 0
        gone = found[order][~is_kept]
        for unit in np.unique(gone["unit"]):
            yield int(unit), gone["index"][gone["unit"] == unit]


@dataclass
class Membership:
    """Who is in one split."""

    num_records: int = 0
    num_duplicates: int = 0  # records beyond the first of their content within the split
    num_shared: int = 0  # records whose content is in another split too
    digest: Any = field(default_factory=hashlib.sha256)  # over the sorted 16-byte ids

    def facts(self) -> dict[str, int | str]:
        """For the manifest."""
        return {
            "num_records": self.num_records,
            "num_duplicates": self.num_duplicates,
            "num_shared": self.num_shared,
            "members_sha256": self.digest.hexdigest(),
        }


def count(
    runs: Sequence[Path], names: Sequence[str], *, place: Callable[[int, int], str], listing: TextIO
) -> tuple[dict[str, Membership], dict[str, Any]]:
    """Membership of each split and facts about equal records; every group of them is a line in `listing`.

    `names` are the splits in the order of their numbers; `place(unit, line)` says where a record stands.
    """
    members = {name: Membership() for name in names}
    facts: dict[str, Any] = {"num_groups": 0, "num_duplicates": 0, "num_shared": 0, "num_removed": 0}
    largest: list[tuple[int, int, dict[str, Any]]] = []
    for found in ranges(runs):
        group = groups(found)
        facts["num_removed"] += int((found["split"] == REMOVED).sum())
        _count_members(found, group, list(members.values()))
        sizes = np.bincount(group) if len(group) else np.empty(0, dtype=np.int64)
        stops = np.cumsum(sizes)
        for number in np.flatnonzero(sizes > 1):
            line = _describe(found[stops[number] - sizes[number] : stops[number]], names, place)
            listing.write(json.dumps(line, ensure_ascii=False) + "\n")
            facts["num_groups"] += 1
            facts["num_duplicates"] += line["count"] - 1
            brief = {**line, "places": line["places"][:NUM_LARGEST]}
            heapq.heappush(largest, (line["count"], -facts["num_groups"], brief))
            if len(largest) > NUM_LARGEST:
                heapq.heappop(largest)
    facts["num_shared"] = sum(member.num_shared for member in members.values())
    facts["largest"] = [line for _, _, line in sorted(largest, key=lambda item: item[:2], reverse=True)]
    return members, facts


def _count_members(found: np.ndarray, group: np.ndarray, members: Sequence[Membership]) -> None:
    """Add the entries of one stretch to the membership of their splits."""
    kept = found["split"] != REMOVED
    found, group = found[kept], group[kept]
    pairs = np.unique(group << 8 | found["split"])  # (group, split), distinct
    num_splits = np.bincount(pairs >> 8, minlength=int(group.max()) + 1 if len(group) else 0)
    for number, member in enumerate(members):
        mine = found["split"] == number
        member.num_records += int(mine.sum())
        member.num_duplicates += int(mine.sum()) - int((pairs & 255 == number).sum())
        member.num_shared += int((num_splits[group[mine]] > 1).sum())
        ids = np.stack([found["high"][mine], found["low"][mine]], axis=1)
        member.digest.update(ids.astype(">u8").tobytes())


def _describe(equal: np.ndarray, names: Sequence[str], place: Callable[[int, int], str]) -> dict[str, Any]:
    numbers: Iterable[int] = sorted({int(number) for number in equal["split"]})
    return {
        "record_id": f"{int(equal['high'][0]):016x}{int(equal['low'][0]):016x}",
        "count": len(equal),
        "splits": ["removed" if number == REMOVED else names[number] for number in numbers],
        "places": [place(int(entry["unit"]), int(entry["line"])) for entry in equal],
    }
