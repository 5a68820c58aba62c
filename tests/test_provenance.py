"""Where an artefact was made is recorded, secrets are not."""

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

import codex_accel
from codex_accel import provenance


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_id_is_time_kind_and_four_digits():
    assert re.fullmatch(r"\d{8}T\d{6}Z-dataset-[0-9a-f]{4}", provenance.new_id("dataset"))


def test_id_sorts_by_time():
    first, second = provenance.new_id("a"), provenance.new_id("b")
    stamp = datetime.datetime.strptime(first[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    assert datetime.timedelta(0) <= datetime.datetime.now(datetime.UTC) - stamp < datetime.timedelta(minutes=1)
    assert first[:16] <= second[:16]


def test_facts_are_json_and_complete():
    facts = json.loads(json.dumps(provenance.collect(), allow_nan=False))
    assert facts["code_version"] == codex_accel.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["hardware"]["num_cpus"] == os.cpu_count()
    assert facts["hardware"]["memory_bytes"] > 2**27
    assert facts["hardware"]["processor"]
    assert datetime.datetime.fromisoformat(facts["time"]).utcoffset() == datetime.timedelta(0)


def test_packages_are_all_that_is_installed_with_their_versions():
    packages = provenance.collect()["packages"]
    assert packages["pydantic"] == pydantic.__version__
    assert packages["pytest"] == pytest.__version__
    assert list(packages) == sorted(packages, key=str.lower)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "ACCELERATE_API_KEY", "HF_HUB_PASSWORD", "TRANSFORMERS_Secret", "SLURM_AUTH", "TORCH_CREDENTIALS"],
)
def test_secret_is_masked(monkeypatch, name):
    monkeypatch.setenv(name, "hunter2")
    facts = provenance.collect()
    assert facts["environment"][name] == "[SECRET]"
    assert "hunter2" not in json.dumps(facts)


def test_variable_outside_the_named_families_is_not_recorded(monkeypatch):
    monkeypatch.setenv("MY_DATABASE", "hunter2")
    assert "hunter2" not in json.dumps(provenance.collect())


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
)
def test_variable_that_matters_is_recorded(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert provenance.collect()["environment"][name] == "0"


def test_environment_is_read_each_time(monkeypatch):
    provenance.collect()
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert provenance.collect()["environment"]["NCCL_DEBUG"] == "INFO"


def test_broken_installation_does_not_stop_the_record(tmp_path):
    """An interrupted pip leaves such folders; the record is made at the end of a stage, whose work would be lost."""
    (tmp_path / "leftover-1.0.dist-info").mkdir()
    (tmp_path / "nameless-1.0.dist-info").mkdir()
    (tmp_path / "nameless-1.0.dist-info" / "METADATA").write_text("Summary: no name\n")
    code = "from codex_accel import provenance; print(sorted(provenance.collect()['packages']))"
    path = os.pathsep.join([str(tmp_path), str(Path(codex_accel.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "'pydantic'" in done.stdout
    assert "leftover" not in done.stdout


def test_git_state_is_commit_and_dirty_flag(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").touch()
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_git_state_outside_of_a_checkout_is_none(tmp_path):
    assert provenance.git_state(tmp_path) is None


def test_git_state_without_git_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path) is None
