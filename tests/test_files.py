"""A file or folder with its final name is always whole."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codex_accel import files
from codex_accel.errors import UserError


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- digests ------------------------------------------------------------------------------------------------------

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
MILLION_A = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_sha256_of_the_published_examples(tmp_path):
    """FIPS 180-2, appendix B: "abc" (B.1) and a million times "a" (B.3); the empty string from NIST's CAVP vectors."""
    assert files.sha256_bytes(b"abc") == ABC
    texts = {"abc": b"abc", "empty": b"", "million": b"a" * 10**6}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    assert files.sha256_file(tmp_path / "abc") == ABC
    assert files.sha256_files(tmp_path / name for name in texts) == [ABC, EMPTY, MILLION_A]


def test_sha256_files_keeps_the_order_of_its_paths(tmp_path):
    paths = [tmp_path / f"{number:02}" for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (40 - number) * 1000)
    assert files.sha256_files(paths) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_flush_and_hash_gives_the_digests_in_the_order_of_its_paths(tmp_path):
    """Sizes fall and rise, so that neither the order by size nor the order of finishing is theirs."""
    paths = [tmp_path / f"{number:02}" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (number % 7) * 10_000)
    assert files.flush_and_hash(paths) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert files.flush_and_hash([]) == []


def test_flush_and_hash_forces_every_file_to_the_disk(tmp_path, monkeypatch):
    """What the kernel is told, by inode: every file once."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
    forced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        forced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    files.flush_and_hash([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert sorted(forced) == sorted((tmp_path / name).stat().st_ino for name in "abc")


def test_flush_that_fails_is_not_taken_for_a_digest(tmp_path, monkeypatch):
    """The flush runs beside the hashing; its error comes out all the same."""
    (tmp_path / "a").write_bytes(b"abc")

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.flush_and_hash([tmp_path / "a"])


def test_flush_and_hash_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.flush_and_hash([tmp_path / "none"])


# --- one file -----------------------------------------------------------------------------------------------------


def test_write_durable_makes_and_replaces_a_file(tmp_path):
    path = tmp_path / "state.json"
    files.write_durable(path, b"old")
    files.write_durable(path, b"new")
    assert tree(tmp_path) == {"state.json": b"new"}


def test_write_durable_does_not_write_into_the_old_file(tmp_path):
    """A reader that has the old file open, or a second name of it, keeps the old bytes."""
    path = tmp_path / "state.json"
    files.write_durable(path, b"old")
    os.link(path, tmp_path / "second name")
    files.write_durable(path, b"new")
    assert tree(tmp_path) == {"state.json": b"new", "second name": b"old"}


def test_write_durable_that_fails_keeps_the_old_file(tmp_path):
    """A limit on the size of files stands for a full disk; in a process of its own, because limits cannot be raised."""
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from codex_accel import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "files.write_durable(Path(sys.argv[1]), b'n' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert path.read_bytes() == b"old"
    assert [name[:5] for name in files.sweep(tmp_path)] == [".tmp-"]
    assert tree(tmp_path) == {"state.json": b"old"}


# --- lists of files -----------------------------------------------------------------------------------------------


def test_list_files_is_sorted_relative_and_deep(tmp_path):
    for name in ("b", "a/z", "a/b/c", ".hidden", "a.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert files.list_files(tmp_path) == [".hidden", "a.x", "a/b/c", "a/z", "b"]


@pytest.mark.security
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_list_files_refuses_a_symbolic_link(tmp_path, target):
    folder = tmp_path / "artefact"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (folder / "sub" / "link").symlink_to(tmp_path / target)
    with pytest.raises(UserError) as caught:
        files.list_files(folder)
    assert caught.value.problems[0].startswith(f"{folder / 'sub' / 'link'}: is a symbolic link")


def test_list_files_of_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="none: cannot be read"):
        files.list_files(tmp_path / "none")


# --- a staged folder ----------------------------------------------------------------------------------------------


def test_staged_folder_takes_its_name_only_at_the_end(tmp_path):
    final = tmp_path / "deep" / "out"
    with files.staged_folder(final, overwrite=False) as folder:
        (folder / "a").write_bytes(b"1")
        assert not final.exists()
        assert folder.parent == final.parent
        assert folder.name.startswith(files.TEMPORARY_PREFIX)
    assert tree(tmp_path) == {"deep/out/a": b"1"}
    assert os.listdir(final.parent) == ["out"]


def fill_and_raise(final: Path, error: BaseException | type[BaseException]) -> None:
    with files.staged_folder(final, overwrite=True) as folder:
        (folder / "a").write_bytes(b"1")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_staged_folder_leaves_nothing_on_an_error(tmp_path, error):
    with pytest.raises(error):
        fill_and_raise(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_staged_folder_keeps_the_old_folder_on_an_error(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    (final / "manifest.json").write_bytes(b"0")
    with pytest.raises(ValueError, match="stop"):
        fill_and_raise(final, ValueError("stop"))
    assert tree(tmp_path) == {"out/manifest.json": b"0"}


def test_staged_folder_keeps_the_old_folder_if_the_rename_fails(tmp_path):
    """Another process's sweep may have taken the temporary folder away."""
    final = tmp_path / "out"
    final.mkdir()
    (final / "manifest.json").write_bytes(b"0")
    with pytest.raises(FileNotFoundError), files.staged_folder(final, overwrite=True) as folder:
        folder.rmdir()
    assert tree(tmp_path) == {"out/manifest.json": b"0"}
    assert os.listdir(tmp_path) == ["out"]


