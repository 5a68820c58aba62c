"""A change of one bit in an artefact, or in any of its ancestors, shows."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codex_accel import config as configuration
from codex_accel import files, manifest
from codex_accel.errors import UserError
from codex_accel.schema import CorpusConfig, VerifyConfig

PAYLOAD = {"data.bin": b"\x00\x01\x02 payload", "sub/weights.safetensors": b"weights"}


def sealed(
    final: Path, *, payload: dict[str, bytes] = PAYLOAD, notes: str | None = "", kind: str = "dataset", **keys
) -> Path:
    """A folder made as every stage makes one; `notes` is a recorded file outside the payload."""
    with files.staged_folder(final, overwrite=False) as folder:
        for name, data in {**payload, **({} if notes is None else {"notes.txt": notes.encode()})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        config = keys.pop("config", CorpusConfig(output_dir="out"))
        manifest.seal(folder, kind=kind, final=final, payload=payload, config=config, **keys)
    return final


def edit(folder: Path, *, self_digest: bool = False, **changes) -> None:
    """Change fields of the manifest and make `SHA256SUMS`, and if told `self_digest`, fit: what a forger would do."""
    document = {**json.loads((folder / "manifest.json").read_bytes()), **changes}
    if self_digest:
        document["self_digest"] = manifest.self_digest(document)
    data = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
    (folder / "manifest.json").write_bytes(data)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    lines = [line for line in lines if not line.endswith("  manifest.json")]
    lines.append(f"{hashlib.sha256(data).hexdigest()}  manifest.json")
    (folder / "SHA256SUMS").write_text("\n".join(sorted(lines, key=lambda line: line[66:])) + "\n")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("manifest") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "folder"))


# --- a whole folder -----------------------------------------------------------------------------------------------


def test_sealed_folder_is_whole(folder):
    assert manifest.problems_of(folder) == []
    assert manifest.check_tree(folder, recursive=True).all_problems() == []


def test_sealed_folder_passes_sha256sum(folder):
    """GNU coreutils checks the folder without any of our code, and covers every file but its own list."""
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = [line.removesuffix(": OK") for line in done.stdout.splitlines()]
    assert checked == [name for name in files.list_files(folder) if name != "SHA256SUMS"]


def test_seal_returns_the_digest_of_the_manifest(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    config = CorpusConfig(output_dir="out")
    digest = manifest.seal(tmp_path, kind="corpus", final=tmp_path, payload=["a"], config=config)
    assert digest == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_digests_that_are_known_are_not_computed_again(tmp_path, monkeypatch):
    """Processes share the hashing of a checkpoint; the one that seals it reads only what is new, its configuration."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    known = dict(zip(["a", "b"], files.flush_and_hash([tmp_path / "a", tmp_path / "b"]), strict=True))
    hashed, flush_and_hash = [], files.flush_and_hash

    def note(paths):
        hashed.extend(path.name for path in paths)
        return flush_and_hash(paths)

    monkeypatch.setattr(files, "flush_and_hash", note)
    config = CorpusConfig(output_dir="out")
    manifest.seal(tmp_path, kind="corpus", final=tmp_path, payload=["a"], config=config, known=known)
    assert hashed == ["config.yaml"]
    assert sorted(known) == ["a", "b"], "the caller's own is left alone"
    assert manifest.problems_of(tmp_path) == []


def test_known_digest_that_is_wrong_shows_at_the_first_check(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    config, known = CorpusConfig(output_dir="out"), {"a": files.sha256_bytes(b"2")}
    manifest.seal(tmp_path, kind="corpus", final=tmp_path, payload=["a"], config=config, known=known)
    assert any("a: has changed" in problem for problem in manifest.problems_of(tmp_path))


def test_seal_forces_every_file_and_folder_to_the_disk(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"1")
    forced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        forced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    config = CorpusConfig(output_dir="out")
    manifest.seal(tmp_path, kind="corpus", final=tmp_path, payload=["sub/a"], config=config)
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} <= set(forced)
    assert forced[-1] == tmp_path.stat().st_ino, "the folder's own list of names comes last"


