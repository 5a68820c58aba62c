"""What an evaluation does batch by batch, and how the results become a part of its report: here, losses.

Rule: a batch is a function of samples and budget alone, and its results are JSON: which process makes them, and in
which session, does not show in the report.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codex_accel import evaluation, journal, metrics, tasks
from codex_accel.evaluate_schema import EvaluateConfig
from codex_accel.evaluation import Documents, Window
from codex_accel.tokens import TokenStore

Run = Callable[[Any, Sequence[int]], list[Any]]  # (model, numbers of samples) -> results, which are JSON


@dataclass(frozen=True)
class Score:
    """A part of the report."""

    metrics: dict[str, Any]
    intervals: dict[str, tuple[float, float] | None]
    counts: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)  # lines of samples.ndjson


@dataclass(frozen=True)
class Work:
    """What has to be done for one part of the report."""

    keys: tuple[str, ...]  # of its batches
    run: Callable[[Any, int], list[Any]]  # (model, number of the batch) -> its results
    collect: Callable[[list[list[Any]]], Score]  # results of all batches, in order
    check: Callable[[Any, list[list[Any]], int], dict[str, Any]]  # some samples again, one by one: what differs


def in_order(batches: Sequence[Sequence[int]], results: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of all batches in the order of what they were made of."""
    found: dict[int, Any] = {}
    for batch, result in zip(batches, results, strict=True):
        found.update(zip(batch, result, strict=True))
    return [found[index] for index in range(len(found))]


def of_windows(documents: Documents, windows: list[Window], config: EvaluateConfig) -> tuple[list[list[int]], Run]:
    """Batches of windows, as numbers of them, and what scores one: [nll, targets, right ones] of each window."""
    batches = evaluation.plan_batches(windows, batch_size=config.batch_size, batch_tokens=config.batch_tokens)

    def run(model: Any, batch: Sequence[int]) -> list[Any]:
        chosen = [windows[n] for n in batch]
        found = evaluation.score_windows(model, documents, chosen, device=model.device, packed=config.packed)
        columns = (found.nll, found.num_targets, found.num_correct)
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    return batches, run


def window_key(batch: Sequence[tuple[str, Window]]) -> str:
    """Name of a batch of windows, each with the id of what it is a part of."""
    return journal.unit_key("windows", [(id_, int(w.start), int(w.stop), int(w.first_target)) for id_, w in batch])


def of_documents(
    documents: Documents, windows: Sequence[Window], config: EvaluateConfig, *, num_bytes: int | None
) -> Work:
    """The losses of documents; `num_bytes` of all targets' text, None where only a part is scored."""
    windows = list(windows)
    batches, run = of_windows(documents, windows, config)
    stored = isinstance(documents, TokenStore)
    ids = list(documents.record_ids()) if stored else [each.record_id for each in documents]  # type: ignore[union-attr]
    keys = tuple(window_key([(ids[windows[n].document], windows[n]) for n in batch]) for batch in batches)

    def collect(results: list[list[Any]]) -> Score:
        scores = _sums(windows, in_order(batches, results), num_documents=len(ids))
        samples = list(_lines(documents, scores))
        scored = [
            metrics.Loss(
                nll=line["nll"],
                num_targets=line["num_target_tokens"],
                num_correct=line["num_correct"],
                num_bytes=None if num_bytes is None else line["num_bytes"],
            )
            for line in samples
            if line["num_target_tokens"]
        ]
        measured = metrics.measure({"loss": metrics.losses()}, scored, **config.bootstrap)
        values = evaluation.summarize(scores, num_bytes=num_bytes)
        counts = {"num_documents": len(samples), "num_windows_scored": len(windows)}
        return Score(values, measured.intervals, counts, {}, samples)

    def check(model: Any, results: list[list[Any]], number: int) -> dict[str, Any]:
        scored = in_order(batches, results)
        chosen = tasks.spread(range(len(windows)), number)
        largest = max((abs(run(model, [n])[0][0] - scored[n][0]) / max(scored[n][1], 1) for n in chosen), default=0.0)
        return {"num_windows": len(chosen), "largest_loss_difference": largest}

    return Work(keys, lambda model, number: run(model, batches[number]), collect, check)


def _sums(windows: Sequence[Window], results: Sequence[Any], *, num_documents: int) -> evaluation.Scores:
    """Sums of each document over its windows, in their order."""
    owners = np.array([window.document for window in windows])
    nll, counts = np.zeros(num_documents), np.zeros((2, num_documents), dtype=np.int64)
    np.add.at(nll, owners, [result[0] for result in results])
    for row in (0, 1):
        np.add.at(counts[row], owners, [result[row + 1] for result in results])
    return evaluation.Scores(nll, counts[0], counts[1])


def _lines(documents: Documents, scores: evaluation.Scores) -> Iterable[dict[str, Any]]:
    """One record a document, in order; documents without a scored target say so by their count."""
    for document, nll, targets, correct in zip(
        documents, scores.nll, scores.num_targets, scores.num_correct, strict=True
    ):
        loss = float(nll / targets) if targets else None
        yield {
            "record_id": document.record_id,
            "num_tokens": len(document.input_ids),
            "num_target_tokens": int(targets),
            "num_bytes": document.num_bytes,
            "nll": float(nll),
            "loss": loss,
            "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
            "num_correct": int(correct),
        }
