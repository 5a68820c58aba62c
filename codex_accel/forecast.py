"""What a run will take: memory, time and disk, measured by a few steps of it.

Rule: a figure is counted or measured on this machine with these settings, and says which; where the processes differ,
the largest is shown. Nothing is written.
"""

import math
import os
import resource
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from codex_accel import adapters, compiler, evaluation, manifest, run, tokenizer
from codex_accel.callbacks import Callbacks, Moment
from codex_accel.tokens import TokenStore
from codex_accel.train_schema import TrainConfig

PROBE_STEPS = 3
NAME = "dry_run"
LEFT_FREE = 0.1  # of the memory; what a run takes grows a little while it is cut into pieces
# of a checkpoint of AdamW (measured with torch 2.13 and safetensors 0.8), besides the numbers themselves
BYTES_A_TENSOR = {"weights": 110, "optimizer": 280}
BYTES_OF_PAPERS = 16_000  # manifest, configurations, state of the loop


@dataclass
class Figures:
    """What one process has measured; bytes and seconds."""

    step_s: list[float] = field(default_factory=list)  # without compiling
    compile_s: list[float] = field(default_factory=list)  # of each step
    program_bytes: int = 0  # of the process before the first step, without the weights
    weights_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    step_peak_bytes: int = 0  # of the process, in a step that is not the first, if there is another
    evaluation_peak_bytes: int = 0
    evaluation_s: float = 0.0  # of all splits, once
    free_bytes: int = 0  # of the device, while the process holds `held_bytes`
    held_bytes: int = 0
    saved_bytes: int = 0  # of a checkpoint
    final_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the micro-batch."""
        return self.program_bytes + self.weights_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """Of the process, while it trains or evaluates."""
        return max(self.step_peak_bytes, self.evaluation_peak_bytes)


class Probe:
    """Measures each step of a dry run, as a callback, and ends it after `PROBE_STEPS`."""

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Any, *, compiled: bool):
        self.accelerator, self.model, self.optimizer, self.compiled = accelerator, model, optimizer, compiled
        self.figures = Figures()
        self.figures.weights_bytes = storage_bytes([*model.parameters(), *model.buffers()])
        self.figures.gradient_bytes = storage_bytes(p for p in model.parameters() if p.requires_grad)
        self.figures.program_bytes = held_bytes(accelerator.device) - self.figures.weights_bytes
        self.compiled_s = compiler.seconds_spent() if compiled else 0.0
        reset_peak(accelerator.device)
        self.since_s = time.monotonic()

    def __call__(self, moment: Moment) -> str | None:
        """Note time and memory of the step that has ended."""
        figures, now_s, device = self.figures, time.monotonic(), self.accelerator.device
        compiled_s = compiler.seconds_spent() if self.compiled else 0.0
        figures.compile_s.append(compiled_s - self.compiled_s)
        figures.step_s.append(now_s - self.since_s - figures.compile_s[-1])
        if moment.state.step <= 2:  # the first step makes the state of the optimizer, and what is loaded when needed
            figures.step_peak_bytes = 0
        figures.step_peak_bytes = max(figures.step_peak_bytes, peak_bytes(device))
        if moment.state.step == 1:
            reset_peak(device)
        self.compiled_s, self.since_s = compiled_s, time.monotonic()
        return "the dry run is over" if moment.state.step >= PROBE_STEPS else None


def watch(config: TrainConfig, accelerator: Accelerator, model: Any, optimizer: Any) -> Callbacks:
    """Callbacks that measure the steps of a dry run and end it after `PROBE_STEPS`; `model` is the bare one."""
    return {NAME: {"on_step": Probe(accelerator, model, optimizer, compiled=config.training.compile)}}


def show(config: TrainConfig, facts: dict[str, Any], called: Callbacks, accelerator: Accelerator) -> None:
    """Print the figures of the steps that `called` has watched; every process must call this."""
    probe = called[NAME]["on_step"]
    assert isinstance(probe, Probe)
    _finish(config, facts, probe)
    everyones = gather_object([probe.figures])
    if accelerator.is_main_process:
        print("\n".join(lines(config, facts, largest(everyones, engine=facts["engine"]))), flush=True)


def _finish(config: TrainConfig, facts: dict[str, Any], probe: Probe) -> None:
    """What is measured and counted once, after the steps."""
    figures, model, device = probe.figures, probe.model, probe.accelerator.device
    moments = [value for state in probe.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    figures.optimizer_bytes = storage_bytes(moments)
    figures.held_bytes, figures.free_bytes = held_bytes(device), free_bytes(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = trained if adapters.is_adapted(model) else [*model.parameters(), *model.buffers()]
    papers = BYTES_OF_PAPERS + _tokenizer_bytes(config)
    figures.final_bytes = storage_bytes(kept) + BYTES_A_TENSOR["weights"] * len(kept) + papers
    moments_bytes = storage_bytes(moments) + BYTES_A_TENSOR["optimizer"] * len(moments)
    figures.saved_bytes = figures.final_bytes + moments_bytes
    reset_peak(device)
    figures.evaluation_s = _seconds_of_evaluation(config, probe, num_processes=facts["num_processes"])
    figures.evaluation_peak_bytes = peak_bytes(device) if figures.evaluation_s else 0


def _tokenizer_bytes(config: TrainConfig) -> int:
    dataset = Path(config.data.dataset)
    folder = run.tokenizer_folder(dataset, manifest.read(dataset), verify=False)
    return sum((folder / name).stat().st_size for name in tokenizer.FILES if (folder / name).is_file())


def _seconds_of_evaluation(config: TrainConfig, probe: Probe, *, num_processes: int) -> float:
    """Time of one evaluation of all splits, from two of its batches; zero if there is none."""
    size, num_tokens, seconds = config.evaluation.batch_size, 0, 0.0
    for split in (config.data.validation_split, *config.evaluation.more_splits):
        if split is None:
            continue
        store = TokenStore(Path(config.data.dataset), split)
        windows = evaluation.plan_windows(store.lengths.tolist(), context_length=config.data.block_size, stride=None)
        windows = evaluation.choose(windows, config.evaluation.max_windows)
        num_tokens += sum(window.stop - window.start for window in windows)
        if seconds or not windows:
            continue
        windows = sorted(windows, key=lambda window: window.start - window.stop)[: 2 * size]
        begun: list[float] = []
        evaluation.score(
            probe.model,
            store,
            windows,
            batch_size=size,
            device=probe.accelerator.device,
            between_batches=lambda *_, begun=begun: begun.append(time.monotonic()),
        )
        last = windows[(len(begun) - 1) * size :]  # of two the second, which finds all warm
        seconds = (time.monotonic() - begun[-1]) / sum(window.stop - window.start for window in last)
    return seconds * num_tokens / num_processes


def largest(everyones: list[Figures], *, engine: str) -> Figures:
    """The figures of the process with the highest peak, with the times of the slowest, and what all save together."""
    shown = max(everyones, key=lambda figures: figures.peak_bytes)
    shown.step_s = [max(times) for times in zip(*(figures.step_s for figures in everyones), strict=True)]
    shown.compile_s = [max(times) for times in zip(*(figures.compile_s for figures in everyones), strict=True)]
    shown.evaluation_s = max(figures.evaluation_s for figures in everyones)
    shown.free_bytes = min(figures.free_bytes for figures in everyones)
    if engine in ("FSDP", "DEEPSPEED"):  # each process has its part
        shown.saved_bytes = sum(figures.saved_bytes for figures in everyones)
        shown.final_bytes = sum(figures.final_bytes for figures in everyones)
    return shown


# --- memory ---------------------------------------------------------------------------------------------------------


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors take in this process, shared storage counted once."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


def held_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that tensors of this process hold, or memory of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The most that `held_bytes` has been since `reset_peak`; since the process began where there is no /proc."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (place := Path("/proc/self/clear_refs")).exists():
        place.write_text("5")  # proc_pid_clear_refs(5): the high water mark becomes what is held now


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of its CUDA device, or its share of the machine's or container's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int((group / "memory.current").read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def largest_micro_batch(config: TrainConfig, figures: Figures, *, num_processes: int) -> int | None:
    """The largest micro-batch that shares a step's batch evenly and fits into memory; None if not even one does."""
    room = (1 - LEFT_FREE) * (figures.held_bytes + figures.free_bytes) - figures.fixed_bytes
    one = max(1, figures.step_peak_bytes - figures.fixed_bytes) / config.training.micro_batch_size
    whole = config.training.global_batch_size // num_processes
    return max((size for size in range(1, whole + 1) if whole % size == 0 and size * one <= room), default=None)


