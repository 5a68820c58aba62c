"""The stage as a whole: any number of processes, kills, repeated runs, removal, other formats, the report."""

import html.parser
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import run_script

from codex_accel import catalog, files, manifest, plan, tokenizer
from codex_accel.errors import UserError
from codex_accel.tokens import TokenStore

HALVES = "split={ratios: {train: 0.5, test: 0.5}}"
EXACT = "split={method: exact, ratios: {train: 0.7, test: 0.3}}"


def argv(tiny, output_dir, source, *overrides) -> list[str]:
    sources = source if isinstance(source, list) else [{"path": str(source)}]
    return [f"tokenizer={tiny}/tokenizer", f"sources={json.dumps(sources)}", f"output_dir={output_dir}", *overrides]


def prepare(tiny, output_dir, source, *overrides) -> dict:
    assert run_script("prepare_data", *argv(tiny, output_dir, source, *overrides)) == 0
    return manifest.read(output_dir)


def write_jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


def texts_of(tiny, folder, split) -> list[str]:
    loaded = tokenizer.load(tiny / "tokenizer")
    return [loaded.decode(document.input_ids.tolist()) for document in TokenStore(folder, split)]


@pytest.fixture(scope="module")
def modules(tiny):
    """Real text of 0.8 MB; with units of 60,000 bytes it has about ten."""
    return tiny / "corpus" / "modules.jsonl"


@pytest.fixture(scope="module")
def whole(tiny, modules, tmp_path_factory):
    """What an undisturbed preparation with one process and one thread gives."""
    folder = tmp_path_factory.mktemp("whole") / "d"
    prepare(tiny, folder, modules, EXACT, "unit_bytes=60000", "duplicates=remove", "num_threads=1")
    return folder


# --- processes, threads, kills ------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [2, 4])
def test_any_number_of_processes_writes_the_same_bytes(tiny, modules, whole, fork_server, tmp_path, num_processes):
    options = argv(tiny, tmp_path / "d", modules, EXACT, "unit_bytes=60000", "duplicates=remove")
    job = fork_server.run("prepare_data", options, num_processes=num_processes)
    assert job.codes == [0] * num_processes, job.output
    assert shards(tmp_path / "d") == shards(whole)
    one, many = manifest.read(whole), manifest.read(tmp_path / "d")
    assert one["content_digest"] == many["content_digest"]
    assert one["facts"]["splits"] == many["facts"]["splits"]


def test_any_number_of_threads_writes_the_same_bytes(tiny, modules, whole, tmp_path):
    prepare(tiny, tmp_path / "d", modules, EXACT, "unit_bytes=60000", "duplicates=remove", "num_threads=3")
    assert shards(tmp_path / "d") == shards(whole)


@pytest.mark.parametrize("num_units", [0, 2, 5])
def test_killed_preparation_goes_on_and_gives_the_same_bytes(tiny, modules, whole, fork_server, tmp_path, num_units):
    """Killed as soon as so many units have their markers."""
    options = argv(tiny, tmp_path / "d", modules, EXACT, "unit_bytes=60000", "duplicates=remove")
    job = fork_server.start("prepare_data", options)
    units = tmp_path / ".partial-d" / "units"
    while job.alive() and len(list(units.glob("*.json"))) < num_units:
        time.sleep(0.0005)
    job.kill()
    assert job.wait() == [-signal.SIGKILL], job.output
    done = len(list(units.glob("*.json")))
    assert not (tmp_path / "d").exists()
    job = fork_server.run("prepare_data", options)
    assert job.codes == [0], job.output
    assert (f"goes on: {done} of " in job.output) == bool(done)
    assert shards(tmp_path / "d") == shards(whole)
    assert not (tmp_path / ".partial-d").exists()


def test_work_for_other_settings_is_not_mixed_in(tiny, modules, whole, fork_server, tmp_path):
    """A preparation with hash splits is killed; one with exact splits follows in the same place."""
    job = fork_server.start("prepare_data", argv(tiny, tmp_path / "d", modules, HALVES, "unit_bytes=60000"))
    while job.alive() and not list((tmp_path / ".partial-d" / "units").glob("*.json")):
        time.sleep(0.0005)
    job.kill()
    job.wait()
    prepare(tiny, tmp_path / "d", modules, EXACT, "unit_bytes=60000", "duplicates=remove")
    assert shards(tmp_path / "d") == shards(whole)


