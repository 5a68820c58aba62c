"""A file of predictions into samples, to be scored without a model.

Rule: a line without a prediction or a reference is located, never counted as wrong.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from codex_accel import metrics, reasons, sources, tasks
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig
from codex_accel.schema import Source
from codex_accel.sources import RawFile
from codex_accel.tasks import Bad, Sample


def score(
    samples: Sequence[Sample], bad: Sequence[Bad], asked: Mapping[str, metrics.Metric], config: EvaluateConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report of predictions, and the lines of samples.ndjson."""
    texts = [metrics.Text(sample.prediction, sample.references, sample.weight) for sample in samples]
    measured = metrics.measure(asked, texts, **config.bootstrap)
    lines = [
        {**tasks.line(None, sample), **tasks.output(sample.prediction), "scores": scores}
        for sample, scores in zip(samples, measured.sample_scores, strict=True)
    ]
    counts = {
        **tasks.counts(lines, bad),
        "num_empty_outputs": sum(not sample.prediction.strip() for sample in samples),
    }
    report = {"metrics": measured.values, "intervals": measured.intervals, "counts": counts, "facts": measured.facts}
    return report, lines + tasks.skipped(None, bad)


def file_of(config: EvaluateConfig) -> RawFile:
    """The one file that `predictions` names. Raises: UserError if it names none, or several."""
    assert config.predictions is not None
    source = Source(path=config.predictions, format="jsonl")
    found = sources.resolve([source], config_problem=lambda _, what: config.problem("predictions", what))
    if len(found) > 1:
        what = f"{config.predictions!r} are {len(found)} files. Score each by itself, or put them into one."
        raise UserError(config.problem("predictions", what))
    return found[0]


def read(raw: RawFile) -> tuple[list[Sample], list[Bad]]:
    """Samples of a file with `prediction` and `references` (a list) or `reference`; `id`, `prompt`, `weight` if there.

    Raises: UserError if it holds no record.
    """
    good: list[Sample] = []
    bad: list[Bad] = []
    for line, value in tasks.values(raw, ("prediction", "references", "reference", "id", "prompt", "weight")):
        try:
            if isinstance(value, ValueError):
                raise value
            good.append(_prediction(raw, line, value))
        except ValueError as error:
            bad.append(Bad(str(raw.path), line, str(error)))
    if not good and not bad:
        raise UserError(f"{raw.path}: holds no record. Name another file.")
    return good, bad


def _prediction(raw: RawFile, line: int, record: Mapping[str, Any]) -> Sample:
    prediction = record.get("prediction")
    if not isinstance(prediction, str):
        found = "missing" if prediction is None else f"of type {type(prediction).__name__}, not text"
        raise ValueError(f"field 'prediction' is {found}: there are {reasons.names(list(record))}")
    given = record.get("references") if record.get("references") is not None else record.get("reference")
    if given is None:
        raise ValueError(f"no reference: neither 'references' nor 'reference' is among {reasons.names(list(record))}")
    references = tasks.texts("references", given)
    prompt, weight = record.get("prompt"), record.get("weight", 1.0)
    prompt = prompt if isinstance(prompt, str) else ""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError("field 'weight' is no number from 0 on")
    for text in (prediction, prompt, *references):
        tasks.require_unicode(text)
    given_id = record.get("id") if isinstance(record.get("id"), str | int) else None
    id_ = tasks.sample_id([given_id if given_id is not None else prompt, references, float(weight)])
    return Sample(
        str(raw.path),
        line,
        id_,
        prompt,
        None,
        references,
        weight=float(weight),
        prediction=prediction,
        given_id=given_id,
    )
