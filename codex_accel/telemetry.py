"""What the machine does during a run: processor, memory, disk and GPUs, in system.ndjson.

Rule: a thread samples and ends with the run, and nothing that goes wrong in it reaches the run.
"""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from codex_accel.events import LineLog
from codex_accel.train_schema import TrainConfig

SYSTEM = "system.ndjson"
Sample = dict[str, float | int | None]
Gpus = list[Any]  # handles of NVML


@contextlib.contextmanager
def sampling(
    config: TrainConfig,
    run_dir: Path,
    track: Callable[[Mapping[str, Any]], None],
    *,
    step: Callable[[], int],
    enabled: bool,
) -> Iterator[None]:
    """While the block runs, write a line to system.ndjson every `log.system_every_s` seconds, the first at its start
    and the last at its end, and give it to `track` with split "system".

    A line is {"time", "step", ...}, with what `Sampler.sample` returns; `step()` is asked from another thread. A run
    that goes on appends. Nothing happens without `log.system_metrics`, or where `enabled` is false.
    """
    if not (config.log.system_metrics and enabled):
        yield
        return
    log = LineLog(run_dir / SYSTEM, max_bytes=config.log.max_bytes)
    sampler, ended = Sampler(run_dir), threading.Event()
    if sampler.why_no_gpus:
        print(f"note    system metrics without GPUs: {sampler.why_no_gpus}", flush=True)

    def write() -> None:
        sample, now = sampler.sample(), datetime.datetime.now(datetime.UTC)
        line = {"time": now.isoformat(timespec="milliseconds"), "step": step(), **sample}
        log.write(line)
        track({**line, "split": "system"})

    def work() -> None:
        try:
            write()
            while not ended.wait(config.log.system_every_s):
                write()
            write()
        except Exception as error:  # of a driver, or of /proc
            print(f"warning: system metrics have stopped ({type(error).__name__}: {error})", flush=True)

    thread = threading.Thread(target=work, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=2.0)  # a driver that hangs does not keep the run


class Sampler:
    """Reads the figures; the processor's are means since the sample before."""

    def __init__(self, run_dir: Path):
        import psutil

        self.run_dir, self.process = run_dir, psutil.Process()
        self.gpus, self.why_no_gpus = _gpus()
        self._cpu_s: dict[Any, float] = {}
        self._machine, self._since_s = psutil.cpu_times(), 0.0

    def sample(self) -> Sample:
        """Figures of this moment, as plain numbers.

        - cpu_percent, rss_bytes: this process and all that it has started; 100 is one core. Memory that several of
          them share counts once for each. cpu_percent and machine_cpu_percent are None in the first sample.
        - machine_cpu_percent, machine_memory_bytes: of all cores, and used as `psutil.virtual_memory` defines it.
        - disk_free_bytes: where the run folder lies, for this user.
        - gpu0_percent, gpu0_memory_bytes ...: of every GPU of the machine in the order of NVML, whoever uses it.
        """
        import psutil

        now_s, machine = time.monotonic(), psutil.cpu_times()
        rss_bytes, cpu_s = _of_tree(self.process)
        since_s, first = now_s - self._since_s, not self._since_s
        used_s = sum(seconds - self._cpu_s.get(process, 0.0) for process, seconds in cpu_s.items())
        total, busy = _total_and_busy(self._machine, machine)
        self._cpu_s, self._machine, self._since_s = cpu_s, machine, now_s
        return {
            "cpu_percent": None if first else round(100 * used_s / since_s, 1),
            "machine_cpu_percent": None if first or not total else round(100 * busy / total, 1),
            "rss_bytes": rss_bytes,
            "machine_memory_bytes": psutil.virtual_memory().used,
            "disk_free_bytes": psutil.disk_usage(str(self.run_dir)).free,
            **_of_gpus(self.gpus),
        }


def _of_tree(process: Any) -> tuple[int, dict[Any, float]]:
    """(resident bytes, processor seconds by process) of a process and its descendants."""
    import psutil

    rss_bytes, cpu_s = 0, {}
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error), member.oneshot():  # it may have ended meanwhile
            times = member.cpu_times()
            rss_bytes += member.memory_info().rss
            cpu_s[member] = times.user + times.system
    return rss_bytes, cpu_s


def _total_and_busy(before: Any, after: Any) -> tuple[float, float]:
    """Seconds of all cores between two readings of psutil.cpu_times, and those that they worked."""

    def total(times: Any) -> float:
        return sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # in user and nice too

    def idle(times: Any) -> float:
        return times.idle + getattr(times, "iowait", 0.0)

    passed = total(after) - total(before)
    return passed, max(0.0, passed - (idle(after) - idle(before)))


def _gpus() -> tuple[Gpus, str]:
    """(handles of NVML, why there is none)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        found = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [], str(error)
    return found, "" if found else "there is none"


def _of_gpus(gpus: Gpus) -> Sample:
    """Utilisation and memory of each; None for what a GPU does not tell (a MIG slice has no utilisation)."""
    if not gpus:
        return {}
    import pynvml

    sample: Sample = {}
    for number, gpu in enumerate(gpus):
        percent = used_bytes = None
        with contextlib.suppress(pynvml.NVMLError):
            used_bytes = pynvml.nvmlDeviceGetMemoryInfo(gpu).used
            percent = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        sample |= {f"gpu{number}_percent": percent, f"gpu{number}_memory_bytes": used_bytes}
    return sample
