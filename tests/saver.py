"""A driver for tests/test_faults.py, run through the fork server: one save of a tiny run, or one start on its folder.

Rule: `start` does with the folder what a start of scripts/train.py does, and prints what it found as one line of JSON.
"""

import argparse
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from codex_accel import checkpoint, files, optim, run_folder
from codex_accel import model as models
from codex_accel import run as training_run
from codex_accel import tokenizer as tokenizers
from codex_accel.events import LineLog
from codex_accel.train_schema import Checkpoint, Data, Model, TrainConfig, Training

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8}
# What a file-changing call goes through in pure Python, for `--kill-at` without a compiler.
PORTABLE = (
    (os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "symlink"), (os, "unlink"), (os, "rmdir"),
    (shutil, "copyfile"), (shutil, "rmtree"), (Path, "write_bytes"), (Path, "write_text"), (torch, "save"),
)  # fmt: skip


class Run:
    """A prepared model and its optimizer, as scripts/train.py has them; other weights for each seed."""

    def __init__(self, tokenizer: Path, seed: int):
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.tokenizer, self.seed = tokenizer, seed
        self.config = TrainConfig(
            output_dir="run",
            seed=seed,
            model=Model(config=GPT2),
            data=Data(dataset="d", block_size=8),
            training=Training(max_steps=1),
        )
        model = models.build(self.config, tokenizers.load(tokenizer), start=None)
        self.model, self.optimizer = self.accelerator.prepare(model, optim.build(self.config, model))
        checkpoint.register_hooks(self.accelerator)

    def step(self) -> None:
        """Take a step along gradients drawn from the seed, so that there are moments to save."""
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def save(self, run_dir: Path, *, keep_last: int) -> None:
        """As scripts/train.py does after a step: a line of metrics, the checkpoint, the deletion of older ones."""
        (run_dir / run_folder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        config = self.config.model_copy(update={"checkpoint": Checkpoint(keep_last=keep_last)})
        metrics, events = LineLog(run_dir / run_folder.METRICS), LineLog(run_dir / run_folder.EVENTS)
        metrics.write({"step": self.seed, "split": "train", "loss": 1.0})
        checkpoint.save(
            self.accelerator,
            run_dir,
            checkpoint.TrainerState(step=self.seed),
            model=self.accelerator.unwrap_model(self.model),
            config=config,
            log=metrics,
            tokenizer_folder=self.tokenizer,
            parents=[],
            identity={"seed": 0},
        )
        training_run.prune(config, run_dir, events)

    def start(self, run_dir: Path) -> dict[str, object]:
        """Sweep, choose the newest whole checkpoint, load it; `digest` is of all weights and moments after that."""
        damaged: list[str] = []
        for folder in (run_dir / run_folder.CHECKPOINTS, run_dir):
            files.sweep(folder)
        chosen = run_folder.newest_whole(run_dir, lambda path, problems: damaged.extend(problems))
        if chosen is None:
            return {"step": None, "damaged": damaged}
        state, _ = checkpoint.stored_state(chosen)
        checkpoint.load(self.accelerator, chosen)
        whole_log = LineLog(run_dir / run_folder.METRICS).cut_back(state.metrics_bytes)
        return {"step": state.step, "digest": self.digest(), "damaged": damaged, "metrics": whole_log}

    def digest(self) -> str:
        """SHA-256 over weights and optimizer state, bit for bit."""
        tensors = list(self.model.state_dict().values())
        for value in self.optimizer.state_dict()["state"].values():
            tensors += [torch.as_tensor(value[name]) for name in sorted(value)]
        return files.sha256_bytes(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors))


def without_fsync() -> None:
    """A saver that trusts the cache."""
    os.fsync = lambda _: None


def without_folder_fsync() -> None:
    """A saver that flushes its files and forgets that their names lie in folders."""
    fsync = os.fsync
    os.fsync = lambda descriptor: None if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)


def without_rename() -> None:
    """A saver that fills the folder under its final name."""

    def copy(source: Path, target: Path) -> None:
        shutil.copytree(source, target) if Path(source).is_dir() else shutil.copyfile(source, target)
        for path in sorted(Path(target).rglob("*")):
            files.fsync_path(path)
        files.fsync_path(target)

    rename = os.rename
    os.rename = lambda old, new: rename(old, new) if files.TRASH_PREFIX in str(new) else copy(old, new)


def without_look() -> None:
    """A disk that fills up between the look at its free space and the save."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)


WITHOUT = {
    "fsync": without_fsync,
    "folder_fsync": without_folder_fsync,
    "rename": without_rename,
    "look": without_look,
}


def kill_at(number: int) -> None:
    """SIGKILL to this process just before the `number`th call of what `PORTABLE` names; no compiler is needed."""
    count = 0

    def counted(function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for owner, name in PORTABLE:
        setattr(owner, name, counted(getattr(owner, name)))


def main(argv: Sequence[str]) -> int:
    """`save TOKENIZER RUN_DIR STEP` or `start TOKENIZER RUN_DIR`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("save", "start"))
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("step", type=int, nargs="?", default=0, help="also the seed of weights and data")
    parser.add_argument("--keep-last", type=int, default=2)
    parser.add_argument("--without", choices=tuple(WITHOUT))
    parser.add_argument("--kill-at", type=int)
    options = parser.parse_args(argv)
    run = Run(options.tokenizer, options.step)
    if options.without:
        WITHOUT[options.without]()
    if options.kill_at:
        kill_at(options.kill_at)
    if options.job == "save":
        run.step()
        run.save(options.run_dir, keep_last=options.keep_last)
    else:
        print(json.dumps(run.start(options.run_dir)))
    return 0
