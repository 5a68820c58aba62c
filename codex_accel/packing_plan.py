"""Which tokens lie in which block, where documents are packed or grouped: a plan from their lengths alone.

Rule: a plan is a function of the lengths, the block size and what becomes of over-long documents; its counts are those
of `packing_cost`. What is fed is pieces: stretches of one document, at most a block long. No document is cut unless it
is longer than the block.

Shapes: D documents, P pieces, B blocks, T = block_size.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codex_accel import order, seeds


@dataclass(frozen=True)
class Pieces:
    """What is to be fed, in the order of the documents."""

    starts: np.ndarray  # (P,) int64, into the row of all tokens
    lengths: np.ndarray  # (P,) uint16 or int64, 1 to T

    def __len__(self) -> int:
        return len(self.starts)

    def taken(self, indices: np.ndarray) -> "Pieces":
        """These, in this order."""
        return Pieces(self.starts[indices], self.lengths[indices])


@dataclass(frozen=True)
class Plan:
    """Block b feeds the pieces first_piece[b] to first_piece[b + 1], one after the other."""

    pieces: Pieces  # in the order of the blocks
    first_piece: Sequence[int] | np.ndarray  # (B + 1,)
    counts: dict[str, int]  # for run.json

    def __len__(self) -> int:
        return len(self.first_piece) - 1

    def stretches(self, block: int) -> list[tuple[int, int]]:
        """[start, stop) of each piece of a block, in the row of all tokens."""
        chosen = slice(int(self.first_piece[block]), int(self.first_piece[block + 1]))
        starts, lengths = self.pieces.starts[chosen].tolist(), self.pieces.lengths[chosen].tolist()
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def cut(lengths: np.ndarray, *, block_size: int, overlong: str) -> tuple[Pieces, dict[str, int]]:
    """Pieces of documents of `lengths` (D,), and what became of those that are longer than the block.

    `split`: full blocks and a rest; `truncate`: the first T tokens; `drop`: nothing of them; `error`: there are none.
    """
    is_over = lengths > block_size
    num_over, excess = int(is_over.sum()), int(lengths[is_over].sum())
    counts = {
        "num_over_long": num_over,
        "documents_cut": num_over if overlong == "split" else 0,
        "documents_truncated": num_over if overlong == "truncate" else 0,
        "documents_dropped": num_over if overlong == "drop" else 0,
        "tokens_dropped": {"split": 0, "truncate": excess - num_over * block_size, "drop": excess}.get(overlong, 0),
    }
    starts = np.cumsum(lengths) - lengths
    kind = np.uint16 if block_size < 1 << 16 else np.int64  # numpy sorts 16 bits by radix: ten times as fast
    if overlong == "split" and num_over:
        num_pieces = -(-lengths // block_size)
        owners = np.repeat(np.arange(len(lengths)), num_pieces)
        within = (np.arange(len(owners)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)) * block_size
        return Pieces(starts[owners] + within, np.minimum(lengths[owners] - within, block_size).astype(kind)), counts
    kept = (lengths > 0) & ~(is_over & (overlong == "drop"))
    return Pieces(starts[kept], np.minimum(lengths[kept], block_size).astype(kind)), counts


def longest_first(pieces: Pieces) -> Pieces:
    """Sorted by falling length; those of one length stay in their order."""
    return pieces.taken(np.argsort(pieces.lengths.max(initial=0) - pieces.lengths, kind="stable"))


def best_fit(pieces: Pieces, *, block_size: int, counts: dict[str, int]) -> Plan:
    """Best-fit decreasing: from the longest piece on, each goes to the fullest block that has room for it.

    Of blocks with equal room, the one that has had it longest. All pieces of one length are placed at once, as in
    `packing_cost.best_fit`, so the time depends on the number of distinct lengths, but for two sorts. Source: Ding et
    al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
    """
    pieces = longest_first(pieces)
    blocks = np.empty(len(pieces), dtype=np.int32)  # (P,) where each goes
    with_room: dict[int, deque[np.ndarray]] = {}  # blocks by the room that they have left
    rooms: list[int] = []  # the keys of `with_room`, rising
    num_blocks, placed = 0, 0

    def add(room: int, opened: np.ndarray) -> None:
        if room and len(opened):
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, deque()).append(opened)

    def take(room: int, at_most: int) -> np.ndarray:
        queue, taken = with_room[room], []
        while queue and at_most:
            first = queue.popleft()
            taken.append(first[:at_most])
            if len(first) > at_most:
                queue.appendleft(first[at_most:])
            at_most -= len(taken[-1])
        if not queue:
            del with_room[room], rooms[bisect_left(rooms, room)]
        return np.concatenate(taken)

    num_of_length = np.bincount(pieces.lengths, minlength=1)
    for length in np.flatnonzero(num_of_length)[::-1].tolist():
        end = placed + int(num_of_length[length])
        while placed < end:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                opened = -(-(end - placed) // (block_size // length))
                add(block_size, np.arange(num_blocks, num_blocks + opened, dtype=np.int32))
                num_blocks += opened
            room = rooms[place]
            each = room // length  # a block stays the fullest one that fits until it is full
            chosen = take(room, -(-(end - placed) // each))
            num_placed = min(each * len(chosen), end - placed)
            blocks[placed : placed + num_placed] = np.repeat(chosen, each)[:num_placed]
            filled, rest = divmod(num_placed, each)
            add(room - each * length, chosen[:filled])
            add(room - rest * length, chosen[filled:])
            placed += num_placed

    num_pieces = np.bincount(blocks, minlength=num_blocks)
    return Plan(
        pieces.taken(np.argsort(blocks, kind="stable")),
        np.concatenate([[0], np.cumsum(num_pieces)]),
        {
            "num_blocks": num_blocks,
            "padding_tokens": num_blocks * block_size - int(pieces.lengths.sum(dtype=np.int64)),
            **counts,
            "blocks_with_boundary": int((num_pieces > 1).sum()),
        },
    )


def group_by_length(pieces: Pieces, *, batch_size: int, counts: dict[str, int]) -> Plan:
    """A row for each piece, the longest first; a batch is `batch_size` rows in a stretch, the last one what is left."""
    pieces = longest_first(pieces)
    widths = pieces.lengths[::batch_size].astype(np.int64)  # of each batch: its first row is its longest
    places = int(widths.sum()) * batch_size
    if len(pieces) % batch_size:
        places -= int(widths[-1]) * (batch_size - len(pieces) % batch_size)
    return Plan(
        pieces,
        range(len(pieces) + 1),
        {
            "num_blocks": len(pieces),
            "num_batches": len(widths),
            "padding_tokens": places - int(pieces.lengths.sum(dtype=np.int64)),
            **counts,
            "blocks_with_boundary": 0,
        },
    )


def grouped_rows(plan: Plan, step: int, *, batch_size: int, global_batch_size: int, seed: int) -> np.ndarray:
    """Rows of optimizer step `step` of a `group_by_length` plan, (global_batch_size,), -1 where a batch has none.

    `order.batch` draws whole batches. Which row stands at a place of the sorted rows is drawn anew each epoch among
    the rows of its length, so that a batch holds other documents and as much padding.
    """
    num_batches, per_step = -(-len(plan) // batch_size), global_batch_size // batch_size
    batches = order.batch(step, num_sequences=num_batches, global_batch_size=per_step, seed=seed)
    epochs = np.repeat(np.arange(step * per_step, (step + 1) * per_step) // num_batches, batch_size)
    places = (batches[:, None] * batch_size + np.arange(batch_size)).ravel()
    rows = np.full(len(places), -1)
    there = places < len(plan)
    lengths = plan.pieces.lengths[places[there]].tolist()
    for epoch, length in sorted(set(zip(epochs[there].tolist(), lengths, strict=True))):
        first, end = (side(plan.pieces.lengths, -length, key=_falling) for side in (bisect_left, bisect_right))
        chosen = (epochs == epoch) & (places >= first) & (places < end)
        drawn = order.permute(places[chosen] - first, end - first, seed=seeds.derive(seed, "rows"), epoch=epoch)
        rows[chosen] = first + drawn
    return rows


def _falling(length: np.integer) -> int:
    return -int(length)