def test_staged_folder_replaces_the_whole_old_folder_if_told(tmp_path):
    final = tmp_path / "out"
    for name in ("first", "second"):
        with files.staged_folder(final, overwrite=True) as folder:
            (folder / name).write_bytes(b"1")
            (folder / "manifest.json").write_bytes(b"{}")
    assert tree(tmp_path) == {"out/second": b"1", "out/manifest.json": b"{}"}
    assert os.listdir(tmp_path) == ["out"]


def test_staged_folder_starts_empty_after_a_kill_of_the_same_process_id(tmp_path):
    """In a container each run has the same process id, so what a killed run left has our names."""
    final = tmp_path / "out"
    for prefix in (files.TEMPORARY_PREFIX, files.TRASH_PREFIX):
        left = tmp_path / f"{prefix}out-{os.getpid()}"
        left.mkdir()
        (left / "half").touch()
    final.mkdir()
    with files.staged_folder(final, overwrite=True) as folder:
        (folder / "a").write_bytes(b"1")
    assert tree(tmp_path) == {"out/a": b"1"}


def test_take_name_replaces_a_folder_or_leaves_all_as_it_was(tmp_path, monkeypatch):
    final, temporary = tmp_path / "step-1", tmp_path / ".tmp-step-1-9"
    for folder, data in ((final, b"old"), (temporary, b"new")):
        folder.mkdir()
        (folder / "a").write_bytes(data)
    before, rename = tree(tmp_path), os.rename

    def fail_once_the_old_is_away(source, target):
        if target == final and Path(source) == temporary:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_once_the_old_is_away)
        with pytest.raises(OSError, match="Input/output error"):
            files.take_name(temporary, final)
    assert tree(tmp_path) == before
    files.take_name(temporary, final)
    assert tree(tmp_path) == {"step-1/a": b"new"}
    assert os.listdir(tmp_path) == ["step-1"]


def test_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"exists\. Choose another folder, or say overwrite=true"):
        files.require_free(tmp_path / "out", overwrite=False)
    files.require_free(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["file", "link to a folder", "link to nothing", "..", "."])
def test_only_a_plain_folder_is_replaced(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to a folder").symlink_to("folder")
    (tmp_path / "link to nothing").symlink_to("nothing")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="is not a plain folder"), files.staged_folder(Path(name), overwrite=True):
        pass
    assert sorted(os.listdir(tmp_path)) == before


def test_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        files.require_free(tmp_path / "file" / "out", overwrite=False)


# --- deletion -----------------------------------------------------------------------------------------------------


def test_remove_folder_removes_it_whole(tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "a").touch()
    files.remove_folder(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_folder_in_the_trash_has_lost_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    trash = files.move_to_trash(tmp_path / "out")
    assert os.listdir(tmp_path) == [trash.name]
    assert trash.name.startswith(files.TRASH_PREFIX)


def test_sweep_removes_leftovers_alone(tmp_path):
    for name in (".tmp-a-1", ".trash-b-2", "keep", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".tmp-file-3", "tmp-file", ".tmpfile"):
        (tmp_path / name).touch()
    assert files.sweep(tmp_path) == [".tmp-a-1", ".tmp-file-3", ".trash-b-2"]
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".tmpfile", "keep", "tmp-file"]
    assert files.sweep(tmp_path) == []


def test_a_folder_that_no_stage_made_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds files that no stage made"):
        files.require_free(tmp_path / "mine", overwrite=True)


def test_a_folder_that_is_read_is_not_written(tmp_path):
    (tmp_path / "out" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    for read in (tmp_path / "out", tmp_path / "out" / "inner", tmp_path / "link" / "inner"):
        with pytest.raises(UserError, match="is read, or holds what is"):
            files.require_apart(tmp_path / "out", [tmp_path / "other", read])
    files.require_apart(tmp_path / "out", [tmp_path, tmp_path / "outer"])


def test_sweep_does_not_stumble_over_a_file_that_goes_by_itself(tmp_path, monkeypatch):
    """The probe of a second run, which will be refused, while the first one, which holds the folder, starts."""
    (tmp_path / f"{files.TEMPORARY_PREFIX}probe-1").touch()
    unlink = os.unlink

    def too_late(path):
        unlink(path)  # as its owner does in between
        unlink(path)

    monkeypatch.setattr(os, "unlink", too_late)
    files.sweep(tmp_path)
    assert not any(tmp_path.iterdir())


def test_sweep_removes_a_link_that_leads_to_a_folder_and_not_the_folder(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".tmp-latest-9").symlink_to("step-1")
    assert files.sweep(tmp_path) == [".tmp-latest-9"]
    assert (tmp_path / "step-1").is_dir()
