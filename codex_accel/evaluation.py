"""Losses of a model on documents, the same during training and in `evaluate.py`.

Rule: every target token is scored once; sums are taken over tokens, documents and processes, and divided once at the
end, so the numbers do not depend on batch size, order or the number of processes beyond rounding.

Shapes: B windows, T tokens in the longest of them, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codex_accel.loss import token_scores
from codex_accel.packing import IGNORE
from codex_accel.tokens import Document, TokenStore
from codex_accel.train_schema import TrainConfig

Documents = Sequence[Document] | TokenStore


@dataclass(frozen=True)
class Window:
    """Inputs [start, stop) of a document, of which the targets from `first_target` on are scored."""

    document: int
    start: int
    stop: int
    first_target: int  # place in the document; targets are first_target ... stop


def stride_of(context_length: int, stride: int | None) -> int:
    """Targets that each window after the first scores."""
    return min(stride or context_length, context_length)


def plan_windows(lengths: Sequence[int], *, context_length: int, stride: int | None) -> list[Window]:
    """Windows that score every token but the first of each document once.

    The first window feeds up to `context_length` tokens; each later one scores `stride` new targets (default: all that
    it can) with as much context before them as fits.

    >>> plan_windows([5], context_length=3, stride=1)[1]
    Window(document=0, start=1, stop=4, first_target=4)
    """
    step = stride_of(context_length, stride)
    windows = []
    for index, length in enumerate(lengths):
        scored = 1  # targets below this place are done; place 0 has nothing before it
        while scored < length:
            stop = min(length - 1, scored - 1 + (context_length if scored == 1 else step))
            windows.append(Window(index, max(0, stop - context_length), stop, scored))
            scored = stop + 1
    return windows


def choose(windows: list[Window], max_windows: int | None) -> list[Window]:
    """All windows, or `max_windows` of them spread evenly from the first to the last."""
    if max_windows is None or max_windows >= len(windows):
        return windows
    return [windows[index] for index in np.linspace(0, len(windows) - 1, max_windows).round().astype(int)]


@dataclass(frozen=True)
class Scores:
    """Sums per document."""

    nll: np.ndarray  # (num_documents,) float64, nats
    num_targets: np.ndarray  # (num_documents,) int64
    num_correct: np.ndarray  # (num_documents,) int64


@torch.no_grad()
def score(
    model: torch.nn.Module,
    documents: Documents,
    windows: list[Window],
    *,
    batch_size: int,
    device: torch.device,
    process_index: int = 0,
    num_processes: int = 1,
    between_batches: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Scores of the windows that fall to this process; leaves the model in evaluation mode.

    Batches hold windows of like length (longest first); process r takes batches r, r + P, ... Rows are padded on the
    right, where a causal model cannot look. `between_batches(done, total)` is called before each, the same number of
    times on every process, so it may talk to the others; what it raises ends the evaluation.
    """
    num_documents = documents.num_documents if isinstance(documents, TokenStore) else len(documents)
    nll = np.zeros(num_documents)
    counts = np.zeros((2, num_documents), dtype=np.int64)
    model.eval()
    ordered = sorted(windows, key=lambda window: window.start - window.stop)
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    num_rounds = -(-len(batches) // num_processes)
    for done in range(num_rounds):
        between_batches(done, num_rounds)
        place = done * num_processes + process_index
        batch = batches[min(place, len(batches) - 1)]
        input_ids, labels = (torch.from_numpy(array).to(device) for array in _arrays(documents, batch))
        logits = model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        if place >= len(batches):
            continue  # the last round may have fewer batches than processes; sharded weights need all of them
        losses, correct = token_scores(logits, labels)
        rows = np.array([window.document for window in batch])
        np.add.at(nll, rows, losses.double().sum(1).cpu().numpy())
        np.add.at(counts[0], rows, (labels != IGNORE).sum(1).cpu().numpy())
        np.add.at(counts[1], rows, correct.sum(1).cpu().numpy())
    return Scores(nll, counts[0], counts[1])


def _arrays(documents: Documents, batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and shifted labels, both (B, T) int64."""
    longest = max(window.stop - window.start for window in batch)
    input_ids = np.zeros((len(batch), longest), dtype=np.int64)
    labels = np.full((len(batch), longest), IGNORE, dtype=np.int64)
    for row, window in enumerate(batch):
        document = (
            documents.document(window.document) if isinstance(documents, TokenStore) else documents[window.document]
        )
        size = window.stop - window.start
        input_ids[row, :size] = document.input_ids[window.start : window.stop]
        targets = np.arange(window.first_target, window.stop + 1)
        targets = targets[document.is_target(window.first_target, window.stop + 1)]
        labels[row, targets - 1 - window.start] = document.input_ids[targets]
    return input_ids, labels


def summarize(scores: Scores, *, num_bytes: int | None) -> dict[str, Any]:
    """Metrics from sums over all processes.

    `loss` is the token-weighted mean negative log-likelihood in nats; `perplexity` its exponential; `bits_per_byte` the
    summed loss in bits over the UTF-8 bytes of the targets' text, or None where `num_bytes` is (a part was scored);
    `token_accuracy` the share of targets that are the arg-max.
    """
    num_targets = int(scores.num_targets.sum())
    total = math.fsum(scores.nll)
    loss = total / num_targets if num_targets else math.nan
    return {
        "loss": loss,
        "perplexity": math.inf if loss >= 700 else math.exp(loss),
        "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else None,
        "token_accuracy": float(scores.num_correct.sum() / num_targets) if num_targets else math.nan,
        "num_target_tokens": num_targets,
        "num_bytes": num_bytes,
    }


@dataclass(frozen=True)
class ValidationSet:
    """A split that is scored during training."""

    split: str
    store: TokenStore
    windows: list[Window]
    num_bytes: int | None  # of all targets' text; None if only a part of the windows is scored


def validation_sets(config: TrainConfig) -> list[ValidationSet]:
    """The splits of `data.validation_split`, which decides which checkpoint is best, and `evaluation.more_splits`."""
    found = []
    for split in (config.data.validation_split, *config.evaluation.more_splits):
        if split is not None:
            store = TokenStore(Path(config.data.dataset), split)
            whole = plan_windows(store.lengths.tolist(), context_length=config.data.block_size, stride=None)
            windows = choose(whole, config.evaluation.max_windows)
            num_bytes = total_bytes(store) if len(windows) == len(whole) else None
            found.append(ValidationSet(split, store, windows, num_bytes))
    return found


def total_bytes(documents: Documents) -> int:
    """UTF-8 bytes of all targets' text."""
    return sum(document.num_bytes for document in documents)
