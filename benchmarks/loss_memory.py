"""Added memory and time of a language-model head and its loss, forward and backward, every contender in one run.

    python benchmarks/loss_memory.py [--repeats 5]

2048 tokens, hidden size 256, a quarter of the labels ignored, gradients for hidden states and weight, vocabulary 50,257
and 128,000, float32 and bfloat16 autocast. Contenders:
- full: `F.linear`, then `F.cross_entropy` of the logits in float32
- ours: `loss.sum_by_chunks`, 512 rows
- torch: `F.linear_cross_entropy`, 512 rows, in the dtype that autocast would give it

Memory: the highest resident set (VmHWM, set back just before) less the resident set before, of a child process that
does it once after a small warm-up; gradients are part of it. Time: medians in one process, contenders in turns.

Needs two quiet cores and 8 GB of memory.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from codex_accel import loss  # noqa: E402
from codex_accel.packing import IGNORE  # noqa: E402

NUM_TOKENS, HIDDEN_SIZE, CHUNK_ROWS = 2048, 256, 512
VOCAB_SIZES, PRECISIONS = (50_257, 128_000), ("float32", "bfloat16")
MEMORY_BAR, TIME_BAR = 0.3, 1.0


def full(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss.sum_by_chunks(hidden, weight, labels, chunk_rows=CHUNK_ROWS)


def torchs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS, chunking_method=None)
    rows = hidden.flatten(0, 1).to(dtype)
    return F.linear_cross_entropy(
        rows, weight.to(dtype), labels.flatten(), reduction="sum", ignore_index=IGNORE, options=options
    )


CONTENDERS = {"full": full, "ours": ours, "torch": torchs}


def task(name: str, precision: str, vocab_size: int, num_tokens: int = NUM_TOKENS) -> Callable[[], float]:
    """A function that makes loss and gradients once and returns the mean loss; same inputs for all contenders."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, num_tokens // 8, HIDDEN_SIZE, generator=generator).requires_grad_()
    weight = (torch.randn(vocab_size, HIDDEN_SIZE, generator=generator) / 50).requires_grad_()
    labels = torch.randint(0, vocab_size, (8, num_tokens // 8), generator=generator)
    labels.view(-1)[torch.randperm(num_tokens, generator=generator)[: num_tokens // 4]] = IGNORE
    num_targets = int((labels != IGNORE).sum())

    def run() -> float:
        hidden.grad = weight.grad = None
        half = precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            total = CONTENDERS[name](hidden, weight, labels)
        (total / num_targets).backward()
        return float(total.detach()) / num_targets

    return run


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def added_bytes(name: str, precision: str, vocab_size: int) -> int:
    """What this process needs at most beside its inputs."""
    task(name, precision, 1000, num_tokens=64)()
    run = task(name, precision, vocab_size)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def in_a_child(name: str, precision: str, vocab_size: int) -> int:
    command = [sys.executable, __file__, "--child", name, precision, str(vocab_size)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(precision: str, vocab_size: int, repeats: int) -> None:
    """Print a row for each contender."""
    memory = {name: in_a_child(name, precision, vocab_size) for name in CONTENDERS}
    tasks = {name: task(name, precision, vocab_size) for name in CONTENDERS}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    values = {}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, run in tasks.items():
            started = time.perf_counter()
            values[name] = run()
            if repeat:
                times[name].append(time.perf_counter() - started)
    for name in tasks:
        spent, shares = statistics.median(times[name]), [a / b for a, b in zip(times[name], times["full"], strict=True)]
        print(
            f"{vocab_size:>7,}  {precision:<8}  {name:<5}  {memory[name] / 1e6:7.0f} MB  "
            f"{memory[name] / memory['full']:5.2f}  {spent:6.2f} s  {statistics.median(shares):5.2f}  "
            f"{min(times[name]):5.2f} to {max(times[name]):5.2f} s  {values[name]:.7f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "PRECISION", "VOCAB_SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    if arguments.child:
        name, precision, vocab_size = arguments.child
        print(added_bytes(name, precision, int(vocab_size)))
        return
    print(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}; {NUM_TOKENS} tokens, a quarter ignored, hidden size {HIDDEN_SIZE}\n"
        f"bars: added memory at most {MEMORY_BAR} of full logits, time at most {TIME_BAR}; shares of time are medians "
        "over the turns\n"
        f"{'vocab':>7}  {'dtype':<8}  {'':<5}  {'memory':>10}  share  {'time':>8}  share  {'spread':>15}  mean loss"
    )
    for vocab_size in VOCAB_SIZES:
        for precision in PRECISIONS:
            compare(precision, vocab_size, arguments.repeats)


if __name__ == "__main__":
    main()
