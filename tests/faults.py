"""Faults made to order: a kill, a power cut, a full disk or a moved clock at the Nth file-changing call of a process.

Rule: what strikes is tests/fault_shim.c, preloaded into the fork server and dormant until a job asks for it; a test
that needs it is skipped where no C compiler is.
"""

import atexit
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("fault_shim.c")
SKIP_REASON = "no C compiler that makes a shared library for Linux is here"


@functools.cache
def library() -> Path | None:
    """The shared library, built once a session; None where no C compiler with its headers is."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    folder = Path(tempfile.mkdtemp(prefix="codex-fault-shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [compiler, "-O1", "-fPIC", "-shared", "-pthread", "-o"]
    probe = folder / "probe.c"
    probe.write_text('#include <stdio.h>\nint probe(void) { return puts(""); }\n')
    if subprocess.run([*command, folder / "probe.so", probe], capture_output=True, check=False).returncode:
        return None  # a compiler without the headers of the C library
    subprocess.run([*command, folder / "fault_shim.so", SOURCE, "-ldl"], check=True)
    return folder / "fault_shim.so"


def environment() -> dict[str, str]:
    """Variables for a process that is to have the library preloaded; none where it could not be built."""
    path = library()
    return {} if path is None else {"LD_PRELOAD": str(path)}


@dataclass(frozen=True)
class Call:
    """A line of a report: the Nth counted call, what it was, on which path below the root, and whether it was hit."""

    number: int
    name: str
    path: str
    hit: bool

    def __str__(self) -> str:
        return f"{self.number} {self.name} {self.path}"


def calls_of(report: Path) -> list[Call]:
    """The file-changing calls that an armed process made, in order."""
    calls = []
    for line in report.read_text().splitlines():
        number, name, path = line.removesuffix(" <- hit").split(" ", 2)
        calls.append(Call(int(number), name, path.lstrip("/"), line.endswith(" <- hit")))
    return calls


# --- in the forked child ------------------------------------------------------------------------------------------


def arm(*, root: str, mode: str, at: int, report: str) -> None:
    """Let `mode` strike this process at its `at`th file-changing call below `root`; each counted call goes to `report`.

    `count` never strikes; `kill` ends it before the call, `torn` in the middle of a write; `power` also cuts what was
    written and not fsynced, and `power_names` undoes names whose folder was not; `ENOSPC`, `EDQUOT`, `EIO` and `EROFS`
    fail from that call on, with `_once` only that one.
    """
    preloaded = ctypes.CDLL(None)
    preloaded.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p]
    if preloaded.fault_arm(root.encode(), mode.encode(), at, report.encode()):
        raise ValueError(f"mode = {mode!r}: no such fault")


def move_clock(offset_s: int) -> None:
    """Move the wall clock of this process by `offset_s` seconds; monotonic clocks and the kernel's stay true."""
    preloaded = ctypes.CDLL(None)
    preloaded.fault_clock.argtypes = [ctypes.c_long]
    preloaded.fault_clock(offset_s)