def test_manifest_lists_every_file_with_size_and_digest(folder):
    resources = {r["name"]: r for r in manifest.read(folder)["resources"]}
    assert list(resources) == ["config.yaml", "data.bin", "notes.txt", "sub/weights.safetensors"]
    for name, resource in resources.items():
        data = (folder / name).read_bytes()
        assert (resource["algorithm"], resource["size"]) == ("sha256", len(data))
        assert resource["digest"] == hashlib.sha256(data).hexdigest()
        assert resource["payload"] is (name in PAYLOAD)


def test_saved_config_is_a_valid_config(folder):
    loaded = configuration.load(CorpusConfig, path=folder / "config.yaml")
    assert loaded.model_dump() == CorpusConfig(output_dir="out").model_dump()
    assert manifest.read(folder)["config"] == loaded.model_dump(mode="json")


def test_content_digest_follows_its_definition(folder):
    """By hand: SHA-256 of "<digest>  <name>\\n" for each payload file, sorted by name."""
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(PAYLOAD.items())]
    assert manifest.read(folder)["content_digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_content_digest_depends_on_the_payload_alone(tmp_path, folder):
    other = sealed(
        tmp_path / "another name",
        notes="other notes",
        config=CorpusConfig(output_dir="elsewhere", max_modules=3),
        parents=[manifest.as_parent(folder)],
        facts={"num_records": 3},
    )
    assert manifest.read(other)["content_digest"] == manifest.read(folder)["content_digest"]
    assert manifest.read(other)["id"] != manifest.read(folder)["id"]
    changed = sealed(tmp_path / "changed", payload={**PAYLOAD, "data.bin": b"\x00\x01\x03 payload"})
    renamed = sealed(
        tmp_path / "renamed", payload={"data2.bin": PAYLOAD["data.bin"], "sub/weights.safetensors": b"weights"}
    )
    assert len({manifest.read(f)["content_digest"] for f in (folder, changed, renamed)}) == 3


def test_folder_may_move_and_be_copied(folder, tmp_path):
    moved = folder.rename(tmp_path / "moved")
    assert manifest.problems_of(moved) == []


# --- one bit ------------------------------------------------------------------------------------------------------


def files_with_bytes(folder: Path) -> list[tuple[Path, bytes]]:
    return [(folder / name, data) for name in files.list_files(folder) if (data := (folder / name).read_bytes())]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A sealed folder with a manifest of one kilobyte, so that a sweep is short: its provenance is taken out."""
    folder = sealed(tmp_path_factory.mktemp("manifest") / "small", payload={"a.bin": b"\x00\xff"}, notes=None)
    edit(folder, self_digest=True, provenance={})
    assert manifest.problems_of(folder) == []
    return folder


@pytest.mark.parametrize("name", ["a.bin", "config.yaml", "manifest.json", "SHA256SUMS"])
def test_flipped_bit_of_any_byte_is_found(small, name):
    """Every byte of every file once, the bit going round from byte to byte."""
    data = (small / name).read_bytes()
    missed = []
    try:
        for place in range(len(data)):
            bit = 1 << (place % 8)
            (small / name).write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            if not manifest.problems_of(small):
                missed.append((place, bit))
    finally:
        (small / name).write_bytes(data)
    assert missed == []
    assert manifest.problems_of(small) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bits_are_found(small, data):
    path, old = data.draw(st.sampled_from(files_with_bytes(small)))
    places = data.draw(st.sets(st.integers(0, 8 * len(old) - 1), min_size=1, max_size=3))
    new = bytearray(old)
    for place in places:
        new[place // 8] ^= 1 << (place % 8)
    try:
        path.write_bytes(new)
        assert manifest.problems_of(small)
    finally:
        path.write_bytes(old)


def test_every_bit_of_every_line_end_is_found(small):
    """Line ends flip to characters that some readers take for line ends too, such as the vertical tab."""
    name = "SHA256SUMS"
    data = (small / name).read_bytes()
    missed = []
    try:
        for place in (place for place, byte in enumerate(data) if byte == 0x0A):
            for bit in range(8):
                (small / name).write_bytes(data[:place] + bytes([0x0A ^ (1 << bit)]) + data[place + 1 :])
                if not manifest.problems_of(small):
                    missed.append((place, bit))
    finally:
        (small / name).write_bytes(data)
    assert missed == []


def test_every_truncation_is_found(small):
    for path, old in files_with_bytes(small):
        step = max(1, len(old) // 20)
        try:
            for length in sorted({*range(0, len(old), step), *range(max(0, len(old) - 3), len(old))}):
                path.write_bytes(old[:length])
                assert manifest.problems_of(small), f"{path.name} cut to {length} bytes"
        finally:
            path.write_bytes(old)


def test_every_appended_byte_is_found(small):
    for path, old in files_with_bytes(small):
        for byte in (b"\n", b" ", b"\0", b"x"):
            try:
                path.write_bytes(old + byte)
                assert manifest.problems_of(small), f"{path.name} with {byte!r} at its end"
            finally:
                path.write_bytes(old)


def test_every_missing_file_is_found(whole, tmp_path):
    for name in files.list_files(whole):
        folder = Path(shutil.copytree(whole, tmp_path / "copy"))
        (folder / name).unlink()
        assert any(name in problem for problem in manifest.problems_of(folder)), name
        shutil.rmtree(folder)


def test_swapped_files_are_found(folder):
    os.rename(folder / "data.bin", folder / "x")
    os.rename(folder / "notes.txt", folder / "data.bin")
    os.rename(folder / "x", folder / "notes.txt")
    assert len([p for p in manifest.problems_of(folder) if "bytes" in p]) == 2


def test_problem_names_the_file_and_both_digests(folder):
    (folder / "data.bin").write_bytes(b"\x00\x01\x02 Payload")
    problems = manifest.problems_of(folder)
    new, old = (hashlib.sha256(data).hexdigest() for data in (b"\x00\x01\x02 Payload", PAYLOAD["data.bin"]))
    assert f"{folder / 'data.bin'}: has changed: SHA-256 {new}, {old} was written." in problems


# --- the outline --------------------------------------------------------------------------------------------------


def test_outline_of_a_whole_folder_has_no_problems(folder):
    assert manifest.problems_of_outline(folder) == []


@pytest.mark.parametrize("name", ["config.yaml", "data.bin", "manifest.json", "SHA256SUMS", "sub/weights.safetensors"])
def test_outline_sees_a_missing_and_a_cut_file(folder, name):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert any(name in problem for problem in manifest.problems_of_outline(folder))
    path.unlink()
    assert any(name in problem for problem in manifest.problems_of_outline(folder))


def test_outline_sees_a_file_too_many_and_an_edited_manifest(folder):
    (folder / "more.bin").write_bytes(b"")
    assert any("more.bin: is not listed" in problem for problem in manifest.problems_of_outline(folder))
    (folder / "more.bin").unlink()
    edit(folder, facts={"step": 8})
    assert any("manifest.json: was edited" in problem for problem in manifest.problems_of_outline(folder))


def test_outline_reads_no_payload(folder):
    """That is what it is for: a checkpoint of gigabytes is not hashed twice in one save."""
    data = bytearray((folder / "data.bin").read_bytes())
    data[0] ^= 1
    (folder / "data.bin").write_bytes(data)
    assert manifest.problems_of_outline(folder) == []
    assert any("data.bin: has changed" in problem for problem in manifest.problems_of(folder))


# --- files that do not belong -------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize("name", ["x.bin", "x.pkl", "x.py", "sub/x.pt", "x", "x.json", "x.safetensors", "new/x.txt"])
def test_unlisted_file_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    problem = f"{folder / name}: is not listed in manifest.json. Remove it, nothing vouches for it."
    assert manifest.problems_of(folder) == [problem]


@pytest.mark.parametrize("name", ["README.md", "out.log", "sub/notes.md", ".gitignore"])
def test_note_beside_is_tolerated(folder, name):
    (folder / name).write_text("a note")
    assert manifest.problems_of(folder) == []


@pytest.mark.security
@pytest.mark.parametrize("name", ["data.bin", "manifest.json", "SHA256SUMS", "README.md", "sub"])
def test_symbolic_link_is_refused_even_to_the_same_bytes(folder, whole, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(whole / name)
    assert [p for p in manifest.problems_of(folder) if p.startswith(f"{path}: is a symbolic link")]


@pytest.mark.security
@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "sub/../data.bin", "..", "./data.bin", "a\\b", "a\nb", "", ".", "sub//x", "a\0b"],
)
def test_unsafe_name_in_a_manifest_is_refused(folder, name):
    (folder.parent / "outside").write_bytes(b"")
    resources = manifest.read(folder)["resources"]
    extra = {
        "name": name,
        "algorithm": "sha256",
        "digest": hashlib.sha256(b"").hexdigest(),
        "size": 0,
        "payload": False,
    }
    edit(folder, self_digest=True, resources=[*resources, extra])
    assert [p for p in manifest.problems_of(folder) if "unsafe name" in p]


@pytest.mark.security
@pytest.mark.parametrize("line", [f"{'0' * 64}  ../outside", f"{'0' * 64}  /etc/passwd", f"{'0' * 64} *a", "", "text"])
def test_unsafe_or_broken_line_in_the_sums_is_refused(folder, line):
    with open(folder / "SHA256SUMS", "a") as stream:
        stream.write(line + "\n")
    number = len((folder / "SHA256SUMS").read_text().split("\n")) - 1
    (problem,) = manifest.problems_of(folder)
    assert problem.startswith(f"{folder / 'SHA256SUMS'}:{number}: ")


# --- edits by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"facts": {"loss": 1.0}}, {"config": {}}, {"parents": []}, {"name": "x"}, {"kind": "model"}, {"extra": 1}],
)
def test_edited_field_is_found_though_the_sums_were_rewritten(tmp_path, changes):
    parent = sealed(tmp_path / "parent")
    child = sealed(tmp_path / "child", parents=[manifest.as_parent(parent)], facts={"loss": 2.0})
    edit(child, **changes)
    assert manifest.problems_of(child) == [
        f"{child / 'manifest.json'}: was edited: self_digest does not follow from the other fields."
    ]


def test_edited_content_digest_is_found(folder):
    edit(folder, self_digest=True, content_digest="0" * 64)
    assert manifest.problems_of(folder) == [
        f"{folder / 'manifest.json'}: content_digest does not follow from the listed files."
    ]


def test_forged_parent_is_found_by_its_child(tmp_path):
    parent = sealed(tmp_path / "parent", facts={"loss": 2.0})
    child = sealed(tmp_path / "child", parents=[manifest.as_parent(parent)])
    grandchild = sealed(tmp_path / "grandchild", parents=[manifest.as_parent(child)])
    edit(parent, self_digest=True, facts={"loss": 1.0})
    assert manifest.problems_of(parent) == []
    for folder in (child, grandchild):
        assert manifest.problems_of(folder) == []
        assert manifest.check_tree(folder, recursive=False).all_problems() == []
        (problem,) = manifest.check_tree(folder, recursive=True).all_problems()
        assert problem.startswith(f"{parent / 'manifest.json'}: SHA-256 ")
        assert "is not what its child recorded" in problem


def test_payload_change_of_an_ancestor_is_found(tmp_path):
    parent = sealed(tmp_path / "parent")
    child = sealed(tmp_path / "child", parents=[manifest.as_parent(parent)])
    (parent / "data.bin").write_bytes(b"\x00\x01\x02 Payload")
    problems = manifest.check_tree(child, recursive=True).all_problems()
    assert any(problem.startswith(f"{parent / 'data.bin'}: has changed") for problem in problems)


def test_replaced_parent_is_found(tmp_path):
    parent = sealed(tmp_path / "parent")
    child = sealed(tmp_path / "child", parents=[manifest.as_parent(parent)])
    shutil.rmtree(parent)
    sealed(parent)
    (problem,) = manifest.check_tree(child, recursive=True).all_problems()
    assert "is not what its child recorded" in problem


def test_missing_parent_is_found(tmp_path):
    parent = sealed(tmp_path / "parent")
    child = sealed(tmp_path / "child", parents=[manifest.as_parent(parent)])
    shutil.rmtree(parent)
    assert manifest.check_tree(child, recursive=True).all_problems() == [
        f"{parent}: is missing, a dataset is expected there."
    ]


@pytest.mark.security
@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {"loss": float("nan")}},
        {"resources": 3},
        {"resources": [{}]},
        {"resources": [[]]},
        {"resources": [{"name": 3, "digest": 3, "size": 3, "payload": True}]},
        {"resources": [{"name": ["a"], "digest": 3, "size": 3, "payload": True}]},
        {"content_digest": None},
        {"parents": 3},
        {"parents": [3]},
        {"parents": [{"path": 3}]},
        {"parents": [{"path": ".", "kind": "unverified"}]},
        {"parents": [{"path": "."}]},
        {"sources": [{"path": "x"}]},
        {"sources": None},
        {"kind": None},
        {"format": "other"},
        {"format_version": 2},
    ],
    ids=str,
)
def test_malformed_manifest_is_a_problem_and_not_a_crash(folder, changes):
    edit(folder, **changes)
    assert manifest.problems_of(folder)
    assert manifest.check_tree(folder, recursive=True).all_problems()


@pytest.mark.security
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"format": "codex-accel-manifest", "format_version": 1}',
    ],
    ids=["empty", "half", "list", "number", "null", "not UTF-8", "deep", "bare"],
)
def test_damaged_manifest_is_a_problem_and_not_a_crash(folder, data):
    (folder / "manifest.json").write_bytes(data)
    assert manifest.problems_of(folder)
    assert manifest.check_tree(folder, recursive=True).all_problems()


@pytest.mark.security
@pytest.mark.parametrize("facts", ['"\\ud800"', "[" * 500 + "]" * 500], ids=["surrogate", "deep"])
def test_manifest_that_cannot_be_written_again_is_a_problem_and_not_a_crash(folder, facts):
    data = (folder / "manifest.json").read_text().replace('"facts": {}', f'"facts": {facts}')
    (folder / "manifest.json").write_text(data)
    assert manifest.problems_of(folder)


@pytest.mark.security
def test_circle_of_parents_ends(tmp_path):
    first = sealed(tmp_path / "first")
    second = sealed(tmp_path / "second", parents=[manifest.as_parent(first)])
    edit(first, self_digest=True, parents=[{**manifest.as_parent(second), "path": "../second"}])
    assert manifest.check_tree(first, recursive=True).all_problems()


# --- raw files and folders without a manifest ---------------------------------------------------------------------


def with_source(tmp_path: Path) -> tuple[Path, Path]:
    tmp_path.mkdir(exist_ok=True)
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b'{"text": "a"}\n')
    source = {"path": str(raw), "sha256": files.sha256_file(raw), "size": raw.stat().st_size}
    parent = sealed(tmp_path / "data" / "parent", sources=[source])
    return raw, sealed(tmp_path / "child", parents=[manifest.as_parent(parent)])


def test_changed_raw_source_is_named(tmp_path):
    raw, child = with_source(tmp_path)
    assert manifest.check_tree(child, recursive=True).all_problems() == []
    raw.write_bytes(b'{"text": "b"}\n')
    assert manifest.check_tree(child, recursive=True).all_problems() == [f"{raw}: has changed since it was read."]


def test_missing_raw_source_is_named(tmp_path):
    raw, child = with_source(tmp_path)
    raw.unlink()
    assert manifest.check_tree(child, recursive=True).all_problems() == [f"{raw}: is missing."]


def test_whole_tree_may_move(tmp_path):
    """Parents and sources are stored relative to the folder, so a project can be copied to another machine."""
    _, child = with_source(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert manifest.check_tree(tmp_path / "after" / child.name, recursive=True).all_problems() == []


def with_download(tmp_path: Path) -> tuple[Path, Path]:
    download = tmp_path / "download"
    download.mkdir()
    (download / "model.safetensors").write_bytes(b"weights")
    (download / "config.json").write_bytes(b"{}")
    record = manifest.as_parent(download)
    assert (record["kind"], record["manifest_digest"]) == ("unverified", None)
    child = sealed(tmp_path / "child", parents=[record])
    assert manifest.check_tree(child, recursive=True).all_problems() == []
    return download, child


def test_folder_without_a_manifest_is_checked_again(tmp_path):
    download, child = with_download(tmp_path)
    (download / "model.safetensors").write_bytes(b"Weights")
    assert manifest.check_tree(child, recursive=True).all_problems() == [
        f"{download}: its files have changed since they were recorded."
    ]


@pytest.mark.security
def test_manifest_put_beside_a_changed_download_does_not_vouch_for_it(tmp_path):
    download, child = with_download(tmp_path)
    recorded = manifest.read(child)["parents"][0]["content_digest"]
    (download / "model.safetensors").write_bytes(b"Weights")
    forged = {"format": manifest.FORMAT, "format_version": 1, "kind": "model", "content_digest": recorded}
    (download / "manifest.json").write_text(json.dumps(forged))
    assert manifest.check_tree(child, recursive=True).all_problems() == [
        f"{download}: its files have changed since they were recorded."
    ]


@pytest.mark.security
def test_symbolic_link_in_a_download_is_named(tmp_path):
    """And what stands after it in the tree is checked all the same."""
    download, child = with_download(tmp_path)
    (tmp_path / "other").write_bytes(b"Weights")
    (download / "model.safetensors").unlink()
    (download / "model.safetensors").symlink_to(tmp_path / "other")
    (problem,) = manifest.check_tree(child, recursive=True).all_problems()
    assert problem.startswith(f"{download / 'model.safetensors'}: is a symbolic link")


def test_missing_download_is_named(tmp_path):
    download, child = with_download(tmp_path)
    shutil.rmtree(download)
    assert manifest.check_tree(child, recursive=True).all_problems() == [f"{download}: is missing."]


def test_missing_folder_cannot_be_a_parent(tmp_path):
    with pytest.raises(UserError, match="none: cannot be read"):
        manifest.as_parent(tmp_path / "none")


def test_damaged_folder_cannot_be_a_verified_parent(folder):
    assert manifest.as_parent(folder, verify=True)["kind"] == "dataset"
    (folder / "data.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.bin"):
        manifest.as_parent(folder, verify=True)


# --- before use ---------------------------------------------------------------------------------------------------


def test_require_returns_the_manifest_of_a_whole_folder(folder):
    assert manifest.require(folder, kinds=("dataset",), verify=True)["kind"] == "dataset"


def test_require_refuses_a_damaged_folder_and_names_the_key(folder):
    (folder / "data.bin").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        manifest.require(folder, kinds=("dataset",), verify=True, key="data.dataset")
    assert caught.value.problems[0].startswith(
        f"data.dataset = '{folder}': is damaged. {folder / 'data.bin'}: has 0 bytes"
    )


def test_require_does_not_hash_if_told(folder):
    (folder / "data.bin").write_bytes(b"")
    assert manifest.require(folder, kinds=("dataset",), verify=False)["kind"] == "dataset"


def test_require_refuses_another_kind(folder):
    with pytest.raises(UserError, match="holds a dataset, not a tokenizer or model"):
        manifest.require(folder, kinds=("tokenizer", "model"), verify=True)


def test_require_refuses_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        manifest.require(tmp_path / "none", kinds=("dataset",), verify=True)


def test_require_refuses_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        manifest.require(tmp_path, kinds=("dataset",), verify=True)


def test_folder_in_the_place_of_a_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        manifest.read(tmp_path)
    assert manifest.check_tree(tmp_path, recursive=True).all_problems()


def test_config_of_any_stage_can_be_sealed(tmp_path):
    final = sealed(tmp_path / "out", kind="evaluation", config=VerifyConfig(path="é: [x", digest="1e5"))
    assert configuration.load(VerifyConfig, path=final / "config.yaml").digest == "1e5"
    assert manifest.problems_of(final) == []
