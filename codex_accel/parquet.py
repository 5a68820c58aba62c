"""Rows of a Parquet file as located values, of the columns that are needed.

Rule: a bad cell spoils its row alone, and a batch of rows is all that is held.
"""

from collections.abc import Iterator
from typing import Any

from codex_accel import files, reasons, redaction, tables
from codex_accel.errors import UserError
from codex_accel.lines import Reading, Values
from codex_accel.sources import Unit

BATCH_BYTES, BATCH_ROWS = 8 << 20, 1024  # of a file held at once, whichever is less


def rows(unit: Unit, reading: Reading) -> Values:
    """Rows as {column: value}, of the columns that are needed; the line is the number of the row, from 1.

    The digest of the file is checked before and after the reading. Raises: UserError for a file that is damaged or
    lacks a column.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    path, row = unit.raw.path, 0
    _require_digest(unit)
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            tables.require_columns(table.schema_arrow.names, reading, str(path))
            columns = sorted({*reading.fields, *reading.present})
            for batch in table.iter_batches(_batch_rows(table.metadata), columns=columns):
                for value in _values(batch, reading):
                    row += 1
                    yield row, value
                reading.num_bytes = unit.num_bytes * row // table.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        _require_digest(unit)
        what = f"is no Parquet file that can be read ({redaction.words(error, 200)})"
        raise UserError(f"{path}:{row + 1}: {what}. Fetch or make it again.") from error
    _require_digest(unit)
    reading.num_bytes = unit.num_bytes


def _require_digest(unit: Unit) -> None:
    if files.sha256_file(unit.raw.path) != unit.sha256:
        raise UserError(f"{unit.raw.path}: has changed while it was being read. Run again.")


def _batch_rows(metadata: Any) -> int:
    """Rows to hold at once, by the mean size of a row in the row group where it is largest."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    mean = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1)
    return int(min(max(BATCH_BYTES // max(mean, 1), 1), BATCH_ROWS))


def _values(batch: Any, reading: Reading) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a batch; of a column that only has to be there, None or True."""
    columns: dict[str, list[Any]] = {}
    for name in reading.present:
        columns[name] = [valid or None for valid in batch.column(name).is_valid().to_pylist()]
    for name in reading.fields:
        try:
            columns[name] = batch.column(name).to_pylist()
        except (ValueError, OverflowError):  # in any of its cells
            columns[name] = [_cell(cell) for cell in batch.column(name)]
    for row in zip(*columns.values(), strict=True):
        fault = next((cell for cell in row if isinstance(cell, ValueError)), None)
        if sum(map(_num_bytes, row)) > reading.max_record_bytes:
            fault = reasons.too_long(reading)
        yield fault or dict(zip(columns, row, strict=True))


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return ValueError(f"not utf-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of a cell")
    except (ValueError, OverflowError):
        return ValueError(f"a cell of type {cell.type} that Python cannot hold")


def _num_bytes(value: Any) -> int:
    """UTF-8 bytes of the texts in a cell."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, list | dict):
        return sum(map(_num_bytes, value.values() if isinstance(value, dict) else value))
    return 0
