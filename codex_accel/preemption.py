"""Being told to stop: by a signal, or by the death of the launcher.

Rule: a signal to any one process stops them all at the same step boundary. The first one asks; a second one stops at
once, whatever the process waits for. In a start-up there is nothing to save, so the first one is enough.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from codex_accel import files, run_folder

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
MARKER = "preempted"
LAUNCHER_VARIABLES = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")  # of `accelerate launch` and `torchrun`
LOOK_S = 0.5  # between two looks at the launcher during a start-up
SAME_WAVE_S = 1.0  # a service manager signals launcher and process alike, and torchrun passes its own on
CLOSE, LOOK = 0, 255  # what is written to the thread besides numbers of signals
SHOW_CURSOR = b"\x1b[?25h"  # which the progress bar hides


class Preempted(Exception):
    """Raised on every process at the same place when one of them was told to stop."""


class Listener:
    """Catches the signals of this process, from its making until `close`.

    A thread reads them from the wake-up descriptor of Python's own handler, because the main thread may wait for
    another process inside of torch and not come back to Python. The parent is watched only if it is a launcher: a run
    that a shell has started (`nohup ... &`) outlives the shell.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._starting = False
        self._run_dir: Path | None = None
        launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        self._parent = os.getppid() if launched else None
        self._wave_s = SAME_WAVE_S if launched else 0.0
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _note(self, number: int, _: FrameType | None = None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def _listen(self) -> None:
        first_s: float | None = None
        while True:
            if select.select([self._readable], [], [], LOOK_S if self._starting else None)[0]:
                if (number := os.read(self._readable, 1)[0]) == CLOSE:
                    return
                if number in SIGNALS:
                    self._note(number)
                    if first_s is not None and time.monotonic() - first_s >= self._wave_s:
                        _end(128 + number)
                    if first_s is None and not self._starting:
                        name = signal.Signals(number).name
                        _tell(f"{name}: stops after this step and saves; once more stops at once\n".encode())
                    first_s = first_s or time.monotonic()
            if self._starting and self._told():
                self._stop_start_up()

    def _stop_start_up(self) -> None:
        if self._run_dir is not None:
            with contextlib.suppress(OSError):  # a disk that takes no marker does not keep the process from stopping
                steps = run_folder.steps_saved(self._run_dir)
                write_marker(self._run_dir, step=steps[0] if steps else 0, reason=self.reason)
        _tell(f"{self.reason}: stopped in start-up, with nothing to save\n".encode())
        _end(EXIT_CODE)

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.write(self._writable, bytes([CLOSE]))
        self._thread.join()
        os.close(self._readable)
        os.close(self._writable)

    def start_up(self, run_dir: Path | None) -> None:
        """Until the first `told_to_stop`, let the first signal, or the launcher's death, end this process at once.

        A start-up can wait for others, or for the launcher's store, much longer than torchrun's 30 s. The marker goes
        into `run_dir`; None for a process that does not hold that folder. Processes without a launcher, which would
        end the rest of them, agree at their first step instead.
        """
        self._run_dir = run_dir
        self._starting = self._parent is not None or os.environ.get("WORLD_SIZE", "1") == "1"
        os.write(self._writable, bytes([LOOK]))

    def told_to_stop(self) -> bool:
        """Whether this process was told to stop, or its launcher has died (its parent is another one then)."""
        self._starting = False
        return self._told()

    def _told(self) -> bool:
        if not self.reason and self._parent not in (None, os.getppid()):
            self.reason = "launcher died"
        return bool(self.reason)


def _end(code: int) -> NoReturn:
    if os.isatty(2):
        _tell(SHOW_CURSOR)
    os._exit(code)


def _tell(text: bytes) -> None:
    """To standard error, past Python's buffer, whose lock the main thread may hold; its reader may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, text)


def write_marker(run_dir: Path, *, step: int, reason: str) -> None:
    """Leave `preempted` in the run folder, which launchers that hide exit codes cannot hide."""
    files.write_durable(run_dir / MARKER, json.dumps({"step": step, "reason": reason}).encode() + b"\n")