# --- time and disk --------------------------------------------------------------------------------------------------


def num_due(every_steps: int | None, *, max_steps: int) -> int:
    """How often something happens that is due every so many steps, and at the end."""
    return math.ceil(max_steps / every_steps) if every_steps else 1


def expected_s(config: TrainConfig, figures: Figures, *, max_steps: int) -> float:
    """Time of the loop: the first step, compiling, steps like those that were seen, evaluations; no saves."""
    steady = figures.step_s[1:] or figures.step_s
    num_evaluations = num_due(config.evaluation.every_steps, max_steps=max_steps)
    loop = figures.step_s[0] + sum(figures.compile_s) + (max_steps - 1) * sum(steady) / len(steady)
    return loop + num_evaluations * figures.evaluation_s


def disk_bytes(config: TrainConfig, figures: Figures, *, max_steps: int) -> tuple[int, int]:
    """(checkpoints that stand at once, bytes of these and of `final`); a new one is whole before an old one goes."""
    settings = config.checkpoint
    made = num_due(settings.every_steps, max_steps=max_steps)
    num = min(made, settings.keep_last + settings.keep_best + 1)
    return num, num * figures.saved_bytes + figures.final_bytes


# --- words ----------------------------------------------------------------------------------------------------------


def lines(config: TrainConfig, facts: dict[str, Any], figures: Figures) -> list[str]:
    """The figures for people, at most 80 columns wide."""
    training, steps, num_processes = config.training, facts["max_steps"], facts["num_processes"]
    evaluated = f", {_mb(figures.evaluation_peak_bytes)} in an evaluation" if figures.evaluation_s else ""
    parts = {
        "program and data": figures.program_bytes,
        "weights": figures.weights_bytes,
        "gradients": figures.gradient_bytes,
        "optimizer state": figures.optimizer_bytes,
        "activations and the rest": figures.step_peak_bytes - figures.fixed_bytes,
    }
    accumulated = f"{facts['accumulation_steps']} x {training.micro_batch_size} sequences"
    on_each = f", on each of {num_processes} processes" if num_processes > 1 else ""
    return [
        f"\ndry run     {_count(len(figures.step_s), 'step')}; nothing was written",
        f"parameters  {facts['num_parameters']:,}, of which {facts['num_trainable_parameters']:,} train",
        f"step        {_fed(config)}: {accumulated}{on_each}",
        f"length      {_count(steps, 'step')}, {facts['steps_per_epoch']:,.2f} an epoch",
        f"memory      {_mb(figures.step_peak_bytes)} at the peak of a step{evaluated}",
        *(["            of the process that takes the most"] if num_processes > 1 else []),
        *(f"{_mb(size):>21}  {name}" for name, size in parts.items()),
        f"            {_mb(figures.free_bytes)} free on {facts['device']} besides",
        _largest_line(config, figures, num_processes=num_processes),
        *_time_lines(config, steps, figures),
        *_disk_lines(config, steps, figures),
    ]