def test_file_changed_since_the_kill_is_read_anew(tiny, fork_server, tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, [f"text {n} {'x' * 200}" for n in range(3000)])
    options = argv(tiny, tmp_path / "d", source, HALVES, "unit_bytes=20000")
    job = fork_server.start("prepare_data", options)
    while job.alive() and not list((tmp_path / ".partial-d" / "units").glob("*.json")):
        time.sleep(0.0005)
    job.kill()
    job.wait()
    write_jsonl(source, [f"other {n}" for n in range(50)])
    assert fork_server.run("prepare_data", options).codes == [0]
    found = texts_of(tiny, tmp_path / "d", "train") + texts_of(tiny, tmp_path / "d", "test")
    assert sorted(found) == sorted(f"other {n}" for n in range(50))


def test_second_preparation_of_one_dataset_is_refused(tiny, modules, tmp_path):
    lock = plan.lock(tmp_path / ".partial-d")
    with pytest.raises(UserError, match=r"\.partial-d: process \d+ on .* prepares this dataset now"):
        prepare(tiny, tmp_path / "d", modules, HALVES)
    lock.close()
    prepare(tiny, tmp_path / "d", modules, HALVES)


class Stopped(BaseException):
    """What a process feels that is stopped."""


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n): the n-th flush to the disk from now on stops the process; None counts only, into `stop_at.count`."""

    def set_(number: int | None) -> None:
        set_.count, set_.number = 0, number

    def fsync(descriptor: int, flush=os.fsync) -> None:
        set_.count += 1
        if set_.count == set_.number:
            raise Stopped
        flush(descriptor)

    set_(None)
    monkeypatch.setattr(os, "fsync", fsync)
    return set_


OPTIONS = {
    "hash": (HALVES,),
    "all": (EXACT, "duplicates=remove", "near_duplicates=0.9"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_stopped_at_any_flush_it_goes_on_and_gives_the_same(tiny, stop_at, tmp_path, kind):
    """Inventory, survey, decision, units, lists, manifest, name: whatever came last before the stop."""
    texts = [f"text {n % 25} {'and more ' * 20}" for n in range(40)]
    options = (write_jsonl(tmp_path / "a.jsonl", texts), *OPTIONS[kind], "unit_bytes=5000", "num_threads=1")
    expected = prepare(tiny, tmp_path / "expected" / "d", *options)
    num_flushes = stop_at.count
    assert num_flushes > 30
    for number in range(1, num_flushes + 1, 1 if kind == "hash" else 3):
        folder = tmp_path / str(number) / "d"
        stop_at(number)
        with pytest.raises(Stopped):
            prepare(tiny, folder, *options)
        stop_at(None)
        again = prepare(tiny, folder, *options)
        assert manifest.problems_of(folder) == [], number
        assert (again["content_digest"], again["facts"]) == (expected["content_digest"], expected["facts"]), number
        for name in ("duplicates.jsonl", "near_duplicates.jsonl"):
            if (tmp_path / "expected" / "d" / name).exists():
                assert (folder / name).read_bytes() == (tmp_path / "expected" / "d" / name).read_bytes()
        assert not (tmp_path / str(number) / ".partial-d").exists()


def test_stopped_while_files_are_taken_it_takes_them_again(tiny, stop_at, tmp_path):
    """The dataset that they are taken from is not written to, even if it has moved away in between."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "one", source, HALVES)
    stop_at(None)
    expected = prepare(tiny, tmp_path / "two", source, HALVES)
    for number in range(1, stop_at.count + 1):
        stop_at(number)
        with pytest.raises(Stopped):
            prepare(tiny, tmp_path / f"d{number}", source, HALVES)
        stop_at(None)
        assert prepare(tiny, tmp_path / f"d{number}", source, HALVES)["content_digest"] == expected["content_digest"]
        assert manifest.problems_of(tmp_path / f"d{number}") == []
    stop_at(number)
    with pytest.raises(Stopped):
        prepare(tiny, tmp_path / "last", source, HALVES)


