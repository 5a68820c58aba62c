"""Documents into training blocks: the arrays of a batch.

Rule: what is fed is followed by its label, the next token, wherever the next token is of the same document or documents
are not isolated; padding has none. `concat` lays the documents of a split in one row and cuts it every `block_size`
tokens, so that every token is the target of exactly one block; nothing is dropped, the last block is padded. `best_fit`
and `group_by_length` feed the pieces of a plan. With isolation, documents in one block do not see each other: positions
restart at each document, and no document's end predicts the next one's start.

Shapes: B blocks, T = block_size.
"""

from dataclasses import dataclass

import numpy as np

from codex_accel import order
from codex_accel.errors import UserError
from codex_accel.packing_plan import Plan, best_fit, cut, group_by_length, grouped_rows
from codex_accel.tokens import TokenStore
from codex_accel.train_schema import TrainConfig

IGNORE = -100  # label of a position that is not a target, as torch.nn.functional.cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """Arrays of some blocks; `position_ids` is None where no block holds a document boundary."""

    input_ids: np.ndarray  # (B, T) int64
    labels: np.ndarray  # (B, T) int64, already shifted: labels[b, t] follows input_ids[b, t]
    position_ids: np.ndarray | None  # (B, T) int64

    @property
    def num_targets(self) -> int:
        """Positions with a label."""
        return int((self.labels != IGNORE).sum())


