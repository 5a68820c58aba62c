"""Where and from what an artefact was made: time, code, packages, hardware and the environment that matters.

Rule: nothing secret is recorded. Only named families of environment variables are kept; of those, one whose name speaks
of a key, token, secret or password has its value replaced, and others are masked like any text.
"""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import codex_accel
from codex_accel import redaction

ENVIRONMENT_FAMILIES = (
    "ACCELERATE_", "CUBLAS_", "CUDA_", "DISABLE_SECRET_FILTER", "FSDP_", "GLOO_", "HF_", "LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "MKL_", "NCCL_", "OMP_", "PYTHONHASHSEED", "RANK", "SLURM_", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "WORLD_SIZE",
)  # fmt: skip
SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASS|CREDENTIAL|AUTH|JWT", re.IGNORECASE)


def new_id(kind: str) -> str:
    """A sortable id such as `20261122T071544Z-dataset-3f9c`: UTC time, kind, four random hexadecimal digits."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{kind}-{secrets.token_hex(2)}"


def collect() -> dict[str, Any]:
    """Facts about this process as plain JSON values; costs some 50 ms once, the slow part is remembered."""
    environment = {
        name: "[SECRET]" if SECRET_NAME.search(name) else redaction.text(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(ENVIRONMENT_FAMILIES)
    }
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code_version": codex_accel.__version__,
        "environment": environment,
        "safety": redaction.facts(),
        **_of_this_machine(),
    }


@functools.cache
def _of_this_machine() -> dict[str, Any]:
    found = reversed([*importlib.metadata.distributions()])  # of two with one name, the first is imported
    packages = {name: d.version for d in found if (name := d.metadata["Name"])}  # a broken install has no name
    return {
        "git": git_state(Path(__file__).parent),
        "python": sys.version.split()[0],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "hardware": {
            "platform": platform.platform(),
            "machine": platform.machine(),
            "processor": _processor_name(),
            "num_cpus": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that `folder` belongs to; None outside of one or without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _processor_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()
