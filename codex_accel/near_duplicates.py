"""Near duplicates: records that share most of their 5-word shingles with an earlier record.

Rule: a record is found only if the signatures themselves say so, never because two buckets met, and what is found
depends on the records and their order alone, not on threads, processes or how the input is cut into blocks.

Resemblance and shingles: Broder 1997, "On the resemblance and containment of documents". Banding: Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", chapter 3.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import rensa

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
SEED = 0x5EED  # signatures made with another seed cannot be compared
RECALL = 0.99  # chance of looking at a record whose similarity is just the threshold
BLOCK = 1 << 12  # signatures whose buckets are computed at once
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: Knuth 1998, The Art of Computer Programming 6.4


def shingles(text: str) -> list[str]:
    """Every run of five words, lower-cased, with one space between words; a shorter text is one shingle.

    Words are what white space separates, so case and spacing make no difference and punctuation does. A script that is
    written without spaces gives one shingle a paragraph, and only copies of such texts are found.

    >>> shingles("To be, or  not to BE")
    ['to be, or not to', 'be, or not to be']
    """
    words = text.lower().split()
    return [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]


def signatures(texts: list[str], *, num_permutations: int = NUM_PERMUTATIONS) -> np.ndarray:
    """MinHash of the set of shingles of each text: (N, num_permutations) uint32, on all cores.

    The share of equal places in two rows estimates the Jaccard similarity of the two sets, with a standard deviation of
    at most sqrt(s (1 - s) / num_permutations): 0.035 at a similarity of 0.8.
    """
    sets = [shingles(text) for text in texts]
    matrix = rensa.RMinHash.digest_matrix_from_token_sets(sets, num_permutations, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), num_permutations)


def bands_for(threshold: float, *, num_permutations: int = NUM_PERMUTATIONS) -> tuple[int, int]:
    """(bands, rows): the longest bands that still show a pair at the threshold with a chance of `RECALL`.

    A pair of similarity s is looked at if one of the bands is equal in all of its rows: 1 - (1 - s**rows)**bands. Long
    bands keep unlike records apart, so fewer of them are compared in vain.

    >>> bands_for(0.8)
    (21, 6)
    """
    for rows in range(num_permutations, 1, -1):
        bands = num_permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return num_permutations, 1


class Index:
    """The records kept so far, found again by any band of the signature that is equal.

    One chained hash table a band: `heads` holds the newest record of each bucket, `older` the one before each record.
    """

    def __init__(self, *, threshold: float, num_permutations: int):
        self.threshold = threshold
        self.bands, self.rows = bands_for(threshold, num_permutations=num_permutations)
        self.num_kept = 0
        self._band = np.arange(self.bands)
        self._signatures = np.empty((0, num_permutations), dtype=np.uint32)  # (kept, permutations)
        self._numbers = np.empty(0, dtype=np.int64)  # (kept,) place of each in the input
        self._older = np.empty((0, self.bands), dtype=np.int32)  # (kept, bands)
        self._heads = np.empty((self.bands, 0), dtype=np.int32)  # (bands, buckets)

    def make_room(self, num_records: int) -> None:
        """Let so many more records in, at least; bucket numbers from before are worth nothing then."""
        capacity = 1 << max(10, (self.num_kept + num_records - 1).bit_length())
        if capacity <= len(self._numbers):
            return
        signatures, numbers, count = self._signatures, self._numbers, self.num_kept
        self._signatures = np.empty((capacity, signatures.shape[1]), dtype=np.uint32)
        self._numbers = np.empty(capacity, dtype=np.int64)
        self._older = np.empty((capacity, self.bands), dtype=np.int32)
        self._heads = np.full((self.bands, capacity), -1, dtype=np.int32)
        self.num_kept = 0
        for start in range(0, count, BLOCK):
            block = signatures[start : min(count, start + BLOCK)]
            for offset, buckets in enumerate(self.buckets(block)):
                self.add(block[offset], buckets, number=int(numbers[start + offset]))

    def buckets(self, signatures: np.ndarray) -> np.ndarray:
        """The bucket of each signature in the table of each band: (N, permutations) -> (N, bands)."""
        rows = signatures[:, : self.bands * self.rows].reshape(-1, self.bands, self.rows)
        mixed = np.zeros(rows.shape[:2], dtype=np.uint64)
        for row in range(self.rows):
            mixed = (mixed ^ rows[:, :, row]) * _MIX
            mixed ^= mixed >> np.uint64(32)
        return (mixed & np.uint64(self._heads.shape[1] - 1)).astype(np.int64)

    def nearest(self, signature: np.ndarray, buckets: np.ndarray) -> tuple[int, float] | None:
        """(number, similarity) of the kept record most like this one, the earliest of equals; None below the threshold.

        Only records with an equal band count. Others share a bucket by accident, and which do depends on its size.
        """
        place, band, met = self._heads[self._band, buckets], self._band, []
        while (alive := place >= 0).any():
            place, band = place[alive], band[alive]
            met.append(place)
            place = self._older[place, band]
        if not met:
            return None
        candidates = np.concatenate(met)
        equal = self._signatures[candidates] == signature  # (candidates, permutations)
        similarity = np.count_nonzero(equal, axis=1) / len(signature)
        close = np.flatnonzero(similarity >= self.threshold)
        banded = equal[close, : self.bands * self.rows].reshape(-1, self.bands, self.rows)
        close = close[banded.all(axis=2).any(axis=1)]
        if not len(close):
            return None
        best = similarity[close].max()
        return int(self._numbers[candidates[close[similarity[close] == best]]].min()), float(best)

    def add(self, signature: np.ndarray, buckets: np.ndarray, *, number: int) -> None:
        """Keep a record; `number` is its place in the input."""
        self._signatures[self.num_kept], self._numbers[self.num_kept] = signature, number
        self._older[self.num_kept] = self._heads[self._band, buckets]
        self._heads[self._band, buckets] = self.num_kept
        self.num_kept += 1


def find(signatures_in_order: Iterable[np.ndarray], *, threshold: float) -> Iterator[tuple[int, int, float]]:
    """(index, index of the earlier record, similarity) of each record that is like one kept before it.

    `signatures_in_order` are blocks (N, permutations) as `signatures` gives them; indices count over all of them. A
    record that is found is not kept, so nothing is compared with it: a chain of small changes is not followed. Of
    several kept records the most similar one is named, the earliest of equals.

    Memory: a kept record takes its signature and 8 to 12 bytes a band, at threshold 0.8 with 128 permutations 700 to
    800 bytes, and twice that for a moment when the tables grow. Time: 50 us a record where few are alike; it grows with
    the number of records that share a band, which is large only where many records are half equal. Measured in 2026 on
    9,671 records of GSM8K and Dolly, each with a copy of which up to 8 % of the words were changed, at 0.8: every copy
    whose estimate reaches the threshold was found; of the true similarities, 93 % of those from 0.8 on, 99.9 % of those
    from 0.85 on, and none below 0.7.
    """
    index: Index | None = None
    start = 0
    for signatures_ in signatures_in_order:
        for at in range(0, len(signatures_), BLOCK):
            block = np.asarray(signatures_[at : at + BLOCK], dtype=np.uint32)
            index = index or Index(threshold=threshold, num_permutations=block.shape[1])
            index.make_room(len(block))
            for number, (signature, buckets) in enumerate(zip(block, index.buckets(block), strict=True), start):
                found = index.nearest(signature, buckets)
                if found is None:
                    index.add(signature, buckets, number=number)
                else:
                    yield number, *found
            start += len(block)
