"""Being told to stop: by a signal, or by the death of the launcher.

Rule: a signal to any one process stops them all at the same step boundary. The first one asks; a second one stops at
once.
"""

import json
import os
import signal
from pathlib import Path
from types import FrameType

from codex_accel import files

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
MARKER = "preempted"
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # of `accelerate launch` and `torchrun`


class Preempted(Exception):
    """Raised on every process at the same place when one of them was told to stop."""


class Listener:
    """Catches the signals of this process from its making until `close`.

    The parent is watched only if it is a launcher: a run that a shell has started (`nohup ... &`) outlives the shell.
    """

    def __init__(self) -> None:
        self.reason = ""
        launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        self._parent = os.getppid() if launched else None
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason = signal.Signals(number).name

    def close(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def told_to_stop(self) -> bool:
        """Whether this process was told to stop, or its launcher has died (its parent is another one then)."""
        if not self.reason and self._parent not in (None, os.getppid()):
            self.reason = "launcher died"
        return bool(self.reason)


def write_marker(run_dir: Path, *, step: int, reason: str) -> None:
    """Leave `preempted` in the run folder, which launchers that hide exit codes cannot hide."""
    files.write_durable(run_dir / MARKER, json.dumps({"step": step, "reason": reason}).encode() + b"\n")
