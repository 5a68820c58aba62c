"""What every peer needs: its arguments, the documents, batches of them, a clock and the line that it ends with.

A peer is a script of its own that runs in an environment of its own, so nothing of codex_accel is imported here. The
documents are an .npz file: `ids` of all in a row, `lengths`, and `num_prompt`, the tokens of each that are no target.
"""

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -100
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 0.1, 1.0


def parse(doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments that all peers share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="JSON: keys of a transformers LlamaConfig")
    parser.add_argument("--documents", type=Path, required=True, help=".npz: ids, lengths, num_prompt")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--variant", default="", help="which of the ways of this peer")
    options = parser.parse_args(argv)
    options.model = json.loads(options.model.read_text())
    return options


class Documents:
    """The documents of an .npz file."""

    def __init__(self, path: Path):
        with np.load(path) as stored:
            self.ids, self.lengths, self.num_prompt = stored["ids"], stored["lengths"], stored["num_prompt"]
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels` of a document, not shifted, as transformers takes them."""
        ids = self.ids[self.starts[index] : self.starts[index + 1]].tolist()
        num_prompt = int(self.num_prompt[index])
        return {"input_ids": ids, "labels": [IGNORE] * num_prompt + ids[num_prompt:]}


def indices(documents: Documents, *, batch_size: int, grouped: bool) -> Iterator[np.ndarray]:
    """Batches of documents without an end, in random order; `grouped`: each of documents of about one length."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(documents))
        if grouped:
            order = order[np.argsort(documents.lengths[order], kind="stable")]
        batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        yield from generator.permutation(batches) if grouped else batches


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """`input_ids` and `labels` (B, T) int64 tensors, padded on the right to the longest of the rows."""
    import torch

    size = max(len(row["input_ids"]) for row in rows)
    made = {}
    for name, filler in (("input_ids", 0), ("labels", IGNORE)):
        made[name] = torch.tensor([row[name] + [filler] * (size - len(row[name])) for row in rows])
    return made


class Clock:
    """Ends of steps, and the places and tokens of documents that each fed."""

    def __init__(self) -> None:
        self.ends: list[float] = []  # time.monotonic(), which is one for all processes of a machine
        self.fed: list[tuple[int, int]] = []  # places, tokens that are not padding

    def feed(self, num_places: int, num_tokens: int) -> None:
        """Note what the next step feeds; a loader may be some batches ahead."""
        self.fed.append((num_places, num_tokens))

    def tick(self) -> None:
        """Note that a step has ended."""
        self.ends.append(time.monotonic())

    def report(self, model: Any, *, packages: Sequence[str], loss: float | None = None) -> None:
        """Print the result as a line of JSON, and end the process without what comes after training."""
        import torch

        fed = self.fed[: len(self.ends)]
        result = {
            "ends": self.ends,
            "places": [places for places, _ in fed],
            "tokens": [tokens for _, tokens in fed],
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "threads": torch.get_num_threads(),
            "loss": loss,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
        }
        print(json.dumps(result), flush=True)
        os._exit(0)
