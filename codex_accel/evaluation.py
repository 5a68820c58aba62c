"""Losses of a model on documents, the same during training and in `evaluate.py`.

Rule: every target token is scored once; sums are taken over tokens, documents and processes, and divided once at the
end, so the numbers do not depend on batch size, order or the number of processes beyond rounding.

Shapes: B windows, R rows of T tokens in which they are fed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from codex_accel import loss
from codex_accel.errors import UserError
from codex_accel.packing import IGNORE
from codex_accel.tokens import Document, TokenStore
from codex_accel.train_schema import TrainConfig

Documents = Sequence[Document] | TokenStore
BATCH_TOKENS = 8192
CPU_TOKENS = 1024  # places of a pass on a CPU: 8192 leave its cache, and take 1.1 to 1.3 times as long (measured)
PACKED_TOKENS = 512  # places of a packed row, unless a window is longer; attention costs their square


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


def plan_batches(
    windows: Sequence[Window], *, batch_size: int | None = None, batch_tokens: int = BATCH_TOKENS
) -> list[list[int]]:
    """Indices into `windows` of each batch, longest windows first, those of like length together.

    A batch holds `batch_size` windows, or, where that is None, as many as `batch_tokens` places hold when all are
    padded to the longest of them; at least one. The plan is a function of windows and budget alone.

    >>> plan_batches([Window(0, 0, n, 1) for n in (1, 5, 2, 4)], batch_tokens=8)
    [[1], [3, 2], [0]]
    """
    return _longest_first([window.stop - window.start for window in windows], batch_size, batch_tokens)


def _longest_first(lengths: Sequence[int], size: int | None, tokens: int) -> list[list[int]]:
    """Indices into `lengths` in groups of `size`, or of what `tokens` places hold; equal lengths keep their order."""
    ordered = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups, start = [], 0
    while start < len(ordered):
        stop = start + (size or max(1, tokens // lengths[ordered[start]]))
        groups.append(ordered[start:stop])
        start = stop
    return groups


@dataclass(frozen=True)
class WindowScores:
    """Sums per window."""

    nll: np.ndarray  # (B,) float64, nats
    num_targets: np.ndarray  # (B,) int64
    num_correct: np.ndarray  # (B,) int64


def score_windows(
    model: torch.nn.Module,
    documents: Documents,
    windows: Sequence[Window],
    *,
    device: torch.device,
    packed: bool = False,
) -> WindowScores:
    """Scores of one batch of windows, in their order; leaves the model in evaluation mode.

    No attention mask is given: each window has a row of its own, padded on the right, where a causal model cannot look,
    nor a recurrent one. `packed`: rows of 512 places and more hold several windows, whose positions restart. A GPU
    takes the batch at once, a CPU some rows at a time. Logits are made for targets alone, a part at a time, unless the
    model does more to them after its head.

    Raises: UserError if windows are to be packed and this architecture cannot keep them apart.
    """
    model.eval()
    if packed:
        _require_isolation(model, device)
    passes = []
    for part in _apart(model, windows, range(len(windows))):
        rows = _rows(windows, part, packed=packed)
        if device.type == "cpu":
            lengths = [sum(windows[index].stop - windows[index].start for index in row) for row in rows]
            passes += [[rows[number] for number in group] for group in _longest_first(lengths, None, CPU_TOKENS)]
        else:
            passes.append(rows)
    parts = [_forward(model, documents, windows, some, device=device, packed=packed) for some in passes]
    columns = ("nll", "num_targets", "num_correct")
    return WindowScores(*(np.sum([getattr(part, name) for part in parts], axis=0) for name in columns))


@torch.no_grad()
def _forward(
    model: torch.nn.Module,
    documents: Documents,
    windows: Sequence[Window],
    rows: list[list[int]],
    *,
    device: torch.device,
    packed: bool,
) -> WindowScores:
    """Scores of the windows that lie in `rows`, zero for the others, by one forward pass."""
    scores_of = loss.scores_in_head if _ends_in_head(model, device) else loss.scores_from_logits
    arrays = _arrays(documents, windows, rows)
    inputs = {"input_ids": arrays.input_ids} | ({"position_ids": arrays.position_ids} if packed else {})
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    labels = torch.from_numpy(arrays.labels).to(device)
    nll, correct = (scores.cpu().numpy() for scores in scores_of(model, labels=labels, use_cache=False, **tensors))
    is_target = arrays.labels != IGNORE
    owners, size = arrays.owners[is_target], len(windows)
    return WindowScores(
        np.bincount(owners, weights=nll[is_target], minlength=size),  # in float64
        np.bincount(owners, minlength=size),
        np.bincount(owners, weights=correct[is_target], minlength=size).astype(np.int64),
    )


_TRIED: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()  # by head: whether its model ends in it


def _ends_in_head(model: torch.nn.Module, device: torch.device) -> bool:
    """`loss.ends_in_head`, tried once for each head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return False
    if head not in _TRIED:
        _TRIED[head] = loss.ends_in_head(model, device)
    return _TRIED[head]


_MOVED: WeakKeyDictionary[torch.nn.Module, float] = WeakKeyDictionary()  # by model: by how much windows see each other


