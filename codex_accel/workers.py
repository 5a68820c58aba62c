"""The processes that share a preparation.

Rule: without a launcher this is one process and imports nothing heavy; under `accelerate launch` the processes meet
through Accelerate and exchange everything else through files.
"""

import ctypes
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

from codex_accel.errors import UserError


@dataclass(frozen=True)
class Workers:
    """This process among all."""

    process: int
    num_processes: int
    num_threads: int  # for this process
    wait: Callable[[], None]  # returns when every process has called it
    leave: Callable[[], None]  # the last call of every process: waits, then takes the group down

    @property
    def is_main(self) -> bool:
        """Whether this process plans, merges and speaks."""
        return self.process == 0


def join(*, num_threads: int | None) -> Workers:
    """Meet the other processes that the launcher started. Raises UserError if Accelerate has not joined them all.

    `num_threads` None shares this machine's cores among its processes.
    """
    _give_memory_back()
    asked, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // local)
    if asked == 1:
        return Workers(0, 1, threads, wait=lambda: None, leave=lambda: None)
    import torch.distributed
    from accelerate import PartialState

    # One process may read for hours before it comes to the barrier; gloo gives up after half an hour.
    state = PartialState(cpu=True, timeout=datetime.timedelta(days=365))
    if state.num_processes != asked:
        raise UserError(
            f"environment: WORLD_SIZE = {asked}: the launcher started {asked} processes, but accelerate has joined "
            f"{state.num_processes}. Use accelerate_configs/cpu_2proc.yaml as a pattern."
        )

    def leave() -> None:
        state.wait_for_everyone()
        torch.distributed.destroy_process_group()

    return Workers(state.process_index, asked, threads, state.wait_for_everyone, leave)


def _give_memory_back() -> None:
    """Let glibc return freed memory at once: one arena for all threads, blocks of 128 kB and more as maps of their own.

    Measured on 100 and 500 MB of JSON lines: peaks of 193 and 195 MB instead of 226 and 232, at the same speed. Where
    the C library is another one, nothing is set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-8, 1), (-3, 128 << 10), (-1, 128 << 10)):  # ARENA_MAX, MMAP_, TRIM_THRESHOLD
            mallopt(parameter, value)