class Blocks:
    """A split in blocks. `concat`: block i reads tokens [i T, i T + T] of the row, one more than it feeds.

    With `plan`, block i feeds the pieces of the plan, one after the other; with `rows_together`, as many rows of it as
    make a micro-batch are padded to the longest of them, else every block to T.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        block_size: int,
        isolate_documents: bool,
        plan: Plan | None = None,
        rows_together: int | None = None,
    ):
        self.store, self.block_size, self.isolate = store, block_size, isolate_documents
        self.plan, self.rows_together = plan, rows_together
        self.num_blocks = max(1, -(-(store.num_tokens - 1) // block_size)) if plan is None else len(plan)

    def __len__(self) -> int:
        """Sequences of an epoch; rows that the last micro-batch lacks are counted."""
        if self.rows_together is None:
            return self.num_blocks
        return -(-self.num_blocks // self.rows_together) * self.rows_together

    def of_step(self, step: int, *, global_batch_size: int, seed: int) -> np.ndarray:
        """Blocks of optimizer step `step`, int64 (global_batch_size,); -1 for a row that a micro-batch lacks."""
        if self.plan is not None and self.rows_together is not None:
            together = self.rows_together
            return grouped_rows(self.plan, step, batch_size=together, global_batch_size=global_batch_size, seed=seed)
        return order.batch(step, num_sequences=len(self), global_batch_size=global_batch_size, seed=seed)

    def batch(self, indices: np.ndarray) -> Batch:
        """The blocks `indices`, stacked."""
        rows = [self._stretches(index) for index in indices.tolist() if index >= 0]
        size = self.block_size
        if self.rows_together is not None:
            size = max(stop - start for row in rows for start, stop in row)
        input_ids = np.zeros((len(rows), size), dtype=np.int64)
        labels = np.full((len(rows), size), IGNORE, dtype=np.int64)
        position_ids = np.tile(np.arange(size, dtype=np.int64), (len(rows), 1))
        for row, stretches in enumerate(rows):
            place = 0
            for start, stop in stretches:
                tokens = self.store.tokens(start, stop + 1)
                end, num_targets = place + stop - start, len(tokens) - 1
                input_ids[row, place : place + min(stop - start, len(tokens))] = tokens[: stop - start]
                labels[row, place : place + num_targets] = tokens[1:]
                position_ids[row, place:] = np.arange(size - place)  # to the end: padding begins no document
                self._mark_documents(start, num_targets, labels[row, place:end], position_ids[row, place:end])
                place = end
        restarted = (np.diff(position_ids, axis=1) != 1).any()
        return Batch(input_ids, labels, position_ids if restarted else None)

    def _stretches(self, index: int) -> list[tuple[int, int]]:
        """[start, stop) of what block `index` feeds, in the row of all tokens."""
        if self.plan is None:
            return [(index * self.block_size, (index + 1) * self.block_size)]
        return self.plan.stretches(index)

    def _mark_documents(self, start: int, num_targets: int, labels: np.ndarray, position_ids: np.ndarray) -> None:
        """Restart positions and drop labels at the documents that begin after `start`; drop labels of prompts."""
        starts, size = self.store.document_starts, len(labels)
        first = int(np.searchsorted(starts, start, side="right"))  # first document that begins after `start`
        last = int(np.searchsorted(starts, start + num_targets, side="right"))
        if self.isolate:
            for boundary in starts[first:last] - start:
                if boundary <= num_targets:
                    labels[boundary - 1] = IGNORE  # it would predict the next document's first token
                position_ids[boundary:] = np.arange(size - min(size, boundary))
        if self.store.has_spans:
            for index in range(first - 1, min(last, self.store.num_documents)):
                document = self.store.document(index)
                mask = document.is_target()
                if not self.isolate:  # then what stands before it predicts its first token
                    mask[:1] = not document.target_spans or document.target_spans[0][0] == 0
                low = int(starts[index]) - start  # place of the document's first token in this block
                a, b = max(1, low), min(num_targets + 1, low + len(mask))
                segment = labels[a - 1 : b - 1]
                segment[~mask[a - low : b - low]] = IGNORE

    def with_boundary(self) -> Batch:
        """The first block in which a document begins after another, alone; `blocks_with_boundary` says there is one."""
        if self.plan is None:
            starts = self.store.document_starts[:-1]
            candidates = np.unique(starts[starts % self.block_size != 0] // self.block_size)
        else:
            candidates = np.flatnonzero(np.diff(self.plan.first_piece) > 1)
        batches = (self.batch(candidates[place : place + 1]) for place in range(len(candidates)))
        return next(batch for batch in batches if batch.position_ids is not None)

    def facts(self) -> dict[str, int]:
        """Counts of the plan, for `run.json`."""
        if self.plan is not None:
            return {"num_documents": self.store.num_documents, "num_tokens": self.store.num_tokens, **self.plan.counts}
        store, size = self.store, self.block_size
        first_block, last_block = store.document_starts[:-1] // size, (store.document_starts[1:] - 2) // size
        return {
            "num_documents": store.num_documents,
            "num_tokens": store.num_tokens,
            "num_blocks": self.num_blocks,
            "padding_tokens": self.num_blocks * size - max(0, store.num_tokens - 1),
            "documents_cut": int((first_block < last_block).sum()),
            "blocks_with_boundary": len(np.unique(first_block[store.document_starts[:-1] % size != 0])),
        }


def build(config: TrainConfig, store: TokenStore) -> Blocks:
    """The blocks of a split as `data.packing` says.

    Raises: UserError if documents are longer than a block and `data.overlong` is error, or if none is left.
    """
    data, batch_size = config.data, config.training.micro_batch_size
    plan = None
    if data.packing != "concat":
        if data.overlong == "error" and (num_over := int((store.lengths > data.block_size).sum())):
            what = (
                f"{num_over:,} of {store.num_documents:,} documents of split {data.train_split!r} are longer than "
                f"data.block_size = {data.block_size}; the longest has {int(store.lengths.max()):,} tokens. Raise "
                "data.block_size, or say split, truncate or drop."
            )
            raise UserError(config.problem("data.overlong", what))
        pieces, counts = cut(store.lengths, block_size=data.block_size, overlong=data.overlong)
        if not len(pieces):
            what = (
                f"{data.overlong} leaves no document of the {store.num_documents:,} of split {data.train_split!r}: "
                f"{counts['num_over_long']:,} are longer than data.block_size = {data.block_size}, the others are "
                "empty. Raise data.block_size, or say split."
            )
            raise UserError(config.problem("data.overlong", what))
        if data.packing == "best_fit":
            plan = best_fit(pieces, block_size=data.block_size, counts=counts)
        else:
            plan = group_by_length(pieces, batch_size=batch_size, counts=counts)
    return Blocks(
        store,
        block_size=data.block_size,
        isolate_documents=data.isolate_documents,
        plan=plan,
        rows_together=batch_size if data.packing == "group_by_length" else None,
    )
