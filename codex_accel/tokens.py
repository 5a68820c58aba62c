"""The token store: documents as ids on disk, read through a memory map.

Rule: what is stored is the documents, not blocks; block size and packing are chosen when training starts. A split is a
set of Arrow IPC streams `<split>-<unit>.arrow`, two bytes a token up to 65,536 ids, which `datasets`, pyarrow and
polars open.

Columns: `input_ids` list<uint16 or uint32>; `target_spans` list of [start, stop) pairs, empty if every token is a
target; `num_bytes` UTF-8 bytes of the targets' text; `record_id` hexadecimal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from codex_accel.errors import UserError

BATCH_TOKENS = 1 << 20  # tokens in one Arrow record batch: what is held in memory while writing


@dataclass(frozen=True)
class Document:
    """One tokenized record."""

    input_ids: np.ndarray  # (L,) unsigned integers
    target_spans: tuple[tuple[int, int], ...]  # [start, stop) into input_ids; () means everything
    num_bytes: int
    record_id: str

    def is_target(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Boolean (stop - start,): which of these tokens are to be predicted; the first of the document never is."""
        stop = len(self.input_ids) if stop is None else stop
        mask = np.full(stop - start, not self.target_spans)
        for low, high in self.target_spans:
            mask[max(0, low - start) : max(0, high - start)] = True
        if start == 0:
            mask[:1] = False
        return mask


def schema_for(vocab_size: int) -> pa.Schema:
    """Columns of the store for ids below `vocab_size`."""
    return pa.schema(
        {
            "input_ids": pa.list_(pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()),
            "target_spans": pa.list_(pa.list_(pa.uint32(), 2)),
            "num_bytes": pa.int64(),
            "record_id": pa.string(),
        }
    )


def shard_name(split: str, unit: int) -> str:
    """File name of the documents of `split` that come from input unit `unit`."""
    return f"{split}-{unit:05d}.arrow"


class ShardWriter:
    """Appends documents to one Arrow IPC stream; whole only after `close`."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema = path, schema
        self._writer = pa.ipc.new_stream(str(path), schema)
        self._pending: list[Document] = []
        self._pending_tokens = 0

    def add(self, document: Document) -> None:
        """Append one document; written when a batch is full."""
        self._pending.append(document)
        self._pending_tokens += len(document.input_ids)
        if self._pending_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is pending and the end of the stream."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        ids_type = self.schema.field("input_ids").type.value_type
        lengths = [len(document.input_ids) for document in self._pending]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        values = np.concatenate([document.input_ids for document in self._pending]).astype(ids_type.to_pandas_dtype())
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(values, ids_type)),
            pa.array([[list(s) for s in d.target_spans] for d in self._pending], self.schema.field(1).type),
            pa.array([document.num_bytes for document in self._pending], pa.int64()),
            pa.array([document.record_id for document in self._pending], pa.string()),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        self._pending, self._pending_tokens = [], 0


class TokenStore:
    """One split of a prepared dataset, seen as documents and as one endless row of tokens."""

    def __init__(self, folder: Path, split: str):
        names = [path.stem.rpartition("-") for path in folder.glob("*-*.arrow")]
        units = sorted(int(unit) for name, _, unit in names if name == split)
        paths = [folder / shard_name(split, unit) for unit in units]
        if not paths:
            there = sorted({name for name, _, _ in names})
            raise UserError(f"{folder}: has no split {split!r}. Choose from: {', '.join(there) or 'none'}.")
        self._batches = [batch for path in paths for batch in _open(path)]
        self._values = [_list_values(batch.column("input_ids")) for batch in self._batches]
        lengths = [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches]
        self._first_document = np.cumsum([0, *map(len, lengths)])  # of each batch
        self.lengths = np.concatenate(lengths).astype(np.int64)  # (num_documents,)
        self.document_starts = np.concatenate([[0], np.cumsum(self.lengths)])  # (num_documents + 1,) into the row
        self._batch_starts = self.document_starts[self._first_document]
        spans = [batch.column("target_spans") for batch in self._batches]
        self.has_spans = any(len(column.flatten()) for column in spans)

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the split, special ones included."""
        return int(self.document_starts[-1])

    def document(self, index: int) -> Document:
        """Document `index`; its ids are a view into the file."""
        batch_index = int(np.searchsorted(self._first_document, index, side="right")) - 1
        batch, row = self._batches[batch_index], index - int(self._first_document[batch_index])
        start = int(self.document_starts[index] - self._batch_starts[batch_index])
        return Document(
            input_ids=self._values[batch_index][start : start + int(self.lengths[index])],
            target_spans=tuple((a, b) for a, b in batch.column("target_spans")[row].as_py()),
            num_bytes=batch.column("num_bytes")[row].as_py(),
            record_id=batch.column("record_id")[row].as_py(),
        )

    def __iter__(self) -> Iterator[Document]:
        return (self.document(index) for index in range(self.num_documents))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the row of all documents, as int64; at most `num_tokens` is reached."""
        stop = min(stop, self.num_tokens)
        result = np.empty(max(0, stop - start), dtype=np.int64)
        first = int(np.searchsorted(self._batch_starts, start, side="right")) - 1
        for index in range(first, len(self._values)):
            low, high = int(self._batch_starts[index]), int(self._batch_starts[index + 1])
            if low >= stop:
                break
            a, b = max(start, low), min(stop, high)
            result[a - start : b - start] = self._values[index][a - low : b - low]
        return result


def _open(path: Path) -> list[pa.RecordBatch]:
    """Record batches of an Arrow stream whose buffers lie in the memory-mapped file."""
    return list(pa.ipc.open_stream(pa.memory_map(str(path), "r")))


def _list_values(column: pa.ListArray) -> np.ndarray:
    return column.values.to_numpy(zero_copy_only=True)
