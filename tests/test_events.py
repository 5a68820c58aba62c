"""Logs hold whole lines only, none of them twice and none of them lost."""

import datetime
import errno
import json
import math
import os
import subprocess
import sys

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
    assert log.sync() == len('{"step": 0}\n')


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_number_is_written_as_text(log, value, text):
    log.write({"loss": value})
    assert log.path.read_text() == f'{{"loss": "{text}"}}\n'


def test_cut_back_drops_what_came_after_the_offset(log):
    log.write({"step": 0})
    offset = log.sync()
    log.write({"step": 1})
    log.write({"step": 2})
    assert log.cut_back(offset)
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
    assert LineLog(path).sync() == 0
    assert path.read_bytes() == b""


def test_whole_lines_of_an_earlier_run_stay(tmp_path):
    path = tmp_path / "metrics.ndjson"
    LineLog(path).write({"step": 0})
    LineLog(path).write({"step": 1})
    assert lines(LineLog(path)) == [{"step": 0}, {"step": 1}]


def test_offset_beyond_the_end_keeps_every_line_and_tells_of_lost_ones(log):
    log.write({"step": 0})
    assert not log.cut_back(10**6)
    assert lines(log) == [{"step": 0}]
    assert log.sync() == 12


def test_offset_inside_a_line_drops_it_and_tells(log):
    """A checkpoint records the ends of lines alone, so the file is not the one that it has seen."""
    log.write({"step": 0})
    log.write({"step": 1})
    assert not log.cut_back(20)
    assert lines(log) == [{"step": 0}]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        ends.append(path.stat().st_size)
    assert log.cut_back(offset) is (offset in [0, *ends])
    assert lines(log) == records[: sum(end <= offset for end in ends)]


def test_disabled_log_touches_nothing(tmp_path):
    log = LineLog(tmp_path / "run" / "metrics.ndjson", enabled=False)
    log.write({"step": 0})
    assert log.cut_back(0)
    assert log.sync() == 0
    assert list(tmp_path.iterdir()) == []


def test_sync_keeps_the_lines(log):
    log.write({"step": 0})
    assert log.sync() == 12
    assert lines(log) == [{"step": 0}]


# --- a disk that takes no more --------------------------------------------------------------------------------------

# In a process of its own: a limit on the size of files, which the kernel enforces in the middle of a line.
FULL_DISK = """
import json, resource, sys
from pathlib import Path
from codex_accel.events import LineLog

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

path, room = Path(sys.argv[1]), int(sys.argv[2])
log = LineLog(path)
limit(room)
for step in range(4):
    log.write({"step": step})
report = {"taken": path.read_text()}
try:
    report["synced"] = log.sync()
except OSError as error:
    report["error"] = [error.strerror, error.filename]
limit(resource.RLIM_INFINITY)
log.write({"step": 4})
report |= {"length": log.sync(), "again": log.sync()}
print(json.dumps(report))
"""


@pytest.mark.parametrize("room", [0, 1, 12, 13, 30, 47])
def test_lines_that_the_disk_refuses_wait_and_come_in_order(tmp_path, room):
    """Four lines of 12 bytes and room for less; then room again, and one more line. None is lost, halved or doubled."""
    path = tmp_path / "metrics.ndjson"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path, str(room)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, wanted = json.loads(done.stdout), "".join(f'{{"step": {step}}}\n' for step in range(5))
    assert report["taken"] == wanted[:room]
    assert report["error"] == ["File too large", str(path)]
    assert path.read_text() == wanted
    assert (report["length"], report["again"]) == (60, 60)


def test_disk_with_just_enough_room_takes_all(tmp_path):
    path = tmp_path / "metrics.ndjson"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path, "48"], capture_output=True, text=True)
    assert json.loads(done.stdout)["synced"] == 48, done.stderr


def test_half_line_of_a_run_that_dies_on_a_full_disk_is_dropped_by_the_next(tmp_path):
    path = tmp_path / "metrics.ndjson"
    code = FULL_DISK.replace("limit(resource.RLIM_INFINITY)\n", "sys.exit(3)\n")
    assert subprocess.run([sys.executable, "-c", code, path, "30"], capture_output=True).returncode == 3
    assert path.stat().st_size == 30
    assert lines(LineLog(path)) == [{"step": 0}, {"step": 1}]


def test_a_disk_that_cannot_be_forced_is_told_with_the_file(log, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    log.write({"step": 0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"Input/output error: '.*metrics\.ndjson'"):
            log.sync()
    assert log.sync() == 12


# --- events ---------------------------------------------------------------------------------------------------------


def test_event_tells_time_kind_process_message_and_facts(log, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    event(log, "save", "wrote step-10", step=10, loss=math.nan)
    (found,) = lines(log)
    time = datetime.datetime.fromisoformat(found.pop("time"))
    assert time.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - time) < datetime.timedelta(minutes=1)
    assert found == {"kind": "save", "process": 3, "message": "wrote step-10", "step": 10, "loss": "nan"}
