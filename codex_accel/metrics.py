"""The metrics by name, and what they say of samples.

Rule: a name means one function, found and checked with its settings before any model loads. `TEXT` and `CHOICE` are
extended by the entry points `codex_accel.metrics`. A value that does not exist is None, never 0.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from codex_accel import answers, ngrams, plugins, uncertainty
from codex_accel.config import StageConfig
from codex_accel.errors import UserError
from codex_accel.evaluate_metric import evaluate_metric
from codex_accel.scoring import Choice as Choice
from codex_accel.scoring import Loss, Metric, Values, number, ratio, share, table
from codex_accel.scoring import Text as Text

Kind = Literal["generate", "choice"]
Maker = Callable[..., Metric | Callable[..., Any]]

TEXT: dict[str, Maker] = {
    "exact_match": answers.exact_match,
    "f1": answers.f1,
    "rouge": ngrams.rouge,
    "bleu": ngrams.bleu,
    "chrf": ngrams.chrf,
    "distinct": ngrams.distinct,
    "weighted_accuracy": answers.weighted_accuracy,
    "numeric_answer": answers.numeric_answer,
    "evaluate": evaluate_metric,
}
CHOICE: dict[str, Maker] = {"acc": answers.acc, "acc_norm": answers.acc_norm}
PACKAGES = {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu", "evaluate": "evaluate"}  # module: name on PyPI


def losses() -> Metric:
    """Loss, perplexity, bits per byte and token accuracy of documents (`Loss`).

    loss = sum of nll / sum of targets, in nats; perplexity = exp(loss); bits_per_byte = sum of nll / ln 2 / sum of
    UTF-8 bytes, if all are known; token_accuracy = share of targets that are the likeliest token.
    """

    def statistics(document: Loss) -> tuple[float, ...]:
        unknown = document.num_bytes is None
        return document.nll, document.num_targets, document.num_correct, document.num_bytes or 0, unknown

    def values(sums: np.ndarray) -> Values:
        nll, num_targets, num_correct, num_bytes, num_unknown = np.moveaxis(sums, -1, 0)
        loss = ratio(nll, num_targets)
        with np.errstate(over="ignore"):
            perplexity = np.exp(loss)
        bits = ratio(nll / math.log(2), np.where(num_unknown == 0, num_bytes, 0.0))
        accuracy = ratio(num_correct, num_targets)
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "token_accuracy": accuracy}

    return Metric(statistics=statistics, values=values)


# --- names ----------------------------------------------------------------------------------------------------------


def load(kind: Kind, names: Mapping[str, Mapping[str, Any]], *, config: StageConfig, key: str) -> dict[str, Metric]:
    """The metrics called `names`, made with their settings; `key` is where the names stand in the configuration.

    Raises: UserError with all problems: a name that is unknown, of the other kind or taken twice, wrong settings, a
    package that is missing, and what a plug-in does wrong, now or when it is asked later.
    """
    found, problems = {}, []
    for name, given in names.items():
        try:
            found[name] = _made(kind, name, given, config=config, key=f"{key}.{name}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return found


def _made(kind: Kind, name: str, given: Mapping[str, Any], *, config: StageConfig, key: str) -> Metric:
    known, other = (TEXT, CHOICE) if kind == "generate" else (CHOICE, TEXT)
    if name in other:
        what = f"{name} does not score samples of kind = {kind}. Choose from: {', '.join(known)}."
        raise UserError(config.problem(key, what))
    make = plugins.find(plugins.METRICS, known | other, name, config=config, key=key)
    with plugins.blaming(plugins.METRICS, name, "cannot be made", config=config, key=key):
        settings = plugins.settings(make, given, config=config, key=key)
        try:
            made = make(**settings)
        except ModuleNotFoundError as error:
            if name not in known or error.name not in PACKAGES:
                raise
            what = f"needs {error.name}, which is not installed. Run: pip install {PACKAGES[error.name]}"
            raise UserError(config.problem(key, what)) from error
        if not isinstance(made, Metric) and not callable(made):
            raise TypeError(f"it gives {made!r}, neither a Metric nor a function that scores one sample")
        metric = made if isinstance(made, Metric) else _mean_of(made, name, kind)
        if (metric.statistics is None) == (metric.whole is None) or (metric.statistics is None) != (
            metric.values is None
        ):
            raise TypeError("a Metric has either statistics and values, or whole")
    described = plugins.described(plugins.METRICS, name)
    if described:
        metric = dataclasses.replace(metric, facts={**metric.facts, "plugin": described})
    return _blamed(metric, name, config=config, key=key) if described or name == "evaluate" else metric


def _mean_of(function: Callable[..., Any], name: str, kind: Kind) -> Metric:
    """The mean over samples of what a plain function gives: a number, None for no score, or several of them by name."""
    names: list[str] = []  # known once the first sample is scored

    def statistics(sample: Any) -> list[float]:
        if kind == "generate":
            found = function(sample.prediction, sample.references)
        else:
            found = function(sample.loglikelihoods, sample.choices, sample.answer)
        scores = (
            {f"{name}_{part}": value for part, value in found.items()} if isinstance(found, dict) else {name: found}
        )
        if not names:
            names.extend(scores)
        if list(scores) != names:
            raise ValueError(f"it gives {', '.join(scores)} for one sample, and {', '.join(names)} for another")
        for value in scores.values():
            if value is not None and not isinstance(value, numbers.Real):
                raise TypeError(f"it gives {value!r}, not a number")
        return [part for value in scores.values() for part in share(None if _is_nan(value) else value)]

    def values(sums: np.ndarray) -> Values:
        return {each: ratio(sums[..., 2 * i], sums[..., 2 * i + 1]) for i, each in enumerate(names)}

    def facts_of(_: Sequence[Any], rows: np.ndarray) -> dict[str, Any]:
        return {"num_without_score": int((rows[:, 1::2] == 0).any(axis=1).sum())}

    return Metric(statistics=statistics, values=values, facts_of=facts_of)


def _is_nan(value: Any) -> bool:
    return value is not None and math.isnan(value)


def _blamed(metric: Metric, name: str, *, config: StageConfig, key: str) -> Metric:
    """`metric`, of which each function that fails is told as a UserError."""

    def wrapped(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        def call(*arguments: Any) -> Any:
            with plugins.blaming(plugins.METRICS, name, "failed", config=config, key=key):
                return function(*arguments)  # type: ignore[misc]

        return function and call

    return dataclasses.replace(
        metric,
        statistics=wrapped(metric.statistics),
        values=wrapped(metric.values),
        per_sample=wrapped(metric.per_sample),
        facts_of=wrapped(metric.facts_of),
        whole=wrapped(metric.whole),
        left_out=wrapped(metric.left_out),
    )


# --- what they say --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What some metrics say of some samples; None where there is no value."""

    values: dict[str, float | None]  # of all samples
    intervals: dict[str, uncertainty.Interval | None]  # same names
    sample_scores: list[dict[str, float | None]]  # of each sample, in order, of metrics that have a value for one
    facts: dict[str, Any]  # by metric


