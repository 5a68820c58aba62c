"""Logs hold whole lines only, none of them twice and none of them lost."""

import datetime
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import unicodedata
from pathlib import Path

import faults
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from codex_accel import events, redaction
from codex_accel.errors import UserError
from codex_accel.events import LineLog, event


def lines(log: LineLog) -> list[dict]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def log_files(path: Path) -> list[Path]:
    """The files of a log in order, by their names."""
    return [*sorted(path.parent.glob(f"{path.stem}.*{path.suffix}")), *([path] if path.exists() else [])]


def all_bytes(path: Path) -> bytes:
    return b"".join(each.read_bytes() for each in log_files(path))


def sizes(path: Path) -> dict[str, int]:
    return {each.name: each.stat().st_size for each in log_files(path)}


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


def test_non_finite_number_in_a_nested_value_is_written_as_text(log):
    log.write({"losses": [1.0, math.nan, {"worst": math.inf}]})
    assert lines(log) == [{"losses": [1.0, "nan", {"worst": "inf"}]}]


# Whatever breaks a line or turns the text of a terminal: C0 and C1 controls, ends of line, bidirectional marks, halves
# of surrogate pairs, and what JSON itself escapes.
UNRULY = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u2028\u2029\u200e\u200f\u061c\ufeff", *'"\\/']
UNRULY += [*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), *"\ud800\udbff\udc00\udfff\U000e0001"]
TEXTS = st.text(st.one_of(st.sampled_from(UNRULY), st.characters(exclude_categories=())), max_size=30)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def as_read(value):
    """What JSON makes of a value: a pair of halves is the one character that they stand for."""
    return json.loads(json.dumps(value))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=4))
@example([{"text": "".join(UNRULY)}, {"".join(UNRULY): ["".join(UNRULY)]}])
@example([{"text": "\u202e\n" * 500_000}])
def test_any_text_is_one_line_of_plain_characters_that_reads_back(tmp_path, records):
    path = tmp_path / "metrics.ndjson"
    path.unlink(missing_ok=True)
    log = LineLog(path)
    for record in records:
        log.write(record)
    written = path.read_bytes()
    assert set(written) <= {*range(0x20, 0x7F), 0x0A}
    assert written.count(b"\n") == len(records)
    assert [json.loads(line) for line in written.splitlines()] == [as_read(redaction.value(each)) for each in records]


def test_the_unruly_characters_are_all_that_unicode_calls_control_or_bidirectional():
    """So the property above has them all to draw from."""
    every = map(chr, range(0x110000))
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    found = {c for c in every if unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in turning}
    assert found <= set(UNRULY)
    assert len(found) == 65 + 9


def test_a_secret_is_masked_before_a_line_is_written(log):
    log.write({"text": "password=Zq8vT3nL0xW5pRk2\u202e"})
    assert "Zq8vT3nL0xW5pRk2" not in log.path.read_text()
    assert "SECRET" in lines(log)[0]["text"]


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


@pytest.mark.parametrize(
    "data",
    [
        b"PRECIOUS\x00 data",
        b"line one\nlast line",
        b'{"step": 0}\n{\n  "a": 1\n}',
        b"x",
        b"{a",
        b'"{',
        b'{"a": 1}\n\x00\x01',
    ],
)
def test_a_foreign_file_without_an_end_of_its_last_line_is_refused_and_stays(tmp_path, data):
    path = tmp_path / "important.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        LineLog(path)
    what = "is no log of this kind: its last line has no end and is no JSON. Name another file, or end the line."
    assert caught.value.problems == [f"{path}: {what}"]
    assert path.read_bytes() == data


@pytest.mark.parametrize("rest", [b"\0" * 4096, b'{"st' + b"\0" * 100, b"{\0"])
def test_zeros_that_a_power_cut_leaves_are_dropped(tmp_path, rest):
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(b'{"step": 0}\n' + rest)
    assert lines(LineLog(path)) == [{"step": 0}]


@pytest.mark.parametrize("over", [-2, -1, 0, 1])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_half_line_as_long_as_some_blocks_is_dropped(tmp_path, num_blocks, over):
    """The end of the line before it is the last byte of a block, the first of one, or beside it."""
    path = tmp_path / "metrics.ndjson"
    half = b'{"text": "'.ljust(num_blocks * events.BLOCK_BYTES + over, b"x")
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + half)
    log = LineLog(path)
    assert lines(log) == [{"step": 0}, {"step": 1}]
    path.write_bytes(b'{"step": 0}\n' + half + b'"}\n')
    assert not log.cut_back(12 + len(half))
    assert lines(log) == [{"step": 0}]