def test_what_is_prepared_after_a_stop_is_not_written_through_links(tiny, stop_at, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "here" / "one", source, HALVES)
    stop_at(None)
    prepare(tiny, tmp_path / "here" / "two", source, HALVES)
    stop_at(stop_at.count - 1)  # all is linked, and not yet named
    with pytest.raises(Stopped):
        prepare(tiny, tmp_path / "here" / "three", source, HALVES)
    stop_at(None)
    shutil.rmtree(tmp_path / "here" / "two")
    (tmp_path / "here" / "one").rename(tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    prepare(tiny, tmp_path / "here" / "three", source, HALVES)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == before


def test_markers_without_their_shards_are_not_gone_on_with(tiny, tmp_path, monkeypatch):
    """Stopped between the name and the removal of the work folder; then the dataset is removed."""
    options = (write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)]), HALVES)
    expected = prepare(tiny, tmp_path / "expected" / "d", *options)

    def stopped(_: Path) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(files, "remove_folder", stopped)
        with pytest.raises(Stopped):
            prepare(tiny, tmp_path / "d", *options)
    assert (tmp_path / "d").exists()
    assert (tmp_path / ".partial-d").exists()
    shutil.rmtree(tmp_path / "d")
    assert prepare(tiny, tmp_path / "d", *options)["content_digest"] == expected["content_digest"]


def test_leftovers_of_an_unfinished_unit_are_removed(tiny, tmp_path):
    """A file that changed while it was read, and changed back, may have left a shard or a run that is not wanted."""
    options = (write_jsonl(tmp_path / "a.jsonl", [*(f"text {n}" for n in range(40)), ""]), HALVES)
    with pytest.raises(UserError, match="max_bad_fraction"):
        prepare(tiny, tmp_path / "d", *options, "max_bad_fraction=0.0")
    work = tmp_path / ".partial-d"
    (work / "units" / "00000.json").unlink()
    (work / "dataset" / "train-00007.arrow").write_bytes(b"half")
    shutil.copy(work / "units" / "00000-0000.run", work / "units" / "00000-0001.run")
    facts = prepare(tiny, tmp_path / "d", *options, "max_bad_fraction=1.0")["facts"]
    assert sum(split["num_records"] for split in facts["splits"].values()) == 40
    assert manifest.problems_of(tmp_path / "d") == []
    assert not (tmp_path / "d" / "train-00007.arrow").exists()


def test_work_that_is_half_removed_is_not_gone_on_with(tiny, tmp_path, monkeypatch):
    """Settings change, the process is stopped while it empties the work folder, and the settings change back."""
    options = (write_jsonl(tmp_path / "a.jsonl", [*(f"text {n}" for n in range(40)), ""]), HALVES)
    with pytest.raises(UserError, match="max_bad_fraction"):
        prepare(tiny, tmp_path / "d", *options, "max_bad_fraction=0.0")

    def stopped(path) -> None:
        next(Path(path).glob("*.run"), Path(path) / "none").unlink(missing_ok=True)
        if Path(path).name == "units":
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stopped)
        with pytest.raises(Stopped):
            prepare(tiny, tmp_path / "d", *options, "add_eos=false")
    facts = prepare(tiny, tmp_path / "d", *options, "max_bad_fraction=1.0")["facts"]
    assert sum(split["num_records"] for split in facts["splits"].values()) == 40


def test_marker_of_the_survey_comes_after_all_its_files(tiny, tmp_path, monkeypatch):
    """Else a power cut would leave a marker and no signatures."""
    flushed: list[str] = []

    def fsync(descriptor: int, flush=os.fsync) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "d", source, HALVES, "near_duplicates=0.9")
    marker = next(number for number, name in enumerate(flushed) if ".json-" in name and flushed[number + 1] == "survey")
    assert "00000.minhash" in flushed[:marker]


# --- prepared before ----------------------------------------------------------------------------------------------


