"""The token store: documents as ids on disk, read through a memory map.

Rule: what is stored is the documents, not blocks; block size and packing are chosen when training starts. A split is a
set of Arrow IPC streams `<split>-<unit>.arrow`, two bytes a token up to 65,536 ids, which `datasets`, pyarrow and
polars open.

Columns: `input_ids` list<uint16 or uint32>; `target_spans` list of [start, stop) pairs, empty if every token is a
target; `num_bytes` UTF-8 bytes of the targets' text; `record_id` 16 bytes.
"""

import bisect
from collections.abc import Iterator, Sequence
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
    record_id: str  # hexadecimal

    def is_target(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Boolean (stop - start,): which of these tokens are to be predicted; the first of the document never is."""
        stop = len(self.input_ids) if stop is None else stop
        mask = np.full(stop - start, not self.target_spans)
        for low, high in self.target_spans:
            mask[max(0, low - start) : max(0, high - start)] = True
        if start == 0:
            mask[:1] = False
        return mask


@dataclass(frozen=True)
class Documents:
    """Many tokenized records as columns: what is written at once. D documents, N tokens, S spans."""

    input_ids: np.ndarray  # (N,) unsigned integers, one document after the other
    lengths: np.ndarray  # (D,) int64
    spans: np.ndarray  # (S, 2) int64, [start, stop) into their document, one document after the other
    num_spans: np.ndarray  # (D,) int64; 0 means everything is a target
    num_bytes: np.ndarray  # (D,) int64
    record_ids: np.ndarray  # (D,) of dtype V16

    @classmethod
    def of(cls, documents: "Sequence[Document]") -> "Documents":
        """Columns of a few documents."""
        return cls(
            input_ids=np.concatenate([np.empty(0, np.uint32), *(each.input_ids for each in documents)]),
            lengths=np.array([len(each.input_ids) for each in documents], dtype=np.int64),
            spans=np.array([span for each in documents for span in each.target_spans], dtype=np.int64).reshape(-1, 2),
            num_spans=np.array([len(each.target_spans) for each in documents], dtype=np.int64),
            num_bytes=np.array([each.num_bytes for each in documents], dtype=np.int64),
            record_ids=np.frombuffer(b"".join(bytes.fromhex(each.record_id) for each in documents), dtype="V16"),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Document]:
        stops, span_stops = np.cumsum(self.lengths), np.cumsum(self.num_spans)
        for index, (stop, span_stop) in enumerate(zip(stops, span_stops, strict=True)):
            spans = self.spans[span_stop - self.num_spans[index] : span_stop]
            yield Document(
                input_ids=self.input_ids[stop - self.lengths[index] : stop],
                target_spans=tuple((int(a), int(b)) for a, b in spans),
                num_bytes=int(self.num_bytes[index]),
                record_id=self.record_ids[index].tobytes().hex(),
            )

    def where(self, chosen: np.ndarray) -> "Documents":
        """Those with True in `chosen` (D,)."""
        if chosen.all():
            return self
        return Documents(
            input_ids=self.input_ids[np.repeat(chosen, self.lengths)],
            lengths=self.lengths[chosen],
            spans=self.spans[np.repeat(chosen, self.num_spans)],
            num_spans=self.num_spans[chosen],
            num_bytes=self.num_bytes[chosen],
            record_ids=self.record_ids[chosen],
        )

    def num_targets(self) -> np.ndarray:
        """Int64 (D,): how many tokens of each are to be predicted; the first of a document never is."""
        result = np.where(self.num_spans == 0, np.maximum(self.lengths - 1, 0), 0)
        start, stop = self.spans.T
        owners = np.repeat(np.arange(len(self)), self.num_spans)
        np.add.at(result, owners, stop - start - ((start == 0) & (stop > 0)))
        return result


def schema_for(vocab_size: int) -> pa.Schema:
    """Columns of the store for ids below `vocab_size`."""
    return pa.schema(
        {
            "input_ids": pa.list_(pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()),
            "target_spans": pa.list_(pa.list_(pa.uint32(), 2)),
            "num_bytes": pa.int64(),
            "record_id": pa.binary(16),
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
        self._pending: list[Documents] = []
        self._pending_tokens = 0

    def add(self, documents: Documents) -> None:
        """Append documents; written when a batch is full."""
        self._pending.append(documents)
        self._pending_tokens += len(documents.input_ids)
        if self._pending_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is pending and the end of the stream."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        ids_type, spans_type = self.schema.field("input_ids").type, self.schema.field("target_spans").type

        def column(name: str) -> np.ndarray:
            arrays = [getattr(documents, name) for documents in self._pending]
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        ids = column("input_ids").astype(ids_type.value_type.to_pandas_dtype(), copy=False)
        pairs = pa.FixedSizeListArray.from_arrays(pa.array(column("spans").astype(np.uint32).ravel()), 2)
        record_ids = column("record_ids")
        ids_column = pa.Array.from_buffers(pa.binary(16), len(record_ids), [None, pa.py_buffer(record_ids.tobytes())])
        columns = [
            pa.ListArray.from_arrays(_offsets(column("lengths")), pa.array(ids)),
            pa.ListArray.from_arrays(_offsets(column("num_spans")), pairs.cast(spans_type.value_type)),
            pa.array(column("num_bytes")),
            ids_column,
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        self._pending, self._pending_tokens = [], 0


def _offsets(lengths: np.ndarray) -> pa.Array:
    """Where each list begins and the last ends, as Arrow wants it."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())  # raises where they do not fit


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
        lengths = [np.diff(_numbers(batch.column("input_ids").offsets)) for batch in self._batches]
        self._first_document = np.cumsum([0, *map(len, lengths)])  # of each batch
        self.lengths = np.concatenate(lengths).astype(np.int64)  # (num_documents,)
        self.document_starts = np.concatenate([[0], np.cumsum(self.lengths)])  # (num_documents + 1,) into the row
        self._batch_starts: list[int] = self.document_starts[self._first_document].tolist()
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
            record_id=batch.column("record_id")[row].as_py().hex(),
        )

    def __iter__(self) -> Iterator[Document]:
        return (self.document(index) for index in range(self.num_documents))

    def record_ids(self) -> Iterator[str]:
        """Record ids in order."""
        return (id_.hex() for batch in self._batches for id_ in batch.column("record_id").to_pylist())

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the row of all documents, as int64; at most `num_tokens` is reached."""
        starts = self._batch_starts
        stop = min(stop, starts[-1])
        if start >= stop:
            return np.empty(0, np.int64)
        first = bisect.bisect_right(starts, start) - 1
        if stop <= starts[first + 1]:  # nearly always: one slice of one batch
            return self._values[first][start - starts[first] : stop - starts[first]].astype(np.int64)
        pieces = [
            self._values[index][max(start - starts[index], 0) : stop - starts[index]]
            for index in range(first, bisect.bisect_left(starts, stop))
        ]
        return np.concatenate(pieces, dtype=np.int64)


def _open(path: Path) -> list[pa.RecordBatch]:
    """Record batches of an Arrow stream whose buffers lie in the memory-mapped file.

    Raises: UserError if it is none, has other columns, or has lists that reach beyond their values.
    """
    try:
        stream = pa.ipc.open_stream(pa.memory_map(str(path), "r"))
        if not any(stream.schema.equals(schema_for(size)) for size in (1, 1 << 32)):
            raise UserError(f"{path}: has other columns than a shard: {stream.schema.names}. Prepare the data again.")
        batches = list(stream)
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is damaged ({reason}). Restore the folder from a copy.") from error
    return batches


def _list_values(column: pa.ListArray) -> np.ndarray:
    return _numbers(column.values)


def _numbers(array: pa.Array) -> np.ndarray:
    """A view of whole numbers (N,) without nulls; `Array.to_numpy` would import pandas, a second at every start."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    buffer = array.buffers()[1]
    if buffer is None:  # of no numbers
        return np.empty(0, dtype)
    return np.frombuffer(buffer, dtype)[array.offset : array.offset + len(array)]


def lengths_of(folder: Path, split: str) -> Iterator[np.ndarray]:
    """Lengths (D,) of the documents of a split in their order, in stretches; none if the split has no shard."""
    names = [path.stem.rpartition("-") for path in folder.glob("*-*.arrow")]
    for unit in sorted(int(unit) for name, _, unit in names if name == split):
        with pa.OSFile(str(folder / shard_name(split, unit))) as stream:  # a map of it all would count as memory
            for batch in pa.ipc.open_stream(stream):
                yield np.diff(_numbers(batch.column("input_ids").offsets)).astype(np.int64)
