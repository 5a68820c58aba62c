"""CPU seconds of `--help`, script by script: the median of seven runs, as the kernel counts them (os.wait4).

python benchmarks/help_time.py
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

RUNS, BAR_S = 7, 0.35


def cpu_s(script: Path) -> float:
    process = subprocess.Popen([sys.executable, script, "--help"], stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, median of {RUNS} runs; bar {BAR_S} s")
    for script in sorted((Path(__file__).parents[1] / "scripts").glob("*.py")):
        print(f"{statistics.median(cpu_s(script) for _ in range(RUNS)):.2f}  {script.name}")