def test_same_input_and_settings_are_not_prepared_twice(tiny, modules, tmp_path, capsys):
    first = prepare(tiny, tmp_path / "d", modules, HALVES)
    assert prepare(tiny, tmp_path / "d", modules, HALVES, "num_threads=1", "max_bad_fraction=0.5") == first
    assert "nothing to do: the same input and settings are prepared in" in capsys.readouterr().out


def test_files_of_a_dataset_beside_are_taken(tiny, modules, tmp_path, capsys):
    first = prepare(tiny, tmp_path / "one", modules, HALVES)
    second = prepare(tiny, tmp_path / "two", modules, HALVES)
    assert "are prepared in" in capsys.readouterr().out
    assert (second["content_digest"], second["name"]) == (first["content_digest"], "two")
    assert second["facts"] == first["facts"]
    assert manifest.problems_of(tmp_path / "two") == []
    assert json.loads((tmp_path / "two" / "report.json").read_bytes())["name"] == "two"
    shard = next(path.name for path in (tmp_path / "one").glob("*.arrow"))
    assert (tmp_path / "one" / shard).stat().st_ino == (tmp_path / "two" / shard).stat().st_ino


def test_damaged_dataset_beside_is_not_taken(tiny, modules, tmp_path):
    first = prepare(tiny, tmp_path / "one", modules, HALVES)
    shard = next((tmp_path / "one").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert prepare(tiny, tmp_path / "two", modules, HALVES)["content_digest"] == first["content_digest"]
    assert manifest.problems_of(tmp_path / "two") == []


def test_other_input_does_not_replace_a_dataset_unasked(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    first = prepare(tiny, tmp_path / "d", source, HALVES)
    write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(41)])
    with pytest.raises(UserError, match=r"output_dir = '.*': exists, made from other input or settings"):
        prepare(tiny, tmp_path / "d", source, HALVES)
    assert manifest.read(tmp_path / "d") == first
    assert prepare(tiny, tmp_path / "d", source, HALVES, "overwrite=true")["facts"]["num_records"] == 41


def test_dataset_that_stands_beside_does_not_replace_another_unasked(tiny, tmp_path):
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(40)]) for name in "ab")
    prepare(tiny, tmp_path / "one", a, HALVES)
    second = prepare(tiny, tmp_path / "two", b, HALVES)
    with pytest.raises(UserError, match=r"output_dir = '.*two': exists, made from other input or settings"):
        prepare(tiny, tmp_path / "two", a, HALVES)
    assert manifest.read(tmp_path / "two") == second
    assert prepare(tiny, tmp_path / "two", a, HALVES, "overwrite=true")["name"] == "two"


def test_dataset_itself_comes_before_one_beside(tiny, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "one", source, HALVES)
    second = prepare(tiny, tmp_path / "two", source, HALVES)
    assert prepare(tiny, tmp_path / "two", source, HALVES) == second
    assert f"nothing to do: the same input and settings are prepared in {tmp_path / 'two'}" in capsys.readouterr().out


def test_unfinished_work_stands_when_the_place_is_taken(tiny, tmp_path):
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", [*(f"{name} {n}" for n in range(40)), ""]) for name in "ab")
    prepare(tiny, tmp_path / "d", a, HALVES, "max_bad_fraction=1.0")
    with pytest.raises(UserError, match="max_bad_fraction"):
        prepare(tiny, tmp_path / "d", b, HALVES, "overwrite=true", "max_bad_fraction=0.0")
    with pytest.raises(UserError, match="made from other input or settings"):
        prepare(tiny, tmp_path / "d", b, EXACT)
    assert (tmp_path / ".partial-d" / "units" / "00000.json").exists()


