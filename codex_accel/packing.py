"""Documents into training blocks.

Rule: `concat` lays the documents of a split in one row and cuts it every `block_size` tokens, so that every token is
the target of exactly one block; nothing is dropped, the last block is padded. With isolation, documents in one block do
not see each other: positions restart at each document, and no document's end predicts the next one's start.

Shapes: B blocks, T = block_size.
"""

from dataclasses import dataclass

import numpy as np

from codex_accel.tokens import TokenStore

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
    """The `concat` plan over one split: block i reads tokens [i T, i T + T] of the row, one more than it feeds."""

    def __init__(self, store: TokenStore, *, block_size: int, isolate_documents: bool):
        self.store, self.block_size, self.isolate = store, block_size, isolate_documents
        self.num_blocks = max(1, -(-(store.num_tokens - 1) // block_size))

    def __len__(self) -> int:
        return self.num_blocks

    def batch(self, indices: np.ndarray) -> Batch:
        """The blocks `indices`, stacked."""
        size = self.block_size
        input_ids = np.zeros((len(indices), size), dtype=np.int64)
        labels = np.full((len(indices), size), IGNORE, dtype=np.int64)
        position_ids = np.tile(np.arange(size, dtype=np.int64), (len(indices), 1))
        for row, index in enumerate(indices):
            start = int(index) * size
            tokens = self.store.tokens(start, start + size + 1)
            num_targets = len(tokens) - 1
            input_ids[row, : min(size, len(tokens))] = tokens[:size]
            labels[row, :num_targets] = tokens[1:]
            self._mark_documents(start, num_targets, labels[row], position_ids[row])
        restarted = (np.diff(position_ids, axis=1) != 1).any()
        return Batch(input_ids, labels, position_ids if restarted else None)

    def _mark_documents(self, start: int, num_targets: int, labels: np.ndarray, position_ids: np.ndarray) -> None:
        """Restart positions and drop labels at the documents that begin after `start`; drop labels of prompts."""
        starts, size = self.store.document_starts, self.block_size
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

    def facts(self) -> dict[str, int]:
        """Counts of the plan, for `run.json`."""
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
