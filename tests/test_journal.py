"""A journal holds whole batches, whoever wrote them and however they ended."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import files, journal
from codex_accel.errors import UserError
from codex_accel.journal import Journal

RESULTS = {"a": [[1.5, 3, 2], [0.1, 1, 0]], "b": [["é\u2028\x85", None]], "c": []}


def filled(folder: Path, **options) -> Journal:
    book = Journal(folder, **options)
    for key, results in RESULTS.items():
        book.add(key, results)
    return book


def test_what_was_added_is_read_back(tmp_path):
    filled(tmp_path / "j")
    assert journal.read(tmp_path / "j") == RESULTS
    assert Journal(tmp_path / "j").done == RESULTS


def test_numbers_come_back_bit_for_bit(tmp_path):
    values = [[0.1 + 0.2, 1e-300, 123456789.123456789, 2**53 + 1]]
    Journal(tmp_path / "j").add("a", values)
    assert journal.read(tmp_path / "j")["a"] == values


def test_every_process_sees_the_batches_of_all(tmp_path):
    first, second = (Journal(tmp_path / "j", process_index=index) for index in (0, 1))
    first.add("a", [1])
    second.add("b", [2])
    assert journal.read(tmp_path / "j") == {"a": [1], "b": [2]}
    assert Journal(tmp_path / "j", process_index=7).done == {"a": [1], "b": [2]}


@settings(max_examples=15)
@given(num_done=st.integers(0, 12), num_processes=st.integers(1, 5))
def test_processes_share_what_is_left(num_done, num_processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("j")
    keys = [f"k{n}" for n in range(12)]
    book = Journal(folder)
    for key in keys[::-1][:num_done]:
        book.add(key, [])
    shares = [
        Journal(folder).left(keys, process_index=index, num_processes=num_processes) for index in range(num_processes)
    ]
    assert sorted(key for share in shares for key in share) == sorted(set(keys) - set(keys[::-1][:num_done]))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("lost", range(1, 40))
def test_a_line_that_was_cut_is_scored_again(tmp_path, lost):
    book = filled(tmp_path / "j")
    [path] = (tmp_path / "j").iterdir()
    path.write_bytes(path.read_bytes()[:-lost])
    again = Journal(tmp_path / "j")
    assert again.done == {key: RESULTS[key] for key in ("a", "b")} or lost == 1  # the line end alone is no loss
    again.add("c", RESULTS["c"])
    assert journal.read(book.folder) == RESULTS


def test_a_changed_byte_is_seen(tmp_path):
    filled(tmp_path / "j")
    [path] = (tmp_path / "j").iterdir()
    path.write_bytes(path.read_bytes().replace(b"1.5", b"1.6"))
    again = Journal(tmp_path / "j")
    assert set(again.done) == {"b", "c"}
    assert again.num_damaged == 1


def test_zeros_that_a_power_cut_left_are_seen(tmp_path):
    filled(tmp_path / "j")
    [path] = (tmp_path / "j").iterdir()
    with open(path, "ab") as stream:
        stream.write(b"\0" * 100)
    again = Journal(tmp_path / "j")
    again.add("d", [4])
    assert journal.read(tmp_path / "j") == RESULTS | {"d": [4]}


def test_another_evaluation_has_another_journal(tmp_path):
    places = {journal.path_of(tmp_path / "r", {"settings": n}) for n in range(3)}
    assert len(places) == 3
    first = sorted(places)[0]
    for place in places:
        Journal(place).add("a", [])
    assert journal.others(tmp_path / "r", first) == sorted(places)[1:]
    assert journal.others(tmp_path / "other", first) == []


@pytest.mark.parametrize("name", ["r[1]*", "r?", "é\u3042", "r"])
def test_the_journals_of_a_folder_are_those_with_its_very_name(tmp_path, name):
    """A name may hold what a glob takes for a pattern, and be the beginning of another."""
    mine, stale = (journal.path_of(tmp_path / name, {"settings": n}) for n in range(2))
    for place in (mine, stale, journal.path_of(tmp_path / f"{name}-x", {}), journal.path_of(tmp_path / "r1", {})):
        Journal(place).add("a", [])
    assert journal.others(tmp_path / name, mine) == [stale]


def test_a_name_as_long_as_the_disk_takes_has_a_journal_that_can_be_removed(tmp_path):
    place = journal.path_of(tmp_path / ("é" * 127), {})
    Journal(place).add("a", [1])
    files.remove_folder(place)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(UserError, match=r"cannot be made beside the output folder .* Choose another output_dir"):
        Journal(tmp_path / "r")


def test_a_full_disk_ends_in_an_error_that_says_how_to_go_on(tmp_path):
    book = filled(tmp_path / "j")
    [path] = (tmp_path / "j").iterdir()
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{os.strerror(errno.ENOSPC)}.*run the same command again: it goes on"):
        book.add("d", [1])


def test_a_killed_process_loses_no_whole_batch(tmp_path):
    """SIGKILL while it writes batch after batch: the numbers that it printed are all there."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom codex_accel.journal import Journal\n"
        "book = Journal(Path(sys.argv[1]))\nn = 0\n"
        "while True:\n    book.add(f'k{n}', [n] * 1000)\n    print(n, flush=True)\n    n += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else last
    done = Journal(tmp_path / "j").done
    assert {f"k{n}": [n] * 1000 for n in range(last + 1)}.items() <= done.items()


def test_keys_tell_what_is_in_a_batch():
    keys = {journal.unit_key("text", "t", [("a", 1)]), journal.unit_key("text", "t", [("a", 2)]),
            journal.unit_key("windows", [("a", 0, 1, 1)])}  # fmt: skip
    assert len(keys) == 3
    assert json.loads(json.dumps(sorted(keys))) == sorted(keys)
