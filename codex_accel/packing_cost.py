"""What each packing of a split would cost at a block size, from the lengths of its documents alone.

Rule: nothing is estimated. The counts are those that the packing itself would give; what depends on the order of the
documents is read in that order, the rest comes from the histogram: distinct `lengths` in tokens, and how many documents
have each (`counts`).
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

BLOCK_SIZES = (512, 1024, 2048, 4096)
PERCENTILES = {"min": 0, "p1": 1, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
MAX_BINS = 24  # of a histogram, up to lengths of 2**24


def concat(lengths_in_order: Iterable[np.ndarray], *, block_size: int) -> dict[str, int]:
    """Counts of `packing.Blocks`, from the lengths in the order of the store, in chunks; one chunk is held at a time.

    `documents_cut` counts documents whose tokens are fed in more than one block, their last token left out.
    """
    return _concat(lengths_in_order, [block_size])[block_size]


def _concat(lengths_in_order: Iterable[np.ndarray], block_sizes: Sequence[int]) -> dict[int, dict[str, int]]:
    num_tokens, cut = 0, dict.fromkeys(block_sizes, 0)
    for chunk in lengths_in_order:
        ends = num_tokens + np.cumsum(chunk, dtype=np.int64)
        starts = ends - chunk
        for size in block_sizes:
            cut[size] += int((starts // size < (ends - 2) // size).sum())
        num_tokens = int(ends[-1]) if len(ends) else num_tokens
    fed = max(0, num_tokens - 1)  # the last token of the row is a label only
    result = {}
    for size in block_sizes:
        num_blocks = max(1, -(-fed // size))
        result[size] = {
            "num_blocks": num_blocks,
            "padding_tokens": num_blocks * size - fed,
            "documents_cut": cut[size],
        }
    return result


def best_fit(lengths: np.ndarray, counts: np.ndarray, *, block_size: int) -> dict[str, int]:
    """Counts of best-fit decreasing: from the longest piece on, each goes to the fullest block that has room for it.

    A document longer than the block is cut into full blocks and a rest, which is packed; no other document is cut. Each
    token takes one place. Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
    All pieces of one length are placed at once, so the time depends on the number of distinct lengths.
    """
    pieces = _pieces(lengths, counts, block_size)
    num_blocks = 0
    blocks_with = [0] * (block_size + 1)  # by the room that they have left
    rooms: list[int] = []  # those above 0 that some block has, rising

    def add(room: int, num: int) -> None:
        if num and room and not blocks_with[room]:
            insort(rooms, room)
        blocks_with[room] += num

    for length in np.flatnonzero(pieces)[::-1].tolist():
        waiting = int(pieces[length])
        while waiting:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                opened = -(-waiting // (block_size // length))
                num_blocks += opened
                add(block_size, opened)
            room = rooms[place]
            each = room // length  # a block stays the fullest one that fits until it is full
            filled = min(blocks_with[room], waiting // each)
            rest = (
                waiting - filled * each if filled < blocks_with[room] else 0
            )  # fewer than `each`: into one more block
            blocks_with[room] -= filled + (rest > 0)
            if not blocks_with[room]:
                del rooms[place]
            add(room - each * length, filled)
            add(room - rest * length, int(rest > 0))
            waiting -= filled * each + rest
    return {
        "num_blocks": num_blocks,
        "padding_tokens": num_blocks * block_size - _num_tokens(lengths, counts),
        **_over_long(lengths, counts, block_size),
    }


def group_by_length(lengths: np.ndarray, counts: np.ndarray, *, block_size: int, batch_size: int = 8) -> dict[str, int]:
    """Counts of batches of `batch_size` pieces of similar length, sorted, each padded to the longest of its batch.

    A document longer than the block is cut into full blocks and a rest. The longest come first; the last batch holds
    what is left.
    """
    pieces = _pieces(lengths, counts, block_size)
    by_length = np.arange(block_size, 0, -1)
    ends = np.cumsum(pieces[:0:-1])  # places of the pieces of each length in the sorted row
    num_batches = -(-int(ends[-1]) // batch_size)
    begun = -(-ends // batch_size)  # batches whose first and longest piece is of this length or longer
    heads = np.diff(begun, prepend=0)
    places = batch_size * int(heads @ by_length)
    if num_batches:
        missing = num_batches * batch_size - int(ends[-1])
        places -= missing * int(by_length[np.flatnonzero(heads)[-1]])
    return {
        "num_batches": num_batches,
        "padding_tokens": places - _num_tokens(lengths, counts),
        **_over_long(lengths, counts, block_size),
    }


def _pieces(lengths: np.ndarray, counts: np.ndarray, block_size: int) -> np.ndarray:
    """(block_size + 1,) number of pieces of each length once every document is cut each `block_size` tokens."""
    pieces = np.zeros(block_size + 1, dtype=np.int64)
    np.add.at(pieces, lengths % block_size, counts)
    pieces[block_size] = (lengths // block_size) @ counts
    pieces[0] = 0  # no rest, or an empty document
    return pieces


def _num_tokens(lengths: np.ndarray, counts: np.ndarray) -> int:
    return int(lengths @ counts)


def _over_long(lengths: np.ndarray, counts: np.ndarray, block_size: int) -> dict[str, int]:
    num = int(counts[lengths > block_size].sum())
    return {"num_over_long": num, "documents_cut": num}


def costs(
    lengths: np.ndarray,
    counts: np.ndarray,
    lengths_in_order: Iterable[np.ndarray],
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Counts by block size and packing, with the share of padding among all places that would be fed.

    `costs(...)["512"]["best_fit"]["padding_fraction"]`; None where nothing would be fed. `lengths_in_order` is read
    once for all block sizes.
    """
    in_order = _concat(lengths_in_order, block_sizes)
    num_tokens = _num_tokens(lengths, counts)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for size in block_sizes:
        packings = {
            "concat": in_order[size],
            "best_fit": best_fit(lengths, counts, block_size=size),
            "group_by_length": group_by_length(lengths, counts, block_size=size),
        }
        result[str(size)] = {}
        for name, cost in packings.items():
            padding = cost["padding_tokens"]
            places = cost["num_blocks"] * size if "num_blocks" in cost else num_tokens + padding
            result[str(size)][name] = {**cost, "padding_fraction": padding / places if places else None}
    return result