@pytest.mark.parametrize("end", [b'"}\n', b'"}\n{"step"'])
def test_a_long_log_is_opened_and_cut_back_in_little_memory(tmp_path, end):
    """One of 64 MiB, the most of it a hole; the longest way to an end of a line is through all of it."""
    path = tmp_path / "metrics.ndjson"
    with open(path, "wb") as stream:
        stream.write(b'{"step": 0}\n{"text": "')
        stream.seek(64 << 20)
        stream.write(end)
    tracemalloc.start()
    try:
        log = LineLog(path)
        assert log.sync() == (64 << 20) + 3
        assert not log.cut_back(64 << 20)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == b'{"step": 0}\n'
    assert most_bytes < 1 << 20


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


def test_offset_before_the_beginning_keeps_every_line_and_tells(log):
    log.write({"step": 0})
    assert not log.cut_back(-5)
    assert lines(log) == [{"step": 0}]


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


# --- a bound on what waits -------------------------------------------------------------------------------------------

BOUNDED_DISK = """
import json, resource, sys
from pathlib import Path
from codex_accel.events import LineLog

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

path, room, bound = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
log = LineLog(path, max_waiting_bytes=bound)
limit(room)
most = 0
for step in range(9):
    log.write({"step": step})
    most = max(most, sum(map(len, log._waiting)))
limit(resource.RLIM_INFINITY)
log.write({"step": 9})
log.write({"step": 10})
print(most)
"""


