"""Rows of Parquet come as Python values, a bad cell spoils its row alone, and a damaged file is an error."""

import pyarrow
import pyarrow.parquet
import pytest
from whole_files import failure, read, unit_of

from codex_accel import parquet
from codex_accel.errors import UserError
from codex_accel.lines import Reading


def table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_rows_are_numbered_from_one_over_row_groups(tmp_path):
    path = table(tmp_path / "a.parquet", text=[str(n) for n in range(8)], other=range(8))
    assert read(path, fields=("text",)) == [(n + 1, {"text": str(n)}) for n in range(8)]


def test_nested_columns_and_nulls_come_as_python_values(tmp_path):
    turns = [[{"role": "user", "content": "a"}], None, []]
    path = table(tmp_path / "a.parquet", m=turns, n=["a", None, "b"])
    assert [value for _, value in read(path, fields=("m",), present=("n",))] == [
        {"n": True, "m": turns[0]},
        {"n": None, "m": None},
        {"n": True, "m": []},
    ]


def test_cell_that_is_not_utf_8_spoils_its_row_alone(tmp_path):
    texts = pyarrow.array([b"a", b"b\xff", b"c"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = table(tmp_path / "a.parquet", text=pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers()))
    assert [value for _, value in read(path, fields=("text",))] == [
        {"text": "a"},
        "! not utf-8: byte 0xff at byte 2 of a cell",
        {"text": "c"},
    ]


def test_large_cells_are_over_the_limit(tmp_path):
    path = table(tmp_path / "a.parquet", m=[["é" * 5], ["é" * 6]])
    found = [value for _, value in read(path, fields=("m",), limit=10)]
    assert found == [{"m": ["é" * 5]}, "! longer than max_record_bytes = 10"]


def test_column_that_is_missing_or_twice_is_an_error(tmp_path):
    path = table(tmp_path / "a.parquet", a=["x"], b=[1])
    assert failure(path, fields=("text",)) == (": no column 'text': there are 'a', 'b'. Name the field that is meant.")
    assert "no column 'c'" in failure(path, fields=("a",), present=("c",))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(twice, path)
    assert failure(path, fields=("a",)).startswith(": two columns have one name: 'a'")


@pytest.mark.security
def test_damaged_parquet_is_an_error(tmp_path):
    path = table(tmp_path / "a.parquet", text=[str(n) * 50 for n in range(99)])
    data = path.read_bytes()
    for damaged in (b"no parquet\n", data[:-20], data[:4] + b"\xff" * 400 + data[404:]):
        told = failure(path, damaged, fields=("text",))
        assert "is no Parquet file that can be read" in told, told
        assert told.endswith("Fetch or make it again.")


def test_parquet_that_changed_is_an_error(tmp_path):
    unit = unit_of(table(tmp_path / "a.parquet", text=["a"]))
    table(tmp_path / "a.parquet", text=["b"])
    with pytest.raises(UserError, match="has changed while it was being read"):
        list(parquet.rows(unit, Reading(99, fields=("text",))))


@pytest.mark.parametrize(("type_", "value"), [(pyarrow.timestamp("ms"), 10**18), (pyarrow.duration("s"), 10**18)])
def test_cell_beyond_what_python_can_hold_spoils_its_row_alone(tmp_path, type_, value):
    path = table(tmp_path / "a.parquet", text=pyarrow.array([value, None], type_))
    assert read(path, fields=("text",)) == [
        (1, f"! a cell of type {type_} that Python cannot hold"),
        (2, {"text": None}),
    ]