def percentiles(lengths: np.ndarray, counts: np.ndarray) -> dict[str, int | None]:
    """The shortest length that at least p % of the documents do not exceed; None for all if there is no document.

    This is `numpy.percentile(..., method="inverted_cdf")` in whole numbers.
    """
    order = np.argsort(lengths)
    reached = np.cumsum(counts[order])
    total = int(reached[-1]) if len(reached) else 0
    if not total:
        return dict.fromkeys(PERCENTILES)
    ranks = {name: max(1, -(-total * percent // 100)) for name, percent in PERCENTILES.items()}
    return {name: int(lengths[order][np.searchsorted(reached, rank)]) for name, rank in ranks.items()}


def histogram(lengths: np.ndarray, counts: np.ndarray) -> list[dict[str, int]]:
    """Documents by length in bins `low` to `high` tokens, both included, whose widths grow with the length.

    There are 1, 2, 4 or 8 bins an octave, the most that `MAX_BINS` allows (or 1). Bins between the shortest and the
    longest document are there even if they are empty.
    """
    lengths, counts = lengths[counts > 0], counts[counts > 0]
    if not len(lengths):
        return []
    choices = [_edges(lengths, per_octave) for per_octave in (8, 4, 2, 1)]
    edges = next((edges for edges in choices if len(edges) <= MAX_BINS + 1), choices[-1])
    totals = np.zeros(len(edges) - 1, dtype=np.int64)
    np.add.at(totals, np.searchsorted(edges, lengths, side="right") - 1, counts)
    return [
        {"low": low, "high": edge - 1, "count": count}
        for low, edge, count in zip(edges[:-1], edges[1:], totals.tolist(), strict=True)
    ]


def _edges(lengths: np.ndarray, per_octave: int) -> list[int]:
    """First lengths of the bins from the shortest to the longest of `lengths`, and the one after the last bin."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    num_octaves = math.ceil(math.log2(longest + 2))
    edges = sorted({0, *(round(2 ** (step / per_octave)) for step in range(num_octaves * per_octave + 2))})
    first = max(index for index, edge in enumerate(edges) if edge <= shortest)
    last = min(index for index, edge in enumerate(edges) if edge > longest)
    return edges[first : last + 1]