@pytest.mark.parametrize(
    ("room", "bound", "wanted"),
    [
        (0, 36, ["6 dropped", 6, 7, 8, 9, 10]),
        (0, 12, ["8 dropped", 8, 9, 10]),
        (0, 5, ["9 dropped", 9, 10]),
        (12, 24, [0, "6 dropped", 7, 8, 9, 10]),
        (13, 24, [0, 1, "6 dropped", 8, 9, 10]),  # a begun line is ended, for half a line is none
        (23, 25, [0, 1, "5 dropped", 7, 8, 9, 10]),
        (0, 10**6, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_oldest_lines_beyond_the_bound_are_dropped_and_told(tmp_path, room, bound, wanted):
    """Nine lines of 12 bytes on a disk with room for `room` bytes; then room again and two more lines."""
    path = tmp_path / "requests.ndjson"
    argv = [sys.executable, "-c", BOUNDED_DISK, path, str(room), str(bound)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in path.read_text().splitlines()]
    told = [f"{line['num_lines']} dropped" if line.get("kind") == "dropped" else line["step"] for line in found]
    assert told == wanted
    assert int(done.stdout) <= max(bound, 11)  # a begun line that is longer stays


LITTLE_BY_LITTLE = """
import json, resource, sys
from pathlib import Path
from codex_accel.events import LineLog

path = Path(sys.argv[1])
log = LineLog(path, max_waiting_bytes=200)
for step in range(300):
    room = resource.RLIM_INFINITY if step == 299 else path.stat().st_size + (step * 7 % 150 if step % 10 == 0 else 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    log.write({"step": step})
"""


def test_what_is_told_and_what_is_there_are_all_lines_however_little_the_disk_takes(tmp_path):
    """It takes a part of a line now and then, of the one that tells too."""
    path = tmp_path / "requests.ndjson"
    done = subprocess.run([sys.executable, "-c", LITTLE_BY_LITTLE, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = [json.loads(line) for line in path.read_text().splitlines()], 0
    for line in found:
        if line.get("kind") == "dropped":
            expected += line["num_lines"]
        else:
            assert line == {"step": expected}
            expected += 1
    assert expected == 300
    assert sum("kind" in line for line in found) > 3


# --- numbered files --------------------------------------------------------------------------------------------------


def test_a_line_that_would_make_the_file_longer_begins_a_new_one(tmp_path):
    log = LineLog(tmp_path / "metrics.ndjson", max_bytes=36)
    for step in range(8):
        log.write({"step": step})
    assert sizes(log.path) == {"metrics.000001.ndjson": 36, "metrics.000002.ndjson": 36, "metrics.ndjson": 24}
    assert log.sync() == 96
    assert [json.loads(line.text)["step"] for line in events.read(log.path)] == list(range(8))


def test_a_line_that_is_longer_than_a_file_may_be_has_one_of_its_own(tmp_path):
    log = LineLog(tmp_path / "metrics.ndjson", max_bytes=20)
    for text in ("a", "b" * 100, "c"):
        log.write({"t": text})
    assert list(sizes(log.path).values()) == [11, 110, 11]


def test_a_begun_line_is_ended_in_its_own_file(tmp_path):
    """The disk takes 6 bytes of a line of 12; the limit of 10 would begin a new file for the rest."""
    path, code = tmp_path / "metrics.ndjson", FULL_DISK.replace("LineLog(path)", "LineLog(path, max_bytes=10)")
    done = subprocess.run([sys.executable, "-c", code, path, "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [each.read_bytes() for each in log_files(path)] == [b'{"step": %d}\n' % step for step in range(5)]


def test_without_a_limit_nothing_is_numbered(tmp_path):
    log = LineLog(tmp_path / "metrics.ndjson")
    for step in range(1000):
        log.write({"step": step})
    assert list(sizes(log.path)) == ["metrics.ndjson"]


def test_logs_whose_names_begin_alike_do_not_meet(tmp_path):
    names = ["a.ndjson", "a.b.ndjson", "a", "a.000001.b.ndjson"]
    for name in names:
        log = LineLog(tmp_path / name, max_bytes=12)
        for step in range(3):
            log.write({"step": step})
    for name in names:
        assert [json.loads(line.text)["step"] for line in events.read(tmp_path / name)] == [0, 1, 2]


def test_numbers_beyond_six_digits_stay_in_order(tmp_path):
    (tmp_path / "m.999999.ndjson").write_text('{"step": 0}\n')
    log = LineLog(tmp_path / "m.ndjson", max_bytes=12)
    log.write({"step": 1})
    log.write({"step": 2})
    assert (tmp_path / "m.1000000.ndjson").exists()
    assert [json.loads(line.text)["step"] for line in events.read(log.path)] == [0, 1, 2]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab", max_size=30), max_size=12),
    max_bytes=st.integers(1, 120),
    offset=st.integers(0, 500),
    later=st.integers(1, 120),
)
def test_any_cut_through_several_files_leaves_the_whole_lines_before_it(tmp_path, texts, max_bytes, offset, later):
    """As of one file, and with the files of a log that was never longer; a limit that has changed meanwhile is fine."""
    shutil.rmtree(tmp_path / "logs", ignore_errors=True)
    path, twin = tmp_path / "logs" / "a.ndjson", tmp_path / "logs" / "b.ndjson"
    log, ends = LineLog(path, max_bytes=max_bytes), [0]
    for text in texts:
        log.write({"t": text})
        ends.append(ends[-1] + len(text) + 10)
    whole = all_bytes(path)
    assert whole == b"".join(b'{"t": "%s"}\n' % text.encode() for text in texts)
    assert log.cut_back(offset) is (offset in ends)
    kept = max(end for end in ends if end <= offset) if offset <= ends[-1] else ends[-1]
    assert all_bytes(path) == whole[:kept]
    other = LineLog(twin, max_bytes=max_bytes)
    for text, end in zip(texts, ends[1:], strict=True):
        if end <= kept:
            other.write({"t": text})
    if offset in ends:
        assert list(sizes(path).values()) == list(sizes(twin).values())
    log = LineLog(path, max_bytes=later)
    log.write({"t": "more"})
    assert all_bytes(path) == whole[:kept] + b'{"t": "more"}\n'
    assert log.sync() == kept + 14 == events.length(path)


def test_a_log_without_one_of_its_files_is_not_cut(tmp_path):
    """Where a file is missing nobody knows where an offset behind it lies."""
    log = LineLog(tmp_path / "metrics.ndjson", max_bytes=24)
    for step in range(8):
        log.write({"step": step})
    (tmp_path / "metrics.000002.ndjson").unlink()
    rest = all_bytes(log.path)
    assert not events.reaches(log.path, 36)
    assert not log.cut_back(36)
    assert all_bytes(log.path) == rest
    assert events.reaches(log.path, 24)
    assert log.cut_back(24)
    assert all_bytes(log.path) == b'{"step": 0}\n{"step": 1}\n'


def test_a_fresh_start_takes_all_files_away(tmp_path):
    log = LineLog(tmp_path / "metrics.ndjson", max_bytes=24)
    for step in range(8):
        log.write({"step": step})
    assert log.cut_back(0)
    assert sizes(log.path) == {"metrics.ndjson": 0}


def test_what_waits_is_gone_after_a_cut(tmp_path, log):
    log.write({"step": 0})
    log.path.chmod(0o644)
    log.path.rename(tmp_path / "aside")
    log.path.mkdir()  # nothing can be appended to it
    log.write({"step": 1})
    log.path.rmdir()
    (tmp_path / "aside").rename(log.path)
    assert log.cut_back(12)
    log.write({"step": 2})
    assert lines(log) == [{"step": 0}, {"step": 2}]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_line_is_known_by_its_file_and_its_number_there(tmp_path):
    log = LineLog(tmp_path / "metrics.ndjson", max_bytes=24)
    for step in range(5):
        log.write({"step": step})
    found = [(line.path.name, line.number, json.loads(line.text)["step"]) for line in events.read(log.path)]
    first, second = "metrics.000001.ndjson", "metrics.000002.ndjson"
    assert found == [(first, 1, 0), (first, 2, 1), (second, 1, 2), (second, 2, 3), ("metrics.ndjson", 1, 4)]


def test_half_a_line_of_a_run_that_writes_is_not_read(log):
    log.write({"step": 0})
    with open(log.path, "ab") as stream:
        stream.write(b'{"step"')
    assert [line.text for line in events.read(log.path)] == [b'{"step": 0}']


def test_a_log_that_is_not_there_cannot_be_read(tmp_path):
    for path in (tmp_path / "metrics.ndjson", tmp_path / "gone" / "metrics.ndjson"):
        assert not events.exists(path)
        assert events.length(path) == 0
        with pytest.raises(FileNotFoundError, match=r"metrics\.ndjson"):
            list(events.read(path))


def test_numbered_files_alone_are_a_log(tmp_path):
    """As a kill leaves it between two files; the next line goes on behind them."""
    path = tmp_path / "metrics.ndjson"
    log = LineLog(path, max_bytes=12)
    log.write({"step": 0})
    path.rename(tmp_path / "metrics.000001.ndjson")
    assert events.exists(path)
    assert [line.text for line in events.read(path)] == [b'{"step": 0}']
    log = LineLog(path, max_bytes=12)
    log.write({"step": 1})
    assert [line.text for line in events.read(path)] == [b'{"step": 0}', b'{"step": 1}']


def test_a_reader_misses_nothing_while_files_get_their_numbers(tmp_path):
    """A writer in a process of its own, as fast as it can; each reading is a beginning of the log without a gap."""
    path = tmp_path / "metrics.ndjson"
    code = "import sys, pathlib\nfrom codex_accel.events import LineLog\n"
    code += "log = LineLog(pathlib.Path(sys.argv[1]), max_bytes=40)\nfor step in range(300): log.write({'step': step})"
    LineLog(path)
    writer, num_readings = subprocess.Popen([sys.executable, "-c", code, path]), 0
    while writer.poll() is None:
        steps = [json.loads(line.text)["step"] for line in events.read(path)]
        assert steps == list(range(len(steps)))
        num_readings += bool(steps)
    assert writer.returncode == 0
    assert num_readings > 3
    assert len(list(events.read(path))) == 300


# --- faults ----------------------------------------------------------------------------------------------------------

# A run of 16 lines that saves after every 7, in files of three lines, forked again and again from one process
# with tests/fault_shim.c in front of libc: struck at call `at`, the start after some at call `again`, then left alone.
STRUCK = """
import json, os, shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import faults
from codex_accel import files, redaction
from codex_accel.events import LineLog, read

redaction.value({"a": "warm"})
root, mode, stride, after = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
folder, path, saved = root / "r", root / "r" / "run" / "m.ndjson", root / "r" / "saves" / "saved"
NUM, MAX_BYTES = 16, 70

def work():
    step, offset = json.loads(saved.read_bytes()) if saved.exists() else (0, 0)
    log = LineLog(path, max_bytes=MAX_BYTES)
    if not log.cut_back(offset):
        os._exit(70)
    while step < NUM:
        log.write({"step": step, "x": "y" * (step % 3)})
        step += 1
        if step % 7 == 0 or step == NUM:
            files.write_durable(saved, json.dumps([step, log.sync()]).encode())

def forked(at, mode):
    pid = os.fork()
    if not pid:
        try:
            if mode:
                faults.arm(root=str(folder), mode=mode, at=at, report=str(root / "report"))
            work()
            os._exit(0)
        except OSError:
            os._exit(2)
        finally:
            os._exit(71)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def outcome():
    names = [*sorted(p.name for p in path.parent.glob("m.0*")), path.name]
    return [(name, (path.parent / name).read_bytes()) for name in names]

def fresh():
    for each in (folder, Path(f"{folder}.lost")):
        shutil.rmtree(each, ignore_errors=True)
    for each in (path, saved):
        each.parent.mkdir(parents=True)

def num_calls():
    return len((root / "report").read_text().splitlines())

fresh()
assert forked(0, "count") == 0
expected, total, points, bad = outcome(), num_calls(), 0, []
fine = (0, 2) if mode.startswith("E") else (-9,)

def finish(what):
    code = forked(0, None)
    if code != 0 or outcome() != expected:
        bad.append(f"{what}: {code} {[name for name, _ in outcome()]}")
    elif [json.loads(line.text)["step"] for line in read(path)] != list(range(NUM)):
        bad.append(f"{what}: read otherwise")

for at in range(1, total + 1, stride):
    fresh()
    code = forked(at, mode)
    if code not in fine:
        bad.append(f"{at}: {code}")
    left = root / "left"
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder, left)
    finish(at)
    points += 1
    again = stride
    while (at - 1) // stride % after == after - 1:
        fresh()
        shutil.rmtree(folder)
        shutil.copytree(left, folder)
        code = forked(again, mode)
        if num_calls() < again:
            break
        if code not in fine:
            bad.append(f"{at}, {again}: {code}")
        finish((at, again))
        points, again = points + 1, again + stride
print(json.dumps({"bad": bad, "points": points, "calls": total, "files": len(expected)}))
"""


def struck(mode: str, *, stride: int, after: int, code: str = STRUCK) -> dict:
    """Strike at each so many calls, and after each so many of those the next start too.

    In memory where there is such a folder: it is the shim that forgets what no fsync has reached, not the disk.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as root:
        argv = [sys.executable, "-c", code, Path(__file__).parent, root, mode, str(stride), str(after)]
        environment = os.environ | faults.environment()
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_shim = pytest.mark.skipif(faults.library() is None, reason=faults.SKIP_REASON)
MODES = ["kill", "torn", "power", "power_names", "ENOSPC", "EIO", "ENOSPC_once", "EIO_once"]


@needs_shim
@pytest.mark.parametrize(("mode", "stride"), [("kill", 4), ("power_names", 5), ("ENOSPC", 6), ("EIO_once", 7)])
def test_a_log_that_is_struck_and_its_next_start_too_ends_as_if_not(mode, stride):
    """Equal files, not only equal lines: the start begins its second file where the first run did."""
    found = struck(mode, stride=stride, after=9)
    assert found["bad"] == []
    assert found["files"] > 4
    assert found["points"] > found["calls"] // stride + 5  # starts were struck too


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("mode", ["kill", "torn", "power", "power_names", "ENOSPC", "EIO", "ENOSPC_once", "EIO_once"])
def test_a_log_struck_at_every_call_and_its_next_start_at_every_call_ends_as_if_not(mode):
    found = struck(mode, stride=1, after=2)
    print(f"\n{mode}: {len(found['bad'])} bad of {found['points']} points")
    assert found["bad"] == []


@needs_shim
@pytest.mark.parametrize("careless", ["None", "None if Path(p).is_dir() else real(p)"])
def test_power_cut_catches_a_log_that_forces_nothing_to_the_disk_or_no_names(careless):
    """So the test above can fail."""
    patch = "real = files.fsync_path\ncareful = files.write_durable\n"
    patch += "def write_durable(path, data):\n    files.fsync_path = real\n    careful(path, data)\n"
    patch += f"    files.fsync_path = lambda p: {careless}\nfiles.write_durable = write_durable\n"
    patch += f"files.fsync_path = lambda p: {careless}\n"
    code = STRUCK.replace("def work():", f"{patch}\ndef work():", 1)
    assert struck("power_names", stride=4, after=10**6, code=code)["bad"] != []


# --- events ---------------------------------------------------------------------------------------------------------


def test_event_tells_time_kind_process_message_and_facts(log, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    event(log, "save", "wrote step-10", step=10, loss=math.nan)
    (found,) = lines(log)
    time = datetime.datetime.fromisoformat(found.pop("time"))
    assert time.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - time) < datetime.timedelta(minutes=1)
    assert found == {"kind": "save", "process": 3, "message": "wrote step-10", "step": 10, "loss": "nan"}