def _fed(config: TrainConfig) -> str:
    sequences, size = config.training.global_batch_size, config.data.block_size
    if config.data.packing == "group_by_length":  # the steps to come may have longer ones than those that were seen
        return f"{sequences:,} rows of at most {size:,} tokens"
    return f"{sequences * size:,} tokens"


def _largest_line(config: TrainConfig, figures: Figures, *, num_processes: int) -> str:
    found = largest_micro_batch(config, figures, num_processes=num_processes)
    if found is None:
        return "            not even one sequence leaves a tenth of the memory free"
    return f"            micro-batches of up to {_count(found, 'sequence')} fit, with a tenth left free"


def _time_lines(config: TrainConfig, max_steps: int, figures: Figures) -> list[str]:
    steady, compiling = figures.step_s[1:] or figures.step_s, sum(figures.compile_s)
    expected, limit = expected_s(config, figures, max_steps=max_steps), config.training.max_time_s
    apart = f", compiling {_time(compiling)}" if compiling else ""
    num = num_due(config.evaluation.every_steps, max_steps=max_steps)
    evaluated = (
        f"{_count(num, 'evaluation')} of {_time(figures.evaluation_s)}" if figures.evaluation_s else "no evaluation"
    )
    each, first = _time(sum(steady) / len(steady)), _time(figures.step_s[0])
    return [
        f"time        {_time(expected)}: {each} a step, first {first}{apart}",
        f"            with {evaluated}; without start-up and saves",
        *([f"            training.max_time_s ends it after {_time(limit)}"] if limit and limit < expected else []),
    ]  # fmt: skip


def _disk_lines(config: TrainConfig, max_steps: int, figures: Figures) -> list[str]:
    num, total = disk_bytes(config, figures, max_steps=max_steps)
    place = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
    checkpoints = f"{_count(num, 'checkpoint')} of {_mb(figures.saved_bytes)}"
    return [
        f"disk        {_mb(total)}: {checkpoints}, final {_mb(figures.final_bytes)}",
        f"            {_mb(free)} free{'' if total <= free else ': NOT ENOUGH'}",
    ]


def _count(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _mb(size: int) -> str:
    """Megabytes (1e6), three digits at least: 0.044 MB, 4.37 MB, 437 MB."""
    digits = max(0, 2 - math.floor(math.log10(max(1, abs(size)) / 1e6)))
    return f"{size / 1e6:,.{min(digits, 3)}f} MB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"