def measure(
    metrics: Mapping[str, Metric], samples: Sequence[Any], *, seed: int, num_resamples: int, confidence: float
) -> Measured:
    """Values, intervals and the scores of each sample; without samples nothing is known, not even all names.

    Raises: UserError if two metrics have a value of one name.
    """
    measured = Measured({}, {}, [{} for _ in samples], {})
    for name, metric in metrics.items() if samples else ():
        rows = table(metric, samples)
        values = value_of(metric, samples, rows)
        twice = [value for value in values if value in measured.values]
        if twice:
            raise UserError(f"metrics: {name} and another metric both give {', '.join(twice)}. Take one of them out.")
        measured.values.update({each: number(value) for each, value in values.items()})
        measured.intervals.update(
            uncertainty.intervals(
                metric, samples, seed=seed, num_resamples=num_resamples, confidence=confidence, rows=rows
            )
        )
        measured.facts[name] = {**metric.facts, **(metric.facts_of(samples, rows) if metric.facts_of else {})}
        alone = metric.per_sample or metric.values
        for each, scores in (alone(rows) if alone else {}).items():
            for scored, value in zip(measured.sample_scores, scores.tolist(), strict=True):
                scored[each] = number(value)
    return measured


def value_of(metric: Metric, samples: Sequence[Any], rows: np.ndarray) -> dict[str, float]:
    """The values of all samples, of which `rows` are the statistics; NaN where there is none."""
    if metric.whole is not None:
        return metric.whole(samples)
    assert metric.values is not None
    return {name: float(value) for name, value in metric.values(rows.sum(axis=0)).items()}
