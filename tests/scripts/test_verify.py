"""The chain of custody: from an evaluation report back to the raw bytes."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_script

from codex_accel import files, manifest

ARTEFACTS = ("report", "run/final", "dataset", "tokenizer", "corpus")


@pytest.fixture(scope="module")
def copied(chain, tmp_path_factory) -> Path:
    """A copy of the chain that may be damaged and mended again."""
    root = tmp_path_factory.mktemp("copied")
    for name in ARTEFACTS:
        shutil.copytree(chain / name, root / name)
    return root


def verify(root: Path, capsys, *arguments: str) -> tuple[int, str]:
    code = run_script("verify", root / "report", "--recursive", *arguments)
    return code, capsys.readouterr().out


def test_an_untouched_chain_is_all_ticks_back_to_the_raw_file(copied, capsys):
    code, out = verify(copied, capsys)
    assert code == 0, out
    assert "✗" not in out
    for what in ("evaluation", "model", "dataset", "tokenizer", "corpus", "raw"):
        assert f"✓ {what}  " in out
    assert out.endswith("all ticks\n")


def test_one_flipped_bit_in_any_file_of_any_ancestor_is_found_and_named(copied, capsys):
    tried = 0
    for artefact in ARTEFACTS:
        for name in files.list_files(copied / artefact):
            path = copied / artefact / name
            whole = path.read_bytes()
            damaged = bytearray(whole)
            damaged[len(damaged) // 3] ^= 1 << (len(name) % 8)
            path.write_bytes(damaged)
            code, out = verify(copied, capsys)
            path.write_bytes(whole)
            assert code == 1, f"{artefact}/{name}"
            assert f"✗ {copied / artefact}" in out or f"  {copied / artefact}" in out.split("✗", 1)[1].splitlines()[0]
            tried += 1
    assert tried >= 30
    assert verify(copied, capsys)[0] == 0


@pytest.mark.parametrize("artefact", ARTEFACTS)
@pytest.mark.parametrize("edited", ["parents", "config", "facts", "provenance"])
def test_an_edited_manifest_with_its_sums_rewritten_is_found(copied, capsys, artefact, edited):
    """What an editor would do who also runs sha256sum: the folder itself, or its child, tells."""
    folder = copied / artefact
    before = {name: (folder / name).read_bytes() for name in (manifest.MANIFEST, manifest.SUMS)}
    document = json.loads(before[manifest.MANIFEST])
    if edited == "parents":
        document["parents"] = [*document["parents"], {"kind": "corpus", "path": "x", "content_digest": ""}]
    else:
        document[edited] = {**document[edited], "num_records": 1}
    (folder / manifest.MANIFEST).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    old, new = files.sha256_bytes(before[manifest.MANIFEST]), files.sha256_file(folder / manifest.MANIFEST)
    (folder / manifest.SUMS).write_bytes(before[manifest.SUMS].replace(old.encode(), new.encode()))
    code, out = verify(copied, capsys)
    for name, data in before.items():
        (folder / name).write_bytes(data)
    assert code == 1
    assert f"{folder}/manifest.json" in out


def test_an_edit_that_hides_every_trace_in_its_own_folder_is_found_by_the_child(copied, capsys):
    """Metrics edited, self_digest and SHA256SUMS recomputed: only the parent's digest in the child can tell."""
    folder = copied / "dataset"
    before = {name: (folder / name).read_bytes() for name in (manifest.MANIFEST, manifest.SUMS)}
    document = json.loads(before[manifest.MANIFEST])
    document["facts"]["num_records"] += 1
    document["self_digest"] = manifest.self_digest(document)
    (folder / manifest.MANIFEST).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    old, new = files.sha256_bytes(before[manifest.MANIFEST]), files.sha256_file(folder / manifest.MANIFEST)
    (folder / manifest.SUMS).write_bytes(before[manifest.SUMS].replace(old.encode(), new.encode()))
    assert manifest.problems_of(folder) == []
    code, out = verify(copied, capsys)
    for name, data in before.items():
        (folder / name).write_bytes(data)
    assert code == 1
    assert f"{folder}/manifest.json: SHA-256 {new} is not what its child recorded" in out


def test_a_digest_kept_elsewhere_vouches_for_the_report_itself(copied, capsys):
    digest = files.sha256_file(copied / "report" / manifest.MANIFEST)
    assert verify(copied, capsys, "--digest", digest)[0] == 0
    code, out = verify(copied, capsys, "--digest", "0" * 64)
    assert code == 1
    assert "is not the given --digest" in out


def test_a_missing_ancestor_is_named(copied, capsys):
    (copied / "tokenizer").rename(copied / "moved")
    code, out = verify(copied, capsys)
    (copied / "moved").rename(copied / "tokenizer")
    assert code == 1
    assert f"{copied}/tokenizer: is missing" in out
