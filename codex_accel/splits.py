"""Which split a record belongs to.

Rule: `hash` looks at the content alone, so a record keeps its split when files are added, moved or read by more
processes, and duplicates land together; `exact` and `position` keep sizes to the record.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from codex_accel import seeds


def by_hash(key: str, ratios: dict[str, float], *, seed: int) -> str:
    """The split of everything with this `key` (the record's id, or the field named by split.key)."""
    place = seeds.derive(seed, "split", key) / 2**63
    edge = 0.0
    for name, share in ratios.items():
        edge += share
        if place < edge:
            return name
    return name  # the shares add up to 1 but for rounding


def sizes(num_records: int, ratios: dict[str, float]) -> dict[str, int]:
    """Whole sizes that add up to `num_records`: cumulative shares, rounded.

    >>> sizes(10, {"train": 0.85, "validation": 0.15})
    {'train': 8, 'validation': 2}
    """
    result, before, share = {}, 0, 0.0
    for name, ratio in ratios.items():
        share += ratio
        edge = min(num_records, round(num_records * share))
        result[name], before = edge - before, edge
    return result


def by_position(num_records: int, ratios: dict[str, float]) -> list[str]:
    """The split of each record: the first so many to the first split, and so on."""
    return [name for name, size in sizes(num_records, ratios).items() for _ in range(size)]


def exact(ids: Sequence[bytes], ratios: dict[str, float], *, seed: int) -> list[str]:
    """The split of each record, with sizes as `sizes` says: ranks of a seeded hash of (id, place among equal ids)."""
    seen: dict[bytes, int] = {}
    ranks = []
    for id_ in ids:
        seen[id_] = seen.get(id_, -1) + 1
        ranks.append(seeds.derive(seed, "exact", id_.hex(), seen[id_]))
    names = by_position(len(ids), ratios)
    result = [""] * len(ids)
    for name, index in zip(names, np.argsort(np.array(ranks, dtype=np.int64), kind="stable"), strict=True):
        result[index] = name
    return result


def cut_text(text: str, ratios: dict[str, float]) -> dict[str, str]:
    """`position` within one long text: consecutive pieces by number of characters."""
    result, start = {}, 0
    for name, size in sizes(len(text), ratios).items():
        result[name] = text[start : start + size]
        start += size
    return result


def membership(ids: dict[str, bytes]) -> dict[str, dict[str, int | str]]:
    """Facts about who is in each split, from the concatenated 16-byte record ids of each.

    For each split: `num_records`, `num_duplicates` (records beyond the first of their content, within the split),
    `num_shared` (records whose content is in another split too) and `members_sha256` (SHA-256 over the sorted ids).
    """
    arrays = {name: np.sort(np.frombuffer(data, dtype=[("high", ">u8"), ("low", ">u8")])) for name, data in ids.items()}
    distinct = {name: np.unique(array) for name, array in arrays.items()}
    facts: dict[str, dict[str, int | str]] = {}
    for name, array in arrays.items():
        others = [other for key, other in distinct.items() if key != name]
        shared = np.isin(array, np.concatenate(others)).sum() if others else 0
        facts[name] = {
            "num_records": len(array),
            "num_duplicates": len(array) - len(distinct[name]),
            "num_shared": int(shared),
            "members_sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
    return facts
