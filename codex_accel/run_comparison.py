"""Two training runs side by side: what they reached, and in what their configuration and surroundings differ.

Rule: what is compared stands in the run folders: `metrics.ndjson`, `config.yaml`, `run.json`. No manifest vouches for
these while a run goes on; `final`, if there is one, is verified.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from codex_accel import comparison, curves, manifest, retention, run_folder
from codex_accel.curves import TRAIN, Curves
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import CompareConfig
from codex_accel.schema import BestMetric
from codex_accel.yaml_reader import read_yaml

HIDDEN = ("output_dir",)  # differs always
SHOWN = ("loss", "perplexity", "bits_per_byte", "token_accuracy", "num_target_tokens", "tokens_per_s", "elapsed_s")


def compare(a: Path, b: Path, config: CompareConfig) -> dict[str, Any]:
    """The comparison as plain JSON values; see docs/compare_reports.md.

    Raises: UserError for a folder that is damaged.
    """
    logs = [curves.read(path) for path in (a, b)]
    settings = [read_yaml(path / manifest.CONFIG)[0] for path in (a, b)]
    facts = [_facts(path) for path in (a, b)]
    for key, path in (("a", a), ("b", b)):
        if (final := path / run_folder.FINAL).is_dir():
            manifest.require(final, kinds=["model"], verify=config.verify, key=key)
    splits = dict.fromkeys(split for log in logs for split in log.splits())
    best_metric = _best_metric(a, settings[0])
    visible = [{key: value for key, value in each.items() if key not in HIDDEN} for each in settings]
    return {
        "kind": "runs",
        "a": _outline(a, logs[0]),
        "b": _outline(b, logs[1]),
        "notes": _notes(facts),
        "best_metric": best_metric,
        "splits": {split: _measured(split, logs, best_metric) for split in splits},
        "configuration": comparison.differences(visible[0], visible[1]),
        "facts": comparison.differences(facts[0]["facts"], facts[1]["facts"]),
        "environment": comparison.differences(facts[0]["environment"], facts[1]["environment"]),
    }


def _best_metric(path: Path, settings: Mapping[str, Any]) -> BestMetric:
    """The metric that the run named; its config.yaml is for people too, and may have been edited."""
    section = settings.get("checkpoint", {})
    named: Any = section.get("best_metric", "loss") if isinstance(section, Mapping) else None
    choices = get_args(BestMetric)
    if named not in choices:
        what = f"checkpoint = {section!r} names no best_metric of {', '.join(choices)}. Restore it from a copy."
        raise UserError(f"{path / manifest.CONFIG}: {what}")
    return named


def _outline(path: Path, log: Curves) -> dict[str, Any]:
    return {
        "path": str(path),
        "last_step": max((line["step"] for line in log.lines.values()), default=0),
        "is_complete": (path / run_folder.FINAL).is_dir(),
        "num_damaged_lines": log.num_damaged,
    }


def _facts(path: Path) -> dict[str, dict[str, Any]]:
    """run.json in two parts: what the run is, with the contents it was made from; and what it ran in."""
    file = path / curves.RUN
    try:
        document = json.loads(file.read_bytes())
        environment = {key: value for key, value in document.pop("provenance").items() if key != "time"}
        contents = {record["kind"]: record["content_digest"] for record in document.pop("parents")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is no record of a run ({type(error).__name__}). Restore it from a copy.") from error
    return {"facts": {**document, "content": contents}, "environment": environment}


def _notes(facts: list[dict[str, dict[str, Any]]]) -> list[str]:
    contents = [each["facts"]["content"] for each in facts]
    notes = []
    if contents[0].get("tokenizer") != contents[1].get("tokenizer"):
        what = "loss, perplexity and token accuracy are by token, so they do not compare. Bits per byte do."
        notes.append(f"The tokenizers differ: {what}")
    if contents[0].get("dataset") != contents[1].get("dataset"):
        notes.append("The datasets differ, and so may what they were evaluated on. Evaluate both models on one.")
    return notes


def _measured(split: str, logs: list[Curves], best_metric: BestMetric) -> dict[str, Any]:
    """The last lines of a split; of what was evaluated, also the best ones and those of the last step of both."""
    lines = [[line for line in log.lines.values() if line["split"] == split] for log in logs]
    found: dict[str, list[Any]] = {"last": [_values(one[-1]) if one else None for one in lines]}
    if split == TRAIN:
        found["mean_loss_of_last_tenth"] = [_mean_of_last_tenth(log) for log in logs]
        return found
    highest = retention.best_is(best_metric) == "highest"
    found["best"] = [_best(one, best_metric, highest=highest) for one in lines]
    common = {line["step"] for line in lines[0]} & {line["step"] for line in lines[1]}
    at = max(common, default=None)
    found["at_last_common_step"] = [
        next((_values(line) for line in reversed(one) if line["step"] == at), None) for one in lines
    ]
    return found


def _values(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": line["step"], **{name: line[name] for name in SHOWN if name in line}}


def _best(lines: list[dict[str, Any]], metric: str, *, highest: bool) -> dict[str, Any] | None:
    """The line with the best finite value; of equal ones the earliest."""
    scored = [line for line in lines if curves.is_finite(line.get(metric))]
    sign = -1 if highest else 1
    best = min(scored, key=lambda line: (sign * line[metric], line["step"]), default=None)
    return None if best is None else _values(best)


def _mean_of_last_tenth(log: Curves) -> float | None:
    """The mean loss of the last tenth of the training lines, one at least: a single step is noisy."""
    points = log.points(TRAIN, "loss")
    last = points[-max(1, len(points) // 10) :]
    return sum(value for _, _, value in last) / len(last) if last else None
