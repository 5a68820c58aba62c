"""What the samples of an evaluation tell together: distributions, ends, losses by length, what was skipped.

Rule: they are seen once, as their lines are written, and of their texts only those are kept that a page can show. A
line is known by its number in `samples.ndjson`, from 1.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from codex_accel.report_page import CHARS_OF_A_TEXT, MOST_TEXTS

MOST_SHOWN = 20  # samples at each end, and skipped ones
MAX_VALUES = 8  # distinct values that get a bar each; above, ranges do
NUM_BINS = 20
Line = Mapping[str, Any]
Order = tuple[float, ...]


class Overview:
    """The lines of `samples.ndjson`, one after the other."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def add(self, number: int, line: Line) -> None:
        """Take in a line: of a document with its loss, of a sample with its scores, or of one that was skipped."""
        self._groups.setdefault(line.get("task") or "", _Group()).add(number, line)

    def of(self, task: str = "") -> dict[str, Any]:
        """Plain JSON values of one task's lines, or of all where there are no tasks; see docs/reports.md."""
        return self._groups.get(task, _Group()).summary()

    def shown(self) -> dict[int, Line]:
        """The lines that the summaries name, by number, their texts cut to what a page shows of them."""
        found = [group.shown() for group in self._groups.values()]
        return {number: lines[number] for lines in found for number in sorted(lines)}


class _Group:
    """Lines of one task."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.num_findings = 0
        self.scores: dict[str, list[float]] = {}
        self.num_without: collections.Counter[str] = collections.Counter()
        self.ordered_by: list[str] = []
        self.num_ordered = 0
        self.candidates: dict[int, tuple[Order, Line]] = {}  # for the ends, by number
        self.skipped: dict[int, Line] = {}
        self.num_skipped = 0
        self.by_length: dict[int, list[tuple[float, int]]] = {}

    def add(self, number: int, line: Line) -> None:
        self.num_findings += line.get("num_findings", 0)
        if "skipped" in line:
            self.num_skipped += 1
            if len(self.skipped) < MOST_SHOWN:
                self.skipped[number] = line
            return
        self.num_samples += 1
        scores = line["scores"] if "scores" in line else {"loss": line["loss"]}
        for name, value in scores.items():
            values = self.scores.setdefault(name, [])
            if value is None:
                self.num_without[name] += 1
            else:
                values.append(float(value))
        if "nll" in line:
            low = 1 << (line["num_tokens"].bit_length() - 1) if line["num_tokens"] else 0
            self.by_length.setdefault(low, []).append((line["nll"], line["num_target_tokens"]))
        order = [*scores.values(), *([_margin(line)] if "choices" in line else [])]
        if order and order[0] is not None:
            self.ordered_by = [*scores, *(["margin"] if "choices" in line else [])]
            self.candidates[number] = tuple(-math.inf if value is None else float(value) for value in order), _cut(line)
            self.num_ordered += 1
            if len(self.candidates) > 40 * MOST_SHOWN:
                low, high = self._sorted()
                kept = low[: 2 * MOST_SHOWN] + high[: 2 * MOST_SHOWN]
                self.candidates = {number: self.candidates[number] for number in kept}

    def _sorted(self) -> tuple[list[int], list[int]]:
        """Numbers of the candidates, lowest first and highest first; of equal ones the earlier line comes first."""
        lowest = sorted(self.candidates, key=lambda n: (self.candidates[n][0], n))
        highest = sorted(self.candidates, key=lambda n: ([-value for value in self.candidates[n][0]], n))
        return lowest, highest

    def _ends(self) -> tuple[list[int], list[int]]:
        """Numbers of the lowest lines, and of the highest; no line is among both."""
        lowest, highest = self._sorted()
        half = self.num_ordered // 2
        lowest = lowest[: min(MOST_SHOWN, self.num_ordered - half)]
        taken = set(lowest)
        return lowest, [number for number in highest if number not in taken][: min(MOST_SHOWN, half)]

    def shown(self) -> dict[int, Line]:
        lowest, highest = self._ends()
        return {**{number: self.candidates[number][1] for number in lowest + highest}, **self.skipped}

    def summary(self) -> dict[str, Any]:
        lowest, highest = self._ends()
        summary: dict[str, Any] = {
            "num_samples": self.num_samples,
            "num_findings": self.num_findings,
            "distributions": {
                name: {"num_samples": len(values), "num_without": self.num_without[name], "bins": bins(values)}
                for name, values in self.scores.items()
            },
            "ends": {"ordered_by": self.ordered_by, "lowest": lowest, "highest": highest},
            "skipped": {"num_samples": self.num_skipped, "first": list(self.skipped)},
        }
        if self.by_length:
            summary["loss_by_length"] = [_of_length(low, self.by_length[low]) for low in sorted(self.by_length)]
        return summary


def _cut(line: Line) -> Line:
    """The line as a page shows it: of each text one character more than that, which tells that it goes on."""
    end = CHARS_OF_A_TEXT + 1
    found = {**line, **{name: line[name][:end] for name in ("prompt", "output") if name in line}}
    if "references" in line:
        found["references"] = [text[:end] for text in line["references"][: MOST_TEXTS + 1]]
    if "choices" in line:  # all of them: `answer` and `predicted` are numbers of these
        found["choices"] = [text[:end] for text in line["choices"]]
    return found


def _margin(line: Line) -> float:
    """Log-likelihood of the right choice less that of the likeliest other, in nats; the surer, the further from 0."""
    values = list(line["loglikelihoods"])
    right = values.pop(line["answer"])
    return right - max(values, default=right)


def _of_length(low: int, documents: Sequence[tuple[float, int]]) -> dict[str, Any]:
    targets = sum(num for _, num in documents)
    return {
        "low": low,
        "high": 2 * low - 1 if low else 0,
        "num_documents": len(documents),
        "num_target_tokens": targets,
        "loss": math.fsum(nll for nll, _ in documents) / targets if targets else None,
    }


def bins(values: Iterable[float]) -> list[dict[str, Any]]:
    """A histogram: `low`, `high`, `count` of each bin; a bin holds its lower end, and the last one its upper end too.

    Up to eight distinct values have a bin each, with `low` equal to `high`. More are counted in about twenty ranges of
    one width, which is 1, 2, 2.5 or 5 times a power of ten; from 0 to 1 in steps of 0.05 if all lie between.

    >>> bins([0, 1, 1])
    [{'low': 0.0, 'high': 0.0, 'count': 1}, {'low': 1.0, 'high': 1.0, 'count': 2}]
    """
    counts = collections.Counter(float(value) for value in values)
    if len(counts) <= MAX_VALUES:
        return [{"low": value, "high": value, "count": counts[value]} for value in sorted(counts)]
    edges = _edges(min(counts), max(counts))
    totals, _ = np.histogram(list(counts), edges, weights=list(counts.values()))
    return [
        {"low": low, "high": high, "count": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], totals, strict=True)
    ]


def _edges(lowest: float, highest: float) -> list[float]:
    if lowest >= 0 and highest <= 1:
        return [round(number / NUM_BINS, 2) for number in range(NUM_BINS + 1)]
    wanted = highest / NUM_BINS - lowest / NUM_BINS
    if not 1e-290 < wanted < 1e290:
        return [lowest, highest]
    unit = 10.0 ** math.floor(math.log10(wanted))
    step = next(times * unit for times in (1, 2, 2.5, 5, 10) if times * unit >= wanted)
    digits = 2 - math.floor(math.log10(step))
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    edges = [round(number * step, digits) for number in range(first, last + 1)]
    return [min(edges[0], lowest), *edges[1:-1], max(edges[-1], highest)]