@torch.no_grad()
def _require_isolation(model: torch.nn.Module, device: torch.device) -> None:
    """Raise UserError if what is in a packed row moves what comes after it, tried once for each model."""
    if model not in _MOVED:
        config: Any = model.config
        before = torch.arange(16, device=device).remainder(config.vocab_size)[None]  # two windows of 8
        after = before.clone()
        after[:, :8] = (after[:, :8] + 1) % config.vocab_size  # all of it: a convolution sees only the last
        positions = torch.arange(8, device=device).repeat(2)[None]
        try:
            first, second = (
                model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:].float()
                for ids in (before, after)
            )
            _MOVED[model] = float((first - second).abs().max() / first.abs().max())
        except TypeError:  # it takes no positions
            _MOVED[model] = math.inf
    if not _MOVED[model] <= 1e-6:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise UserError(f"packed = true: {kind} models cannot keep the windows of a row apart. Say packed=false.")


def _apart(model: torch.nn.Module, windows: Sequence[Window], batch: Iterable[int]) -> list[list[int]]:
    """A batch in parts that one forward pass may take: LongRoPE turns all its positions by the longest row.

    Measured with transformers 5.23: a window of 12 tokens beside one of 39, over its limit, had a loss 2.4 % higher.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    by_layer = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    limits = {each["original_max_position_embeddings"] for each in by_layer if each.get("rope_type") == "longrope"}
    parts: dict[int, list[int]] = {}
    for index in batch:
        length = windows[index].stop - windows[index].start
        parts.setdefault(sum(length > limit for limit in limits), []).append(index)
    return list(parts.values())


def _rows(windows: Sequence[Window], batch: list[int], *, packed: bool) -> list[list[int]]:
    """Windows of each row: one, or by first fit, the longest first, as many as it has room for."""
    if not packed:
        return [[index] for index in batch]
    lengths = {index: windows[index].stop - windows[index].start for index in batch}
    size = max(PACKED_TOKENS, *lengths.values())
    rows: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(batch, key=lambda index: -lengths[index]):
        row = next((row for row, room in enumerate(rooms) if room >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            rooms.append(size)
        rows[row].append(index)
        rooms[row] -= lengths[index]
    return rows


@dataclass(frozen=True)
class _Arrays:
    """What a forward pass is fed, all (R, T) int64 for R rows."""

    input_ids: np.ndarray
    labels: np.ndarray  # shifted: labels[r, t] follows input_ids[r, t]
    position_ids: np.ndarray
    owners: np.ndarray  # index of the window


def _arrays(documents: Documents, windows: Sequence[Window], rows: list[list[int]]) -> _Arrays:
    """The windows in their rows, padded on the right, all of it at position 0: a model may know no more of them."""
    lengths = [window.stop - window.start for window in windows]
    shape = len(rows), max(sum(lengths[index] for index in row) for row in rows)
    input_ids, position_ids, owners = np.zeros((3, *shape), dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for number, row in enumerate(rows):
        place = 0
        for index in row:
            window, stop = windows[index], place + lengths[index]
            document = (
                documents.document(window.document) if isinstance(documents, TokenStore) else documents[window.document]
            )
            input_ids[number, place:stop] = document.input_ids[window.start : window.stop]
            position_ids[number, place:stop] = np.arange(lengths[index])
            owners[number, place:stop] = index
            targets = np.arange(window.first_target, window.stop + 1)
            targets = targets[document.is_target(window.first_target, window.stop + 1)]
            labels[number, place + targets - 1 - window.start] = document.input_ids[targets]
            place = stop
    return _Arrays(input_ids, labels, position_ids, owners)


@dataclass(frozen=True)
class Scores:
    """Sums per document."""

    nll: np.ndarray  # (num_documents,) float64, nats
    num_targets: np.ndarray  # (num_documents,) int64
    num_correct: np.ndarray  # (num_documents,) int64


def score(
    model: torch.nn.Module,
    documents: Documents,
    windows: Sequence[Window],
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    device: torch.device,
    process_index: int = 0,
    num_processes: int = 1,
    between_batches: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Scores of the windows that fall to this process; leaves the model in evaluation mode.

    Process r takes the batches r, r + P, ... of `plan_batches`. `between_batches(done, total)` is called before each,
    the same number of times on every process, so it may talk to the others; what it raises ends the evaluation.
    """
    num_documents = documents.num_documents if isinstance(documents, TokenStore) else len(documents)
    nll, counts = np.zeros(num_documents), np.zeros((2, num_documents), dtype=np.int64)
    plan = plan_batches(windows, batch_size=batch_size, batch_tokens=batch_tokens)
    batches = [part for batch in plan for part in _apart(model, windows, batch)]
    num_rounds = -(-len(batches) // num_processes)
    model.eval()
    for done in range(num_rounds):
        between_batches(done, num_rounds)
        place = done * num_processes + process_index
        batch = [windows[index] for index in batches[min(place, len(batches) - 1)]]
        # one pass on every process, since sharded weights need all of them, also where a round has too few batches
        found = _forward(model, documents, batch, [[row] for row in range(len(batch))], device=device, packed=False)
        if place >= len(batches):
            continue
        owners = np.array([window.document for window in batch])
        np.add.at(nll, owners, found.nll)
        np.add.at(counts[0], owners, found.num_targets)
        np.add.at(counts[1], owners, found.num_correct)
    return Scores(nll, counts[0], counts[1])


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
