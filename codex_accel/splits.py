"""Which split a record belongs to.

Rule: `hash` looks at the content alone, so a record keeps its split when files are added, moved or read by more
processes, and duplicates land together; `exact` and `position` keep sizes to the record.
"""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from codex_accel import seeds


def by_hash(ratios: dict[str, float], *, seed: int) -> Callable[[str], int]:
    """The number of the split of everything with a key (the record's id, or the field named by split.key).

    The key's place is `seeds.derive(seed, "split", key)` over 2**63; what is the same for all keys is hashed once.
    """
    start = hashlib.sha256(seeds.encoded(seed, "split"))
    edges = list(itertools.accumulate(ratios.values()))

    def number_of(key: str) -> int:
        data, digest = key.encode(), start.copy()
        digest.update(len(data).to_bytes(4, "big") + data)  # as `seeds.encoded`
        place = (int.from_bytes(digest.digest()[:8], "big") >> 1) / 2**63
        return min(bisect.bisect_right(edges, place), len(edges) - 1)  # the shares add up to 1 but for rounding

    return number_of


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


def edges(num_records: int, ratios: dict[str, float]) -> list[int]:
    """`position`: where each split but the first begins, in records."""
    stops = np.cumsum(list(sizes(num_records, ratios).values()))
    return [int(stop) for stop in stops[:-1]]


Place = tuple[int, int, int]  # (rank, unit, index within the unit): the order in which `exact` deals records out


def ranks(heads: np.ndarray, *, seed: int) -> np.ndarray:
    """uint64 (N,): a seeded shuffle's rank for each record, from the first 8 bytes of its id, uint64 (N,).

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014) over the id, which is a hash already. Equal content has an
    equal rank, so duplicates stand together.
    """
    mixed = heads ^ np.uint64(seeds.derive(seed, "exact"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def exact_cuts(
    read: Callable[[], Iterable[tuple[int, np.ndarray, np.ndarray]]], ratios: dict[str, float]
) -> list[Place]:
    """The first place of each split but the first, so that sizes are as `sizes` says; memory is a small share of N.

    `read()` gives (unit, ranks, indices) of each unit and is called twice: to count ranks by their first 16 bits, and
    to sort those few that fall where a cut does.
    """
    counts = np.zeros(1 << 16, dtype=np.int64)
    for _, found, _ in read():
        counts += np.bincount((found >> np.uint64(48)).astype(np.int64), minlength=len(counts))
    before = np.cumsum(counts) - counts
    wanted = edges(int(counts.sum()), ratios)
    buckets = [int(np.searchsorted(before, edge, side="right")) - 1 for edge in wanted]
    members: dict[int, list[Place]] = {bucket: [] for bucket in buckets}
    for unit, found, indices in read():
        heads = (found >> np.uint64(48)).astype(np.int64)
        for bucket, places in members.items():
            chosen = heads == bucket
            places += [(int(rank), unit, int(i)) for rank, i in zip(found[chosen], indices[chosen], strict=True)]
    cuts = []
    for edge, bucket in zip(wanted, buckets, strict=True):
        inside = sorted(members[bucket])
        rest = edge - int(before[bucket])
        cuts.append(inside[rest] if rest < len(inside) else (1 << 64, 0, 0))
    return cuts


def by_cuts(ranks: np.ndarray, cuts: list[Place], *, unit: int, indices: np.ndarray) -> list[int]:
    """The number of the split of each record of a unit, from ranks and places (N,) in it and `exact_cuts`."""
    places = zip(ranks.tolist(), indices.tolist(), strict=True)
    return [bisect.bisect_right(cuts, (rank, unit, index)) for rank, index in places]


def cut_text(text: str, ratios: dict[str, float]) -> dict[str, str]:
    """`position` within one long text: consecutive pieces by number of characters."""
    result, start = {}, 0
    for name, size in sizes(len(text), ratios).items():
        result[name] = text[start : start + size]
        start += size
    return result
