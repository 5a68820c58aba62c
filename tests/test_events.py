"""Logs hold whole lines only, none of them twice."""

import datetime
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codex_accel.events import LineLog, event


def lines(log: LineLog) -> list[dict]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def log(tmp_path):
    return LineLog(tmp_path / "run" / "metrics.ndjson")


def test_each_record_is_one_line(log):
    log.write({"step": 0, "loss": 2.5})
    log.write({"step": 1, "text": "two\nlines\u2028and é"})
    assert log.path.read_bytes().count(b"\n") == 2
    assert [json.loads(line) for line in log.path.read_bytes().split(b"\n")[:-1]] == [
        {"step": 0, "loss": 2.5},
        {"step": 1, "text": "two\nlines\u2028and é"},
    ]


def test_line_is_there_as_soon_as_it_is_written(log):
    log.write({"step": 0})
    assert log.path.read_text() == '{"step": 0}\n'
    assert log.offset_bytes == len('{"step": 0}\n')


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_number_is_written_as_text(log, value, text):
    log.write({"loss": value})
    assert log.path.read_text() == f'{{"loss": "{text}"}}\n'


def test_cut_back_drops_what_came_after_the_offset(log):
    log.write({"step": 0})
    offset = log.offset_bytes
    log.write({"step": 1})
    log.write({"step": 2})
    log.cut_back(offset)
    log.write({"step": 1})
    assert lines(log) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("cut", range(1, 13))
def test_half_line_of_a_killed_run_is_dropped(tmp_path, cut):
    """Every length of a second line of 12 bytes; only at the 12th is it whole."""
    path = tmp_path / "metrics.ndjson"
    path.write_bytes((b'{"step": 0}\n' + b'{"step": 1}\n')[: 12 + cut])
    assert lines(LineLog(path)) == [{"step": 0}, {"step": 1}][: 1 + (cut == 12)]


def test_file_without_a_whole_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(b'{"step"')
    assert LineLog(path).offset_bytes == 0


def test_whole_lines_of_an_earlier_run_stay(tmp_path):
    path = tmp_path / "metrics.ndjson"
    LineLog(path).write({"step": 0})
    LineLog(path).write({"step": 1})
    assert lines(LineLog(path)) == [{"step": 0}, {"step": 1}]


def test_offset_beyond_the_end_keeps_every_line(log):
    log.write({"step": 0})
    log.cut_back(10**6)
    assert lines(log) == [{"step": 0}]
    assert log.offset_bytes == 12


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=9), st.integers())), max_size=4),
    offset=st.integers(0, 300),
)
def test_any_cut_leaves_the_whole_lines_before_it(tmp_path, records, offset):
    path = tmp_path / "metrics.ndjson"
    path.unlink(missing_ok=True)
    log = LineLog(path)
    ends = []
    for record in records:
        log.write(record)
        ends.append(log.offset_bytes)
    log.cut_back(offset)
    assert lines(log) == records[: sum(end <= offset for end in ends)]


def test_disabled_log_touches_nothing(tmp_path):
    log = LineLog(tmp_path / "run" / "metrics.ndjson", enabled=False)
    log.write({"step": 0})
    log.cut_back(0)
    log.sync()
    assert log.offset_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_sync_keeps_the_lines(log):
    log.write({"step": 0})
    log.sync()
    assert lines(log) == [{"step": 0}]


def test_event_tells_time_kind_process_message_and_facts(log, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    event(log, "save", "wrote step-10", step=10, loss=math.nan)
    (found,) = lines(log)
    time = datetime.datetime.fromisoformat(found.pop("time"))
    assert time.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - time) < datetime.timedelta(minutes=1)
    assert found == {"kind": "save", "process": 3, "message": "wrote step-10", "step": 10, "loss": "nan"}
