"""A driver for tests/test_engines.py: one process of a tiny GPT-2 under FSDP2, saved and loaded through our envelope.

Rule: what it says of itself (processes, backend, how its parameters lie) is read from torch, and printed as one line of
JSON by process 0 alone, with every number taken over all processes.
"""

import argparse
import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate import Accelerator
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from codex_accel import checkpoint, files, optim, processes, run_folder, seeds
from codex_accel import model as models
from codex_accel import tokenizer as tokenizers
from codex_accel.events import LineLog
from codex_accel.train_schema import Data, Model, TrainConfig, Training

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}


class Run:
    """A sharded model with its optimizer; `seed` decides the weights that it starts from."""

    def __init__(self, tokenizer: Path, seed: int):
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.config = TrainConfig(
            output_dir="run",
            seed=seed,
            model=Model(config=GPT2),
            data=Data(dataset="d", block_size=16),
            training=Training(max_steps=1),
        )
        self.tokenizer = tokenizer
        self.model = models.build(self.config, tokenizers.load(tokenizer), start=None)
        for layer in self.model.transformer.h:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = optim.build(self.config, self.model)

    def train(self, step: int) -> float:
        """One step on a batch of this process's own; the loss is the mean over processes."""
        index = self.accelerator.process_index
        generator = torch.Generator().manual_seed(seeds.derive(0, "batch", step, index))
        torch.manual_seed(seeds.derive(0, "dropout", step, index))
        input_ids = torch.randint(512, (2, 16), generator=generator)
        loss = self.model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return processes.sum_float(self.accelerator, loss.detach()) / self.accelerator.num_processes

    def state(self, *, full: bool) -> dict[str, Any]:
        """Weights and moments by parameter name: this process's shards, or all of it."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=full))
        return {"model": model, "optimizer": optimizer}

    def write(self, folder: str) -> None:
        distributed_checkpoint.save(self.state(full=False), checkpoint_id=folder)

    def write_on_a_full_disk(self, folder: str) -> None:
        self.write(folder)
        if not self.accelerator.is_main_process:
            raise OSError(errno.ENOSPC, "No space left on device")

    def read(self, folder: str) -> None:
        state = self.state(full=False)
        distributed_checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def digest(self) -> str:
        """SHA-256 over all weights and moments, bit for bit, in the order of their names."""
        state = self.state(full=True)
        found = dict(state["model"])
        for name, moments in state["optimizer"]["state"].items():
            found |= {f"{name}/{kind}": value for kind, value in moments.items()}
        texts = [name.encode() + found[name].contiguous().numpy().tobytes() for name in sorted(found)]
        assert len(texts) >= 3 * len(list(self.model.parameters()))  # weights and two moments at least
        return files.sha256_bytes(b"".join(texts))

    def facts(self) -> dict[str, Any]:
        """How this process is joined to the other, and how its parameters lie."""
        parameters = list(self.model.parameters())
        local = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        return {
            "num_processes": distributed.get_world_size(),
            "backend": distributed.get_backend(),
            "engine": self.accelerator.distributed_type.value,
            "wrapped": type(self.model).__mro__[1].__name__,
            "all_sharded": all(isinstance(p, DTensor) and p.placements[0].is_shard() for p in parameters),
            "local_share": local / sum(p.numel() for p in parameters),
        }


def main(argv: Sequence[str]) -> int:
    """`save TOKENIZER RUN_DIR`: a step, a checkpoint, a step more. `load TOKENIZER RUN_DIR`: that step again.

    `refuse TOKENIZER RUN_DIR`: as `save`, but the disk of process 1 is full.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("save", "load", "refuse"))
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("run_dir", type=Path)
    options = parser.parse_args(argv)
    run = Run(options.tokenizer, seed=1 if options.job == "load" else 0)
    losses = []
    if options.job != "load":
        losses.append(run.train(0))
        if run.accelerator.is_main_process:
            run_folder.make(options.run_dir)
        run.accelerator.wait_for_everyone()
        checkpoint.save(
            run.accelerator,
            options.run_dir,
            checkpoint.TrainerState(step=1),
            model=run.model,
            config=run.config,
            log=LineLog(options.run_dir / run_folder.METRICS, enabled=run.accelerator.is_main_process),
            tokenizer_folder=options.tokenizer,
            parents=[],
            identity={"seed": 0},
            write_state=run.write if options.job == "save" else run.write_on_a_full_disk,
        )
    else:
        run.train(7)  # so that weights, moments and counts are others before the load
        before = run.digest()
        folder = run_folder.checkpoint_path(options.run_dir, 1)
        state, _ = checkpoint.stored_state(folder)
        checkpoint.load(run.accelerator, folder, read_state=run.read)
        assert state.step == 1
        assert run.digest() != before
    digest = run.digest()
    losses.append(run.train(1))
    document = {"digest": digest, "next_loss": losses[-1], "next_digest": run.digest(), "processes": [None, None]}
    distributed.all_gather_object(document["processes"], run.facts())
    if run.accelerator.is_main_process:
        print(json.dumps(document), flush=True)
    processes.end(run.accelerator)
    return 0
