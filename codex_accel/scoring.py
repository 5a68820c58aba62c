"""What is scored, and what a metric is.

Rule: a metric is a function of sums over samples wherever it can be, so that one division at the end gives the value
of the corpus, a resample of the bootstrap is the same sums with other counts, and processes can be added up.

Shapes: N samples, K statistics of one sample, ... resamples or nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Values = dict[str, np.ndarray]  # by name, (...); NaN where there is none


@dataclass(frozen=True)
class Text:
    """An output to be scored."""

    prediction: str
    references: tuple[str, ...]  # accepted answers, at least one
    weight: float = 1.0  # counts in weighted_accuracy only

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("a text needs at least one reference")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"a weight is a number from 0 on, not {self.weight}")


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question."""

    loglikelihoods: tuple[float, ...]  # of each choice given the prompt, summed over its tokens, in nats
    choices: tuple[str, ...]  # their texts, without the space that parts them from the prompt
    answer: int  # index of the right one

    def __post_init__(self) -> None:
        if len(self.loglikelihoods) != len(self.choices):
            raise ValueError(f"{len(self.choices)} choices have {len(self.loglikelihoods)} log-likelihoods")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer {self.answer} is none of the {len(self.choices)} choices")


@dataclass(frozen=True)
class Loss:
    """A document."""

    nll: float  # summed over its targets, in nats
    num_targets: int
    num_correct: int  # targets that are the likeliest token
    num_bytes: int | None  # UTF-8 bytes of the scored text; None: not known


@dataclass(frozen=True)
class Metric:
    """One metric, which may have several values (as ROUGE has).

    Either `statistics` and `values` are given: the statistics of one sample add up over samples. Or `whole` is, for
    what does not add up.
    """

    statistics: Callable[[Any], Sequence[float]] | None = None  # of one sample, (K,)
    values: Callable[[np.ndarray], Values] | None = None  # of sums, (..., K)
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the report, such as a signature
    per_sample: Callable[[np.ndarray], Values] | None = None  # of (N, K), if `values` is not meant for one sample
    facts_of: Callable[[Sequence[Any], np.ndarray], dict[str, Any]] | None = None  # of the samples and their (N, K)
    whole: Callable[[Sequence[Any]], dict[str, float]] | None = None  # of all samples
    left_out: Callable[[Sequence[Any], np.ndarray], Values] | None = None  # (samples, group of each (N,)) -> (G,),
    # `whole` without the samples of each group; None: `whole` is called for each group
    bounds: tuple[float, float] = (-math.inf, math.inf)  # of the values of `whole`


def table(metric: Metric, samples: Sequence[Any]) -> np.ndarray:
    """The statistics of each sample, (N, K); (N, 0) for a metric whose statistics do not add up."""
    if metric.statistics is None:
        return np.zeros((len(samples), 0))
    rows = [metric.statistics(sample) for sample in samples]
    return np.array(rows, dtype=np.float64) if rows else np.zeros((0, 0))


def number(value: float) -> float | None:
    """`value` as JSON can hold it: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    empty = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=empty, where=denominator != 0)


def share(right: bool | float | None) -> tuple[float, float]:
    """(score, 1) of a sample with a score, and (0, 0) of one without, which so takes no part in the mean."""
    return (0.0, 0.0) if right is None else (float(right), 1.0)


def means(*names: str) -> Callable[[np.ndarray], Values]:
    """The function of sums that gives the mean of each name; statistics are (score, count) of each, as of `share`."""
    return lambda sums: {name: ratio(sums[..., 2 * i], sums[..., 2 * i + 1]) for i, name in enumerate(names)}