def test_only_a_dataset_is_replaced(tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    with pytest.raises(UserError, match=r"output_dir = '.*': holds a tokenizer, and only a dataset is replaced"):
        prepare(tiny, tmp_path / "tokenizer", source, HALVES, "overwrite=true")


def test_hidden_name_is_refused_because_work_folders_have_such(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    with pytest.raises(UserError, match=r"output_dir = '.*\.partial-d': is a hidden name"):
        prepare(tiny, tmp_path / ".partial-d", source, HALVES)


def test_list_shows_size_records_tokens_and_what_is_missing(tiny, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    facts = prepare(tiny, tmp_path / "d", source, HALVES)["facts"]
    capsys.readouterr()
    run_script("prepare_data", *argv(tiny, tmp_path / "d", source), "--list")
    line = capsys.readouterr().out
    assert "40 records" in line
    assert f"{sum(split['num_tokens'] for split in facts['splits'].values())} tokens" in line
    (tmp_path / "a.jsonl").unlink()
    assert catalog.print_all(tmp_path) == 0
    assert f"without {source}" in capsys.readouterr().out


def test_list_split_prints_the_record_ids(tiny, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "d", source, HALVES)
    capsys.readouterr()
    run_script("prepare_data", *argv(tiny, tmp_path / "d", source), "--list-split", "test")
    expected = [document.record_id for document in TokenStore(tmp_path / "d", "test")]
    assert capsys.readouterr().out.split() == expected


def test_gc_removes_what_has_lost_its_raw_files(tiny, tmp_path):
    kept = write_jsonl(tmp_path / "kept.jsonl", [f"text {n}" for n in range(40)])
    gone = write_jsonl(tmp_path / "gone.jsonl", [f"text {n}" for n in range(40, 80)])
    prepare(tiny, tmp_path / "a", kept, HALVES)
    prepare(tiny, tmp_path / "b", gone, HALVES)
    (tmp_path / "gone.jsonl").unlink()
    run_script("prepare_data", *argv(tiny, tmp_path / "a", kept), "--gc", "--dry-run")
    assert (tmp_path / "b").exists()
    run_script("prepare_data", *argv(tiny, tmp_path / "a", kept), "--gc")
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_gc_keeps_a_dataset_that_is_seen_through_a_link(tiny, tmp_path, monkeypatch):
    """The path of a raw file is relative to where the dataset truly lies."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "deep" / "er" / "d", source, HALVES)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    catalog.collect_garbage(tmp_path / "link", dry_run=False)
    assert (tmp_path / "link" / "d").exists()


def test_gc_lets_nobody_go_on_with_what_it_removes(tmp_path):
    plan.lock(tmp_path / ".partial-d").close()
    for work in catalog.find_partial(tmp_path):
        with pytest.raises(UserError, match="prepares this dataset now"):
            plan.lock(work)


def test_lock_of_a_folder_that_was_removed_is_none(tmp_path, monkeypatch):
    """The last holder removes the folder after another process has opened the lock, and before that one has it."""
    import fcntl

    def flock(stream, how, lock=fcntl.flock) -> None:
        if not removed:
            shutil.rmtree(tmp_path / ".partial-d")
            removed.append(True)
        lock(stream, how)

    removed: list[bool] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    lock = plan.lock(tmp_path / ".partial-d")
    with pytest.raises(UserError, match="prepares this dataset now"):
        plan.lock(tmp_path / ".partial-d")
    lock.close()


def test_gc_removes_what_is_half_deleted(tmp_path, capsys):
    (tmp_path / ".trash-d-1").mkdir()
    catalog.collect_garbage(tmp_path, dry_run=False)
    assert "half deleted" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_is_listed_and_collected(tiny, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [*(f"text {n}" for n in range(40)), ""])
    with pytest.raises(UserError, match=r"1 of 41 records are bad.*They are listed in .*quarantine\.jsonl"):
        prepare(tiny, tmp_path / "d", source, HALVES, "max_bad_fraction=0.0")
    run_script("prepare_data", *argv(tiny, tmp_path / "d", source), "--list")
    assert "unfinished: " in capsys.readouterr().out
    run_script("prepare_data", *argv(tiny, tmp_path / "d", source), "--gc")
    assert not (tmp_path / ".partial-d").exists()


def test_manifest_of_somebody_else_is_passed_over(tiny, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text("{}")
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "d", source, HALVES)
    assert catalog.print_all(tmp_path) == 0


def test_damaged_dataset_in_the_way_is_told(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    prepare(tiny, tmp_path / "d", source, HALVES)
    shard = next((tmp_path / "d").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged: .*\.arrow: has \d+ bytes.*overwrite=true"):
        prepare(tiny, tmp_path / "d", source, HALVES)
    prepare(tiny, tmp_path / "d", source, HALVES, "overwrite=true")
    assert manifest.problems_of(tmp_path / "d") == []


def test_changed_tokenizer_is_other_input_whatever_its_manifest_says(tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(40)])
    first = prepare(tmp_path, tmp_path / "one", source, HALVES)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "[EOS]"', '"eos_token": "[PAD]"'))
    second = prepare(tmp_path, tmp_path / "two", source, HALVES, "verify=false")
    assert second["content_digest"] != first["content_digest"]


def test_tokenizer_must_be_a_folder(tiny, shared, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    model = shared / "tokenizers" / "mistral_v1" / "tokenizer.model"
    with pytest.raises(UserError, match=r"tokenizer: '.*tokenizer\.model' is a file\. Give the folder"):
        prepare(tiny, tmp_path / "d", source, f"tokenizer={model}")


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_duplicates_are_listed_and_one_of_each_is_kept(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n % 30}" for n in range(50)])
    options = ("split.ratios={all: 1.0}", "unit_bytes=200")
    facts = prepare(tiny, tmp_path / "kept", source, *options)["facts"]
    assert (facts["duplicates"]["num_duplicates"], facts["duplicates"]["num_removed"]) == (20, 0)
    facts = prepare(tiny, tmp_path / "removed", source, *options, "duplicates=remove")["facts"]
    assert (facts["num_records"], facts["splits"]["all"]["num_records"]) == (50, 30)
    assert facts["duplicates"]["num_removed"] == 20
    assert texts_of(tiny, tmp_path / "removed", "all") == [f"text {n}" for n in range(30)]
    for name in ("kept", "removed"):
        lines = [json.loads(line) for line in (tmp_path / name / "duplicates.jsonl").read_text().splitlines()]
        assert sorted(tuple(line["places"]) for line in lines) == sorted(
            (f"{source}:{n + 1}", f"{source}:{n + 31}") for n in range(20)
        )


def test_test_split_keeps_what_training_gives_away(tiny, tmp_path):
    sources = [
        {"path": write_jsonl(tmp_path / "train.jsonl", ["a", "b", "c"]), "split": "train"},
        {"path": write_jsonl(tmp_path / "test.jsonl", ["b", "d"]), "split": "test"},
    ]
    facts = prepare(tiny, tmp_path / "kept", sources, "split.method=given")["facts"]
    assert facts["splits"]["test"]["num_shared"] == 1
    prepare(tiny, tmp_path / "d", sources, "split.method=given", "duplicates=remove")
    assert texts_of(tiny, tmp_path / "d", "train") == ["a", "c"]
    assert texts_of(tiny, tmp_path / "d", "test") == ["b", "d"]


def test_removal_comes_before_sizes_and_places(tiny, tmp_path):
    """30 contents, 20 of them twice: exact and position divide the 30 that are left."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"text {n % 30}" for n in range(50)])
    for method in ("exact", "position"):
        split = f"split={{method: {method}, ratios: {{train: 0.8, test: 0.2}}}}"
        facts = prepare(tiny, tmp_path / method, source, split, "duplicates=remove", "unit_bytes=150")["facts"]
        assert [part["num_records"] for part in facts["splits"].values()] == [24, 6]
    assert texts_of(tiny, tmp_path / "position", "test") == [f"text {n}" for n in range(24, 30)]


def test_single_content_that_is_left_is_cut_and_the_others_are_removed(tiny, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one text", "one text"])
    split = "split={method: position, ratios: {train: 0.5, test: 0.5}}"
    facts = prepare(tiny, tmp_path / "d", source, split, "duplicates=remove")["facts"]
    assert [texts_of(tiny, tmp_path / "d", name) for name in ("train", "test")] == [["one "], ["text"]]
    assert facts["duplicates"]["num_removed"] == 1


def test_test_split_keeps_what_is_nearly_the_same_in_training(tiny, tmp_path):
    text = " ".join(f"word{n}" for n in range(200))
    sources = [
        {"path": write_jsonl(tmp_path / "train.jsonl", [text, "a b c"]), "split": "train"},
        {"path": write_jsonl(tmp_path / "test.jsonl", [text + " more"]), "split": "test"},
    ]
    prepare(tiny, tmp_path / "d", sources, "split.method=given", "duplicates=remove", "near_duplicates=0.8")
    assert texts_of(tiny, tmp_path / "d", "train") == ["a b c"]
    assert texts_of(tiny, tmp_path / "d", "test") == [text + " more"]


def test_near_duplicates_are_counted_listed_and_removed_if_asked(tiny, shared, tmp_path):
    lines = (shared / "instruct" / "dolly15k_part0.jsonl").read_text().splitlines()
    texts = [text for text in (json.loads(line)["response"] for line in lines) if len(text) > 800][:20]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[3].replace(" the ", " a ", 1), texts[5]])
    options = ("split.ratios={all: 1.0}", "near_duplicates=0.8")
    assert prepare(tiny, tmp_path / "a", source, *options)["facts"]["splits"]["all"]["num_records"] == 22
    [line] = map(json.loads, (tmp_path / "a" / "near_duplicates.jsonl").read_text().splitlines())
    assert (line["place"], line["of"]) == (f"{source}:21", f"{source}:4")
    facts = prepare(tiny, tmp_path / "b", source, *options, "duplicates=remove")["facts"]
    assert facts["splits"]["all"]["num_records"] == 20
    assert facts["duplicates"]["near"] == {"threshold": 0.8, "num_found": 1, "num_removed": 1}


# --- formats and shapes -------------------------------------------------------------------------------------------


def test_jsonl_and_csv_of_gsm8k_have_the_same_content(tiny, shared, tmp_path):
    """The first 500 records; the CSV has a byte order mark, CRLF and embedded newlines."""
    lines = (shared / "instruct" / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)[:500]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    csv = shared / "instruct" / "gsm8k_train_first500_bom_crlf.csv"
    jsonl = [{"path": f"{tmp_path}/a.jsonl", "prompt": "question", "completion": "answer"}]
    first = prepare(tiny, tmp_path / "jsonl", jsonl, HALVES)
    second = prepare(
        tiny, tmp_path / "csv", [{"path": str(csv), "prompt": "prompt", "completion": "completion"}], HALVES
    )
    assert first["facts"]["num_records"] == 500
    assert first["content_digest"] == second["content_digest"]
    assert first["facts"]["splits"] == second["facts"]["splits"]


CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '[EOS]\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


def test_messages_are_rendered_and_only_the_assistant_is_a_target(tiny, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    messages = [{"role": "user", "content": "2 + [EOS]?"}, {"role": "assistant", "content": "four"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    template = str(tmp_path / "chat.jinja")
    source = [{"path": f"{tmp_path}/a.jsonl", "messages": "messages", "chat_template": template}]
    prepare(tiny, tmp_path / "d", source, "split.ratios={all: 1.0}")
    [document] = TokenStore(tmp_path / "d", "all")
    loaded = tokenizer.load(tiny / "tokenizer")
    ids = document.input_ids.tolist()
    assert ids.count(loaded.eos_id) == 2  # one a turn: not the text "[EOS]", and none is added behind the last
    assert manifest.read(tmp_path / "d")["facts"]["splits"]["all"]["num_without_eos"] == 0
    [(start, stop)] = document.target_spans
    assert loaded.backend.decode(ids[start:stop], skip_special_tokens=False) == "four[EOS]\n"


def test_messages_without_any_template_are_told(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: holds messages, but the tokenizer '.*' has no chat template"):
        prepare(tiny, tmp_path / "d", [{"path": f"{tmp_path}/a.jsonl", "messages": "messages"}])


def test_a_template_that_is_not_text_is_told(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    (tmp_path / "chat.jinja").write_bytes(b"{{ 'caf\xe9' }}")
    source = {"path": f"{tmp_path}/a.jsonl", "messages": "messages", "chat_template": f"{tmp_path}/chat.jinja"}
    with pytest.raises(UserError, match=r"chat\.jinja: cannot be read as UTF-8 text .*Give a file"):
        prepare(tiny, tmp_path / "d", [source])


def test_document_without_a_target_token_is_an_error_unless_allowed(tiny, tmp_path):
    """One character without BOS and EOS: its only token is the first, which nothing predicts."""
    source = write_jsonl(tmp_path / "a.jsonl", ["two words", "b"])
    options = ("split.ratios={all: 1.0}", "add_bos=false", "add_eos=false")
    with pytest.raises(UserError, match=r"a\.jsonl:2: no token of it is a target.*allow_no_target=true"):
        prepare(tiny, tmp_path / "d", source, *options)
    facts = prepare(tiny, tmp_path / "d", source, *options, "allow_no_target=true")["facts"]
    assert facts["splits"]["all"]["num_without_target"] == 1
    assert facts["splits"]["all"]["num_without_eos"] == 2


# --- the report ---------------------------------------------------------------------------------------------------


class Values(html.parser.HTMLParser):
    """(data-key, data-value) of every element."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "data-key" in attributes:
            self.found.append((attributes["data-key"], attributes["data-value"]))


def test_every_number_on_the_page_is_that_of_the_report(whole):
    report = json.loads((whole / "report.json").read_bytes())
    page = Values()
    page.feed((whole / "report.html").read_text())
    assert len(page.found) > 100
    for key, value in page.found:
        place = report
        for part in key.replace("\\.", "\0").split("."):
            place = place[int(part) if isinstance(place, list) else part.replace("\0", ".")]
        assert json.loads(value) == place, key


def test_report_counts_what_the_manifest_counts(whole):
    report, facts = json.loads((whole / "report.json").read_bytes()), manifest.read(whole)["facts"]
    assert report["splits"] == facts["splits"]
    assert (report["num_records"], report["num_bad"]) == (facts["num_records"], facts["num_bad"])


def test_packing_cost_of_the_report_is_that_of_the_store(whole):
    from codex_accel.packing import Blocks

    costs = manifest.read(whole)["facts"]["splits"]["train"]["packing"]
    for block_size in (512, 4096):
        blocks = Blocks(TokenStore(whole, "train"), block_size=block_size, isolate_documents=True).facts()
        cost = costs[str(block_size)]["concat"]
        assert {key: cost[key] for key in ("num_blocks", "padding_tokens", "documents_cut")} == {
            key: blocks[key] for key in ("num_blocks", "padding_tokens", "documents_cut")
        }


def test_examples_are_documents_with_their_targets(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "what", "a": "that"}\n')
    source = [{"path": f"{tmp_path}/a.jsonl", "prompt": "q", "completion": "a"}]
    prepare(tiny, tmp_path / "d", source, "split.ratios={all: 1.0}")
    [example] = json.loads((tmp_path / "d" / "report.json").read_bytes())["examples"]["all"]
    spelled = dict.fromkeys(("special", "prompt", "target"), "")
    for token in example["tokens"]:
        spelled[token["kind"]] += token["text"]
    assert spelled == {"special": "[BOS][EOS]", "prompt": "what", "target": "that"}
    assert (example["line"], example["num_left_out"]) == (1, 0)


def test_characters_of_several_tokens_are_shown_whole(tiny, shared, tmp_path):
    lines = (shared / "text" / "udhr_20lang.txt").read_text().splitlines()
    line = next(line for line in lines if len(line.encode()) > 2.5 * len(line))[:60]
    source = write_jsonl(tmp_path / "a.jsonl", [line])
    prepare(tiny, tmp_path / "d", source, "split.ratios={all: 1.0}")
    [example] = json.loads((tmp_path / "d" / "report.json").read_bytes())["examples"]["all"]
    assert "".join(token["text"] for token in example["tokens"]) == f"[BOS]{line}[EOS]"


def test_reason_for_the_slower_engine_is_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab cd\nef gh\n")
    source = f"sources=[{{path: {tmp_path}/a.txt}}]"
    run_script("train_tokenizer", f"output_dir={tmp_path}/tokenizer", source, "type=char")
    facts = prepare(tmp_path, tmp_path / "d", tmp_path / "a.txt", "split.ratios={all: 1.0}")["facts"]
    assert facts["tokenized_by"] == "tokenizers"
    assert "tokenizes with tokenizers: it has a normalizer, or does not cut text" in capsys.readouterr().out
